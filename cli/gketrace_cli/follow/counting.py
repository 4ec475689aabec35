"""Packets and bytes of entries: only the last event of one has them, so the tables are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from gketrace.connections import Place
from gketrace.conntrack_records import Record, records_from_bytes
from gketrace.errors import GketraceError
from gketrace_proto.v1alpha1 import agent_pb2 as pb

if TYPE_CHECKING:
    from gketrace_cli.agents import Fleet

__all__ = ["read_counters"]


def read_counters(
    fleet: Fleet, places: Iterable[Place], filters: Sequence[pb.ConntrackFilter]
) -> list[tuple[Place, list[Record]]]:
    """Of the nodes' own tables.  What cannot be read is left out: its traffic is then not known."""
    calls = {
        place: (
            place.node,
            "ListConntrack",
            pb.ListConntrackRequest(
                target=pb.Target(host=True), any=filters, format=pb.CONNTRACK_FORMAT_RECORDS
            ),
        )
        for place in places
        if not place.pod
    }
    found: list[tuple[Place, list[Record]]] = []
    try:
        for place, reply in fleet.stream(calls):
            if reply is not None and not isinstance(reply, GketraceError) and reply.records:
                found.append((place, list(records_from_bytes(reply.records))))
    except GketraceError:  # the following itself says what stands in the way
        return found
    return found
