"""Writes beside the reading: a slow reader costs what it does not read, and is told so."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from queue import Empty, Full, Queue
from typing import Final

from gketrace_cli.render.layout import plain_ascii

__all__ = ["Output", "Sampler"]

_WAITING: Final = 50_000
"""Pieces of text that wait to be written, at most."""


class Output:
    """Standard output, in a thread of its own."""

    def __init__(self) -> None:
        self._queue: Queue[str | None] = Queue(maxsize=_WAITING)
        self.unwritten = 0
        """Pieces that were thrown away, as too many waited."""
        self.broken = threading.Event()
        """Nobody reads it any more, or it cannot be written."""
        self.error = ""
        """Why it cannot be written; empty: it can, or there is nobody to read it."""
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        self._ascii = encoding.lower().replace("-", "") not in ("utf8", "utf16")
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def write(self, text: str, *, must: bool = False) -> bool:
        """False: thrown away.  `must`: waits a while for room instead."""
        try:
            self._queue.put(text, timeout=5.0 if must else None, block=must)
        except Full:
            self.unwritten += 1
            return False
        return True

    def close(self, seconds: float) -> bool:
        """Waits until all is written; False: it was not, after so long."""
        try:
            self._queue.put(None, timeout=seconds)
        except Full:
            return False
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (text := self._queue.get()) is not None:
            parts = [text]
            ended = False
            try:  # what has gathered goes out in one piece
                while len(parts) < 500:
                    more = self._queue.get_nowait()
                    if more is None:
                        ended = True
                        break
                    parts.append(more)
            except Empty:
                pass
            if not self.broken.is_set():
                self._put("".join(parts))
            if ended:
                return

    def _put(self, text: str) -> None:
        try:
            sys.stdout.write(plain_ascii(text) if self._ascii else text)
            sys.stdout.flush()
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                self.error = error.strerror or str(error)
            self.broken.set()
            # What is still in the buffer goes nowhere, or the end of the program would complain.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


class Sampler:
    """Picks what a terminal can show, and says what it left out."""

    def __init__(
        self, write: Callable[[str], object], lines: int, clock: Callable[[], float]
    ) -> None:
        """`lines`: of connections in a second that ended well, and as many that failed."""
        self._write = write
        self._lines = lines
        self._clock = clock
        self._since = clock()
        self._shown = {True: 0, False: 0}
        self._came = {True: 0, False: 0}

    def offer(self, text: Callable[[], str], *, failed: bool) -> None:
        """`text` is made only when it is shown."""
        self.tick()
        self._came[failed] += 1
        if self._shown[failed] < self._lines:
            self._shown[failed] += 1
            self._write(text())

    def tick(self) -> None:
        """Once a second says what was left out."""
        now = self._clock()
        if now - self._since < 1.0:
            return
        came, shown = sum(self._came.values()), sum(self._shown.values())
        if came > shown:
            hidden = self._came[True] - self._shown[True]
            failures = f", {hidden} of those failed" if hidden else ""
            when = time.strftime("%H:%M:%S", time.localtime())
            rest = f"{came - shown} more in {now - self._since:.1f} s are counted, not shown"
            self._write(f"{when} … {rest}{failures}\n")
        self._since = now
        self._shown = {True: 0, False: 0}
        self._came = {True: 0, False: 0}
