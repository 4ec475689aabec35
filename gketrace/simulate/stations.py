"""A packet past the stations of one hook, in their order, until one of them parts its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gketrace.conntrack import CtState
from gketrace.simulate import nat
from gketrace.simulate.cursor import (
    Context,
    Cursor,
    Way,
    on,
    unknown,
)
from gketrace.simulate.evolve import copier, evolve
from gketrace.simulate.state import (
    CERTAIN,
    Alternative,
    CtInfo,
    PacketState,
    VerdictKind,
)
from gketrace.simulate.station import Station, StationKind
from gketrace.simulate.station_chain import chain_ways, routes_anew, through
from gketrace.simulate.station_conntrack import confirm, look_up
from gketrace.simulate.station_nat import nat_chain_ways, translate
from gketrace.simulate.ties import run_tie
from gketrace.snapshot import Unavailable
from gketrace.trace import (
    Missing,
    Step,
)

__all__ = ["run_stations"]


def run_stations(context: Context, cursor: Cursor) -> tuple[tuple[Step, ...], tuple[Way, ...]]:
    """The ways on from the cursor's hook: past it, or past the station that changed the cursor.

    The steps before them are of all these ways.
    """
    unread = cursor.space.unread
    if unread and cursor.stations and not cursor.guessed_rules:
        return (), _without(cursor, unread)
    state, stations = cursor.state, cursor.stations
    manip = nat.MANIP_AT.get(state.hook)
    steps: tuple[Step, ...] = ()
    for position, station in enumerate(stations, 1):
        kind = station.kind
        if _idle(kind, state.ct, manip):
            continue
        found: tuple[Alternative, ...] = ()
        if kind is StationKind.CHAIN or kind is StationKind.NAT_CHAIN:
            found = through(cursor.space, station, state)
            only = found[0]
            if len(found) == 1 and _passes(only, station, state):
                # Most chains have one way through them: it needs no cursor of its own.
                state = only.state
                steps += only.steps
                continue
        rest = _before(cursor, state, stations[position:])
        if kind is StationKind.CHAIN:
            ways = chain_ways(rest, station, found)
        elif kind is StationKind.NAT_CHAIN:
            ways = nat_chain_ways(context, rest, found)
        else:
            ways = _RUN[kind](context, rest, station)
        onward = _onward(ways)
        if onward is None:
            return steps, ways
        cursor, state = onward, onward.state
        steps += ways[0].steps
    return steps, (Way(cursor=_past(cursor, state, (), cursor.then)),)


def _onward(ways: tuple[Way, ...]) -> Cursor | None:
    """Where the packet is on the hook, when it just goes on and all that is left are the steps."""
    way = ways[0]
    if len(ways) > 1 or way.chance is not CERTAIN or way.because or way.flows or way.missing:
        return None
    return way.cursor


_before: Final = copier(Cursor, "state", "stations")
_past: Final = copier(Cursor, "state", "stations", "stage")


def _passes(alternative: Alternative, station: Station, state: PacketState) -> bool:
    """Whether the packet just goes on behind a chain that has no other way through it."""
    return (
        alternative.chance is CERTAIN
        and not alternative.because
        and alternative.verdict.kind is VerdictKind.ACCEPT
        and alternative.verdict.nat is None
        and not routes_anew(station, state, alternative.state)
    )


def _idle(kind: StationKind, ct: CtInfo | None, manip: nat.Manip | None) -> bool:
    """Whether a station has nothing to do with a packet that is tracked so."""
    if kind is StationKind.CHAIN or kind is StationKind.TIE:
        return False
    if kind is StationKind.CONNTRACK:
        # nf_conntrack_in(): "Previously seen (loopback or untracked)? Ignore."
        return ct is not None and not ct.template
    if ct is None:
        return True
    if kind is StationKind.NAT:
        return ct.orig is None and ct.state is not CtState.RELATED
    if ct.orig is None or kind is StationKind.CONFIRM:
        return ct.orig is None or ct.existing
    return manip is None or nat.initialized(ct, manip)


def _without(cursor: Cursor, unread: tuple[Unavailable, ...]) -> tuple[Way, ...]:
    """A rule set was not read: it may stop or change the packet, or do nothing to it."""
    why = "; ".join(gap.reason for gap in unread)
    netns = cursor.space.netns
    missing = Missing(what="rules", why=why, node=netns.node, netns=str(netns))
    return (
        Way(
            cursor=evolve(cursor, guessed_rules=True),
            missing=(missing,),
            chance=None,
            because=f"if rules that could not be read do nothing to it: {why}",
        ),
        unknown(
            cursor,
            f"rules could not be read: {why}",
            what="rules",
            chance=None,
            because="if rules that could not be read stop or change it",
        ),
    )


def _tie(context: Context, cursor: Cursor, station: Station) -> tuple[Way, ...]:
    return run_tie(cursor, station, lambda here, one: _one(context, here, one))


def _one(context: Context, cursor: Cursor, station: Station) -> tuple[Way, ...]:
    if _idle(station.kind, cursor.state.ct, nat.MANIP_AT.get(cursor.state.hook)):
        return on(cursor)
    return _RUN[station.kind](context, cursor, station)


def _chain(context: Context, cursor: Cursor, station: Station) -> tuple[Way, ...]:
    return chain_ways(cursor, station, through(cursor.space, station, cursor.state))


def _nat_chain(context: Context, cursor: Cursor, station: Station) -> tuple[Way, ...]:
    return nat_chain_ways(context, cursor, through(cursor.space, station, cursor.state))


_RUN: Final[dict[StationKind, Callable[[Context, Cursor, Station], tuple[Way, ...]]]] = {
    StationKind.CONNTRACK: look_up,
    StationKind.CHAIN: _chain,
    StationKind.NAT_CHAIN: _nat_chain,
    StationKind.NAT: translate,
    StationKind.CONFIRM: confirm,
    StationKind.TIE: _tie,
}
