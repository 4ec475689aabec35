"""What a planned capture brings, kept until its end: clocks corrected, packets stitched.

`Collector` takes the events of a `CaptureStream`.  At the end `result` has all packets in the order
of corrected times, each with its comment, and the connections that they make.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from gketrace.capture.clock import HERE, ClockBounds, Clocks, observe
from gketrace.capture.packets import CapturedPacket, Tap
from gketrace.capture.passages import Window
from gketrace.capture.plan import Route
from gketrace.capture.segments import sightings
from gketrace.capture.stitch import Stitched, stitch_packets
from gketrace.conntrack import ConntrackEntry
from gketrace_cli.capture.connections import packet_comments, span
from gketrace_cli.capture.stream import AgentFailed, Batch, Event, Started, Statistics, TapsEnded

__all__ = ["Collection", "Collector", "collect_packets"]

_MOST: Final = 256 << 20
"""Bytes of packets that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """All of a capture."""

    packets: tuple[CapturedPacket, ...]
    """In order of corrected times, with their comments."""
    stitched: Stitched
    clocks: Clocks
    left_out: int = 0
    """Packets beyond what is kept: they are in no connection."""

    @property
    def section_comments(self) -> tuple[str, ...]:
        """What a file's section header says of clocks."""
        text = self.clocks.text()
        return (text,) if text else ()


class Collector:
    """`feed` it all events, then `result`."""

    def __init__(self, *, reference: str = "", most: int = _MOST) -> None:
        """`reference`: the node whose clock is taken as it is; by default the first to start."""
        self.bounds = ClockBounds()
        self._begun = time.time_ns()
        self._reference = reference
        self._most = most
        self._bytes = 0
        self._left_out = 0
        self._batches: list[Batch] = []
        self._windows: dict[Tap, Window] = {}

    def feed(self, event: Event) -> None:
        if isinstance(event, Started):
            self._reference = self._reference or event.node
            begin = event.reply.wall_ns
            # The node's clock was read after this machine asked, and before it had the answer.
            self.bounds.before(HERE, self._begun, event.node, begin)
            self.bounds.before(event.node, begin, HERE, event.received_ns)
            for tap in event.taps:
                self._windows[tap] = Window(begin=begin, end=begin)
        elif isinstance(event, Batch):
            self._bytes += event.batch.captured
            if self._bytes > self._most:
                self._left_out += len(event.batch)
                self._close((event.tap,), complete=False)
            else:
                self._batches.append(event)
        elif isinstance(event, Statistics):
            self.bounds.before(event.node, event.wall_ns, HERE, event.received_ns)
            for tap, numbers in event.taps.items():
                window = self._windows.get(tap)
                if window is not None:
                    whole = window.complete and not numbers.dropped
                    self._windows[tap] = replace(window, end=event.wall_ns, complete=whole)
        elif isinstance(event, TapsEnded | AgentFailed):
            self._close(event.taps, complete=isinstance(event, TapsEnded))

    def _close(self, taps: Iterable[Tap], *, complete: bool) -> None:
        for tap in taps:
            window = self._windows.get(tap)
            if window is not None:
                self._windows[tap] = replace(window, complete=window.complete and complete)

    def result(
        self, *, routes: Sequence[Route] = (), entries: Iterable[ConntrackEntry] = ()
    ) -> Collection:
        """What was captured so far."""
        packets = [packet for event in self._batches for packet in event.batch.packets()]
        return collect_packets(
            packets,
            windows=self._windows,
            bounds=self.bounds,
            reference=self._reference,
            routes=routes,
            entries=entries,
            left_out=self._left_out,
        )


def collect_packets(
    packets: Sequence[CapturedPacket],
    *,
    windows: dict[Tap, Window] | None = None,
    bounds: ClockBounds | None = None,
    reference: str = "",
    routes: Sequence[Route] = (),
    entries: Iterable[ConntrackEntry] = (),
    left_out: int = 0,
    corrected: bool = False,
) -> Collection:
    """Corrects, orders, stitches and comments packets; also those that were read from a file.

    `corrected`: their times have been corrected already, so only bounds are told anew.
    """
    bounds = bounds or ClockBounds()
    observe(bounds, sightings(packets)[0])
    clocks = bounds.clocks(
        {packet.tap.node for packet in packets},
        reference or min((packet.tap.node for packet in packets), default=""),
    )
    if not corrected:
        packets = [replace(p, time_ns=clocks.corrected(p.tap.node, p.time_ns)) for p in packets]
    ordered = sorted(packets, key=lambda packet: packet.time_ns)
    open_at = {
        tap: replace(
            window,
            begin=clocks.corrected(tap.node, window.begin),
            end=clocks.corrected(tap.node, window.end),
        )
        for tap, window in (windows or {}).items()
    }
    stitched = stitch_packets(
        ordered, entries=entries, routes=routes, windows=open_at, clocks=clocks
    )
    comments = packet_comments(stitched)
    for number, text in _weak_orders(ordered, stitched, clocks).items():
        comments[number] = f"{comments[number]}; {text}" if number in comments else text
    commented = tuple(
        replace(packet, comment=comments[number]) if number in comments else packet
        for number, packet in enumerate(ordered)
    )
    return Collection(packets=commented, stitched=stitched, clocks=clocks, left_out=left_out)


def _weak_orders(
    packets: Sequence[CapturedPacket], stitched: Stitched, clocks: Clocks
) -> dict[int, str]:
    """Packets that stand behind one of another node, though the clocks do not say that they must.

    Of one and the same packet at two nodes the order is certain all the same.
    """
    units: dict[int, int] = {}
    for connection in stitched.connections:
        for flow in (connection.there, connection.back):
            for unit in flow.units:
                for passage in unit.passages:
                    units[passage.number] = id(unit)
    weak: dict[int, str] = {}
    for number in range(1, len(packets)):
        before, here = packets[number - 1], packets[number]
        if before.tap.node == here.tap.node:
            continue
        if units.get(number, -1) == units.get(number - 1, -2):
            continue
        one, other = before.tap.node, here.tap.node
        if clocks.certain(one, before.time_ns, other, here.time_ns):
            continue
        width = clocks.width(one, other)
        known = f"± {span(width)}" if width is not None else "not known"
        weak[number] = f"order against the packet before is not certain (clocks {known})"
    return weak
