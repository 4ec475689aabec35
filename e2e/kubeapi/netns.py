"""Sockets inside another process's network namespace.

A socket belongs for good to the namespace it was made in, whoever uses it later (net/socket.c
``sock_create`` takes ``current->nsproxy->net_ns``). So a thread of its own enters the namespace,
makes the socket and ends; nothing else in this process ever changes namespace.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading

__all__ = ["NamespaceGone", "listening_socket", "make_socket"]

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceGone(Exception):
    """There is no such process, so no way into its namespace."""


def make_socket(pid: int | None, family: socket.AddressFamily) -> socket.socket:
    """A TCP socket in the network namespace of process ``pid`` (None: this one's).

    Raises: NamespaceGone; OSError when the kernel refuses.
    """
    if pid is None:
        return socket.socket(family, socket.SOCK_STREAM)
    made: list[socket.socket] = []
    failed: list[Exception] = []

    def enter() -> None:
        try:
            try:
                fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, ProcessLookupError) as error:
                raise NamespaceGone(f"process {pid} is gone") from error
            try:
                if _libc.setns(fd, _CLONE_NEWNET) != 0:
                    code = ctypes.get_errno()
                    raise OSError(code, f"setns to process {pid}: {os.strerror(code)}")
            finally:
                os.close(fd)
            made.append(socket.socket(family, socket.SOCK_STREAM))
        except (OSError, NamespaceGone) as error:
            failed.append(error)

    thread = threading.Thread(target=enter, name=f"netns-{pid}")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def listening_socket(address: tuple[str, int], pid: int | None) -> socket.socket:
    """A listening TCP socket at ``address``, in the namespace of ``pid`` when it is given."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    sock = make_socket(pid, family)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(1024)
    except OSError:
        sock.close()
        raise
    return sock
