"""Connection-tracking tables of many nodes and pods, read at the same time, piece by piece.

What comes back is handed on as it comes, so that a table of any size passes through.  How each
reading ended is kept: a table that changed under the dump or was cut is never taken for whole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from gketrace.conntrack import ConntrackEntry
from gketrace.conntrack_records import (
    FIELDS,
    RECORD,
    STATE_NAMES,
    entry_from_record,
    records_from_bytes,
)
from gketrace.errors import GketraceError, UnavailableError
from gketrace.trace import Missing
from gketrace_cli.podref import pod_target
from gketrace_cli.printable import printable
from gketrace_proto.codec import decode
from gketrace_proto.v1alpha1 import agent_pb2 as pb

if TYPE_CHECKING:
    from gketrace.objects import Pod
    from gketrace_cli.agents import Fleet

__all__ = [
    "Place",
    "Reading",
    "TableEnd",
    "check_entries",
    "check_events",
    "entries_of",
    "plain_lines",
]

_STATE: Final = sum(
    struct.calcsize(f"<{code}") for _, code in FIELDS[: [name for name, _ in FIELDS].index("state")]
)
"""Where a record has its state, a byte."""
_PLAIN: Final = bytes(range(32, 127)) + b"\t\n"
"""What conntrack(8) prints."""
_LATEST: Final = 1e11
"""Seconds since the epoch: no clock is later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One table: a node's own, or a pod's."""

    node: str
    pod: Pod | None = field(default=None, hash=False)

    @property
    def netns(self) -> str:
        """``host`` or ``pod/NS/NAME``."""
        return "host" if self.pod is None else f"pod/{self.pod.key}"

    @property
    def target(self) -> pb.Target:
        return pb.Target(host=True) if self.pod is None else pod_target(self.pod)

    def __str__(self) -> str:
        return f"node {self.node}" if self.pod is None else f"pod {self.pod.key} on {self.node}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableEnd:
    """How the reading of one table ended."""

    place: Place
    summary: pb.ConntrackSummary | None
    received: int = 0
    """Entries that came, also of a table that was broken off."""
    error: GketraceError | None = None

    @property
    def not_tracked(self) -> bool:
        """True: nothing in this namespace asks for connection tracking."""
        return self.summary is not None and not self.summary.tracked

    def cut(self, limit: int) -> bool:
        """True: the server sent fewer than were asked for."""
        said = self.summary
        return said is not None and said.truncated and not (limit and said.sent >= limit)

    def missing(self, limit: int) -> tuple[Missing, ...]:
        """What was not seen of this table."""
        node, netns = self.place.node, "" if self.place.pod is None else self.place.netns

        def miss(why: str) -> tuple[Missing, ...]:
            return (Missing(what="conntrack", why=why, node=node, netns=netns),)

        if self.error is not None:
            return miss(self.error.message)
        if self.summary is None:
            return miss("the answer ended without its summary")
        found: tuple[Missing, ...] = ()
        if not self.summary.consistent:
            lost = f", {self.summary.lost} of them broken off" if self.summary.lost else ""
            found += miss(
                "the table changed while it was read "
                f"({self.summary.readings} readings{lost}): some entries may be left out"
            )
        if self.cut(limit):
            found += miss(f"the agent sends no more than {self.summary.sent} entries")
        return found


@dataclass(slots=True)
class Reading:
    """Reads the tables of `places`.  Iterate `replies` to the end, then look at `ends`."""

    fleet: Fleet
    places: Sequence[Place]
    filters: Mapping[Place, tuple[pb.ConntrackFilter, ...]]
    """An entry is wanted when one of them takes it; a place without any is not read at all."""
    limit: int = 0
    """Entries of each table; 0: all."""
    ends: dict[Place, TableEnd] = field(default_factory=dict)

    def replies(
        self, form: pb.ConntrackFormat.ValueType
    ) -> Iterator[tuple[Place, pb.ListConntrackReply]]:
        """Pieces as they come, in `form`.

        Raises: `GketraceError` when no table at all can be read.
        """
        calls = {
            place: (
                place.node,
                "ListConntrack",
                pb.ListConntrackRequest(
                    target=place.target,
                    any=self.filters[place],
                    limit=self.limit,
                    format=form,
                ),
            )
            for place in self.places
            if self.filters[place]
        }
        summaries: dict[Place, pb.ConntrackSummary] = {}
        received = dict.fromkeys(self.places, 0)
        wrong: dict[Place, GketraceError] = {}
        stream = self.fleet.stream(calls)
        for place, reply in stream:
            if reply is None or isinstance(reply, GketraceError):
                self.ends[place] = TableEnd(
                    place=place,
                    summary=summaries.get(place),
                    received=received[place],
                    error=wrong.get(place, reply),
                )
                continue
            if place in wrong:
                continue
            try:
                check_entries(reply)
            except GketraceError as error:
                wrong[place] = error
                continue
            received[place] += _count(reply)
            if reply.HasField("summary"):
                summaries[place] = reply.summary
            yield place, reply
        self._raise_when_blind()

    def entries(self) -> Iterator[tuple[Place, ConntrackEntry]]:
        """`replies`, taken apart."""
        for place, reply in self.replies(RECORDS):
            for entry in entries_of(reply):
                yield place, entry

    @property
    def missing(self) -> tuple[Missing, ...]:
        return tuple(m for end in self.ends.values() for m in end.missing(self.limit))

    @property
    def summaries(self) -> tuple[pb.ConntrackSummary, ...]:
        return tuple(end.summary for end in self.ends.values() if end.summary is not None)

    @property
    def sent(self) -> int:
        return sum(end.received for end in self.ends.values())

    def _raise_when_blind(self) -> None:
        errors = [end.error for end in self.ends.values() if end.error is not None]
        if not errors or len(errors) < len(self.ends) or self.summaries:
            return
        if len({type(error) for error in errors}) == 1:
            raise errors[0]
        raise UnavailableError(f"no table could be read: {errors[0].message}")


def check_entries(reply: pb.ListConntrackReply | pb.FollowConntrackReply) -> None:
    """Raises `GketraceError` for entries that this side cannot read: of an agent that is newer, or
    of anybody.  After that, `entries_of` does not."""
    states = reply.records[_STATE :: RECORD.size]
    if len(reply.records) % RECORD.size:
        raise GketraceError(f"{len(reply.records)} bytes are no entries of {RECORD.size}")
    if states and max(states) >= len(STATE_NAMES):
        raise GketraceError(f"conntrack state {max(states)} is newer than this program")
    if isinstance(reply, pb.ListConntrackReply):
        for entry in reply.entries:
            decode(ConntrackEntry, entry)


def check_events(reply: pb.FollowConntrackReply) -> None:
    """The same for events, and their times."""
    from gketrace.follow.entries import POLLED  # lists need no joiner

    check_entries(reply)
    if reply.records and len(reply.kinds) != len(reply.records) // RECORD.size:
        raise GketraceError("events and their kinds do not agree")
    for event in reply.events:
        decode(ConntrackEntry, event.entry)
    kinds = {kind & ~POLLED for kind in reply.kinds} | {int(event.kind) for event in reply.events}
    if newer := kinds - set(pb.ConntrackEventKind.values()):
        raise GketraceError(f"events of kind {max(newer)} are newer than this program")
    for at in (reply.at, reply.after, reply.status.at):
        if not 0 <= at < _LATEST:
            raise GketraceError(f"{at} is no time")


def plain_lines(text: bytes) -> bytes:
    """Lines as conntrack(8) prints them, without what would do something to a terminal."""
    if not text.translate(None, _PLAIN):
        return text
    return printable(text.decode("utf-8", "backslashreplace")).encode()


def _count(reply: pb.ListConntrackReply) -> int:
    return len(reply.records) // RECORD.size + len(reply.entries) + reply.text.count(b"\n")


RECORDS: Final = pb.CONNTRACK_FORMAT_RECORDS


def entries_of(reply: Any) -> Iterator[ConntrackEntry]:
    """The entries of one reply with records."""
    for record in records_from_bytes(reply.records):
        yield entry_from_record(record)
    for message in reply.entries:
        yield decode(ConntrackEntry, message)
