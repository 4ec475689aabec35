"""In which order a hook's stations stand, and where that cannot be known.

Of two functions with one priority on one hook, the one that was registered later runs first
(nf_hook_entries_grow() in net/netfilter/core.c).  Within an nftables table that is the reverse of
the order in which nft lists the chains; between tables nothing that can be read shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice, permutations, product
from typing import Final

from gketrace.ruleset.iptables import IptablesRuleset
from gketrace.ruleset.nft import NftRuleset
from gketrace.simulate.station import Station, StationKind

__all__ = ["MAX_ORDERS", "in_order"]

MAX_ORDERS: Final = 24
"""Of more possible orders than these, not all are tried."""


def in_order(stations: Iterable[Station]) -> tuple[Station, ...]:
    """One hook's stations as a packet meets them; a `StationKind.TIE` where that is not known.

    Chains of type nat all hang on the nat hook; among themselves they have priorities of their
    own.
    """
    found: list[Station] = []
    for _, group in groupby(sorted(stations, key=_place), key=lambda s: s.priority):
        members = tuple(group)
        if len(members) == 1:
            found += members
            continue
        orders = tuple(islice(_orders(members), MAX_ORDERS + 1))
        if len(orders) == 1:
            found += members
        else:
            found.append(Station(kind=StationKind.TIE, priority=members[0].priority, orders=orders))
    return tuple(found)


def _place(station: Station) -> tuple[int, int, int]:
    return station.priority, station.kind, station.order


def _orders(members: Sequence[Station]) -> Iterator[tuple[Station, ...]]:
    """All orders that stations of one priority may have, the default one first.

    Chains that can do nothing stand where they do by default, behind the others.
    """
    nat = [s for s in members if s.kind in (StationKind.NAT_CHAIN, StationKind.NAT)]
    units: list[list[tuple[Station, ...]]] = []
    idle: list[Station] = []
    chains: dict[int, list[Station]] = {}
    for station in members:
        if station.kind is StationKind.CHAIN:
            if _does_nothing(station):
                idle.append(station)
            else:
                chains.setdefault(id(station.ruleset), []).append(station)
        elif station not in nat:
            units.append([(station,)])
    units += [[tuple(own)] for own in chains.values()]
    if nat:
        units.append(list(islice(_nat_orders(nat), MAX_ORDERS + 1)))
    for choice in product(*units):
        for arranged in permutations(choice):
            yield (*(station for unit in arranged for station in unit), *idle)


def _nat_orders(members: Sequence[Station]) -> Iterator[tuple[Station, ...]]:
    """The chains by their own priorities, then what carries out what they say."""
    levels: list[list[tuple[Station, ...]]] = []
    for _, group in groupby(members, key=lambda s: (s.kind, s.order)):
        level = tuple(group)
        busy: dict[int, list[Station]] = {}
        for station in level:
            if not _does_nothing(station):
                busy.setdefault(id(station.ruleset), []).append(station)
        if len(busy) < 2:
            levels.append([level])
            continue
        idle = tuple(s for s in level if _does_nothing(s))
        levels.append(
            [
                (*(station for own in arranged for station in own), *idle)
                for arranged in islice(permutations(busy.values()), MAX_ORDERS + 1)
            ]
        )
    for choice in product(*levels):
        yield tuple(station for level in choice for station in level)


def _does_nothing(station: Station) -> bool:
    """A chain without rules that accepts."""
    base, ruleset = station.chain, station.ruleset
    if base is None or base.policy != "ACCEPT":
        return False
    if isinstance(ruleset, IptablesRuleset):
        own = ruleset.chain(base.table, base.chain)
        return own is not None and not len(own)
    if isinstance(ruleset, NftRuleset):
        return not ruleset.has_rules(base.chain)
    return False
