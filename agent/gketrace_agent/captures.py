"""The Capture call: rings opened, read in turn, and their blocks sent on until something ends it.

There is no queue between a ring and its client: while the client does not read, the ring fills,
and what it has no room for the kernel drops and counts.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from typing import Final, TypeAlias

from gketrace.errors import GketraceError, UsageError
from gketrace.trace import NetnsKind
from gketrace_agent.capture_counts import CAPTURES
from gketrace_agent.capture_finish import Finish
from gketrace_agent.capture_limits import CaptureLimits
from gketrace_agent.capture_taps import CapturePlace, OpenTap, encode_packets, open_tap
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import run_in_netns
from gketrace_agent.kernel.packet_ring import BLOCK_SIZE
from gketrace_agent.observe.netns_use import netns_is_used
from gketrace_proto.v1alpha1 import capture_pb2 as pb

__all__ = ["capture_packets"]

Reply: TypeAlias = pb.CaptureReply | bytes
"""A message, or one that is encoded already."""

_MOST_TAPS: Final = 32
_HEADERS: Final = 128
"""Bytes: Ethernet with a tag, IPv6, and TCP with all its options are 114."""
_LONGEST_SNAP: Final = 262_144
_RING: Final = 16 << 20
_LATENCY: Final = 0.1
_LATENCIES: Final = (0.01, 2.0)
_RETIRE_SHARE: Final = 0.4
"""Of the latency.  The kernel hands a block over after one to two retire times."""
_RETIRE_MS: Final = 40
"""At most; beyond that only gathering takes longer."""
_STATISTICS_EVERY: Final = 0.5
_STATISTICS: Final = (0.2, 10.0)
_LOOK_EVERY: Final = 1.0
"""Seconds between looks at whether a pod's namespace is still used."""
_GATHER_SHARE: Final = 0.4
"""Of the latency, at least: for so long blocks are gathered, so that messages are few."""
_STEPS: Final = (0.01, 0.04)
"""Seconds between looks at how many there are."""
_MOST_BLOCKS: Final = 16
"""Of one message.  What is larger is mapped by itself (`kernel.memory`): that costs more than to
have fewer messages saves."""
_HELD_UP: Final = 0.05
"""Seconds for a message, from which on the client is what holds up the capture."""


def capture_packets(
    request: pb.CaptureRequest,
    places: Sequence[CapturePlace],
    *,
    node: str,
    limits: CaptureLimits,
    paths: HostPaths,
    finish: Finish,
    active: Callable[[], bool],
) -> Generator[Reply, None, None]:
    """The replies to `request`, until a limit is reached, `finish` is asked for, or `active` says
    no.

    Raises `UsageError` for filters that libpcap does not take, `NotFoundError`, `ExhaustedError`,
    `ForbiddenError`, `UnavailableError`.
    """
    if not places:
        raise UsageError("the request names no tap")
    if len(places) > _MOST_TAPS:
        raise UsageError(f"a capture has {_MOST_TAPS} taps at most")
    with ExitStack() as stack:
        CAPTURES.enter()
        stack.callback(CAPTURES.leave)
        capture = _Capture(request, node, limits, paths, finish, active)
        stack.callback(capture.close)
        for place in places:
            capture.open(place)
        yield from capture.replies()


