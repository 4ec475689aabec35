"""Files that the command line or a kubeconfig names, read whole: with an end, whatever they are.

A pipe (``<(command)``) is read as a file is; a FIFO that nobody writes to, a device and what is far
larger than any such file are not waited for.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from pathlib import Path
from typing import Final

__all__ = ["read_input"]

_MOST: Final = 16 << 20
"""Bytes.  Hundreds of clusters' kubeconfig, or all the world's authorities."""
_SECONDS: Final = 30.0
"""For a pipe: a command that logs in and asks somebody takes some."""
_CHUNK: Final = 1 << 16


def read_input(path: Path | str) -> bytes:
    """The file's bytes.  Raises `OSError`, whose strerror says what is wrong."""
    # Non-blocking, or to open a FIFO would wait for its writer.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        until = time.monotonic() + _SECONDS
        found = bytearray()
        while data := _read(file, until):
            found += data
            if len(found) > _MOST:
                raise OSError(0, f"it is larger than {_MOST >> 20} MiB")
        return bytes(found)
    finally:
        os.close(file)


def _read(file: int, until: float) -> bytes:
    """Empty at the end."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    # A FIFO that had no writer yet is at its end for read(), and not for poll().
    while poll.poll(max(until - time.monotonic(), 0) * 1000):
        with contextlib.suppress(BlockingIOError):
            return os.read(file, _CHUNK)
    raise OSError(0, f"it has not ended in {_SECONDS:g} s")
