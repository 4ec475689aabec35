"""Destinations that no route and no policy rule can tell apart.

The packets of a Service's endpoints differ in their destination, and mostly take one route.  All
that IPv4 look-ups compare addresses with are prefixes: those of the routes, of the policy rules,
and a few that the kernel knows itself.  Their ends cut the addresses into segments; two addresses
of one segment are in the very same prefixes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import fields
from operator import attrgetter
from typing import TypeAlias

from gketrace.packet import Packet
from gketrace.simulate.fib.decision import RouteDecision, RouteKind
from gketrace.simulate.fib.input4 import input4
from gketrace.simulate.fib.ipv4 import Ipv4Tables
from gketrace.simulate.fib.view import NotKnown

__all__ = ["InputMemo"]

_Decisions: TypeAlias = tuple[RouteDecision, ...]

_KERNEL = (
    (0, 32),
    (127 << 24, 8),
    (0xE << 28, 4),
    (0xFFFFFFFF, 32),
)
"""Unspecified, loopback, multicast, broadcast: what `fib.address` tells apart."""

_OTHERS = attrgetter(*(field.name for field in fields(Packet) if field.name != "dst"))


class InputMemo:
    """Decisions about received IPv4 packets, for others that differ in the destination only.

    Only packets that are forwarded are remembered: other decisions name the destination itself.
    """

    def __init__(self, tables: Ipv4Tables) -> None:
        self._tables = tables
        self._first: tuple[Packet, str, _Decisions] | None = None
        """Kept as it was: there may be no second packet."""
        self._cuts: list[int] | None = None
        """Empty: the routes or the rules are not known, and nothing is remembered."""
        self._known: dict[tuple[object, ...], _Decisions] = {}

    def ask(self, packet: Packet, iif: str) -> _Decisions:
        """As `input4`.  Raises `NotKnown`."""
        first = self._first
        if first is None:
            found = input4(self._tables, packet, iif)
            self._first = packet, iif, found
            return found
        if self._cuts is None:
            try:
                self._cuts = _cuts(self._prefixes())
            except NotKnown:
                self._cuts = []
            self._keep(self._key(first[0], first[1]), first[2])
        if not self._cuts:
            return input4(self._tables, packet, iif)
        key = self._key(packet, iif)
        known = self._known.get(key)
        if known is None:
            known = input4(self._tables, packet, iif)
            self._keep(key, known)
        return known

    def _key(self, packet: Packet, iif: str) -> tuple[object, ...]:
        """What the decision hangs on."""
        return iif, bisect_right(self._cuts or (), int(packet.dst)), _OTHERS(packet)

    def _keep(self, key: tuple[object, ...], found: _Decisions) -> None:
        if all(one.kind is RouteKind.FORWARD for one in found):
            self._known[key] = found

    def _prefixes(self) -> Iterable[tuple[int, int]]:
        yield from _KERNEL
        for routes in self._tables.routes.values():
            for route in routes:
                yield int(route.dst.network_address), route.dst.prefixlen
        for rule in self._tables.rules.rules:
            for net in (rule.src, rule.dst):
                if net is not None:
                    yield int(net.network_address), net.prefixlen


def _cuts(prefixes: Iterable[tuple[int, int]]) -> list[int]:
    """The first address of each segment but the lowest."""
    found: set[int] = set()
    for first, length in prefixes:
        found.add(first)
        found.add(first + (1 << (32 - length)))
    return sorted(found)
