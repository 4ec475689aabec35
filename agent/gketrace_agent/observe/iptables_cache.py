"""Dumps of rules that several calls share."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gketrace_agent.observe.iptables_dump import IptablesDump, IptablesDumps

if TYPE_CHECKING:
    from gketrace_agent.observe.nftables import NftablesDump

__all__ = ["DumpCache", "Turn"]


@dataclass(slots=True)
class Turn:
    """One namespace's dumps are made one after the other: a large one takes hundreds of megabytes.

    Who waited through a whole reading takes what it found: it began after they asked.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    waiting: int = 0
    began: float = 0.0
    """When the reading began that found `found`; time.monotonic()."""
    found: tuple[IptablesDumps, NftablesDump | None] | None = None
    """Kept only while somebody waits."""


class DumpCache:
    """The iptables-nft dumps that are still true, by namespace and family; shared by a node's
    calls.

    Keyed by the namespace's cookie, which is never used again, and the generation.  The rules are
    then current; their counters are as old as `IptablesDump.taken_at` says.  Legacy has no
    generation and is always read again, and so are nftables' own tables, whose sets are written by
    packets; but once for all who wait for it.
    """

    def __init__(self, *, most_bytes: int = 256 << 20) -> None:
        self._most = most_bytes
        self._lock = threading.Lock()
        self._turns: dict[int, Turn] = {}
        self._dumps: OrderedDict[tuple[int, int], IptablesDump] = OrderedDict()

    def wait(self, cookie: int, timeout: float) -> tuple[Turn | None, bool]:
        """Whoever reads a namespace's rules holds its turn: give it back with `end`.  None: it was
        not to be had in time.  True: others had it first."""
        with self._lock:
            turn = self._turns.setdefault(cookie, Turn())
            if turn.lock.acquire(blocking=False):
                return turn, False
            turn.waiting += 1
        taken = turn.lock.acquire(timeout=timeout)
        with self._lock:
            turn.waiting -= 1
        return turn if taken else None, True

    def end(
        self, turn: Turn, began: float, found: tuple[IptablesDumps, NftablesDump | None] | None
    ) -> None:
        """Gives it back; what was found, if anything, was read since `began`."""
        with self._lock:
            if found is not None:
                turn.began, turn.found = began, found
            if not turn.waiting:
                turn.found = None
                for cookie in [c for c, one in self._turns.items() if one is turn]:
                    del self._turns[cookie]
        turn.lock.release()

    def get(self, cookie: int | None, family: int, generation: int) -> IptablesDump | None:
        """The dump of this very generation, if there is one."""
        if cookie is None:
            return None
        with self._lock:
            dump = self._dumps.get((cookie, family))
            if dump is None or dump.generation != generation:
                return None
            self._dumps.move_to_end((cookie, family))
            return dump

    def put(self, cookie: int | None, dump: IptablesDump) -> None:
        """Keeps it, and forgets the least used ones over the bound."""
        if cookie is None:
            return
        with self._lock:
            self._dumps[cookie, dump.family] = dump
            self._dumps.move_to_end((cookie, dump.family))
            while sum(len(kept.text) for kept in self._dumps.values()) > self._most:
                self._dumps.popitem(last=False)
