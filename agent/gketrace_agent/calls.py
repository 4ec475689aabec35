"""What the agent's own calls cost, counted where they are logged."""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final

__all__ = ["BUCKETS", "CALLS", "LOSSES", "CallCounts", "Losses", "MethodCounts"]

BUCKETS: Final = (0.005, 0.025, 0.1, 0.5, 2.5, 10.0)
"""Seconds; upper bounds."""


@dataclass(slots=True)
class MethodCounts:
    """Of one method."""

    codes: dict[str, int] = field(default_factory=dict)
    """gRPC status → calls."""
    durations: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    """Calls in each bucket, the last one for what is longer than all bounds."""
    seconds: float = 0.0
    sent: int = 0
    """Bytes of replies."""


class CallCounts:
    """Any thread may count and read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._methods: dict[str, MethodCounts] = {}

    def add(self, method: str, code: str, seconds: float, sent: int = 0) -> None:
        """One call that ended; `sent`: bytes of its replies."""
        with self._lock:
            counts = self._methods.setdefault(method, MethodCounts())
            counts.codes[code] = counts.codes.get(code, 0) + 1
            counts.durations[bisect_left(BUCKETS, seconds)] += 1
            counts.seconds += seconds
            counts.sent += sent

    def read(self) -> dict[str, MethodCounts]:
        """A copy."""
        with self._lock:
            return {
                method: MethodCounts(dict(one.codes), list(one.durations), one.seconds, one.sent)
                for method, one in self._methods.items()
            }


class Losses:
    """What was lost on the way to clients, by kind.  Any thread may count and read."""

    KINDS: Final = ("conntrack_dumps", "conntrack_events", "stalled_streams")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lost = dict.fromkeys(self.KINDS, 0)

    def add(self, kind: str, count: int) -> None:
        """`kind`: of `KINDS`."""
        with self._lock:
            self._lost[kind] += count

    def read(self) -> dict[str, int]:
        """A copy."""
        with self._lock:
            return dict(self._lost)


CALLS: Final = CallCounts()
"""Of this process."""
LOSSES: Final = Losses()
"""Of this process."""
