"""Cgroup namespaces: from where /proc/PID/cgroup is told.

Source: kernel kernel/cgroup/namespace.c, and cgroup.c proc_cgroup_show; setns(2).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

__all__ = ["join_cgroup_namespace"]

_CLONE_NEWCGROUP: Final = 0x02000000
_libc: Final = ctypes.CDLL(None, use_errno=True)


def join_cgroup_namespace(path: Path) -> None:
    """Moves this thread, and those that it starts from now on, into the namespace of the file
    `path`; in which cgroup they are is not changed.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, _CLONE_NEWCGROUP):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    finally:
        os.close(fd)
