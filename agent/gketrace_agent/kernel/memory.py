"""How much memory this process and its children use, how much they may, and how little is kept."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["UsedMemory", "give_back_memory", "used_memory"]

_CGROUP: Final = Path("/sys/fs/cgroup")
"""The container's own cgroup is mounted here, whatever the host's /sys is."""
# glibc malloc/malloc.h
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_ARENAS: Final = 2
_LARGE: Final = 4 << 20
"""Bytes.  What is as large as that is mapped by itself, and given back when it is freed: the text
of rules.  Connections' columns are smaller: to map them anew each time costs a quarter more."""
_KEPT: Final = 8 << 20
"""Bytes that are kept at the top of the heap."""


def give_back_memory() -> None:
    """Has the C library keep less of what is freed; to be called before there are threads.

    As it comes, glibc has 8 heaps for each core, and each keeps what its threads have freed; and
    once something large was freed, so large a piece is taken from the heap the next time.  Ten
    clients that ask for everything at once so cost a fifth more, most of it for ever.  A C library
    without mallopt(3) keeps what it likes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for parameter, value in (
        (_M_ARENA_MAX, _ARENAS),
        (_M_MMAP_THRESHOLD, _LARGE),
        (_M_TRIM_THRESHOLD, _KEPT),
    ):
        mallopt(parameter, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedMemory:
    """Bytes."""

    bytes: int
    limit: int
    """0: none is known."""


def used_memory(proc: Path = Path("/proc")) -> UsedMemory:
    """By the cgroup where it has a limit (mm/memcontrol.c: memory.current without what reclaim can
    take back at once, inactive_file); else the resident pages of this process alone."""
    limit = _number(_CGROUP / "memory.max")
    if limit:
        current = _number(_CGROUP / "memory.current")
        if current:
            return UsedMemory(bytes=max(0, current - _inactive_file()), limit=limit)
    for line in _lines(proc / "self" / "status"):
        if line.startswith("VmRSS:"):
            return UsedMemory(bytes=int(line.split()[1]) * 1024, limit=limit)
    return UsedMemory(bytes=0, limit=limit)


def _inactive_file() -> int:
    for line in _lines(_CGROUP / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            return int(value)
    return 0


def _number(path: Path) -> int:
    """0: there is no such file, or no number (``max``) in it."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # not a cgroup of version 2, or its root, which has no such file
        return []
