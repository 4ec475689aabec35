"""The connection-tracking table, streamed: batches of columns, each entry once.

The kernel walks its hash table bucket by bucket and stops when a datagram is full; it goes on when
the reader has taken that, so a slow reader costs nothing but time.  When the entry at which it
stopped is gone it sends the whole bucket again: those are the doubled entries that are left out
here.  When the hash table is resized in between, entries may be missed: then it is read again.

Source: kernel net/netfilter/nf_conntrack_netlink.c ctnetlink_dump_table(); net/netlink/af_netlink.c
netlink_dump().
"""

from __future__ import annotations

import errno
import itertools
import socket
import struct
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gketrace.errors import TimeoutExceeded, UnavailableError
from gketrace_agent.kernel.conntrack_columns import Array, Batch, Group, Layouts, frame
from gketrace_agent.kernel.conntrack_request import KernelFilter, dump_body
from gketrace_agent.kernel.netlink import NETLINK_NETFILTER, NetlinkError

__all__ = ["BulkSocket", "Seen", "TableReading"]

_CT_NEW: Final = 0x0100
_CT_GET: Final = 0x0101
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLM_F_REQUEST: Final = 0x01
_NLM_F_DUMP: Final = 0x300
_NLM_F_DUMP_INTR: Final = 0x10
_HEADER: Final = struct.Struct("=IHHII")
_BUFFER: Final = 2 << 20
"""Bytes that are decoded together: about 8,000 entries."""
_DATAGRAM: Final = 64 << 10
"""Room for the next datagram; the kernel fills at most 32 KiB."""
_ATTEMPTS: Final = 4
_TIMEOUT: Final = 5
"""Seconds without a datagram."""
_WHAT: Final = "conntrack table"


