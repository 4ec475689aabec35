"""Network namespaces: opening one, and running a function inside one.

Source: kernel net/core/net_namespace.c, fs/nsfs.c; setns(2).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

from gketrace.errors import ForbiddenError, GoneError, UnavailableError
from gketrace_agent.kernel.hostpaths import HostPaths

__all__ = [
    "NetnsHandle",
    "count_open",
    "open_current",
    "open_path",
    "open_pid",
    "process_starttime",
    "run_in_netns",
]

T = TypeVar("T")

_CLONE_NEWNET: Final = 0x40000000
_NS_GET_NSTYPE: Final = 0xB703
"""ioctl_ns(2), Linux 4.11: the CLONE_NEW* of a namespace file."""
_libc: Final = ctypes.CDLL(None, use_errno=True)


_open: Final[set[int]] = set()
"""File descriptors of open handles; adding and discarding are atomic."""


class NetnsHandle:
    """An open network namespace: it cannot vanish or change identity while this is open."""

    __slots__ = ("_fd", "inode", "origin")

    def __init__(self, fd: int, origin: str) -> None:
        self._fd = fd
        _open.add(fd)
        self.inode: Final = os.fstat(fd).st_ino
        """Inode of the namespace in nsfs; the number in ``net:[4026531833]``."""
        self.origin: Final = origin
        """Where it was opened from, for messages."""

    @property
    def fd(self) -> int:
        """The file descriptor.  Raises `GoneError` once closed."""
        if self._fd < 0:
            raise GoneError(f"the namespace handle of {self.origin} is closed")
        return self._fd

    def close(self) -> None:
        """Lets go of the namespace; may be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            _open.discard(fd)  # before: once closed, the number may be another handle's
            os.close(fd)

    def __enter__(self) -> NetnsHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<netns {self.inode} from {self.origin}>"


def process_starttime(paths: HostPaths, pid: int) -> int:
    """Field 22 of /proc/PID/stat: clock ticks since boot.  With the PID it names one process.

    Raises `GoneError` when there is no such process.
    """
    try:
        stat = paths.pid(pid, "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        raise GoneError(f"process {pid} has ended") from None
    # The command name, in parentheses, may hold spaces and parentheses itself.
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


def open_pid(paths: HostPaths, pid: int, *, starttime: int | None = None) -> NetnsHandle:
    """The network namespace of a process.

    `starttime` (`process_starttime`) says which process is meant; without it the namespace is
    only guaranteed to be that of one process with this PID.  Raises `GoneError` when the process
    has ended or the PID now belongs to another one, `ForbiddenError` without SYS_PTRACE.
    """
    before = process_starttime(paths, pid)
    if starttime is not None and before != starttime:
        raise GoneError(f"process {pid} has ended; the PID now belongs to another process")
    handle = open_path(paths.pid(pid, "ns", "net"))
    try:
        after = process_starttime(paths, pid)
        if after != before:
            raise GoneError(f"process {pid} ended while its namespace was being opened")
    except GoneError:
        handle.close()
        raise
    return handle


def open_path(path: Path) -> NetnsHandle:
    """The network namespace that a file stands for: /run/netns/NAME or /proc/PID/ns/net.

    Raises `GoneError` when the file is not there, `ForbiddenError` when it may not be opened and
    `UnavailableError` when it is no network namespace (an empty file where a bind mount should be:
    the agent's /run/netns is not mounted with HostToContainer propagation).
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        raise GoneError(f"there is no namespace at {path}") from None
    except PermissionError:
        raise ForbiddenError(
            f"may not open the namespace {path}", hint="the agent needs SYS_PTRACE and SYS_ADMIN"
        ) from None
    if not _is_netns(fd):
        os.close(fd)
        raise UnavailableError(
            f"{path} is not a network namespace",
            hint="mount /run/netns with mountPropagation HostToContainer",
        )
    return NetnsHandle(fd, str(path))


def _is_netns(fd: int) -> bool:
    try:
        return fcntl.ioctl(fd, _NS_GET_NSTYPE) == _CLONE_NEWNET
    except OSError:
        return False  # ENOTTY: no namespace file at all


def open_current() -> NetnsHandle:
    """The network namespace that the calling thread is in."""
    return open_path(Path("/proc/thread-self/ns/net"))


def count_open() -> int:
    """How many network namespaces this process holds open."""
    return len(_open)


class _Call(threading.Thread, Generic[T]):
    """A thread that enters a namespace, runs one function and ends."""

    def __init__(self, netns: NetnsHandle, function: Callable[[], T]) -> None:
        super().__init__(name=f"netns-{netns.inode}", daemon=True)
        self._netns = netns
        self._function = function
        self.result: T | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            _enter(self._netns)
            self.result = self._function()
        except BaseException as error:  # noqa: BLE001 - handed to the caller, who raises it
            self.error = error


def _enter(netns: NetnsHandle) -> None:
    if _libc.setns(netns.fd, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise ForbiddenError(
            f"cannot enter the namespace of {netns.origin}: {os.strerror(number)}",
            hint="the agent needs SYS_ADMIN",
        )
    entered = os.stat("/proc/thread-self/ns/net").st_ino
    if entered != netns.inode:
        raise UnavailableError(
            f"entered namespace {entered} where {netns.inode} of {netns.origin} was asked for"
        )


def run_in_netns(netns: NetnsHandle, function: Callable[[], T]) -> T:
    """Runs `function` inside `netns`, in a thread made for it, and returns or raises what it does.

    Blocks until the function ends: whatever it calls must be bounded in time itself, which all of
    `gketrace_agent.kernel` is.
    """
    call: _Call[T] = _Call(netns, function)
    call.start()
    call.join()
    if call.error is not None:
        try:
            raise call.error
        finally:
            call.error = None  # breaks the cycle error → traceback → frame → call
    return call.result  # type: ignore[return-value]  # set, as there was no error
