"""What a process holds, and whether it grows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

__all__ = ["GAUGES", "agent_pid", "read_gauges", "slope"]

GAUGES: Final = ("rss", "threads", "fds", "namespaces", "rings", "children", "zombies", "mounts")


def agent_pid(cgroup: Path, node: str) -> int:
    """The agent of `node` below a lab's cgroup, as this process numbers it.  Raises LookupError."""
    for folder, _, files in os.walk(cgroup):
        if "cgroup.procs" not in files:
            continue
        for text in Path(folder, "cgroup.procs").read_text().split():
            try:
                words = Path("/proc", text, "cmdline").read_bytes().split(b"\0")
            except FileNotFoundError:
                continue
            if b"--node-name" in words and words[words.index(b"--node-name") + 1] == node.encode():
                return int(text)
    raise LookupError(f"no agent of {node} below {cgroup}")


def read_gauges(pid: int) -> dict[str, int]:
    """`rss` in bytes; `namespaces` and `rings` are open descriptors of nsfs and packet sockets'
    mappings; `mounts` those that the process sees.  Raises FileNotFoundError when it has ended."""
    folder = Path("/proc", str(pid))
    links = []
    for entry in os.listdir(folder / "fd"):
        try:
            links.append(os.readlink(folder / "fd" / entry))
        except FileNotFoundError:  # closed meanwhile
            continue
    states = []
    for task in os.listdir(folder / "task"):
        try:
            children = (folder / "task" / task / "children").read_text().split()
        except FileNotFoundError:  # the thread ended
            continue
        for child in children:
            try:
                stat = Path("/proc", child, "stat").read_text()
            except FileNotFoundError:
                continue
            states.append(stat.rpartition(")")[2].split()[0])
    statm = (folder / "statm").read_text().split()
    return {
        "rss": int(statm[1]) * os.sysconf("SC_PAGESIZE"),
        "threads": len(os.listdir(folder / "task")),
        "fds": len(links),
        "namespaces": sum(link.startswith("net:[") for link in links),
        "rings": (folder / "maps").read_text().count("socket:["),
        "children": len(states),
        "zombies": states.count("Z"),
        "mounts": len((folder / "mountinfo").read_text().splitlines()),
    }


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Theil and Sen's: the median of the slopes between all pairs, per unit of time, which a few
    samples taken in the middle of a call do not move.  0 for fewer than two."""
    found = sorted(
        (values[j] - values[i]) / (times[j] - times[i])
        for i in range(len(times))
        for j in range(i + 1, len(times))
        if times[j] > times[i]
    )
    return found[len(found) // 2] if found else 0.0
