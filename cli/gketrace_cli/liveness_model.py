"""Live connections of a Service against the rules, and against the other node's table.

Two questions about each entry that `gketrace_cli.liveness` found: would the rules make it again,
and has the endpoint's node an entry of the same packets?
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from gketrace.conntrack import ConntrackEntry, CtStatus
from gketrace.errors import GketraceError
from gketrace.packet import PORT_PROTOCOLS, Tuple5
from gketrace_cli.agreement import compare_entries
from gketrace_cli.conntrack_reading import Place, Reading
from gketrace_cli.liveness import Live, Standing
from gketrace_proto.v1alpha1 import agent_pb2 as pb

if TYPE_CHECKING:
    from gketrace.objects import Endpoint
    from gketrace_cli.session import Session

__all__ = ["hold_against_rules", "look_at_the_other_end"]

_WALKS: Final = 16
"""Of each node, at most: `gketrace service` has other things to say, too."""
_PAIRS: Final = 500
"""Connections whose other end is looked for."""
_PINNED: Final = (Standing.CURRENT, Standing.DRAINING)


def hold_against_rules(session: Session, found: Sequence[Live]) -> list[Live]:
    """Each entry with what the rules of its node would do now.  A stale one needs no rule to be
    wrong, so it is not asked about."""
    indices = [i for i, one in enumerate(found) if one.standing in _PINNED]
    asked = [(found[i].place.node, found[i].entry) for i in indices]
    made = list(found)
    compared = compare_entries(session, asked, at_most=_WALKS)
    for index, comparison in zip(indices, compared, strict=True):
        made[index] = replace(found[index], comparison=comparison)
    return made


def look_at_the_other_end(
    session: Session, found: Sequence[Live], endpoints: Sequence[Endpoint]
) -> list[Live]:
    """Marks entries whose endpoint's node has no entry of the same packets.

    Only those that are open, have been answered, and are still there after the other node was
    read: a connection that begins or ends meanwhile is no contradiction.
    """
    nodes = {end.address: end.node for end in endpoints if end.node}
    there = set(session.fleet.nodes)
    pairs = {
        index: node
        for index, one in enumerate(found)
        if one.standing in _PINNED
        and one.entry.status & CtStatus.SEEN_REPLY
        and (node := nodes.get(str(one.entry.reply.src), "")) in there
        and node != one.place.node
        and one.entry.orig.protocol in PORT_PROTOCOLS
    }
    pairs = dict(list(pairs.items())[:_PAIRS])
    if not pairs:
        return list(found)
    wanted: dict[Place, dict[tuple[str, int, int], None]] = {}
    for index, node in pairs.items():
        reply = found[index].entry.reply
        end = (str(reply.src), reply.sport or 0, reply.protocol)
        wanted.setdefault(Place(node=node), {})[end] = None
    filters = {
        place: tuple(
            pb.ConntrackFilter(reply_src=address, reply_sport=port, protocol=protocol)
            for address, port, protocol in ends
        )
        for place, ends in wanted.items()
    }
    seen = _tuples(session, filters)
    absent = {
        index: node
        for index, node in pairs.items()
        if node in seen and not _has(seen[node], found[index].entry.reply)
    }
    if not absent:
        return list(found)
    still = _still_there(session, [found[index] for index in absent])
    return [
        replace(one, absent_on=absent[index]) if index in absent and _key(one) in still else one
        for index, one in enumerate(found)
    ]


def _tuples(
    session: Session, filters: dict[Place, tuple[pb.ConntrackFilter, ...]]
) -> dict[str, set[Tuple5]]:
    """Original tuples by node, of the nodes that track and were read whole."""
    reading = Reading(fleet=session.fleet, places=list(filters), filters=filters)
    found: dict[str, set[Tuple5]] = {place.node: set() for place in filters}
    try:
        for place, entry in reading.entries():
            found[place.node].add(entry.orig)
    except GketraceError:
        return {}  # what could not be read says nothing, and `read_live` has told of it
    whole = {
        place.node
        for place, end in reading.ends.items()
        if not end.missing(0) and not end.not_tracked
    }
    return {node: tuples for node, tuples in found.items() if node in whole}


def _has(known: Collection[Tuple5], reply: Tuple5) -> bool:
    """The packets of the connection behind the translation, in either direction."""
    return reply.inverted() in known or reply in known


def _still_there(session: Session, found: Sequence[Live]) -> set[tuple[str, int | None]]:
    """Those of the entries that their node still has, as they were."""
    filters: dict[Place, tuple[pb.ConntrackFilter, ...]] = {}
    for one in found:
        filters[one.place] = (*filters.get(one.place, ()), _exactly(one.entry))
    reading = Reading(fleet=session.fleet, places=list(filters), filters=filters)
    try:
        entries = list(reading.entries())
    except GketraceError:
        return set()
    states = {_key(one): one.entry.tcp_state for one in found}
    return {
        key
        for place, entry in entries
        if (key := (place.node, entry.id)) in states and states[key] == entry.tcp_state
    }


def _key(one: Live) -> tuple[str, int | None]:
    return one.place.node, one.entry.id


def _exactly(entry: ConntrackEntry) -> pb.ConntrackFilter:
    orig = entry.orig
    return pb.ConntrackFilter(
        family=orig.src.version,
        protocol=orig.protocol,
        orig_src=str(orig.src),
        orig_dst=str(orig.dst),
        orig_sport=orig.sport,
        orig_dport=orig.dport,
    )
