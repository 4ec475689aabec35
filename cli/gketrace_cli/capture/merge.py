"""Packets of several taps put into one order, that of their times.

A packet is held until no earlier one can come: every tap has sent a later one, or its agent has
said that it has sent all that it had until then (`Statistics`).  So each chunk is sorted, and
chunks follow each other in time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from gketrace.capture.packets import CapturedPacket, Tap
from gketrace_cli.capture.batch import Array, PacketBatch
from gketrace_cli.capture.stream import AgentFailed, Batch, Event, Started, Statistics, TapsEnded

__all__ = ["Chunk", "Merge"]

_SLACK_NS: Final = 2_000_000
"""Packets of one ring may stand so far out of order, as several processors fill it."""
_LAG: Final = 2.0
"""Latencies after which an agent has sent what came in."""
_MOST: Final = 192 << 20
"""Bytes that are held; beyond that, packets are handed on though an earlier one may come."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """Packets in the order of their times."""

    batches: tuple[PacketBatch, ...]
    order: Array | None = None
    """int64; the places of all packets of the batches, these one after the other, in the order of
    time.  None: they are in order."""

    def __len__(self) -> int:
        return sum(map(len, self.batches))

    def first(self, count: int) -> Chunk:
        """The first packets of it."""
        if count >= len(self):
            return self
        order = np.arange(len(self)) if self.order is None else self.order
        wanted = np.zeros(len(self), bool)
        wanted[order[:count]] = True
        return self._only(wanted)

    def of(self, tap: Callable[[Tap], bool]) -> Chunk:
        """The packets of some taps."""
        flags = [np.full(len(batch), tap(batch.tap)) for batch in self.batches]
        return self._only(np.concatenate(flags))

    def _only(self, wanted: Array) -> Chunk:
        ends = np.cumsum([len(batch) for batch in self.batches])[:-1]
        parts = zip(self.batches, np.split(wanted, ends), strict=True)
        batches = tuple(batch.take(mine) for batch, mine in parts if mine.any())
        if self.order is None:
            return Chunk(batches=batches)
        places = np.cumsum(wanted) - 1  # old place → new one
        return Chunk(batches=batches, order=places[self.order[wanted[self.order]]])

    def packets(self) -> Iterator[CapturedPacket]:
        """In order, made one by one."""
        if self.order is None:
            for batch in self.batches:
                yield from batch.packets()
            return
        made = [packet for batch in self.batches for packet in batch.packets()]
        for place in self.order.tolist():
            yield made[place]


class Merge:
    """`feed` it all events in order, then `finish`.

    `nodes` are those that will start, or fail: until then all is held.  `offsets`: nanoseconds to
    add to the times of a node's packets; may change at any time.
    """

    def __init__(self, nodes: Iterable[str] = (), offsets: Mapping[str, int] | None = None) -> None:
        self._awaited = set(nodes)
        self.offsets: Final[dict[str, int]] = dict(offsets or {})
        self.late = 0
        """Packets that were handed on after later ones."""
        self.forced = 0
        """Times that too much was held."""
        self._held: list[PacketBatch] = []
        self._known: dict[Tap, int] = {}
        """Live taps → the time until which all of their packets have come."""
        self._lags: dict[str, int] = {}
        self._last = -(1 << 62)

    def feed(self, event: Event) -> Iterator[Chunk]:
        """What can be handed on after this event."""
        if isinstance(event, Started):
            self._awaited.discard(event.node)
            self._lags[event.node] = int(event.reply.latency_seconds * _LAG * 1e9)
            for tap in event.taps:
                self._known[tap] = -(1 << 62)
            return
        if isinstance(event, Batch):
            offset = self.offsets.get(event.node, 0)
            batch = _sorted(event.batch.shifted(offset))
            if not len(batch):
                return
            if len(self._known) == 1 and not self._held and not self._awaited:
                yield self._chunk([batch])
                return
            self._held.append(batch)
            self._reach(batch.tap, int(batch.times[-1]) - _SLACK_NS)
        elif isinstance(event, Statistics):
            offset = self.offsets.get(event.node, 0)
            for tap in event.taps:
                self._reach(tap, event.wall_ns + offset - self._lags.get(event.node, 0))
        elif isinstance(event, TapsEnded | AgentFailed):
            for tap in event.taps:
                self._known.pop(tap, None)
            if isinstance(event, AgentFailed):
                self._awaited.discard(event.node)
        if not self._awaited:
            yield from self._release(min(self._known.values(), default=1 << 62))
        if sum(len(batch.buffer) for batch in self._held) > _MOST:
            self.forced += 1
            yield from self._release(max(int(batch.times[0]) for batch in self._held))

    def finish(self) -> Iterator[Chunk]:
        """What is still held."""
        yield from self._release(1 << 62)

    def _reach(self, tap: Tap, time_ns: int) -> None:
        if tap in self._known:
            self._known[tap] = max(self._known[tap], time_ns)

    def _release(self, until: int) -> Iterator[Chunk]:
        """All that is held and not later than `until`."""
        parts: list[PacketBatch] = []
        kept: list[PacketBatch] = []
        for batch in self._held:
            count = int(np.searchsorted(batch.times, until, side="right"))
            if count == len(batch):
                parts.append(batch)
            elif count:
                parts.append(batch.take(slice(None, count)))
                kept.append(batch.take(slice(count, None)))
            else:
                kept.append(batch)
        self._held = kept
        if parts:
            yield self._chunk(parts)

    def _chunk(self, parts: list[PacketBatch]) -> Chunk:
        for batch in parts:
            if batch.times[0] < self._last:
                self.late += int(np.searchsorted(batch.times, self._last))
        self._last = max(self._last, *(int(batch.times[-1]) for batch in parts))
        if len(parts) == 1:
            return Chunk(batches=(parts[0],))
        times = np.concatenate([batch.times for batch in parts])
        return Chunk(batches=tuple(parts), order=np.argsort(times, kind="stable"))


def _sorted(batch: PacketBatch) -> PacketBatch:
    times = batch.times
    if len(times) < 2 or bool((times[1:] >= times[:-1]).all()):
        return batch
    return batch.take(np.argsort(times, kind="stable"))
