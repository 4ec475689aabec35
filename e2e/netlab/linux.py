"""The few system calls that the lab needs and Python 3.11 does not have, through libc.

Constants are those of include/uapi/linux/sched.h, mount.h and prctl.h.
Every function raises OSError with the call's errno.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

__all__ = [
    "CLONE_NEWCGROUP",
    "CLONE_NEWIPC",
    "CLONE_NEWNET",
    "CLONE_NEWNS",
    "CLONE_NEWPID",
    "CLONE_NEWUTS",
    "bind_mount",
    "die_with_parent",
    "make_mounts_private",
    "make_mounts_shared",
    "mount",
    "outlive_parent",
    "set_process_title",
    "setns",
    "start_time",
    "umount",
    "unshare",
]

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

_MS_BIND = 4096
_MS_REC = 16384
_MS_PRIVATE = 1 << 18
_MS_SHARED = 1 << 20
_MNT_DETACH = 2
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_SIGKILL = 9

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """unshare(2): new namespaces for this process (for its children, with CLONE_NEWPID)."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(path: str, kind: int) -> None:
    """setns(2) into the namespace file at `path`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, ctypes.c_int(kind)), f"setns {path}")
    finally:
        os.close(fd)


def mount(source: str, target: str, fstype: str, flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    result = _libc.mount(
        source.encode(),
        target.encode(),
        fstype.encode(),
        ctypes.c_ulong(flags),
        options.encode() if options else None,
    )
    _check(result, f"mount {fstype} on {target}")


def bind_mount(source: str, target: str) -> None:
    """Mounts the file or folder `source` on `target` too."""
    mount(source, target, "none", _MS_BIND)


def make_mounts_private() -> None:
    """From here on, mounts of this mount namespace stay in it."""
    mount("none", "/", "none", _MS_REC | _MS_PRIVATE)


def make_mounts_shared() -> None:
    """As on a booted machine: containers may ask for mounts that come later (HostToContainer)."""
    mount("none", "/", "none", _MS_REC | _MS_SHARED)


def umount(target: str) -> None:
    """umount2(2), lazily."""
    _check(_libc.umount2(target.encode(), _MNT_DETACH), f"umount {target}")


def die_with_parent() -> None:
    """The kernel kills this process when the thread that made it ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "prctl PR_SET_PDEATHSIG")


def outlive_parent() -> None:
    """Takes `die_with_parent` back."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0), "prctl PR_SET_PDEATHSIG")


def set_process_title(comm: str, cmdline: str) -> None:
    """What ps shows: /proc/PID/comm, and /proc/PID/cmdline, which is this process's own memory.

    The command line is cut to the room that the original one left.
    """
    _check(_libc.prctl(_PR_SET_NAME, comm.encode()[:15], 0, 0, 0), "prctl PR_SET_NAME")
    stat = Path("/proc/self/stat").read_text()
    fields = stat[stat.rindex(")") + 2 :].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end: proc(5), 48 and 49
    text = cmdline.replace(" ", "\0").encode()[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def start_time(pid: int) -> int | None:
    """When `pid` started, in clock ticks since boot (proc(5), field 22); None if it is gone.

    With the PID it names a process for good: PIDs are used again.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] == "Z" else int(fields[19])
