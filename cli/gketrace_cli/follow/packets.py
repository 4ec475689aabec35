"""Packets of followed connections: captured along the plan of what is followed, kept by tuple, and
put to a connection when conntrack has told it.

Kept is what is of connections that are not told yet, up to a bound; the oldest go first.  What
conntrack never told, because a node dropped or rejected it before its entry was confirmed, is
found here as an opening that nobody has claimed.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from gketrace.capture.clock import HERE, ClockBounds, Clocks
from gketrace.capture.conversations import Tracked
from gketrace.capture.packets import CapturedPacket, Tap
from gketrace.capture.passages import Window
from gketrace.capture.plan import Route
from gketrace.capture.segments import (
    ACK,
    SYN,
    FlowKey,
    reverse_key,
    sightings,
    tuple5_of,
)
from gketrace.capture.stitch import StitchedConnection
from gketrace.capture.verdicts import State, state_of
from gketrace.errors import GketraceError
from gketrace.follow.joiner import Followed
from gketrace.packet import Protocol, Tuple5
from gketrace_cli.capture.stitching import collect_packets
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
from gketrace_proto.v1alpha1 import capture_pb2 as pb

if TYPE_CHECKING:
    from gketrace_cli.agents import Fleet
    from gketrace_cli.capture.planning import NodeTaps

__all__ = ["PacketWatch", "SeenPackets"]

_MOST: Final = 100_000
"""Packets that are kept."""
_EACH: Final = 4_000
"""Of one connection; beyond that its oldest go."""
_BEHIND: Final = 0.3
"""Seconds that a node's packets must have come beyond the end of a connection."""
_LONG: Final = 1.3
"""… of one that failed: a packet counts as lost a second after it was seen last."""
_LOOK_AFTER: Final = 2.0
"""Seconds after which an opening that conntrack did not tell is looked at."""
_SILENT_AFTER: Final = 3.5
_GIVE_UP: Final = 15.0
_CLAIMED_FOR: Final = 150.0
"""Seconds that a told connection's tuples are remembered: TIME_WAIT is 120."""
_RETRY: Final = 2.0
_SHARE: Final = 0.5
"""Of one processor's time, for stitching."""
_APART: Final = 1_000_000_000
_ALONE: Final = frozenset({State.UNANSWERED, State.REFUSED, State.UNREACHABLE})


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenPackets:
    """What was captured of one connection."""

    connection: StitchedConnection
    clocks: Clocks
    whole: bool
    """False: packets of it were lost, or dropped here for want of room."""


class _Kept:
    """Packets of one tuple, both directions."""

    __slots__ = ("cut", "heard", "opened", "packets")

    def __init__(self, heard: float) -> None:
        self.packets: list[CapturedPacket] = []
        self.heard = heard
        """Our time when the first came."""
        self.opened: FlowKey | None = None
        """As its client sends it, when its beginning was seen."""
        self.cut = False


class _Node:
    """One node's capture."""

    __slots__ = ("heard", "live", "offset", "said", "statistics", "windows")

    def __init__(self) -> None:
        self.live = False
        self.heard = 0.0
        """Our time, until which its packets have come."""
        self.offset: int | None = None
        """Nanoseconds from its clock to ours, the least that was seen."""
        self.windows: dict[Tap, Window] = {}
        self.statistics: dict[Tap, TapStatistics] = {}
        self.said = ""


