"""Which next hops of a multipath route the hash can choose, and how often."""

from __future__ import annotations

from fractions import Fraction

from gketrace.snapshot import NextHop

__all__ = ["shares"]


def shares(hops: tuple[NextHop, ...]) -> tuple[tuple[NextHop, Fraction], ...]:
    """Each next hop with its share of the flows.

    Shares are the kernel's upper bounds (fib_rebalance, rt6_upper_bound_set): cumulated weights
    scaled to 31 bits and rounded to the nearest.
    """
    total = sum(hop.weight for hop in hops)
    result: list[tuple[NextHop, Fraction]] = []
    weight = 0
    below = -1
    for hop in hops:
        weight += hop.weight
        bound = ((weight << 31) + total // 2) // total - 1
        result.append((hop, Fraction(bound - below, 1 << 31)))
        below = bound
    return tuple(result)
