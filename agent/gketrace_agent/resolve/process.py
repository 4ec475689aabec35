"""What /proc says of one process, guarded against PID re-use."""

from __future__ import annotations

import os
from dataclasses import dataclass

from gketrace.errors import ForbiddenError, GoneError
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import NetnsHandle, open_pid, process_starttime
from gketrace_agent.resolve.cgroup import parse_cgroup_file

__all__ = ["Process", "open_owned", "read_cgroup", "read_process"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process; PID and start time together name it for good."""

    pid: int
    start_time: int
    """Clock ticks after boot."""
    command: str
    """Base name of its first argument, or the kernel's name for it where it has none."""
    netns_inode: int


def read_process(paths: HostPaths, pid: int) -> Process:
    """Raises `GoneError` when the process has ended or its PID went to another meanwhile,
    `ForbiddenError` when its namespace may not be read."""
    before = process_starttime(paths, pid)
    try:
        inode = os.stat(paths.pid(pid, "ns", "net")).st_ino
        arguments = paths.pid(pid, "cmdline").read_bytes()
        name = paths.pid(pid, "comm").read_text(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        # A zombie keeps /proc/PID and has no namespaces any more.
        raise GoneError(f"process {pid} has ended") from None
    except PermissionError:
        raise ForbiddenError(
            f"may not read the network namespace of process {pid}",
            hint="the agent needs SYS_PTRACE",
        ) from None
    if process_starttime(paths, pid) != before:
        raise GoneError(f"process {pid} ended while it was being read")
    first = arguments.split(b"\0", 1)[0].decode(errors="replace")
    return Process(
        pid=pid,
        start_time=before,
        command=os.path.basename(first) or name,
        netns_inode=inode,
    )


def read_cgroup(paths: HostPaths, pid: int) -> str:
    """/proc/PID/cgroup.  Raises FileNotFoundError or ProcessLookupError.

    Not `read_text`: a carriage return in a cgroup's name is no end of line.
    """
    return paths.pid(pid, "cgroup").read_bytes().decode("utf-8", "replace")


def open_owned(paths: HostPaths, pid: int, start_time: int | None) -> tuple[NetnsHandle, str]:
    """A process's namespace and the UID of the pod whose cgroup it is in, empty for none: both of
    one process, that of `start_time` where that is known.  The caller closes the namespace.

    Raises `GoneError` and `ForbiddenError` as `open_pid` does.
    """
    before = process_starttime(paths, pid) if start_time is None else start_time
    handle = open_pid(paths, pid, starttime=before)
    try:
        try:
            text = read_cgroup(paths, pid)
        except (FileNotFoundError, ProcessLookupError):
            raise GoneError(f"process {pid} has ended") from None
        if process_starttime(paths, pid) != before:
            raise GoneError(f"process {pid} ended while its cgroup was being read")
        owner = parse_cgroup_file(text, source=f"/proc/{pid}/cgroup")
    except BaseException:
        handle.close()
        raise
    return handle, "" if owner is None else owner.pod_uid
