"""Replies of the agents → the joiner: clocks, losses, ends of calls and their return."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from gketrace.connections import Place
from gketrace.conntrack import ConntrackEntry
from gketrace.conntrack_records import STATE_NAMES, Record, record_of, records_from_bytes
from gketrace.follow.entries import POLLED
from gketrace.follow.joiner import Joiner
from gketrace.trace import Missing
from gketrace_cli.follow.tally import Gap
from gketrace_proto.codec import decode
from gketrace_proto.v1alpha1 import agent_pb2 as pb

if TYPE_CHECKING:
    from gketrace_cli.follow.streams import Arrived, Streams

__all__ = ["Intake"]

_TWICE_SECONDS: Final = 3.0
"""For so long after a change of filters an event may come from both calls."""
_APART_SECONDS: Final = 1.0
_LATE_SECONDS: Final = 5.0
"""Agents send something each second."""
_SOON_SECONDS: Final = 2.0
_SETTLED: Final = 4
"""Statuses, one a second, after which a node's offset is taken for known."""


class _Feed:
    """One place."""

    __slots__ = (
        "away",
        "came",
        "late",
        "lost",
        "offset",
        "resyncs",
        "said",
        "statuses",
        "turn",
        "why",
    )

    def __init__(self) -> None:
        self.turn = 0
        self.statuses = 0
        """Of the call that is under way: the first begins it, the second ends its reading."""
        self.lost = (0, 0)
        self.resyncs = 0
        self.offset: float | None = None
        """Seconds from the node's clock to ours, the least that was seen."""
        self.away: float | None = None
        """Since when no call is under way."""
        self.why = ""
        self.said = ""
        self.came = time.time()
        """Our time of the last message."""
        self.late = False
        """It was said that none comes, or that they come late."""


