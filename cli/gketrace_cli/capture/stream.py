"""Captures on many agents at once: one call for each agent, with all its taps.

What comes back are events, in the order in which they come: `Started`, `Batch`, `Statistics`,
`TapsEnded`, and `AgentFailed` for an agent that cannot be reached, refuses, or dies.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from queue import Empty, Queue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import grpc

from gketrace.capture.packets import Tap
from gketrace.errors import GketraceError, UnavailableError
from gketrace.trace import NetnsRef
from gketrace_cli.capture.batch import PacketBatch, batch_from_blocks
from gketrace_cli.capture.wire import RawPackets, check_reply, parse_reply
from gketrace_proto.codec import decode
from gketrace_proto.v1alpha1 import capture_pb2 as pb

if TYPE_CHECKING:
    from gketrace_cli.agents import Fleet

__all__ = [
    "AgentFailed",
    "Batch",
    "CaptureStream",
    "Event",
    "Started",
    "Statistics",
    "TapStatistics",
    "TapsEnded",
]

_METHOD: Final = "/gketrace.v1alpha1.Agent/Capture"
_AHEAD: Final = 8
"""Replies of all agents, of 4 MiB at most, that are read before they are wanted; beyond that, the
agents wait, and then their rings fill."""
_LOOK: Final = 1.0
"""Seconds between looks at whether to stop, when nothing comes."""
_DRIFT: Final = 0.001
"""By so much one machine's monotonic clock may be faster than another's: NTP turns them by at most
500 parts in a million."""
_GRACE: Final = 3.0
"""Seconds that the last statistics, or the next of the last messages, may take after `stop`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """An agent's taps are open."""

    node: str
    taps: tuple[Tap, ...]
    reply: pb.CaptureStarted
    """What was granted, and clocks."""
    received_ns: int
    """This machine's wall clock when the reply came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Packets of one tap."""

    node: str
    batch: PacketBatch

    @property
    def tap(self) -> Tap:
        return self.batch.tap


@dataclass(frozen=True, slots=True, kw_only=True)
class TapStatistics:
    """From the start of the capture on; see CaptureTapStatistics."""

    received: int = 0
    dropped: int = 0
    dropped_waiting: int = 0
    freezes: int = 0
    packets: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """As often as the request says.  All packets of blocks that were closed by `wall_ns` have come
    before."""

    node: str
    taps: Mapping[Tap, TapStatistics]
    wall_ns: int
    """The node's clock."""
    monotonic_ns: int
    received_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TapsEnded:
    """By the agent; packets and statistics of these taps have come before."""

    node: str
    taps: tuple[Tap, ...]
    reason: str
    """``seconds``, ``packets``, ``bytes``, ``namespace-gone``, ``interface-gone``, ``stopping``,
    ``finished``; ``unknown`` is a newer agent's."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentFailed:
    """Its call ended with an error; `taps` are those that had not ended."""

    node: str
    taps: tuple[Tap, ...]
    error: GketraceError


Event: TypeAlias = Started | Batch | Statistics | TapsEnded | AgentFailed


@dataclass(slots=True)
class _Call:
    node: str
    stub: Any
    replies: Any
    asked: float
    """When, by this machine's monotonic clock."""
    begun_ns: int = 0
    """By the node's; it was asked before that."""
    latency: float = 0.0
    """Seconds."""
    taps: tuple[Tap, ...] = ()
    ended: frozenset[int] = frozenset()
    stopped: bool = False
    """Statistics have come after `stop`."""
    capture_id: str = ""
    """Empty: the agent does not know FinishCapture, or has not yet said."""
    finish: Any = None
    """The call that ends it, once it is made."""

    @property
    def told(self) -> bool:
        """Whether the agent was told to finish, and did not refuse."""
        finish = self.finish
        return finish is not None and not (
            finish.done() and finish.code() is not grpc.StatusCode.OK
        )

    @property
    def live(self) -> tuple[Tap, ...]:
        return tuple(tap for tap in self.taps if tap.index not in self.ended)

    def has_all(self, until: float, monotonic_ns: int) -> bool:
        """Whether statistics of that time on the node's clock come after all that was captured
        until then on this machine's.

        The node was asked at a known time here, and began at a known time there, later: so we know
        what its clock said at most at any time here, whatever messages take.
        """
        passed = (until - self.asked) * (1 + _DRIFT) + self.latency
        return monotonic_ns - self.begun_ns >= passed * 1e9


