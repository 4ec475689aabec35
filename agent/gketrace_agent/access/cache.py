"""Answers that hold for a while: bounded, and asked for once however many wait."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

from gketrace.errors import ExhaustedError, TimeoutExceeded

__all__ = ["Cache"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
_WAIT: Final = 15.0
"""Seconds that one who asks waits for another's answer to the same question."""


class Cache(Generic[K, V]):
    """Key → answer, until its time is over or newer answers push it out."""

    def __init__(
        self, size: int, *, asking: int = 8, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`size`: answers kept.  `asking`: questions under way at once; one more is refused."""
        self._size = size
        self._asking = asking
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[K, tuple[float, V]] = OrderedDict()
        self._under_way: dict[K, threading.Event] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: K, ask: Callable[[], tuple[V, float]]) -> V:
        """The answer that is kept, or `ask()`'s (answer, seconds that it holds; 0: not kept).

        Raises what `ask` raises, which is not kept; `ExhaustedError`, `TimeoutExceeded`.
        """
        deadline = self._clock() + _WAIT
        while True:
            with self._lock:
                now = self._clock()
                kept = self._kept.get(key)
                if kept is not None and now < kept[0]:
                    self._kept.move_to_end(key)
                    return kept[1]
                waiting = self._under_way.get(key)
                if waiting is None:
                    if len(self._under_way) >= self._asking:
                        raise ExhaustedError(
                            "too many callers wait for the API server's word on them",
                            hint="try again",
                        )
                    waiting = self._under_way[key] = threading.Event()
                    break
            if now > deadline or not waiting.wait(max(0.01, deadline - now)):
                raise TimeoutExceeded("the API server's answer about this caller takes too long")
        try:
            value, seconds = ask()
            with self._lock:
                if seconds > 0:
                    self._kept[key] = (self._clock() + seconds, value)
                    self._kept.move_to_end(key)
                    while len(self._kept) > self._size:
                        self._kept.popitem(last=False)
                else:
                    self._kept.pop(key, None)
            return value
        finally:
            with self._lock:
                del self._under_way[key]
            waiting.set()
