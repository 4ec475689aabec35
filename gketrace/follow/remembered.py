"""Entries of connections that were told, so that what still comes of them is not taken for news."""

from __future__ import annotations

import heapq

from gketrace.conntrack_records import Record
from gketrace.follow.entries import EntryKey

__all__ = ["Remembered"]


class Remembered:
    """Entries by their tuple and CTA_ID, each for a time; by a hash, as they are many."""

    def __init__(self, most: int) -> None:
        """`most`: beyond that, those whose time ends first are forgotten."""
        self._most = most
        self._until: dict[int, float] = {}
        self._order: list[tuple[float, int]] = []

    def add(self, key: EntryKey, record: Record, until: float) -> None:
        """`until`: seconds since the epoch."""
        token = _token(key, record)
        self._until[token] = until
        heapq.heappush(self._order, (until, token))

    def has(self, key: EntryKey, record: Record) -> bool:
        return _token(key, record) in self._until

    def remove(self, key: EntryKey, record: Record) -> None:
        """It is a new one."""
        self._until.pop(_token(key, record), None)

    def forget(self, now: float) -> None:
        """Those whose time is over."""
        order = self._order
        while order and (order[0][0] <= now or len(self._until) > self._most):
            until, token = heapq.heappop(order)
            if self._until.get(token) == until:
                del self._until[token]


def _token(key: EntryKey, record: Record) -> int:
    return hash((key, record.id))
