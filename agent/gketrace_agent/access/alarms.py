"""Something is done when a time is over, unless it is called off: one thread for all calls."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

__all__ = ["Alarms"]


class Alarms:
    """All of them after the same time, so that the first set is the first due."""

    def __init__(self, seconds: float) -> None:
        self.seconds: Final = seconds
        self._lock = threading.Condition()
        self._waiting: deque[tuple[float, list[Callable[[], None]]]] = deque()
        self._thread: threading.Thread | None = None

    def set(self, ring: Callable[[], None]) -> Callable[[], None]:
        """`ring` is called when the time is over; what is returned calls that off."""
        held = [ring]
        with self._lock:
            self._waiting.append((time.monotonic() + self.seconds, held))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="alarms", daemon=True)
                self._thread.start()
            elif len(self._waiting) == 1:
                self._lock.notify()
        return held.clear

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._waiting:
                    self._lock.wait()
                due, held = self._waiting[0]
                left = due - time.monotonic()
                if left > 0 and held:
                    self._lock.wait(left)
                    continue
                self._waiting.popleft()
            for ring in tuple(held):
                ring()
