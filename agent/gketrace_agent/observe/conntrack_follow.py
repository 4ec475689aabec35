"""Following a connection-tracking table: the kernel's events, polls where it sends none.

With net.netfilter.nf_conntrack_events at 2, the default, the kernel sends events only of entries
that were made while somebody listened.  Those that were there before are polled until each has
ended or was heard of; with 0 everything is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from gketrace_agent.kernel.conntrack_columns import Array, Batch
from gketrace_agent.kernel.conntrack_dump import TableReading
from gketrace_agent.kernel.conntrack_events import EventKind, EventSocket
from gketrace_agent.observe.conntrack_filter import ConntrackFilters
from gketrace_agent.observe.conntrack_records import RECORD_TYPE, pack_groups

__all__ = ["EXISTING", "Changes", "Follower", "Polled"]

EXISTING: Final = 4
"""As ConntrackEventKind."""
_STATUS_SECONDS: Final = 1.0
_RESYNC_SECONDS: Final = 2.0
"""From a loss to the reading after it: it covers what is lost until then, too."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Events that the kernel sent, or entries of a reading (EXISTING)."""

    batch: Batch
    kinds: Array
    """Of each place of `batch`."""


@dataclass(frozen=True, slots=True)
class Polled:
    """Changes that were found by comparing readings."""

    kind: int
    records: Array
    """Of `RECORD_TYPE`."""


class _Watched:
    """Entries that are polled: a record of each, ordered by key."""

    def __init__(self) -> None:
        self.keys: Array = np.empty(0, np.uint64)
        self.records: Array = np.empty(0, RECORD_TYPE)

    def forget(self, keys: Array) -> None:
        if len(self.keys) and len(keys):
            stay = ~np.isin(self.keys, keys)
            self.keys, self.records = self.keys[stay], self.records[stay]

    def set(self, keys: Array, records: Array) -> None:
        order = np.argsort(keys)
        self.keys, self.records = keys[order], records[order]

    def compare(self, keys: Array, records: Array, *, all_new: bool) -> list[Polled]:
        """What changed since the last time; with `all_new`, entries that were not there before
        are news, otherwise somebody else's."""
        order = np.argsort(keys)
        keys, records = keys[order], records[order]
        known = np.isin(keys, self.keys)
        gone = self.records[~np.isin(self.keys, keys)]
        now = records[known]
        # Equal keys in both, in the same order.
        before = self.records[np.isin(self.keys, keys)]
        changed = np.zeros(len(now), bool)
        for name in ("id", "status", "state", "mark"):
            changed |= now[name] != before[name]
        found = [Polled(EventKind.DESTROY, gone), Polled(EventKind.UPDATE, now[changed])]
        if all_new:
            found.append(Polled(EventKind.NEW, records[~known]))
            self.keys, self.records = keys, records
        else:
            self.keys, self.records = keys[known], now
        return [one for one in found if len(one.records)]


class Follower:
    """One follow of one namespace; iterate over `changes` in one thread."""

    def __init__(
        self,
        *,
        events: EventSocket,
        setting: int,
        kinds: frozenset[EventKind],
        wanted: ConntrackFilters,
        reading: Callable[[], TableReading],
        existing: bool,
        poll_seconds: float,
    ) -> None:
        self._events = events
        self._setting = setting
        self._kinds = kinds
        self._wanted = wanted
        self._reading = reading
        self._existing = existing
        self._poll_seconds = poll_seconds
        self._watched = _Watched()
        self.resyncs = 0

    def close(self) -> None:
        """May be called twice."""
        self._events.close()

    @property
    def overruns(self) -> int:
        return self._events.overruns

    @property
    def lost(self) -> int:
        """Events that the kernel dropped."""
        return self._events.lost

    @property
    def heard(self) -> float:
        """All events from before then have been yielded, once what is yielded now has been taken;
        seconds since the epoch."""
        return self._events.heard

    @property
    def mode(self) -> str:
        if self._setting == 0:
            return "poll"
        return "events+poll" if len(self._watched.keys) else "events"

    @property
    def reason(self) -> str:
        if self._setting == 0:
            return "net.netfilter.nf_conntrack_events is 0: the kernel sends none"
        if len(self._watched.keys):
            return (
                f"net.netfilter.nf_conntrack_events is {self._setting}: {len(self._watched.keys)} "
                "entries are older than this call, and the kernel may send no events of them"
            )
        return ""

    def changes(self) -> Iterator[Changes | Polled | None]:
        """For ever.  None: nothing for a second, or the counts have changed: time to say so."""
        yield from self._begin()
        told = time.monotonic()
        next_poll = told + self._poll_seconds
        resync_at: float | None = None
        while True:
            now = time.monotonic()
            wake = min(
                told + _STATUS_SECONDS,
                next_poll if self._polling else now + _STATUS_SECONDS,
                resync_at if resync_at is not None else now + _STATUS_SECONDS,
            )
            found, overrun = self._events.read(max(wake - now, 0.0))
            kept = None if found is None else self._keep(found.batch)
            if found is not None and kept is not None:
                yield Changes(kept, found.kinds)
            now = time.monotonic()
            if overrun:
                resync_at = resync_at or now + _RESYNC_SECONDS
                yield None
            # An event that is older than the reading must not come after it.
            if resync_at is not None and now >= resync_at and self._events.caught_up:
                self.resyncs += 1
                resync_at = None
                yield from self._read_all()
                yield None
            if self._polling and now >= next_poll:
                yield from self._compare()
                next_poll = time.monotonic() + self._poll_seconds
            if now >= told + _STATUS_SECONDS:
                told = now
                yield None

    @property
    def _polling(self) -> bool:
        return self._setting == 0 or len(self._watched.keys) > 0

    def _begin(self) -> Iterator[Changes | Polled | None]:
        """Reads what is there already: after the socket began to listen, so nothing is missed."""
        yield None
        if self._existing:
            yield from self._read_all()
        if self._setting != 1:
            self._watched.set(*self._table())

    def _read_all(self) -> Iterator[Changes]:
        for batch in self._reading().batches():
            yield Changes(batch, np.full(batch.size, EXISTING, np.uint8))

    def _table(self) -> tuple[Array, Array]:
        """Keys and records of all that is wanted."""
        keys, records = [np.empty(0, np.uint64)], [np.empty(0, RECORD_TYPE)]
        for batch in self._reading().batches():
            keys += [group.keys() for group in batch.groups]
            records += pack_groups(batch)
        return np.concatenate(keys), np.concatenate(records)

    def _compare(self) -> Iterator[Polled]:
        keys, records = self._table()
        for found in self._watched.compare(keys, records, all_new=self._setting == 0):
            if found.kind in self._kinds:
                yield found

    def _keep(self, batch: Batch) -> Batch | None:
        groups = []
        for group in batch.groups:
            self._watched.forget(group.keys())
            which = self._wanted.mask(group)
            if which is None or which.all():
                groups.append(group)
            elif which.any():
                groups.append(group.take(which))
        return Batch(batch.size, tuple(groups)) if groups else None
