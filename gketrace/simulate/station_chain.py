"""A base chain on a hook: the ways through it, and what its verdicts mean for the packet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from gketrace.ruleset.model import ChainType
from gketrace.simulate.cursor import Cursor, Way, end, followed_by, joined, unknown
from gketrace.simulate.evolve import evolve
from gketrace.simulate.namespace import Namespace
from gketrace.simulate.routes import reroute
from gketrace.simulate.state import Alternative, PacketState, VerdictKind
from gketrace.simulate.station import Station
from gketrace.simulate.traversal import traverse
from gketrace.trace import Disposition, Hook

__all__ = ["chain_ways", "onward_ways", "routes_anew", "through"]


def through(space: Namespace, station: Station, state: PacketState) -> tuple[Alternative, ...]:
    """All ways through a station's chain."""
    ruleset, chain, recall = station.ruleset, station.chain, space.recall
    assert ruleset is not None
    assert chain is not None
    if recall is None:
        return traverse(ruleset, chain, state, space)
    return recall.chain(chain, state, lambda seen: traverse(ruleset, chain, seen, space, recall))


def onward_ways(
    cursor: Cursor,
    found: tuple[Alternative, ...],
    onward: Callable[[Alternative, Cursor, Way], Iterable[Way]],
) -> tuple[Way, ...]:
    """The ways on behind a chain; `onward` says what becomes of a packet that it accepts, which is
    at the cursor and on the way that it is given."""
    ways: list[Way] = []
    for alternative in found:
        after = _with_state(cursor, alternative.state)
        if alternative.verdict.kind is VerdictKind.ACCEPT:
            way = Way(
                cursor=after,
                steps=alternative.steps,
                chance=alternative.chance,
                because=alternative.because,
            )
            ways += onward(alternative, after, way)
        else:
            ways += _stopped(after, alternative)
    return tuple(ways)


def chain_ways(cursor: Cursor, station: Station, found: tuple[Alternative, ...]) -> tuple[Way, ...]:
    """Behind a chain that is not of type nat."""

    def onward(alternative: Alternative, after: Cursor, way: Way) -> Iterable[Way]:
        if routes_anew(station, cursor.state, alternative.state):
            return [followed_by(way, further) for further in reroute(after)]
        return (way,)

    return onward_ways(cursor, found, onward)


def _with_state(cursor: Cursor, state: PacketState) -> Cursor:
    """Most chains leave the packet as it is."""
    return cursor if state is cursor.state else evolve(cursor, state=state)


def routes_anew(station: Station, before: PacketState, after: PacketState) -> bool:
    """ipt_mangle_out() and nf_route_table_hook4(): what makes them call ip_route_me_harder()."""
    chain = station.chain
    if chain is None or chain.type is not ChainType.ROUTE or chain.hook is not Hook.OUTPUT:
        return False
    old, new = before.packet, after.packet
    return (old.src, old.dst, old.mark, old.dscp) != (new.src, new.dst, new.mark, new.dscp)


_STOPS: Final = {
    VerdictKind.DROP: Disposition.DROPPED,
    VerdictKind.REJECT: Disposition.REJECTED,
}


def _stopped(cursor: Cursor, alternative: Alternative) -> list[Way]:
    """What comes of a verdict that is not ACCEPT."""
    verdict = alternative.verdict
    chance, because = alternative.chance, alternative.because
    disposition = _STOPS.get(verdict.kind)
    if disposition is not None:
        stop = end(
            cursor,
            disposition,
            verdict.detail,
            *alternative.steps,
            citation=verdict.citation,
            reject_with=verdict.reject_with,
            chance=chance,
            because=because,
        )
        return [stop]
    ways: list[Way] = []
    if verdict.kind is VerdictKind.QUEUE:
        # nf_reinject(): accepted packets go on with the next thing on the hook.
        accepted = "if the program that it is queued to lets it pass unchanged"
        onward = Way(cursor=cursor, steps=alternative.steps, chance=chance, because=because)
        ways.append(evolve(onward, chance=None, because=joined(because, accepted)))
        chance, because = None, joined(because, "if that program does something else with it")
    detail = verdict.detail or {
        VerdictKind.QUEUE: "handed to a program in user space; what that does is not known",
        VerdictKind.STOLEN: "taken by the rule's target; what becomes of it is not known",
    }.get(verdict.kind, "the rule is not understood")
    ways.append(
        unknown(
            cursor,
            detail,
            *alternative.steps,
            citation=verdict.citation,
            chance=chance,
            because=because,
        )
    )
    return ways