class _Capture:
    def __init__(
        self,
        request: pb.CaptureRequest,
        node: str,
        limits: CaptureLimits,
        paths: HostPaths,
        finish: Finish,
        active: Callable[[], bool],
    ) -> None:
        self._request = request
        self._node = node
        self._paths = paths
        self._finish = finish
        self._active = active
        self._taps: list[OpenTap] = []
        self._most_ring = limits.ring_bytes
        self._lowered: list[str] = []
        asked = request.limits
        self._seconds = self._granted("seconds", asked.seconds, limits.seconds)
        self._packets = int(self._granted("packets", asked.packets, limits.packets))
        self._bytes = int(self._granted("bytes", asked.bytes, limits.bytes))
        wanted = request.latency_seconds or _LATENCY
        self._latency = min(max(wanted, _LATENCIES[0]), _LATENCIES[1])
        self._retire_ms = min(max(int(self._latency * _RETIRE_SHARE * 1000), 1), _RETIRE_MS)
        self._gathering = max(
            self._latency - 2 * self._retire_ms / 1000, self._latency * _GATHER_SHARE
        )
        every = request.quiet_statistics_seconds or request.statistics_seconds or _STATISTICS_EVERY
        self._statistics_every = min(max(every, _STATISTICS[0]), _STATISTICS[1])
        self._drain = 2.5 * self._retire_ms / 1000 + 0.02
        """Seconds after which all that a ring had is handed over."""
        self._poll = select.poll()
        self._poll.register(finish, select.POLLIN)
        self._asked = select.poll()
        """For `finish` alone."""
        self._asked.register(finish, select.POLLIN)
        self._finishing = False
        self._in_pods = False

    def _granted(self, what: str, asked: float, most: float) -> float:
        if asked < 0:
            raise UsageError(f"a capture of {asked:g} {what} makes no sense")
        if asked > most:
            self._lowered.append(f"{what}: {most:g}, not {asked:g}, is this agent's limit")
        return min(asked or most, most)

    # opening

    def open(self, place: CapturePlace) -> None:
        """Raises as `capture_packets` does."""
        index = len(self._taps)
        snap = place.request.snap_length or _HEADERS
        if snap > _LONGEST_SNAP:
            self._lowered.append(f"snap length: {_LONGEST_SNAP} is the most, not {snap}")
            snap = _LONGEST_SNAP
        wanted = self._request.ring_bytes or _RING
        granted = CAPTURES.take_memory(wanted, self._most_ring)
        if granted < wanted // BLOCK_SIZE * BLOCK_SIZE:
            mebibytes = wanted / (1 << 20)
            self._lowered.append(
                f"tap {index}: a ring of {granted / (1 << 20):g} MiB, not {mebibytes:g}, as the "
                f"agent's captures may have {self._most_ring >> 20} MiB together"
            )
        try:
            tap = run_in_netns(
                place.namespace.handle,
                lambda: open_tap(
                    place,
                    index=index,
                    snap=snap,
                    ring_bytes=granted,
                    retire_ms=self._retire_ms,
                    hardware_timestamps=self._request.hardware_timestamps,
                ),
            )
        except GketraceError as error:
            CAPTURES.give_memory(granted)
            where = f"{place.namespace.ref} {place.request.interface}"
            raise type(error)(f"{where}: {error.message}", hint=error.hint) from None
        self._taps.append(tap)
        self._in_pods |= place.namespace.ref.kind is not NetnsKind.HOST
        self._poll.register(tap.ring, select.POLLIN)

    def close(self) -> None:
        for tap in self._taps:
            if not tap.over:
                tap.count()
            tap.ring.close()
            CAPTURES.give_memory(tap.granted)
        self._taps.clear()

    # reading

    def replies(self) -> Iterator[Reply]:
        now = time.monotonic()
        deadline = now + self._seconds
        yield self._started()
        statistics_at = now + self._statistics_every
        look_at = now + _LOOK_EVERY
        while any(not tap.over for tap in self._taps):
            waits = [statistics_at, deadline, *(tap.until for tap in self._taps if tap.until)]
            if self._in_pods:
                waits.append(look_at)
            ready = self._poll.poll(max(min(waits) - time.monotonic(), 0) * 1000)
            if not self._active():
                return
            if not self._finishing and self._asked.poll(0):
                self._finishing = True
                self._poll.unregister(self._finish)
                self._end(self._taps, pb.CAPTURE_END_REASON_FINISHED, "its client has finished it")
            yield from self._read(ready)
            now = time.monotonic()
            if now >= deadline:
                text = f"it has captured for {self._seconds:g} s"
                self._end(self._taps, pb.CAPTURE_END_REASON_SECONDS, text)
                deadline = float("inf")
            if now >= look_at:
                look_at = now + _LOOK_EVERY
                self._look()
            if now >= statistics_at:
                statistics_at = now + self._statistics_every
                yield self._statistics()
            yield from self._ended(now)

    def _read(self, ready: list[tuple[int, int]]) -> Iterator[Reply]:
        """What the rings have, in turn; a message of each at a time."""
        events = dict(ready)
        for tap in self._taps:
            if events.get(tap.ring.fileno(), 0) & ~select.POLLIN and tap.ring.is_gone():
                name = tap.ring.interface.name
                text = f"interface {name} was deleted, or moved to another namespace"
                self._end([tap], pb.CAPTURE_END_REASON_INTERFACE_GONE, text)
        taps = [tap for tap in self._taps if not tap.over]
        if not any(tap.ring.ready(1) for tap in taps):
            return
        if not self._finishing:
            self._gather(taps)
        again = True
        while again and self._active():
            for tap in taps:
                yield from self._send(tap)
            again = any(tap.fullness() >= 1 for tap in taps)

    def _gather(self, taps: Sequence[OpenTap]) -> None:
        begun = now = time.monotonic()
        end = begun + self._gathering
        while (fullest := max(tap.fullness() for tap in taps)) < 1 and now < end:
            # Half the time that it would take at this rate.
            half = (now - begun) * (1 - fullest) / max(fullest, 0.01) / 2
            wait = min(max(half, _STEPS[0]), _STEPS[1], end - now)
            if self._asked.poll(wait * 1000):
                return
            now = time.monotonic()

    def _send(self, tap: OpenTap) -> Iterator[Reply]:
        blocks = tap.ring.take(blocks=_MOST_BLOCKS, packets=self._packets, size=self._bytes)
        message = encode_packets(tap.index, blocks) if blocks.parts else b""
        packets, size = sum(blocks.counts), blocks.size
        tap.ring.give_back()
        if message:
            tap.packets += packets
            tap.bytes += size
            self._packets -= packets
            self._bytes -= size
            CAPTURES.add(packets=packets, size=size)
            tap.count()
            begun = time.monotonic()
            yield message
            if time.monotonic() - begun > _HELD_UP:
                waiting = tap.count()
                tap.waiting += waiting
                CAPTURES.add(waiting=waiting)
        if self._packets <= 0:
            text = "it has captured as many packets as it may"
            self._end(self._taps, pb.CAPTURE_END_REASON_PACKETS, text, now=True)
        elif tap.ring.cut or self._bytes <= 0:
            text = "it has captured as many bytes as it may"
            self._end(self._taps, pb.CAPTURE_END_REASON_BYTES, text, now=True)

    def _look(self) -> None:
        """Whether the pods' namespaces are used by anybody but this capture, which keeps them."""
        for tap in self._taps:
            namespace = tap.place.namespace
            if tap.over or tap.reason or namespace.ref.kind is NetnsKind.HOST:
                continue
            if not netns_is_used(self._paths, namespace.handle):
                text = f"nothing uses the namespace of {namespace.ref} any more: the pod has ended"
                self._end([tap], pb.CAPTURE_END_REASON_NAMESPACE_GONE, text)

    def _end(
        self,
        taps: Sequence[OpenTap],
        reason: pb.CaptureEndReason.ValueType,
        text: str,
        *,
        now: bool = False,
    ) -> None:
        """Lets taps end when their rings are drained, or at once."""
        until = time.monotonic() + (0 if now else self._drain)
        for tap in taps:
            if not tap.reason:
                tap.reason, tap.text, tap.until = reason, text, until
                tap.drained = now
                tap.ring.shut()

    def _ended(self, now: float) -> Iterator[Reply]:
        """Statistics and the ends of the taps whose time has come."""
        ending = [
            tap
            for tap in self._taps
            if tap.until and now >= tap.until and (tap.drained or not tap.ring.ready(1))
        ]
        if not ending:
            return
        yield self._statistics()
        for tap in ending:
            tap.until, tap.over = 0.0, True
            self._poll.unregister(tap.ring)
            yield pb.CaptureReply(
                end=pb.CaptureEnd(taps=[tap.index], reason=tap.reason, text=tap.text)
            )

    # messages

    def _started(self) -> Reply:
        return pb.CaptureReply(
            started=pb.CaptureStarted(
                node=self._node,
                taps=[tap.started for tap in self._taps],
                limits=pb.CaptureLimits(
                    seconds=self._seconds, packets=self._packets, bytes=self._bytes
                ),
                wall_ns=time.time_ns(),
                monotonic_ns=time.monotonic_ns(),
                latency_seconds=self._latency,
                lowered=self._lowered,
                capture_id=self._finish.id,
            )
        )

    def _statistics(self) -> Reply:
        return pb.CaptureReply(
            statistics=pb.CaptureStatistics(
                taps=[tap.statistics() for tap in self._taps],
                wall_ns=time.time_ns(),
                monotonic_ns=time.monotonic_ns(),
            )
        )
