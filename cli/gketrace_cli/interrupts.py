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
    """Calls the next of `steps` at each SIGINT, SIGTERM or SIGHUP (where it is not ignored, as by
    nohup); after the last one, KeyboardInterrupt is raised.  In another thread than the main one
    signals stay as they are."""
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

    heard = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        heard.append(signal.SIGHUP)
    before = [(one, signal.signal(one, on_signal)) for one in heard]
    try:
        yield
    finally:
        for one, handler in before:
            signal.signal(one, handler)
