"""Who asks the API server now: so many at once, the others in turn, and nobody waits for ever.

A crowd that sends tokens which it made up must keep out neither who was let in lately nor who comes
for the first time.  So some seats are kept for who is known; the others are given first to whoever
has asked least lately, and when too many wait, one of whoever has asked most is turned away.  A
crowd has to make a new connection for each of its lies.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from gketrace.errors import ExhaustedError

__all__ = ["Seats"]

_SECONDS: Final = 4.0
"""That one waits for a seat."""
_LATELY: Final = 10.0
"""Seconds for which it is remembered who asked how often."""
_REMEMBERED: Final = 4096
"""Who asked, at most; then all is forgotten."""


@dataclass(slots=True, eq=False)
class _Waiter:
    asked: int
    """Which question of theirs it is, lately."""
    called: threading.Event = field(default_factory=threading.Event)
    seated: bool = False


class _Room:
    """Those who wait, in the order in which they came."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiters: list[_Waiter] = []

    def __len__(self) -> int:
        return len(self._waiters)

    def enter(self, waiter: _Waiter) -> _Waiter | None:
        """None, or who is turned away for it: of those who asked most the last, itself perhaps."""
        self._waiters.append(waiter)
        if len(self._waiters) <= self._size:
            return None
        out = max(reversed(self._waiters), key=lambda one: one.asked)
        self.leave(out)
        return out

    def leave(self, waiter: _Waiter) -> None:
        """Does nothing when it is gone already."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)

    def next(self) -> _Waiter:
        """Of those who asked least the first."""
        waiter = min(self._waiters, key=lambda one: one.asked)
        self._waiters.remove(waiter)
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
        self._asked: Counter[Hashable] = Counter()
        self._since = time.monotonic()
        self._known = _Room(waiting)
        self._others = _Room(waiting)

    @contextmanager
    def take(self, who: Hashable, *, known: bool) -> Iterator[None]:
        """A seat while it lasts.  Raises `ExhaustedError`: too many wait, or for too long."""
        room = self._known if known else self._others
        with self._lock:
            waiter = _Waiter(self._count(who))
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

    def _count(self, who: Hashable) -> int:
        now = time.monotonic()
        if now - self._since > _LATELY or len(self._asked) >= _REMEMBERED:
            self._since = now
            self._asked.clear()
        self._asked[who] += 1
        return self._asked[who]

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