class Intake:
    """Feeds a joiner.  For one thread."""

    def __init__(self, joiner: Joiner, streams: Streams, say: Callable[[str], None]) -> None:
        self._joiner = joiner
        self._streams = streams
        self._say = say
        self._feeds: dict[Place, _Feed] = {}
        self.taken = 0
        """Events so far."""
        self.lost: Counter[str] = Counter()
        self._ended: list[Gap] = []
        self._switched_at = 0.0
        self._recent: set[int] = set()

    @property
    def gaps(self) -> list[Gap]:
        """Times in which a place was not followed; those that last, too."""
        return self._ended + [
            Gap(where=str(place), why=feed.why, begin=feed.away, end=None)
            for place, feed in self._feeds.items()
            if feed.away is not None
        ]

    def unseen_nodes(self, missing: Iterable[Missing]) -> frozenset[str]:
        """Nodes that are not followed now."""
        away = {place.node for place, feed in self._feeds.items() if feed.away is not None}
        return frozenset(away | {item.node for item in missing if item.node})

    @property
    def ready(self) -> int:
        """Places of which all is known that is there now."""
        return sum(feed.statuses >= 2 for feed in self._feeds.values())

    def switch(self) -> None:
        """The next call to each place replaces one: for a while events come twice."""
        self._switched_at = time.monotonic()
        self._recent = set()

    def take(self, arrived: Arrived) -> None:
        place = arrived.place
        feed = self._feeds.setdefault(place, _Feed())
        if arrived.turn < feed.turn:
            return  # of a call that was replaced
        if arrived.reply is None:
            if arrived.turn == feed.turn or not feed.turn:
                self._end(place, feed, arrived)
            return
        reply = arrived.reply
        feed.came = arrived.at
        if arrived.turn > feed.turn or feed.away is not None:
            if not reply.HasField("status"):
                return
            self._begin(place, feed, arrived)
        told = reply.at or reply.status.at or arrived.at
        least = arrived.at - told
        feed.offset = least if feed.offset is None else min(feed.offset, least)
        at = told + self._correction(feed)
        if reply.HasField("status"):
            self._status(place, feed, reply.status, at)
        records, kinds = self._events(reply)
        self.taken += len(records)
        if records:
            after = reply.after + self._correction(feed) if reply.after else None
            self._joiner.feed(place, at, kinds, records, after=after)

    def listen(self, ours: float, *, waiting: bool) -> None:
        """Says of whom nothing comes, or late; `ours`: the time.  `waiting`: more has come than was
        taken, so it is this program that is late."""
        for place, feed in self._feeds.items():
            until = self._joiner.heard_until(place)
            if feed.away is not None or until is None:
                continue
            late = self.now(ours) - until
            if feed.late and late < _SOON_SECONDS:
                feed.late = False
                self._say(f"{place} is not behind any more")
            if feed.late or late < _LATE_SECONDS:
                continue
            feed.late = True
            if waiting:
                why = "this program needs more processor time than it gets"
            elif ours - feed.came > _LATE_SECONDS:
                why = "nothing comes from there"
            else:
                why = "its agent is late with its events"
            self._say(f"{place} is {late:.0f} s behind: {why}")

    def behind(self, until: float) -> frozenset[Place]:
        """Places that have more to say of what was before `until`, our time; of those that are not
        followed now nothing is expected."""
        away = {place for place, feed in self._feeds.items() if feed.away is not None}
        return self._joiner.behind(self.now(until)) - away

    def now(self, ours: float) -> float:
        """Our time by the nodes' clocks."""
        return ours - self._delay()

    def _delay(self) -> float:
        """From the nodes' clocks to ours, with the least delay on the way that was seen."""
        known = (feed.offset for feed in self._feeds.values() if feed.offset is not None)
        return min(known, default=0.0)

    def _correction(self, feed: _Feed) -> float:
        """For a node whose clock is not the others': delays alone do not differ as much."""
        if feed.statuses < _SETTLED or feed.offset is None:
            return 0.0
        apart = feed.offset - self._delay()
        return apart if apart > _APART_SECONDS else 0.0

    def _begin(self, place: Place, feed: _Feed, arrived: Arrived) -> None:
        self._streams.settle(place, arrived.turn)
        widened = arrived.turn > feed.turn
        feed.turn, feed.statuses = arrived.turn, 0
        feed.lost, feed.resyncs = (0, 0), 0
        if feed.away is None:
            self._joiner.begin_reading(place)
            return
        gap = Gap(where=str(place), why=feed.why, begin=feed.away, end=arrived.at)
        self._ended.append(gap)
        self._say(
            f"{place} is followed again after {arrived.at - feed.away:.1f} s; what began and "
            "ended there in between was not seen"
        )
        feed.away = None
        self._joiner.lose(place, widened=widened)

    def _end(self, place: Place, feed: _Feed, arrived: Arrived) -> None:
        feed.statuses = 0
        if feed.away is None:
            feed.away, feed.why = arrived.at, arrived.error
            self._say(
                f"{place} is not followed any more, and is called again; what has to do with it "
                f"waits for it, {self._joiner.patience:.0f} s at most: {arrived.error}"
            )
            self._joiner.lose(place)

    def _status(
        self, place: Place, feed: _Feed, status: pb.FollowConntrackStatus, at: float
    ) -> None:
        feed.statuses += 1
        lost = (status.lost, status.overruns)
        if lost != feed.lost:
            number = status.lost - feed.lost[0]
            self.lost[str(place)] += max(number, 1)
            feed.lost = lost
            self._joiner.lose(place)
            self._say(f"{place}: its kernel dropped {number} events: they came too fast")
        # After a loss: what was heard before is what was surely known then.  The first status says
        # nothing yet, as the reading of the table comes after it.
        if feed.statuses > 1:
            self._joiner.heard(place, at, counts=status.accounting)
        if feed.statuses == 2 or status.resyncs != feed.resyncs:
            feed.resyncs = status.resyncs
            self._joiner.read_whole(place, at)
        mode = status.mode if status.tracked else "untracked"
        if feed.statuses == 2 and mode != feed.said:
            feed.said = mode
            if not status.tracked and not place.pod:
                self._say(f"{place}: nothing there asks for connection tracking")
            elif status.mode == "poll":
                self._say(f"{place} is polled: {status.reason}; short connections are not seen")

    def _events(self, reply: pb.FollowConntrackReply) -> tuple[list[Record], bytes]:
        records = list(records_from_bytes(reply.records))
        kinds = reply.kinds
        if reply.events:
            more = [(e, _record(decode(ConntrackEntry, e.entry))) for e in reply.events]
            fitting = [(e, record) for e, record in more if record is not None]
            records += [record for _, record in fitting]
            kinds += bytes(int(e.kind) | (POLLED if e.polled else 0) for e, _ in fitting)
        if time.monotonic() - self._switched_at < _TWICE_SECONDS:
            once = list(self._once(kinds, records))
            return [record for _, record in once], bytes(kind for kind, _ in once)
        self._recent.clear()
        return records, kinds

    def _once(self, kinds: bytes, records: list[Record]) -> Iterator[tuple[int, Record]]:
        for kind, record in zip(kinds, records, strict=True):
            number = hash((kind, record))
            if number not in self._recent:
                self._recent.add(number)
                yield kind, record


def _record(entry: ConntrackEntry) -> Record | None:
    """Without what a record has no room for, and nothing here needs; None: a state that is newer
    than this program, which the agent's own events of it then lack."""
    if entry.tcp_state not in STATE_NAMES:
        return None
    return record_of(replace(entry, helper="", secctx="", labels="", stopped=None))
