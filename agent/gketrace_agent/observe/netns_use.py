"""Whether anybody uses a network namespace, beside who holds it open."""

from __future__ import annotations

import os

from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import NetnsHandle

__all__ = ["netns_is_used"]


def netns_is_used(paths: HostPaths, handle: NetnsHandle) -> bool:
    """True: it is still where it was opened from (/run/netns/NAME, /proc/PID/ns/net), or some
    process that may be looked at is in it."""
    try:
        if os.stat(handle.origin).st_ino == handle.inode:
            return True
    except (FileNotFoundError, ProcessLookupError):
        pass  # the process or the name that it was opened by has gone; others may use it
    for name in os.listdir(paths.proc):
        if not name.isdigit():
            continue
        try:
            if os.stat(paths.pid(int(name), "ns", "net")).st_ino == handle.inode:
                return True
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile, a zombie, or not ours to see
    return False
