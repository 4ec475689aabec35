"""Ctrl-C in commands that run until it comes: the first one ends them in order."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

__all__ = ["interruptible"]

_SAME: Final = 0.3
"""Seconds: what comes so soon after another is the same one.  timeout(1) signals the program, and
its process group after that; a script that ends its children does so beside the terminal."""


@contextmanager
def interruptible(*steps: Callable[[], None]) -> Iterator[None]:
    """Calls the next of `steps` at each SIGINT or SIGTERM; after the last one, KeyboardInterrupt is
    raised.  In another thread than the main one signals stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting = list(steps)
    last = float("-inf")

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal last
        del number, frame
        now = time.monotonic()
        same, last = now - last < _SAME, now
        if same:
            return
        if not waiting:
            raise KeyboardInterrupt
        waiting.pop(0)()

    before = [(one, signal.signal(one, on_signal)) for one in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for one, handler in before:
            signal.signal(one, handler)
