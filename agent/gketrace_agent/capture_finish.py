"""Which captures can be finished, and by whom: FinishCapture finds them here by their ids."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from gketrace.errors import ForbiddenError

__all__ = ["FINISHES", "Finish", "Finishes"]


class Finish:
    """One capture's."""

    def __init__(self, user: str) -> None:
        self.id: Final = secrets.token_hex(16)
        self.user: Final = user
        self._event: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        """poll(2) it for input: the capture is to end, or its client has gone."""
        return self._event

    def ask(self) -> None:
        os.eventfd_write(self._event, 1)

    def close(self) -> None:
        os.close(self._event)


class Finishes:
    """Of one agent.  Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Finish] = {}

    @contextmanager
    def open(self, user: str) -> Iterator[Finish]:
        """While a capture of `user` goes on."""
        made = Finish(user)
        with self._lock:
            self._open[made.id] = made
        try:
            yield made
        finally:
            with self._lock:
                del self._open[made.id]
                made.close()

    def wake(self, capture_id: str) -> None:
        """Lets a capture look whether its client is still there; it may have ended."""
        with self._lock:
            found = self._open.get(capture_id)
            if found is not None:
                found.ask()

    def finish(self, capture_id: str, user: str) -> None:
        """Raises `ForbiddenError`, whose text does not say whether somebody else has that id."""
        with self._lock:
            found = self._open.get(capture_id)
            if found is None or found.user != user:
                raise ForbiddenError(f"{user} has no capture with this id in progress")
            found.ask()


FINISHES: Final = Finishes()
"""Of this process."""
