"""A FollowConntrack call to each agent, kept up: what ends is begun again, and what that cost is
said."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from queue import Full, Queue
from typing import TYPE_CHECKING, Any, Final

from gketrace.connections import Place
from gketrace.errors import GketraceError
from gketrace_cli.conntrack_reading import check_events
from gketrace_proto.v1alpha1 import agent_pb2 as pb

if TYPE_CHECKING:
    from gketrace_cli.agents import Fleet
    from gketrace_cli.conntrack_reading import Place as Target

__all__ = ["Arrived", "Streams"]

_AHEAD: Final = 64
"""Replies that are read before they are wanted; beyond that, the agents wait."""
_RETRY_SECONDS: Final = (0.3, 0.5, 1.0, 2.0, 3.0, 5.0)
_SILENCE: Final = 30.0
"""Seconds without a message after which a call is given up.  Agents send one a second; on a node
without processor time to spare it comes late, and a call that goes on misses nothing."""
_FRESH_AFTER: Final = 2
"""Attempts over the way that there was, before the agent is looked for anew."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """What came from one place."""

    place: Place
    turn: int
    """Of the calls to this place: the later, the newer its filters."""
    at: float
    """When it came, seconds since the epoch, by our clock."""
    reply: pb.FollowConntrackReply | None = None
    error: str = ""
    """Why the call ended, when it did."""


class _Call:
    def __init__(self, turn: int) -> None:
        self.turn = turn
        self.over = threading.Event()


class Streams:
    """Calls to all places; read `arrived`."""

    def __init__(self, fleet: Fleet, refresh: Callable[[], Fleet]) -> None:
        """`refresh` reaches the agents anew: theirs may be other pods now."""
        self.arrived: Queue[Arrived] = Queue(maxsize=_AHEAD)
        self._fleet = fleet
        self._refresh = refresh
        self._refreshing = threading.Lock()
        self._refreshed_at = 0.0
        self._calls: dict[Place, list[_Call]] = {}
        self._turn = 0
        self._closed = threading.Event()

    def follow(self, targets: Iterable[Target], filters: Sequence[pb.ConntrackFilter]) -> None:
        """Begins a call to each; those that are under way go on until `settle`."""
        self._turn += 1
        for target in targets:
            place = Place(node=target.node, pod=target.pod.key if target.pod else "")
            call = _Call(self._turn)
            self._calls.setdefault(place, []).append(call)
            request = pb.FollowConntrackRequest(
                target=target.target,
                any=filters,
                existing=True,
                format=pb.CONNTRACK_FORMAT_RECORDS,
            )
            threading.Thread(
                target=self._run,
                args=(place, call, request),
                name=f"follow-{place}",
                daemon=True,
            ).start()

    def settle(self, place: Place, turn: int) -> None:
        """The call `turn` has begun: ends those before it."""
        calls = self._calls.get(place, [])
        for call in calls:
            if call.turn < turn:
                call.over.set()
        self._calls[place] = [call for call in calls if call.turn >= turn]

    def close(self) -> None:
        self._closed.set()
        for calls in self._calls.values():
            for call in calls:
                call.over.set()

    def _run(self, place: Place, call: _Call, request: pb.FollowConntrackRequest) -> None:
        failures = 0
        while not call.over.is_set():
            begun = time.monotonic()
            error = self._read(place, call, request)
            if call.over.is_set():
                return
            self._put(call, Arrived(place, call.turn, time.time(), error=error))
            failures = 0 if time.monotonic() - begun > 30.0 else failures + 1
            call.over.wait(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS)) - 1])
            if failures > _FRESH_AFTER:
                self._look_again(place)

    def _read(self, place: Place, call: _Call, request: pb.FollowConntrackRequest) -> str:
        """Why it ended."""
        calls = {place: (place.node, "FollowConntrack", request)}
        stream: Any = self._fleet.stream(calls, silence=_SILENCE)
        try:
            for _, reply in stream:
                if call.over.is_set():
                    return ""
                if reply is None:
                    return "the agent ended the call"
                if isinstance(reply, GketraceError):
                    return reply.message
                check_events(reply)
                self._put(call, Arrived(place, call.turn, time.time(), reply))
        except GketraceError as error:
            return error.message
        except (RuntimeError, ValueError) as error:  # the channel was closed meanwhile
            return str(error)
        finally:
            stream.close()
        return "the call ended"

    def _put(self, call: _Call, what: Arrived) -> None:
        while not call.over.is_set() and not self._closed.is_set():
            try:
                self.arrived.put(what, timeout=0.2)
                return
            except Full:
                continue

    def _look_again(self, place: Place) -> None:
        with self._refreshing:
            if time.monotonic() - self._refreshed_at < 5.0:
                return
            self._refreshed_at = time.monotonic()
            try:
                fleet = self._refresh()
            except GketraceError:
                return  # as before: the next attempt says what stands in the way
            if fleet.failure(place.node) is None:
                self._fleet = fleet
