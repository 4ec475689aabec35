"""Routing tables, indexed for longest-prefix match."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from gketrace.snapshot import NextHop, Route
from gketrace.trace import Citation, Source

__all__ = ["Hit", "PrefixIndex", "group_tables", "render_route", "route_citation", "table_name"]

T = TypeVar("T")

_TABLE_NAMES = {255: "local", 254: "main", 253: "default"}


def table_name(table: int) -> str:
    """``main`` for 254, …; digits for the rest."""
    return _TABLE_NAMES.get(table, str(table))


@dataclass(slots=True)
class Hit:
    """What a table (or a rule that decides itself) answered (struct fib_result)."""

    route: Route | None
    hop: NextHop | None
    """The next hop that was found first; multipath is spread out later."""
    error: str = ""
    """errno name for unreachable and the like; empty: a usable route."""
    prefixlen: int = 0
    table: int = 0
    """The table that was asked; 0: a rule decided."""
    spread: tuple[NextHop, ...] = ()
    """IPv6: the siblings among which the hash chooses; empty: no choice."""


class PrefixIndex(Generic[T]):
    """Values by prefix; `matches` yields those of the longest prefix first.

    Built in one pass: one dictionary for each prefix length that occurs.
    """

    __slots__ = ("_levels",)

    def __init__(self, bits: int, entries: Iterable[tuple[int, int, T]]) -> None:
        """`entries`: network address as a number, prefix length, value; order is kept."""
        levels: dict[int, dict[int, list[T]]] = {}
        for network, length, value in entries:
            shift = bits - length
            levels.setdefault(length, {}).setdefault(network >> shift, []).append(value)
        self._levels = [(bits - length, levels[length]) for length in sorted(levels, reverse=True)]

    def matches(self, address: int) -> Iterator[list[T]]:
        for shift, level in self._levels:
            found = level.get(address >> shift)
            if found is not None:
                yield found

    def sort(self, key: Callable[[T], tuple[int, ...]]) -> None:
        """Sorts the values of each prefix, keeping the order of equals."""
        for _, level in self._levels:
            for values in level.values():
                if len(values) > 1:
                    values.sort(key=key)


def group_tables(routes: Iterable[Route], family: int) -> dict[int, list[Route]]:
    """The routes of one family by table, in the order in which the kernel gave them."""
    tables: dict[int, list[Route]] = {}
    for route in routes:
        if route.family == family:
            tables.setdefault(route.table, []).append(route)
    return tables


def route_citation(route: Route, hop: NextHop | None = None) -> Citation:
    """Cites a route with its table; verbatim where the observer kept the text."""
    return Citation(
        source=Source.ROUTE,
        text=route.text or render_route(route),
        table=table_name(route.table),
    )


def render_route(route: Route) -> str:
    """A route roughly as ``ip route`` prints it, for routes that came without their text."""
    words = [] if route.type.value == "unicast" else [route.type.value]
    words.append("default" if route.dst.prefixlen == 0 else str(route.dst))
    if route.src is not None:
        words += ["from", str(route.src)]
    for hop in route.next_hops:
        if len(route.next_hops) > 1:
            words.append("nexthop")
        if hop.gateway is not None:
            words += ["via", str(hop.gateway)]
        if hop.oif is not None:
            words += ["oif", str(hop.oif)]
        if len(route.next_hops) > 1:
            words += ["weight", str(hop.weight)]
        words += hop.flags
    if route.prefsrc is not None:
        words += ["src", str(route.prefsrc)]
    if route.priority:
        words += ["metric", str(route.priority)]
    return " ".join(words)
