"""Who asks the API server now: so many at once, the others in turn, and nobody waits for ever.

A crowd that sends tokens which it made up must keep out neither who was let in lately nor who comes
for the first time.  So some seats are kept for who is known; the others are given in turn to each
that waits, however many questions it has; and when too many wait, one of whoever has most of them
is turned away.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from gketrace.errors import ExhaustedError

__all__ = ["Seats"]

_SECONDS: Final = 4.0
"""That one waits for a seat."""


@dataclass(slots=True, eq=False)
class _Waiter:
    who: Hashable
    called: threading.Event = field(default_factory=threading.Event)
    seated: bool = False


class _Room:
    """Those who wait, in turn by who they are."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._queues: dict[Hashable, deque[_Waiter]] = {}
        """In the order in which they come next."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def enter(self, waiter: _Waiter) -> _Waiter | None:
        """None, or who is turned away for it: the last of whoever has most, itself perhaps."""
        queue = self._queues.setdefault(waiter.who, deque())
        queue.append(waiter)
        self._count += 1
        if self._count <= self._size:
            return None
        # Of two with as many, the later one.
        longest = max(reversed(self._queues.values()), key=len)
        out = longest[-1]
        self.leave(out)
        return out

    def leave(self, waiter: _Waiter) -> None:
        """Does nothing when it is gone already."""
        queue = self._queues.get(waiter.who)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
            self._count -= 1
            if not queue:
                del self._queues[waiter.who]

    def next(self) -> _Waiter:
        who, queue = next(iter(self._queues.items()))
        waiter = queue.popleft()
        self._count -= 1
        del self._queues[who]
        if queue:
            self._queues[who] = queue  # behind the others
        return waiter


class Seats:
    """Any thread may take one."""

    def __init__(self, seats: int, *, kept: int, waiting: int, seconds: float = _SECONDS) -> None:
        """`kept`: of the seats, for who is known.  `waiting`: as many of each, known or not."""
        self._seats = seats
        self._kept = kept
        self._seconds = seconds
        self._lock = threading.Lock()
        self._taken = 0
        self._known = _Room(waiting)
        self._others = _Room(waiting)

    @contextmanager
    def take(self, who: Hashable, *, known: bool) -> Iterator[None]:
        """A seat while it lasts.  Raises `ExhaustedError`: too many wait, or for too long."""
        waiter = _Waiter(who)
        room = self._known if known else self._others
        with self._lock:
            out = room.enter(waiter)
            self._call()
        if out is not None:
            out.called.set()
        if not waiter.called.wait(self._seconds):
            with self._lock:
                room.leave(waiter)
        if not waiter.seated:
            raise ExhaustedError(
                "too many callers wait for the API server's word on them", hint="try again"
            )
        try:
            yield
        finally:
            with self._lock:
                self._taken -= 1
                self._call()

    def _call(self) -> None:
        """Those whose turn it is."""
        while True:
            if self._known and self._taken < self._seats:
                waiter = self._known.next()
            elif self._others and self._taken < self._seats - self._kept:
                waiter = self._others.next()
            else:
                return
            self._taken += 1
            waiter.seated = True
            waiter.called.set()