class CaptureStream:
    """The calls of one command.  A context manager; leaving it ends all of them.

    `descriptions` are the taps' `Tap.description`, by node, in the order of the request's taps.
    """

    def __init__(
        self,
        fleet: Fleet,
        requests: Mapping[str, pb.CaptureRequest],
        *,
        descriptions: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self._fleet = fleet
        self._requests = requests
        self._descriptions = descriptions or {}
        self._arrived: Queue[tuple[str, Any]] = Queue(maxsize=_AHEAD)
        self._calls: dict[str, _Call] = {}
        self._threads: list[threading.Thread] = []
        self._stopped = 0.0
        self._stop_by = 0.0
        self._woken, self._wake = os.pipe()
        """A signal's handler may write to it, and take no lock.  It is open as long as there is
        somebody to call `stop`."""
        for end in (self._woken, self._wake):
            weakref.finalize(self, os.close, end)
        self._closing = False
        self._finisher = threading.Thread(target=self._finish, name="capture-end", daemon=True)

    def __enter__(self) -> CaptureStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def nodes(self) -> tuple[str, ...]:
        """Those that are asked."""
        return tuple(self._requests)

    def stop(self) -> None:
        """Lets `events` end when all has come that was captured until now.  May be called by a
        signal's handler.

        Agents are told to finish.  From one that does not know that call, or refuses it, statistics
        are awaited before which all has come.
        """
        self._stopped = time.monotonic()
        self._stop_by = self._stopped + _GRACE
        os.write(self._wake, b"\0")

    def close(self) -> None:
        """Ends all calls now.  May be called twice."""
        for call in self._calls.values():
            call.replies.cancel()
        while any(thread.is_alive() for thread in self._threads):
            try:  # a full queue would keep them
                self._arrived.get(timeout=0.01)
            except Empty:
                continue
        self._threads.clear()
        self._closing = True
        os.write(self._wake, b"\0")
        if self._finisher.is_alive():
            self._finisher.join()

    def events(self) -> Iterator[Event]:
        """Until every agent's call has ended, or `stop`."""
        self._finisher.start()
        for node, request in self._requests.items():
            try:
                self._open(node, request)
            except GketraceError as error:
                yield AgentFailed(node=node, taps=(), error=error)
        while self._calls:
            try:
                node, reply = self._arrived.get(timeout=_LOOK)
            except Empty:
                if self._stop_by and time.monotonic() > self._stop_by:
                    break
                continue
            call = self._calls.get(node)
            if call is None:
                continue
            try:
                yield from self._event(call, reply)
            except GketraceError as error:
                call.replies.cancel()
                self._calls.pop(node, None)
                yield AgentFailed(node=node, taps=call.live, error=_not_understood(node, error))
            if self._stop_by and call.told:
                # Rings are shut: what comes now has an end.
                self._stop_by = max(self._stop_by, time.monotonic() + _GRACE)
            if self._stop_by and time.monotonic() > self._stop_by:
                break
        for call in self._calls.values():
            if call.capture_id:
                text = f"its last packets and numbers did not come within {_GRACE:g} s"
                yield AgentFailed(node=call.node, taps=call.live, error=UnavailableError(text))

    def _finish(self) -> None:
        """Tells agents to end their captures, once `stop` has been called.  In its own thread: it
        must not be done in a signal's handler, and events go on meanwhile."""
        while True:
            os.read(self._woken, 1)
            if self._closing:
                return
            for call in tuple(self._calls.values()):
                if call.capture_id and call.finish is None:
                    request = pb.FinishCaptureRequest(capture_id=call.capture_id)
                    call.finish = call.stub.FinishCapture.future(request, timeout=_GRACE)

    def _open(self, node: str, request: pb.CaptureRequest) -> None:
        agent = self._fleet.agent(node)
        # Packets are taken out of the message without the copies that its parsing would make.
        method = agent.channel.unary_stream(
            _METHOD,
            request_serializer=pb.CaptureRequest.SerializeToString,
            response_deserializer=parse_reply,
        )
        asked = time.monotonic()
        replies = method(request)
        self._calls[node] = _Call(node, agent.stub, replies, asked)
        thread = threading.Thread(
            target=self._read,
            args=(node, replies, asked),
            name=f"capture-{node}",
            daemon=True,
        )
        self._threads.append(thread)
        thread.start()

    def _read(self, node: str, replies: Any, begun: float) -> None:
        end: GketraceError | None = None
        try:
            for reply in replies:
                if isinstance(reply, GketraceError):
                    replies.cancel()
                    end = _not_understood(node, reply)
                    break
                self._arrived.put((node, reply))
        except grpc.RpcError as error:
            end = self._fleet.explain(node, error, time.monotonic() - begun)
        self._arrived.put((node, end))

    def _event(self, call: _Call, reply: Any) -> Iterator[Event]:
        node = call.node
        if isinstance(reply, RawPackets | pb.CaptureReply):
            check_reply(reply, asked=len(self._requests[node].taps), taps=len(call.taps))
        if isinstance(reply, RawPackets):
            tap = call.taps[reply.tap]
            batch = batch_from_blocks(tap, reply.data, reply.counts, reply.lengths)
            yield Batch(node=node, batch=batch)
        elif reply is None or isinstance(reply, GketraceError):
            del self._calls[node]
            if reply is not None:
                yield AgentFailed(node=node, taps=call.live, error=reply)
        elif reply.HasField("started"):
            call.taps = self._taps(node, reply.started)
            call.begun_ns = reply.started.monotonic_ns
            call.latency = reply.started.latency_seconds
            call.capture_id = reply.started.capture_id
            if self._stopped:
                os.write(self._wake, b"\0")
            yield Started(
                node=node, taps=call.taps, reply=reply.started, received_ns=time.time_ns()
            )
        elif reply.HasField("statistics"):
            yield self._statistics(call, reply.statistics)
        elif reply.HasField("end"):
            ended = tuple(call.taps[index] for index in reply.end.taps)
            call.ended |= frozenset(reply.end.taps)
            known = pb.CaptureEndReason.DESCRIPTOR.values_by_number.get(reply.end.reason)
            reason = "unknown" if known is None else known.name.removeprefix("CAPTURE_END_REASON_")
            yield TapsEnded(
                node=node,
                taps=ended,
                reason=reason.lower().replace("_", "-"),
                text=reply.end.text,
            )

    def _statistics(self, call: _Call, message: pb.CaptureStatistics) -> Statistics:
        received_ns = time.time_ns()
        if not self._stopped or call.told:
            pass
        elif call.stopped or call.has_all(self._stopped, message.monotonic_ns):
            call.replies.cancel()
            del self._calls[call.node]
        else:
            # Made before `stop`, perhaps; the second one is not.
            call.stopped = True
        numbers = (
            TapStatistics(
                received=one.received,
                dropped=one.dropped,
                dropped_waiting=one.dropped_waiting,
                freezes=one.freezes,
                packets=one.packets,
                bytes=one.bytes,
            )
            for one in message.taps
        )
        return Statistics(
            node=call.node,
            taps=dict(zip(call.taps, numbers, strict=True)),
            wall_ns=message.wall_ns,
            monotonic_ns=message.monotonic_ns,
            received_ns=received_ns,
        )

    def _taps(self, node: str, started: pb.CaptureStarted) -> tuple[Tap, ...]:
        words = self._descriptions.get(node, ())
        return tuple(
            Tap(
                node=node,
                netns=decode(NetnsRef, one.netns),
                interface=one.interface,
                link_type=one.link_type,
                ifindex=one.ifindex,
                mtu=one.mtu,
                hardware=one.hardware,
                snap_length=one.snap_length,
                filter=one.filter,
                excluded=tuple((part.filter, part.reason) for part in one.excluded),
                index=index,
                description=words[index] if index < len(words) else "",
                interfaces=dict(one.interfaces),
            )
            for index, one in enumerate(started.taps)
        )


def _not_understood(node: str, error: GketraceError) -> GketraceError:
    return UnavailableError(f"the agent of node {node} is not understood: {error.message}")
