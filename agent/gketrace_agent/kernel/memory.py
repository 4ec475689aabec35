"""How much memory this process and its children use, and how much they may."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["UsedMemory", "used_memory"]

_CGROUP: Final = Path("/sys/fs/cgroup")
"""The container's own cgroup is mounted here, whatever the host's /sys is."""


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