class PacketWatch:
    """Threads read; the methods are for one other thread."""

    def __init__(self, fleet: Fleet, say: Callable[[str], None]) -> None:
        """`say`: gets sentences, in any thread."""
        self._fleet = fleet
        self._say = say
        self._lock = threading.Lock()
        self._nodes: dict[str, _Node] = {}
        self._kept: dict[FlowKey, _Kept] = {}
        self._count = 0
        self._due: list[tuple[float, FlowKey]] = []
        self._claimed: dict[FlowKey, float] = {}
        self._bounds = ClockBounds()
        self._routes: tuple[Route, ...] = ()
        self._closing = threading.Event()
        self._replaced = threading.Event()
        self._streams: dict[str, CaptureStream] = {}
        self._threads: list[threading.Thread] = []
        self._begun = time.monotonic()
        self._spent = 0.0
        self.lost: Counter[str] = Counter()
        """Node → packets that its kernel dropped."""
        self.dropped = 0
        """Packets that were dropped here before their connection was told."""
        self.passed_over = 0
        """Connections whose packets were not looked at, for want of time."""

    # the capture

    def start(self, routes: tuple[Route, ...], taps: dict[str, NodeTaps]) -> None:
        """Begins; a capture that is under way is ended first."""
        self._end()
        self._replaced = threading.Event()
        with self._lock:
            self._routes = routes
            self._nodes = {node: _Node() for node in taps}
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(node, one, self._replaced),
                name=f"packets-{node}",
                daemon=True,
            )
            for node, one in taps.items()
        ]
        for thread in self._threads:
            thread.start()

    def use(self, fleet: Fleet) -> None:
        """From now on."""
        self._fleet = fleet

    @property
    def started(self) -> bool:
        """All nodes capture, or have said why they do not."""
        return all(node.live or node.said for node in self._nodes.values())

    def close(self) -> None:
        self._closing.set()
        self._end()

    def _end(self) -> None:
        self._replaced.set()
        for stream in list(self._streams.values()):
            stream.stop()
        for thread in self._threads:
            thread.join(5.0)
        self._threads = []

    def _run(self, node: str, taps: NodeTaps, over: threading.Event) -> None:
        while not over.is_set():
            request = pb.CaptureRequest(taps=taps.taps, latency_seconds=0.1)
            descriptions = {node: taps.descriptions}
            try:
                with CaptureStream(
                    self._fleet, {node: request}, descriptions=descriptions
                ) as stream:
                    self._streams[node] = stream
                    for event in stream.events():
                        self._feed(event)
                        if over.is_set():
                            break
            except GketraceError as error:
                self._gone(node, error.message)
            except (RuntimeError, ValueError) as error:  # the fleet's channel was closed meanwhile
                self._gone(node, str(error))
            if over.is_set():
                return
            with self._lock:
                self._nodes[node].live = False
            over.wait(_RETRY)

    def _gone(self, node: str, why: str) -> None:
        one = self._nodes[node]
        with self._lock:
            one.live = False
            different, one.said = one.said != why, why
        if different and not self._replaced.is_set():
            self._say(f"packets of {node} are not captured: {why}; trying again")

    def _feed(self, event: Event) -> None:
        if isinstance(event, Batch):
            packets = list(event.batch.packets())
            seen, errors, _ = sightings(packets)
            now = time.time()
            with self._lock:
                for one in seen:
                    opening = one.flags & (SYN | ACK) == SYN or one.flow[0] != Protocol.TCP
                    self._keep(one.flow, packets[one.number], now, opening=opening)
                for error in errors:
                    self._keep(error.quoted, packets[error.number], now, opening=False)
                self._bound()
            return
        node = self._nodes[event.node]
        if isinstance(event, Started):
            begin = event.reply.wall_ns
            with self._lock:
                self._bounds.before(event.node, begin, HERE, event.received_ns)
                node.windows = {tap: Window(begin=begin, end=begin) for tap in event.taps}
                node.statistics = {}
                node.live = True
                again, node.said = node.said, ""
            if again:
                self._say(f"packets of {event.node} are captured again")
        elif isinstance(event, Statistics):
            with self._lock:
                self._statistics(node, event)
        elif isinstance(event, AgentFailed):
            self._gone(event.node, event.error.message)
        elif isinstance(event, TapsEnded) and event.reason != "finished":
            with self._lock:
                for tap in event.taps:
                    window = node.windows.get(tap)
                    if window is not None:
                        node.windows[tap] = replace(window, complete=False)
            if event.reason not in ("seconds", "packets", "bytes"):
                self._say(f"packets of {event.node} are not captured any more: {event.text}")

    def _statistics(self, node: _Node, event: Statistics) -> None:
        self._bounds.before(event.node, event.wall_ns, HERE, event.received_ns)
        away = event.received_ns - event.wall_ns
        node.offset = away if node.offset is None else min(node.offset, away)
        node.heard = (event.wall_ns + node.offset) / 1e9
        for tap, numbers in event.taps.items():
            before = node.statistics.get(tap)
            lost = numbers.dropped - (before.dropped if before is not None else 0)
            if lost:
                if not self.lost[event.node]:
                    self._say(f"{event.node}: its kernel dropped packets of {tap.interface}")
                self.lost[event.node] += lost
            node.statistics[tap] = numbers
            window = node.windows.get(tap)
            if window is not None:
                whole = window.complete and not lost
                node.windows[tap] = replace(window, end=event.wall_ns, complete=whole)

    def _keep(self, flow: FlowKey, packet: CapturedPacket, now: float, *, opening: bool) -> None:
        key = min(flow, reverse_key(flow))
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = _Kept(now)
            heapq.heappush(self._due, (now + _LOOK_AFTER, key))
        if opening and kept.opened is None:
            kept.opened = flow
        kept.packets.append(packet)
        self._count += 1
        if len(kept.packets) > _EACH:
            less = len(kept.packets) // 2
            kept.packets.sort(key=lambda one: one.time_ns)
            del kept.packets[:less]
            kept.cut = True
            self._count -= less
            self.dropped += less

    def _bound(self) -> None:
        """Drops tuples in the order in which they came, told ones before others."""
        if self._count <= _MOST:
            return
        order = sorted(
            self._kept, key=lambda key: (key not in self._claimed, self._kept[key].heard)
        )
        for key in order:
            if self._count <= _MOST * 3 // 4:
                return
            gone = self._kept.pop(key)
            self._count -= len(gone.packets)
            if key not in self._claimed:
                self.dropped += len(gone.packets)

    # what is asked

    def ready(self, since: float, *, failed: bool) -> bool:
        """Whether the packets have come of what was told at `since`, our time."""
        until = since + (_LONG if failed else _BEHIND)
        with self._lock:
            return all(one.heard >= until for one in self._nodes.values() if one.live)

    def take(self, followed: Followed, *, final: bool) -> SeenPackets | None:
        """What was captured of it; None: nothing, or there was no time to look.  `final`: it is
        over, and its packets are not asked for again."""
        halves = [half.entry for half in followed.connection.halves]
        keys = {key_of(half) for entry in halves for half in (entry.orig, entry.reply)}
        entries = [
            Tracked(node=half.place.node, entry=half.entry)
            for half in followed.connection.halves
            if not half.place.pod
        ]
        if not followed.judgement.failed and self._busy():
            self.passed_over += 1
            self._claim(keys, drop=final)
            return None
        found = self._stitch(keys, entries, followed.began)
        self._claim(keys, drop=final)
        return found

    def alone(
        self, knows: Callable[[Tuple5], bool], heard: Callable[[float], bool], now: float
    ) -> Iterable[SeenPackets]:
        """Openings that failed and that conntrack did not tell.

        `knows`: whether it has told one of this tuple, or will; `heard`: whether it has told all
        that was before then, our time.
        """
        with self._lock:
            for key in [key for key, until in self._claimed.items() if until < now][:1000]:
                del self._claimed[key]
            due = []
            while self._due and self._due[0][0] <= now:
                due.append(heapq.heappop(self._due)[1])
        for key in due:
            kept = self._kept.get(key)
            if kept is None or kept.opened is None:
                self._let_go(key, kept)
                continue
            age = now - kept.heard
            if key in self._claimed or knows(tuple5_of(kept.opened)):
                continue
            if not heard(kept.heard + 0.5) and age < _GIVE_UP:
                self._again(key, now)
                continue
            found = self._stitch({key}, (), None)
            state = None if found is None else state_of(found.connection)
            silent = state in (State.UNANSWERED, State.PENDING)
            if silent and age < (_SILENT_AFTER if state is State.UNANSWERED else _GIVE_UP):
                self._again(key, now)
            elif found is not None and state in _ALONE:
                self._claim({key}, drop=True)
                yield found

    def _let_go(self, key: FlowKey, kept: _Kept | None) -> None:
        """Without a beginning, and told: the last packets of what is over."""
        if kept is not None and key in self._claimed:
            with self._lock:
                if self._kept.pop(key, None) is not None:
                    self._count -= len(kept.packets)

    def _again(self, key: FlowKey, now: float) -> None:
        with self._lock:
            heapq.heappush(self._due, (now + 0.5, key))

    def _busy(self) -> bool:
        return self._spent > 2.0 + _SHARE * (time.monotonic() - self._begun)

    def _claim(self, keys: Iterable[FlowKey], *, drop: bool) -> None:
        until = time.time() + _CLAIMED_FOR
        with self._lock:
            for key in keys:
                self._claimed[key] = until
                gone = self._kept.pop(key, None) if drop else None
                if gone is not None:
                    self._count -= len(gone.packets)

    def _stitch(
        self, keys: Iterable[FlowKey], entries: Sequence[Tracked], began: float | None
    ) -> SeenPackets | None:
        begun = time.thread_time()
        with self._lock:
            found = [self._kept[key] for key in keys if key in self._kept]
            packets = [packet for kept in found for packet in kept.packets]
            cut = any(kept.cut for kept in found)
            windows = {t: w for node in self._nodes.values() for t, w in node.windows.items()}
            if not packets:
                return None
            collection = collect_packets(
                packets, windows=windows, bounds=self._bounds, routes=self._routes, entries=entries
            )
        connections = [one for one in collection.stitched.connections if one.there.units]
        self._spent += time.thread_time() - begun
        if not connections:
            return None
        if began is None:
            chosen = connections[-1]
        else:
            shift = self._shift(packets[0].tap.node)
            at = int(began * 1e9) - shift
            chosen = min(connections, key=lambda one: abs(one.begin - at))
        taps = {s.tap for flow in (chosen.there, chosen.back) for s in flow.stations}
        whole = not cut and all(t in windows and windows[t].complete for t in taps)
        return SeenPackets(connection=chosen, clocks=collection.clocks, whole=whole)

    def _shift(self, node: str) -> int:
        """What a clock is behind the others', where that is more than delays make."""
        offsets = {name: one.offset for name, one in self._nodes.items() if one.offset is not None}
        apart = offsets.get(node, 0) - min(offsets.values(), default=0)
        return apart if apart > _APART else 0


def key_of(half: Tuple5) -> FlowKey:
    """The tuple as packets are kept by it, the same for both directions."""
    sport, dport = half.sport or 0, half.dport or 0
    if half.protocol in (Protocol.ICMP, Protocol.ICMPV6):
        dport = sport
    key = half.protocol, half.src.packed, sport, half.dst.packed, dport
    return min(key, reverse_key(key))
