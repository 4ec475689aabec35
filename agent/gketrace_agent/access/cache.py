"""Answers that hold for a while: bounded, and asked for once however many wait."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

from gketrace.errors import ExhaustedError, TimeoutExceeded
from gketrace_agent.access.seats import Seats

__all__ = ["ASKING", "FOLLOWERS", "WAITING", "Cache"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
_WAIT: Final = 15.0
"""Seconds that one who asks waits for another's answer to the same question."""
FOLLOWERS: Final = 24
"""That wait so, at most: a command may begin with as many calls."""
ASKING: Final = 8
"""Questions under way at once."""
WAITING: Final = 8
"""That wait to ask, and have never had a good answer; as many who have."""


class Cache(Generic[K, V]):
    """Key → answer, until its time is over or newer answers push it out.

    Bad answers push out no good ones: whoever asks for nonsense makes nobody else be asked for
    again.  A key that had a good answer is known until newer ones push it out, also when the answer
    holds no longer: it is asked for before others are (`Seats`).
    """

    def __init__(
        self,
        size: int,
        *,
        asking: int = ASKING,
        good: Callable[[V], bool] = lambda value: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`size`: good answers kept, and bad ones.  `asking`: questions under way at once, a
        quarter of them only for keys that are known."""
        self._size = size
        self._good = good
        self._clock = clock
        self._lock = threading.Lock()
        self._seats = Seats(asking, kept=asking // 4, waiting=WAITING)
        self._kept: OrderedDict[K, tuple[float, V]] = OrderedDict()
        self._bad: OrderedDict[K, tuple[float, V]] = OrderedDict()
        self._under_way: dict[K, threading.Event] = {}
        self._following = 0

    def __len__(self) -> int:
        return len(self._kept) + len(self._bad)

    def get(self, key: K, ask: Callable[[], tuple[V, float]], who: Hashable = None) -> V:
        """The answer that is kept, or `ask()`'s (answer, seconds that it holds; 0: not kept).

        `who`: those who wait for their turn have it by this.
        Raises what `ask` raises, which is not kept; `ExhaustedError`, `TimeoutExceeded`.
        """
        deadline = self._clock() + _WAIT
        while True:
            with self._lock:
                now = self._clock()
                for answers in (self._kept, self._bad):
                    found = answers.get(key)
                    if found is not None and now < found[0]:
                        answers.move_to_end(key)
                        return found[1]
                known = key in self._kept
                waiting = self._under_way.get(key)
                if waiting is None:
                    waiting = self._under_way[key] = threading.Event()
                    break
                if self._following >= FOLLOWERS:
                    raise ExhaustedError(
                        "too many callers wait for the API server's word on them",
                        hint="try again",
                    )
                self._following += 1
            try:
                late = now > deadline or not waiting.wait(max(0.01, deadline - now))
            finally:
                with self._lock:
                    self._following -= 1
            if late:
                raise TimeoutExceeded("the API server's answer about this caller takes too long")
        try:
            with self._seats.take(who, known=known):
                value, seconds = ask()
            with self._lock:
                self._keep(key, value, seconds)
            return value
        finally:
            with self._lock:
                del self._under_way[key]
            waiting.set()

    def _keep(self, key: K, value: V, seconds: float) -> None:
        self._kept.pop(key, None)
        self._bad.pop(key, None)
        if seconds <= 0:
            return
        answers = self._kept if self._good(value) else self._bad
        answers[key] = self._clock() + seconds, value
        if len(answers) > self._size:
            answers.popitem(last=False)
