"""How many captures there are, what memory their rings take, and what they have sent."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

from gketrace.errors import ExhaustedError
from gketrace_agent.kernel.packet_ring import BLOCK_SIZE

__all__ = ["CAPTURES", "CaptureCounts", "Captures"]

_LEAST_RING: Final = 8 * BLOCK_SIZE


@dataclass(slots=True)
class CaptureCounts:
    """Since the agent's start."""

    open: int = 0
    ring_bytes: int = 0
    """Of open captures."""
    captures: int = 0
    refused: int = 0
    """For want of memory for rings."""
    packets: int = 0
    bytes: int = 0
    dropped: int = 0
    dropped_waiting: int = 0


class Captures:
    """What all captures of an agent use together.  Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = CaptureCounts()

    def enter(self) -> None:
        with self._lock:
            self._counts.open += 1
            self._counts.captures += 1

    def leave(self) -> None:
        with self._lock:
            self._counts.open -= 1

    def take_memory(self, wanted: int, most: int) -> int:
        """Grants at most an eighth of what is left of `most`.  Raises `ExhaustedError`."""
        with self._lock:
            left = most - self._counts.ring_bytes
            granted = max(min(wanted, left // 8), _LEAST_RING) // BLOCK_SIZE * BLOCK_SIZE
            if granted > left:
                self._counts.refused += 1
                raise ExhaustedError(
                    f"the rings of this node's captures take {self._counts.ring_bytes >> 20} of "
                    f"the {most >> 20} MiB that they may",
                    hint="end a capture, or start the agent with a larger --max-capture-ring-bytes",
                )
            self._counts.ring_bytes += granted
            return granted

    def give_memory(self, size: int) -> None:
        with self._lock:
            self._counts.ring_bytes -= size

    def add(self, *, packets: int = 0, size: int = 0, dropped: int = 0, waiting: int = 0) -> None:
        with self._lock:
            self._counts.packets += packets
            self._counts.bytes += size
            self._counts.dropped += dropped
            self._counts.dropped_waiting += waiting

    def read(self) -> CaptureCounts:
        """A copy."""
        with self._lock:
            one = self._counts
            return CaptureCounts(**{name: getattr(one, name) for name in one.__slots__})


CAPTURES: Final = Captures()
"""Of this process."""
