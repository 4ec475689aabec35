"""Connection-tracking events: NEW, UPDATE and DESTROY, as the kernel multicasts them.

Each event is a datagram of its own.  What a socket's buffer has no room for the kernel drops; it
tells so once (ENOBUFS) and counts each datagram (SK_MEMINFO_DROPS).

Source: kernel net/netfilter/nf_conntrack_netlink.c ctnetlink_conntrack_event(); net/netlink/
af_netlink.c netlink_overrun(); net/core/filter.c.
"""

from __future__ import annotations

import ctypes
import errno
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np

from gketrace.errors import ForbiddenError, UnavailableError
from gketrace_agent.kernel.conntrack_bpf import events_program
from gketrace_agent.kernel.conntrack_columns import Array, Batch, Layouts
from gketrace_agent.kernel.conntrack_request import KernelFilter
from gketrace_agent.kernel.netlink import NETLINK_NETFILTER, NetlinkError

__all__ = ["EventBatch", "EventKind", "EventSocket"]


class EventKind(IntEnum):
    """Numbered as ConntrackEventKind is on the wire; the kernel's groups have the same numbers
    (NFNLGRP_CONNTRACK_*)."""

    NEW = 1
    UPDATE = 2
    DESTROY = 3


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Events that came together."""

    batch: Batch
    kinds: Array
    """uint8, `EventKind`, of each place of `batch`."""


_CT_NEW: Final = 0x0100
_CT_DELETE: Final = 0x0102
_NLM_F_CREATE: Final = 0x400
_BUFFER: Final = 1 << 20
_DATAGRAM: Final = 8 << 10
"""An event has some hundred bytes."""
_RECEIVE_BUFFER: Final = 32 << 20
"""Bytes, of which an event takes about 1 KiB in the kernel: a second of 30,000 events."""
_SO_RCVBUFFORCE: Final = 33
_SO_ATTACH_FILTER: Final = 26
_SO_MEMINFO: Final = 55
_SK_MEMINFO_DROPS: Final = 8
_WHAT: Final = "conntrack events"
_GATHER: Final = 0.02
"""Seconds that events are gathered for, so that they are decoded together."""


class EventSocket:
    """Listens in the network namespace of the thread that makes it; read it from one thread."""

    def __init__(self, kinds: frozenset[EventKind], wanted: Sequence[KernelFilter] = ()) -> None:
        """`wanted`: what none of them takes the kernel drops, though not all of it."""
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER
            )
        except OSError as error:
            raise UnavailableError(f"no netfilter socket: {error.strerror}") from None
        try:
            self._open(kinds, wanted)
        except OSError as error:
            self._socket.close()
            raise ForbiddenError(
                f"cannot listen to {_WHAT}: {error.strerror}", hint="the agent needs NET_ADMIN"
            ) from None
        self.overruns = 0
        """Times that the kernel said that it dropped events."""
        self.caught_up = True
        """The last `read` took all that there was."""
        self.heard = time.time()
        """Every event from before then was read; seconds since the epoch."""
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._layouts = Layouts()
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def _open(self, kinds: frozenset[EventKind], wanted: Sequence[KernelFilter]) -> None:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        except PermissionError:
            # In a user namespace of its own: as much as net.core.rmem_max allows.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        program = events_program(wanted)
        if program:
            # struct sock_fprog points to the instructions, which the kernel copies.
            code = ctypes.create_string_buffer(program, len(program))
            length = len(program) // 8
            fprog = struct.pack("@HP", length, ctypes.addressof(code))
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
        self._socket.setblocking(False)
        self._socket.bind((0, sum(1 << (kind - 1) for kind in kinds)))

    def close(self) -> None:
        """May be called twice."""
        self._socket.close()

    @property
    def lost(self) -> int:
        """Events that the kernel dropped, by its own count."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 64)
        return int(struct.unpack_from("=I", raw, 4 * _SK_MEMINFO_DROPS)[0])

    def read(self, timeout: float) -> tuple[EventBatch | None, bool]:
        """The events that have come, after at most `timeout` seconds; whether some were dropped
        before or among them."""
        starts: list[int] = []
        kinds: list[int] = []
        filled, overrun = 0, False
        self.caught_up = True
        came = self._poll.poll(timeout * 1000)
        if not came:
            looked = time.time()
            came = self._poll.poll(0)
            self.heard = self.heard if came else looked
        if came:
            filled, overrun = self._gather(starts, kinds)
        if overrun:
            self.overruns += 1
        return self._decode(filled, starts, kinds), overrun

    def _gather(self, starts: list[int], kinds: list[int]) -> tuple[int, bool]:
        filled, overrun = 0, False
        self.caught_up = False
        end = time.monotonic() + _GATHER
        receive, view = self._socket.recv_into, self._view
        header = struct.Struct("=IHH").unpack_from
        while filled + _DATAGRAM <= _BUFFER:
            looked = time.time()
            try:
                size = receive(view[filled:], _DATAGRAM)
            except BlockingIOError:
                self.caught_up, self.heard = True, looked
                left = end - time.monotonic()
                if left <= 0 or not self._poll.poll(left * 1000):
                    break
                continue
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise NetlinkError(error.errno or 0, _WHAT) from None
                overrun = True
                continue
            offset, last = filled, filled + size
            while offset + 20 <= last:
                length, kind, flags = header(self._buffer, offset)
                if length < 20:
                    raise NetlinkError(errno.EBADMSG, _WHAT)
                if kind in (_CT_NEW, _CT_DELETE):
                    starts.append(offset // 4)
                    kinds.append(
                        EventKind.DESTROY
                        if kind == _CT_DELETE
                        else EventKind.NEW
                        if flags & _NLM_F_CREATE
                        else EventKind.UPDATE
                    )
                offset += (length + 3) & ~3
            filled += (size + 3) & ~3
            if time.monotonic() >= end:
                break
        return filled, overrun

    def _decode(self, filled: int, starts: list[int], kinds: list[int]) -> EventBatch | None:
        if not starts:
            return None
        words = np.frombuffer(self._buffer, np.uint32, filled // 4)
        batch = self._layouts.batch(words, np.array(starts, np.int64))
        return EventBatch(batch, np.array(kinds, np.uint8))
