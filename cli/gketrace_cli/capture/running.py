"""One capture from its calls to its end: events in, packets in order out, numbers at the end."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from gketrace.capture.packets import Tap
from gketrace.errors import ExitCode, GketraceError
from gketrace_cli.capture.merge import Chunk, Merge
from gketrace_cli.capture.stream import (
    AgentFailed,
    Batch,
    CaptureStream,
    Event,
    Started,
    Statistics,
    TapsEnded,
    TapStatistics,
)
from gketrace_cli.interrupts import interruptible

__all__ = ["Outcome", "Sink", "TapOutcome", "keep_memory", "run_capture", "tell"]

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_KEPT: Final = 64 << 20
_ENDED: Final = frozenset({"seconds", "packets", "bytes", "finished"})
"""Reasons of ends that were asked for."""


class Sink(Protocol):
    """Where packets go."""

    def started(self, taps: tuple[Tap, ...]) -> None:
        """Before their packets."""

    def write(self, chunk: Chunk) -> None: ...

    def finish(self, outcome: Outcome) -> None:
        """After the last packet."""


@dataclass(slots=True, kw_only=True)
class TapOutcome:
    """One tap's numbers."""

    captured: int = 0
    """Written or printed."""
    statistics: TapStatistics = field(default_factory=TapStatistics)
    started_ns: int = 0
    ended_ns: int = 0
    """By its node's clock; of the last statistics."""
    end: str = ""
    """Why the agent ended it, where that was not asked for."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of a capture."""

    taps: dict[Tap, TapOutcome] = field(default_factory=dict)
    failures: dict[str, GketraceError] = field(default_factory=dict)
    """By node."""
    late: int = 0
    """Packets that were handed on after later ones."""
    notes: list[str] = field(default_factory=list)

    @property
    def captured(self) -> int:
        return sum(one.captured for one in self.taps.values())

    @property
    def dropped(self) -> int:
        return sum(one.statistics.dropped for one in self.taps.values())

    @property
    def code(self) -> ExitCode:
        """3 when something was not seen; what stood in the way when nothing was."""
        if self.failures and not self.taps:
            return max((error.exit_code for error in self.failures.values()), default=ExitCode.OK)
        if self.failures or self.dropped or any(one.end for one in self.taps.values()):
            return ExitCode.PARTIAL
        return ExitCode.OK


def run_capture(
    stream: CaptureStream,
    sinks: Iterable[Sink],
    *,
    count: int = 0,
    offsets: Mapping[str, int] | None = None,
    watch: Callable[[Event], None] | None = None,
) -> Outcome:
    """Until all taps have ended, `count` packets (0: no bound) have passed, or SIGINT or SIGTERM.

    `watch` sees every event first.  What is to be said on the way goes to standard error.
    """
    sinks = tuple(sinks)
    outcome = Outcome()
    merge = Merge(stream.nodes, offsets)
    left = count or sys.maxsize
    stopped = False

    def hand_on(chunks: Iterator[Chunk]) -> None:
        nonlocal left
        for whole in chunks:
            chunk = whole.first(left)
            if not len(chunk):
                continue
            left -= len(chunk)
            for batch in chunk.batches:
                outcome.taps[batch.tap].captured += len(batch)
            for sink in sinks:
                sink.write(chunk)

    with interruptible(stream.stop):
        for event in stream.events():
            if watch is not None:
                watch(event)
            _note(event, outcome, sinks)
            hand_on(merge.feed(event))
            if left <= 0 and not stopped:
                # Not a break: the last statistics are still to come.
                stopped = True
                stream.stop()
        hand_on(merge.finish())
    outcome.late = merge.late
    if merge.forced:
        outcome.notes.append(
            f"the order is not certain: too much was held {merge.forced} times, waiting for taps "
            "that had sent nothing"
        )
    for sink in sinks:
        sink.finish(outcome)
    return outcome


def _note(event: Event, outcome: Outcome, sinks: tuple[Sink, ...]) -> None:
    if isinstance(event, Started):
        for tap in event.taps:
            outcome.taps[tap] = TapOutcome(
                started_ns=event.reply.wall_ns, ended_ns=event.reply.wall_ns
            )
        for text in event.reply.lowered:
            tell(f"node {event.node}: {text}")
        for sink in sinks:
            sink.started(event.taps)
    elif isinstance(event, Statistics):
        for tap, numbers in event.taps.items():
            outcome.taps[tap].statistics = numbers
            outcome.taps[tap].ended_ns = event.wall_ns
    elif isinstance(event, TapsEnded):
        if event.reason not in _ENDED:
            for tap in event.taps:
                outcome.taps[tap].end = event.text
                tell(f"{tap}: the capture ended: {event.text}")
    elif isinstance(event, AgentFailed):
        outcome.failures[event.node] = event.error
        for tap in event.taps:
            outcome.taps[tap].end = event.error.message
        tell(f"not captured: {event.error}")
    else:
        assert isinstance(event, Batch)


def keep_memory() -> None:
    """Lets the C library keep freed memory, of which a capture takes megabytes again and again:
    to get it from the kernel anew each time costs more than the work done in it.

    And what is there now stays: to look through it for garbage takes longer than a message does.
    """
    gc.freeze()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc's; other libraries have their own ways
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_THRESHOLD, _KEPT)


def tell(text: str) -> None:
    print(f"gketrace: {text}", file=sys.stderr, flush=True)  # noqa: T201
