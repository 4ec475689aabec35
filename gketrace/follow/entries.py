"""One conntrack entry of one place, from the first event of it to the last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeAlias

from gketrace.connections import Place, TupleKey
from gketrace.conntrack import CtStatus
from gketrace.conntrack_records import HAS_COUNTERS, HAS_STARTED, HAS_TIMEOUT, STATE_NAMES, Record

__all__ = ["POLLED", "EntryKey", "EventKind", "Seen", "Sight", "states_of", "with_counters"]

EntryKey: TypeAlias = tuple[Place, TupleKey, int]
"""Place, original tuple, zone: what is unique at one time."""
POLLED: Final = 128
"""Added to an `EventKind`: found by comparing two readings."""


class EventKind(IntEnum):
    """As ConntrackEventKind is on the wire."""

    NEW = 1
    UPDATE = 2
    DESTROY = 3
    EXISTING = 4
    """It was in the table when that was read."""


_SEEN_REPLY: Final = int(CtStatus.SEEN_REPLY)
"""A flag's own operators are slow, and this is asked for each event."""
_OVER: Final = sum(1 << STATE_NAMES.index(name) for name in ("TIME_WAIT", "CLOSE"))
_SHAKEN: Final = sum(
    1 << STATE_NAMES.index(name)
    for name in ("ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT")
)
"""TCP's states that only a client which has an answer brings about."""
_SURE: Final = 2.0
"""Seconds that an entry must have had left, by our own count, to say that it was removed early:
events come late, and timeouts are whole seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What one place has seen of a connection."""

    place: Place
    states: tuple[str, ...]
    """TCP's or SCTP's, in the order of `STATE_NAMES`; events may have left some out."""
    began: float | None
    """None: it was there before, or the event of its beginning was lost."""
    ended: float | None
    """When the entry was removed; None: it is still there."""
    left: float | None
    """Seconds that it still had when it was removed, at least; None: not removed, or it expired."""
    replied: bool
    counted: bool
    """False: packets and bytes are not known, or not all of them yet."""
    complete: bool
    """False: events were lost there while it lived."""


class Seen:
    """What is known now.  Mutable; the joiner's own."""

    __slots__ = (
        "began",
        "changed",
        "counted",
        "end_seen",
        "ended",
        "key",
        "left",
        "let_out",
        "lossy",
        "old",
        "over_at",
        "place",
        "record",
        "shaken_at",
        "since",
        "states",
        "taken",
    )

    def __init__(
        self,
        place: Place,
        key: EntryKey,
        let_out: TupleKey,
        record: Record,
        at: float,
        began: float | None,
        since: float | None = None,
    ) -> None:
        """`began`: when its beginning was read, None if it was not; `since`: what is surely before
        its beginning, None if nothing is known to be."""
        self.place = place
        self.key = key
        self.taken = key[1]
        self.let_out = let_out
        self.record = record
        self.states = 1 << record.state
        self.began = record.started / 1e9 if record.has & HAS_STARTED else began
        known = [time for time in (since, self.began) if time is not None]
        self.since = min(known, default=None)
        self.changed = at
        self.ended: float | None = None
        self.left: float | None = None
        self.over_at = at if 1 << record.state & _OVER else None
        """Since when no more packets of it are expected; None: they are."""
        self.end_seen = False
        """An event has said so: else `over_at` is when it was found."""
        self.shaken_at = at if 1 << record.state & _SHAKEN else None
        """Since when the client is known to have its answer; None: it is not."""
        self.lossy = False
        self.old = False
        """It was over when the following began."""
        self.counted = False
        """The counters are those of the end."""

    @property
    def replied(self) -> bool:
        return bool(self.record.status & _SEEN_REPLY)

    def update(self, record: Record, at: float, *, told: bool = True) -> None:
        """`told`: by an event, not by a reading of the table."""
        self.states |= 1 << record.state
        if not record.has & HAS_COUNTERS and self.record.has & HAS_COUNTERS:
            record = with_counters(record, self.record)
        self.record = record
        self.changed = at
        if self.shaken_at is None and 1 << record.state & _SHAKEN:
            self.shaken_at = at
        if not 1 << record.state & _OVER:
            self.over_at = None
        elif self.over_at is None:
            self.over_at, self.end_seen = at, told

    def end(self, record: Record, at: float) -> None:
        """DESTROY.  Kernels before 5.10 leave the state and the time left out of that event."""
        before = self.record
        # A packet in between gave it more time and needs no event: at least so much was left.
        left = before.timeout - (at - self.changed) if before.has & HAS_TIMEOUT else 0.0
        if record.has & HAS_TIMEOUT:
            self.left = float(record.timeout) if record.timeout else None
        elif left > _SURE:
            self.left = left
        if not record.state:
            record = record._replace(state=before.state)
        self.counted = bool(record.has & HAS_COUNTERS)
        over_at, end_seen = self.over_at, self.end_seen
        self.update(record, at)
        self.ended = at
        self.over_at, self.end_seen = (at, True) if over_at is None else (over_at, end_seen)

    def vanish(self, at: float) -> None:
        """It is not there any more, and no event of its end came."""
        self.ended = at
        self.over_at = at if self.over_at is None else self.over_at
        self.lossy = True

    def count(self, record: Record) -> None:
        """Counters that were read after the last packet."""
        self.record = with_counters(self.record, record)
        self.counted = True

    def sight(self) -> Sight:
        return Sight(
            place=self.place,
            states=tuple(states_of(self.states)),
            began=self.began,
            ended=self.ended,
            left=self.left,
            replied=self.replied,
            counted=self.counted,
            complete=not self.lossy,
        )


def with_counters(record: Record, counters: Record) -> Record:
    """`record` with the other's packets and bytes."""
    return record._replace(
        orig_packets=counters.orig_packets,
        orig_bytes=counters.orig_bytes,
        reply_packets=counters.reply_packets,
        reply_bytes=counters.reply_bytes,
        has=record.has | HAS_COUNTERS,
    )


def states_of(bits: int) -> Iterator[str]:
    """A set of states as bits by their index in `STATE_NAMES` → their names."""
    return (name for number, name in enumerate(STATE_NAMES) if name and bits >> number & 1)
