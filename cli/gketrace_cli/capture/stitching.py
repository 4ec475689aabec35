"""What a planned capture brings, kept until its end: clocks corrected, packets stitched.

`Collector` takes the events of a `CaptureStream`.  At the end `result` has all packets in the order
of corrected times, each with its comment, and the connections that they make.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from gketrace.capture.clock import HERE, ClockBounds, Clocks, observe
from gketrace.capture.conversations import Tracked
from gketrace.capture.dissect import dissect
from gketrace.capture.packets import CapturedPacket, Direction, Tap
from gketrace.capture.passages import Window
from gketrace.capture.plan import Crossing, Plan, Route, Spot
from gketrace.capture.segments import FlowKey, flow_key, sightings, tuple5_of
from gketrace.capture.stitch import Stitched, stitch_packets
from gketrace.packet import Packet
from gketrace_cli.capture.batch import batch_from_packets
from gketrace_cli.capture.connection_words import cited, packet_comments, span
from gketrace_cli.capture.merge import Chunk
from gketrace_cli.capture.stream import AgentFailed, Batch, Event, Started, Statistics, TapsEnded

__all__ = [
    "Collection",
    "Collector",
    "PlanComments",
    "chunk_of",
    "collect_packets",
]

_MOST: Final = 256 << 20
"""Bytes of packets that are kept."""
_KNOWN: Final = 65536


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
        text = self.clocks.text({packet.tap.node for packet in self.packets})
        return (text,) if text else ()


class Collector:
    """`feed` it all events, then `result`."""

    def __init__(self, *, reference: str = "", most: int = _MOST) -> None:
        """`reference`: the node whose clock is taken as it is; by default that of most packets."""
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
        self, *, routes: Sequence[Route] = (), entries: Iterable[Tracked] = ()
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
    entries: Iterable[Tracked] = (),
    left_out: int = 0,
    corrected: bool = False,
) -> Collection:
    """Corrects, orders, stitches and comments packets; also those that were read from a file.

    `corrected`: their times have been corrected already, so only bounds are told anew.
    """
    bounds = bounds or ClockBounds()
    observe(bounds, sightings(packets)[0])
    nodes = Counter(packet.tap.node for packet in packets)
    if not reference and nodes:
        reference = max(sorted(nodes), key=nodes.__getitem__)
    clocks = bounds.clocks(nodes, reference)
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


def chunk_of(packets: Sequence[CapturedPacket]) -> Chunk:
    """Packets in order → a chunk that is written in that order."""
    places: dict[Tap, list[int]] = {}
    for number, packet in enumerate(packets):
        places.setdefault(packet.tap, []).append(number)
    batches = tuple(
        batch_from_packets(tap, [packets[number] for number in numbers])
        for tap, numbers in places.items()
    )
    flat = np.array([number for numbers in places.values() for number in numbers], np.int64)
    return Chunk(batches=batches, order=np.argsort(flat, kind="stable"))


class PlanComments:
    """Comments for packets that are handed on at once: the hop of the plan, and the rules that
    rewrote what passes there.  Without stitching, so without a connection's number."""

    def __init__(self, plan: Plan) -> None:
        self._crossings: dict[Spot, list[Crossing]] = {}
        for route in plan.routes:
            for crossing in (*route.there, *route.back):
                self._crossings.setdefault(crossing.spot, []).append(crossing)
        self._known: dict[tuple[Tap, Direction, FlowKey], str] = {}

    def chunk(self, chunk: Chunk) -> Chunk:
        """The same packets with comments."""
        batches = tuple(
            replace(batch, comments=tuple(map(self._comment, batch.packets())))
            for batch in chunk.batches
        )
        return replace(chunk, batches=batches)

    def _comment(self, packet: CapturedPacket) -> str:
        found = dissect(packet.tap.link_type, packet.data, packet.original_length)
        flow = flow_key(found)
        if flow is None:
            return ""
        key = (packet.tap, packet.direction, flow)
        if key not in self._known:
            if len(self._known) > _KNOWN:
                self._known.clear()
            self._known[key] = self._text(*key)
        return self._known[key]

    def _text(self, tap: Tap, direction: Direction, flow: FlowKey) -> str:
        half = tuple5_of(flow)
        packet = Packet(
            src=half.src, dst=half.dst, protocol=half.protocol, sport=half.sport, dport=half.dport
        )
        spot = Spot(node=tap.node, pod=tap.pod, interface=tap.interface)
        texts: dict[str, None] = {}
        for crossing in self._crossings.get(spot, ()):
            if crossing.direction is direction and crossing.term.takes(packet, back=crossing.back):
                done = "".join(f"; {cited(rewrite)}" for rewrite in crossing.rewrites)
                texts[f"hop {crossing.hop}{' back' if crossing.back else ''}{done}"] = None
        return " | ".join(texts)
