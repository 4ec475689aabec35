"""Calls at once, by class and by user, and memory: work is refused before there is none left."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from gketrace.access import CallClass
from gketrace.errors import ExhaustedError
from gketrace_agent.kernel.memory import used_memory

__all__ = ["Bounds"]

_FULL: Final = 0.9
"""Of the memory that there is: above it only quick calls are taken."""


class Bounds:
    """Of one agent, all its listeners together."""

    def __init__(
        self,
        *,
        calls: int,
        of_a_user: int,
        classes: Mapping[CallClass, int],
        memory_bytes: int = 0,
        proc: Path = Path("/proc"),
    ) -> None:
        """`memory_bytes` 0: as much as the cgroup allows."""
        self._calls = calls
        self._of_a_user = of_a_user
        self._classes = classes
        self._memory_bytes = memory_bytes
        self._proc = proc
        self._lock = threading.Lock()
        self._running: Counter[CallClass] = Counter()
        self._users: Counter[str] = Counter()

    @contextmanager
    def admit(self, user: str, call_class: CallClass) -> Iterator[None]:
        """Raises `ExhaustedError`, which says which bound it is."""
        with self._lock:
            self._check(user, call_class)
            self._running[call_class] += 1
            self._users[user] += 1
        try:
            if call_class is not CallClass.QUICK:
                self._check_memory()
            yield
        finally:
            with self._lock:
                self._running[call_class] -= 1
                self._users[user] -= 1
                if not self._users[user]:
                    del self._users[user]

    def _check(self, user: str, call_class: CallClass) -> None:
        running = sum(self._running.values())
        if running >= self._calls:
            raise ExhaustedError(
                f"the agent is busy: {running} calls are in progress, and {self._calls} is its "
                "bound",
                hint="try again",
            )
        most = self._classes.get(call_class, self._calls)
        if self._running[call_class] >= most:
            raise ExhaustedError(
                f"the agent is busy: {self._running[call_class]} calls of class "
                f"{call_class.value} are in progress, and {most} is its bound",
                hint="try again",
            )
        if self._users[user] >= self._of_a_user:
            raise ExhaustedError(
                f"{user} has {self._users[user]} calls in progress, and {self._of_a_user} is "
                "each user's bound",
                hint="end some of them",
            )

    def _check_memory(self) -> None:
        used = used_memory(self._proc)
        most = self._memory_bytes or used.limit
        if most and used.bytes > most * _FULL:
            raise ExhaustedError(
                f"the agent uses {used.bytes >> 20} MiB of the {most >> 20} MiB of memory that it "
                "may have",
                hint="try again when other calls have ended",
            )
