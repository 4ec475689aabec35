"""The node's own network namespace, and its view of cgroups."""

from __future__ import annotations

from typing import Final

from gketrace.errors import ForbiddenError, GoneError
from gketrace_agent.kernel.cgroupns import join_cgroup_namespace
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import NetnsHandle, open_path

__all__ = ["open_host_netns", "see_all_cgroups"]

_KTHREADD: Final = 2
_PF_KTHREAD: Final = 0x00200000


def open_host_netns(paths: HostPaths) -> NetnsHandle:
    """That of the node's PID 1; the caller closes it.

    Some machines' PID 1 may not be looked at even by root.  kthreadd serves as well where it is
    there: kernel threads are in the initial network namespace, as the PID 1 that started with
    them is.  Raises `ForbiddenError` when neither may be opened.
    """
    try:
        return open_path(paths.pid(1, "ns", "net"))
    except ForbiddenError:
        if not _is_kthreadd(paths):
            raise
        return open_path(paths.pid(_KTHREADD, "ns", "net"))
    except GoneError:
        raise ForbiddenError(
            f"{paths.proc} has no PID 1", hint="the agent needs hostPID or the host's /proc"
        ) from None


def see_all_cgroups(paths: HostPaths) -> str:
    """Has this thread, and those that it starts, see cgroups as the node's PID 1 does.

    A container has a cgroup namespace of its own, in which its own pod is a path without the pod's
    name (``/``, and ``/../ID`` for the sandbox): what belongs to that pod could not be told.
    Returns why it cannot; empty: done.  kthreadd serves as for `open_host_netns`.
    """
    try:
        try:
            join_cgroup_namespace(paths.pid(1, "ns", "cgroup"))
        except PermissionError:
            if not _is_kthreadd(paths):
                raise
            join_cgroup_namespace(paths.pid(_KTHREADD, "ns", "cgroup"))
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return ""


def _is_kthreadd(paths: HostPaths) -> bool:
    """PID 2 with the flag of a kernel thread (/proc/PID/stat field 9) and no parent (field 4)."""
    try:
        stat = paths.pid(_KTHREADD, "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    after = stat[stat.rindex(b")") + 2 :].split()
    return after[1] == b"0" and bool(int(after[6]) & _PF_KTHREAD)
