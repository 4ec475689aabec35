"""Chains of one priority whose order is not known: every order is tried."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Final, TypeAlias

from gketrace.simulate.cursor import Cursor, Way, followed_by, joined, unknown
from gketrace.simulate.evolve import evolve
from gketrace.simulate.order import MAX_ORDERS
from gketrace.simulate.station import Station, StationKind

__all__ = ["run_tie"]

RunOne: TypeAlias = Callable[[Cursor, Station], tuple[Way, ...]]
Result: TypeAlias = tuple[dict[object, Fraction], frozenset[object]]
"""What comes of it: the chances of each end or packet, and those whose chance is not known."""

_NAMES: Final = {StationKind.CONNTRACK: "connection tracking", StationKind.NAT: "NAT"}


def run_tie(cursor: Cursor, station: Station, run: RunOne) -> tuple[Way, ...]:
    """The ways on from a `StationKind.TIE`.

    Where every order comes to the same packet and verdict, one of them is shown.
    """
    if len(station.orders) > MAX_ORDERS:
        named = " and ".join(_units(station.orders[0]))
        why = f"the rules of {named} have one priority; in which order they run is not visible"
        return (unknown(cursor, why, what="hooks"),)
    found: list[tuple[Result, tuple[Station, ...], list[Way]]] = []
    for order in station.orders:
        ways = _through(cursor, order, run)
        result = _result(ways)
        if all(result != known for known, _, _ in found):
            found.append((result, order, ways))
    if len(found) == 1:
        return tuple(found[0][2])
    forks: list[Way] = []
    for _, order, ways in found:
        told = " runs before ".join(_units(order))
        because = f"if {told} (they have one priority, and the order is not visible)"
        forks += [evolve(way, chance=None, because=joined(because, way.because)) for way in ways]
    return tuple(forks)


def _units(order: tuple[Station, ...]) -> tuple[str, ...]:
    """What changes its place as one, as a trace names it."""
    names: dict[str, None] = {}
    for station in order:
        if station.chain is not None and station.ruleset is not None:
            names[f"{station.ruleset.backend} {station.chain.table}"] = None
        elif station.kind in _NAMES:
            names[_NAMES[station.kind]] = None
    return tuple(names)


def _through(cursor: Cursor, order: tuple[Station, ...], run: RunOne) -> list[Way]:
    """The ways on behind all of `order`."""
    done: list[Way] = []
    open_ = [Way(cursor=cursor)]
    for station in order:
        further: list[Way] = []
        for way in open_:
            assert way.cursor is not None
            for then in run(way.cursor, station):
                whole = followed_by(way, then)
                (done if whole.cursor is None else further).append(whole)
        open_ = further
    return open_ + done


def _result(ways: list[Way]) -> Result:
    chances: dict[object, Fraction] = {}
    unsure: set[object] = set()
    for way in ways:
        key: object
        if way.outcome is not None:
            key = way.outcome.disposition, way.outcome.reject_with
        else:
            assert way.cursor is not None
            key = way.cursor.state, way.cursor.decision
        if way.chance is None:
            unsure.add(key)
        else:
            chances[key] = chances.get(key, Fraction(0)) + way.chance
    return chances, frozenset(unsure)