class BulkSocket:
    """A netlink socket in the network namespace of the thread that makes it; for one dump at a
    time, from any thread."""

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER
            )
        except OSError as error:
            raise UnavailableError(f"no netfilter socket: {error.strerror}") from None
        # A timeout of Python's would cost a poll(2) for each datagram.
        limit = struct.pack("@ll", _TIMEOUT, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._socket.bind((0, 0))
        # A number that an address, a port or a counter is unlikely to be: see `frame`.
        self._sequence = itertools.count(0x7E5A_1D00)

    def close(self) -> None:
        """May be called twice."""
        self._socket.close()

    def dump(self, wanted: KernelFilter, buffer: bytearray) -> Iterator[tuple[Array, Array, bool]]:
        """(words, where each message starts, interrupted) of one dump, a bufferful at a time.

        The words are only good until the next one is asked for.  Raises `NetlinkError`, with
        ENOBUFS where the kernel had no memory for a datagram.
        """
        sequence = next(self._sequence)
        body = dump_body(wanted)
        flags = _NLM_F_REQUEST | _NLM_F_DUMP
        request = _HEADER.pack(_HEADER.size + len(body), _CT_GET, flags, sequence, 0) + body
        try:
            self._socket.send(request)
        except OSError as error:  # closed, or no memory
            raise NetlinkError(error.errno or 0, _WHAT) from None
        view = memoryview(buffer)
        done = False
        while not done:
            filled = 0
            while not done and filled + _DATAGRAM <= len(buffer):
                size = self._receive(view[filled:])
                done = _ends(buffer, filled, size, sequence)
                filled += size
            words = np.frombuffer(buffer, np.uint32, filled // 4)
            starts = frame(words, sequence)
            if starts is None:
                starts = _walk(buffer, filled, sequence)
            kinds = words[starts + 1]
            interrupted = bool((kinds >> 16 & _NLM_F_DUMP_INTR).any())
            yield words, starts[(kinds & 0xFFFF) == _CT_NEW], interrupted

    def _receive(self, room: memoryview) -> int:
        try:
            size = self._socket.recv_into(room, 0, socket.MSG_TRUNC)
        except BlockingIOError:
            raise TimeoutExceeded(f"{_WHAT}: the kernel did not answer in {_TIMEOUT} s") from None
        except OSError as error:
            raise NetlinkError(error.errno or 0, _WHAT) from None
        if size > len(room):
            raise NetlinkError(errno.EMSGSIZE, _WHAT, "a datagram longer than the buffer")
        return size


def _ends(buffer: bytearray, offset: int, size: int, sequence: int) -> bool:
    """Whether the datagram ends the dump.  Raises `NetlinkError` when it tells of an error.

    The kernel puts NLMSG_DONE at the end of a datagram, by itself or after the last entries; an
    error comes alone.
    """
    end = offset + size
    for start, kind in ((offset, _NLMSG_ERROR), (end - 20, _NLMSG_DONE), (offset, _NLMSG_DONE)):
        if start < offset or start + 20 > end:
            continue
        length, found, _, answers, _ = _HEADER.unpack_from(buffer, start)
        if found == kind and answers == sequence and length >= 20 and start + length <= end:
            (number,) = struct.unpack_from("=i", buffer, start + 16)
            if number < 0:
                raise NetlinkError(-number, _WHAT)
            return True
    return False


def _walk(buffer: bytearray, filled: int, sequence: int) -> Array:
    """Message after message: what `frame` does, where an entry holds the sequence number."""
    starts: list[int] = []
    offset = 0
    while offset + 16 <= filled:
        length, _, _, answers, _ = _HEADER.unpack_from(buffer, offset)
        if length < 16:
            raise NetlinkError(errno.EBADMSG, _WHAT)
        if answers == sequence:
            starts.append(offset // 4)
        offset += (length + 3) & ~3
    return np.array(starts, np.int64)


class Seen:
    """Which entries have been seen: 8 bytes for each."""

    def __init__(self) -> None:
        self._keys: Array = np.empty(0, np.uint64)

    def __len__(self) -> int:
        return len(self._keys)

    def new(self, groups: Sequence[Group]) -> tuple[list[Group], int]:
        """The groups without the entries that were seen before, and how many those were."""
        if not groups:
            return [], 0
        parts = [group.keys() for group in groups]
        keys = np.concatenate(parts)
        order = np.argsort(keys, kind="stable")
        ranked = keys[order]
        fresh = np.ones(len(keys), bool)
        fresh[1:] = ranked[1:] != ranked[:-1]
        if len(self._keys):
            places = np.searchsorted(self._keys, ranked)
            places[places == len(self._keys)] = 0
            fresh &= self._keys[places] != ranked
        added = ranked[fresh]
        self._keys = np.concatenate((self._keys, added))
        self._keys.sort(kind="stable")
        if fresh.all():
            return list(groups), 0
        keep = np.empty(len(keys), bool)
        keep[order] = fresh
        left: list[Group] = []
        start = 0
        for group in groups:
            which = keep[start : start + len(group)]
            start += len(group)
            if which.any():
                left.append(group if which.all() else group.take(which))
        return left, len(keys) - int(fresh.sum())


@dataclass(slots=True)
class TableReading:
    """A reading of the table under some filters, and what can be said of it afterwards."""

    socket: BulkSocket
    filters: Sequence[KernelFilter]
    take: Callable[[Group], Array | None]
    """Which rows of a group are wanted (bool); None: all."""
    buckets: Callable[[], int]
    """net.netfilter.nf_conntrack_buckets."""
    read: int = 0
    """Entries that the kernel sent, doubled and unwanted ones included."""
    duplicates: int = 0
    """Entries that the kernel sent twice in one dump."""
    active: Callable[[], bool] = lambda: True
    """Whether somebody still waits for it; asked for each dump and bufferful."""
    readings: int = 0
    """Dumps that were begun."""
    failures: int = 0
    """Dumps that ended early for want of memory (ENOBUFS)."""
    consistent: bool = True
    """False: the last attempt of some dump was interrupted, too, so something may be missing."""

    def batches(self) -> Iterator[Batch]:
        """What `take` takes of what the filters let through, each entry once.

        An interrupted dump is made again, a bounded number of times; what it brought stays.
        Raises `TimeoutExceeded` when nobody waits for it any more.
        """
        seen = Seen()
        buffer = bytearray(_BUFFER)
        layouts = Layouts()
        for number, wanted in enumerate(self.filters):
            for attempt in range(_ATTEMPTS):
                again = bool(number or attempt)
                interrupted = yield from self._attempt(wanted, buffer, layouts, seen, again)
                if not interrupted:
                    break
            else:
                self.consistent = False

    def _check_active(self) -> None:
        if not self.active():
            raise TimeoutExceeded(f"{_WHAT}: its reader has gone")

    def _attempt(
        self,
        wanted: KernelFilter,
        buffer: bytearray,
        layouts: Layouts,
        seen: Seen,
        again: bool,
    ) -> Generator[Batch, None, bool]:
        self._check_active()
        self.readings += 1
        before = self.buckets()
        interrupted = False
        try:
            for words, starts, interrupted_now in self.socket.dump(wanted, buffer):
                self._check_active()
                interrupted |= interrupted_now
                self.read += len(starts)
                batch = layouts.batch(words, starts)
                groups, doubled = seen.new(self._taken(batch))
                if not again:
                    self.duplicates += doubled
                if groups:
                    yield Batch(batch.size, tuple(groups))
        except NetlinkError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self.failures += 1
            interrupted = True
        return interrupted or self.buckets() != before

    def _taken(self, batch: Batch) -> list[Group]:
        left: list[Group] = []
        for group in batch.groups:
            which = self.take(group)
            if which is None or which.all():
                left.append(group)
            elif which.any():
                left.append(group.take(which))
        return left
