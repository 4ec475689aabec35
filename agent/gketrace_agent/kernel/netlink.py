"""A netlink socket, and netlink's attributes.

Why not pyroute2's sockets: they start an event loop for each socket, belong to the thread they
were made in, and ignore NLM_F_DUMP_INTR since 0.9.1; and its decoder costs 0.3 ms for each link
with its attributes (110 veths: 60 ms for the links alone, where this module and
`gketrace_agent.observe.links` take 5 ms).  It takes 0.2 s and 9 MiB to import, and is the second
opinion in tests.

Source: kernel net/netlink/af_netlink.c, include/uapi/linux/netlink.h.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from gketrace.errors import ForbiddenError, TimeoutExceeded, UnavailableError

__all__ = [
    "NETLINK_NETFILTER",
    "NETLINK_ROUTE",
    "NETLINK_SOCK_DIAG",
    "Dump",
    "Message",
    "NetlinkError",
    "NetlinkForbidden",
    "NetlinkSocket",
    "attribute",
    "attributes",
    "nested",
    "text",
    "u16",
    "u32",
]

NETLINK_ROUTE: Final = 0
NETLINK_SOCK_DIAG: Final = 4
NETLINK_NETFILTER: Final = 12

_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLM_F_REQUEST: Final = 0x01
_NLM_F_ACK: Final = 0x04
_NLM_F_DUMP_INTR: Final = 0x10
_NLM_F_DUMP: Final = 0x300
_NLM_F_CAPPED: Final = 0x100
_NLM_F_ACK_TLVS: Final = 0x200
_NLMSGERR_ATTR_MSG: Final = 1
_NLA_TYPE_MASK: Final = 0x3FFF
_NLA_F_NESTED: Final = 0x8000
_SOL_NETLINK: Final = 270
_NETLINK_EXT_ACK: Final = 11
_SO_NETNS_COOKIE: Final = 71

_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_ERRNO: Final = struct.Struct("=i")
_RECEIVE: Final = 1 << 17
"""Bytes; the kernel fills at most 32 KiB for one datagram of a dump."""
_ATTEMPTS: Final = 4
_TIMEOUT: Final = 5.0
"""Seconds without a datagram."""


class Message(NamedTuple):
    """One netlink message without its header."""

    type: int
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Dump:
    """All messages of one dump."""

    messages: list[Message]
    consistent: bool
    """False: the table changed under each of the attempts (NLM_F_DUMP_INTR), so something may be
    missing or doubled."""


class NetlinkError(UnavailableError):
    """The kernel's answer was an error number; a `NetlinkForbidden` where that is EPERM."""

    def __new__(cls, number: int, what: str, detail: str = "") -> NetlinkError:
        return super().__new__(NetlinkForbidden if number == errno.EPERM else cls)

    def __init__(self, number: int, what: str, detail: str = "") -> None:
        self.errno: Final = number
        name = errno.errorcode.get(number, str(number))
        told = f": {detail}" if detail else ""
        hint = "the agent needs NET_ADMIN" if number == errno.EPERM else ""
        said = os.strerror(number) if number in errno.errorcode else "unknown error"
        super().__init__(f"{what}: {said} ({name}){told}", hint=hint)


class NetlinkForbidden(ForbiddenError, NetlinkError):
    """What reading netfilter or another namespace's links takes is missing: CAP_NET_ADMIN in the
    namespace's user namespace (net/netfilter/nfnetlink.c, nfnetlink_rcv)."""


class NetlinkSocket:
    """A netlink socket in the network namespace of the thread that makes it.

    May be used from several threads, one request at a time.  Raises `NetlinkError` for errors
    that the kernel answers, `TimeoutExceeded` when it does not answer.
    """

    def __init__(self, protocol: int) -> None:
        self._sequence = itertools.count(1)
        self._lock = threading.Lock()
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol
            )
        except OSError as error:
            raise UnavailableError(
                f"no netlink socket of protocol {protocol}: {error.strerror}"
            ) from None
        self._socket.settimeout(_TIMEOUT)
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)

    def close(self) -> None:
        """May be called twice."""
        self._socket.close()

    @property
    def netns_cookie(self) -> int | None:
        """A number that no other network namespace has had since boot; None before Linux 5.14.

        Unlike the inode it is never used again.
        """
        try:
            raw = self._socket.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
        except OSError as error:
            if error.errno == errno.ENOPROTOOPT:
                return None
            raise
        return int.from_bytes(raw, sys.byteorder)

    def dump(
        self,
        kind: int,
        body: bytes,
        *,
        what: str,
        flags: int = 0,
        wanted: Callable[[bytes], object] | None = None,
    ) -> Dump:
        """All entries of a table; read again, a bounded number of times, when it changed meanwhile.

        `kind` is the message type, `body` the family's header and attributes.  Only messages for
        whose body `wanted` is true are kept: of a large table, that may be few.
        """
        messages: list[Message] = []
        for _ in range(_ATTEMPTS):
            messages, interrupted = self._exchange(
                kind, _NLM_F_REQUEST | _NLM_F_DUMP | flags, body, what, wanted
            )
            if not interrupted:
                return Dump(messages=messages, consistent=True)
        return Dump(messages=messages, consistent=False)

    def request(self, kind: int, body: bytes, *, what: str) -> Message | None:
        """The answer to one question; None when the kernel only acknowledged it."""
        messages, _ = self._exchange(kind, _NLM_F_REQUEST | _NLM_F_ACK, body, what)
        return messages[0] if messages else None

    def _exchange(
        self,
        kind: int,
        flags: int,
        body: bytes,
        what: str,
        wanted: Callable[[bytes], object] | None = None,
    ) -> tuple[list[Message], bool]:
        with self._lock:
            sequence = next(self._sequence)
            header = _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0)
            try:
                self._socket.send(header + body)
            except OSError as error:  # closed, or no memory
                raise NetlinkError(error.errno or 0, what) from None
            return self._receive(sequence, what, wanted)

    def _receive(
        self, sequence: int, what: str, wanted: Callable[[bytes], object] | None
    ) -> tuple[list[Message], bool]:
        messages: list[Message] = []
        keep = messages.append
        interrupted = False
        failure: NetlinkError | None = None
        unpack: Callable[[bytes, int], tuple[int, int, int, int, int]] = _HEADER.unpack_from
        while True:
            try:
                data, _, received, _ = self._socket.recvmsg(_RECEIVE)
            except TimeoutError:
                raise TimeoutExceeded(
                    f"{what}: the kernel did not answer in {_TIMEOUT} s"
                ) from None
            except OSError as error:
                raise NetlinkError(error.errno or 0, what) from None
            if received & socket.MSG_TRUNC:
                failure = NetlinkError(errno.EMSGSIZE, what, "a message longer than the buffer")
            offset, end = 0, len(data)
            while offset + 16 <= end:
                length, kind, flags, answers, _ = unpack(data, offset)
                if length < 16:
                    raise NetlinkError(errno.EBADMSG, what)
                if answers == sequence:
                    interrupted |= bool(flags & _NLM_F_DUMP_INTR)
                    if kind == _NLMSG_DONE:
                        number = _ERRNO.unpack_from(data, offset + 16)[0] if length >= 20 else 0
                        if number < 0:
                            failure = failure or NetlinkError(-number, what)
                        if failure is not None:
                            raise failure
                        return messages, interrupted
                    if kind == _NLMSG_ERROR:
                        number = _ERRNO.unpack_from(data, offset + 16)[0]
                        if number:
                            told = _error_text(data[offset + 16 : offset + length], flags)
                            raise NetlinkError(-number, what, told)
                        return messages, interrupted
                    body = data[offset + 16 : offset + length]
                    if wanted is None or wanted(body):
                        keep(Message(kind, body))
                offset += (length + 3) & ~3


def _error_text(body: bytes, flags: int) -> str:
    """The extended acknowledgement's message, if the kernel sent one."""
    if not flags & _NLM_F_ACK_TLVS:
        return ""
    # errno, then the request's header, then (unless capped) the whole request.
    (length,) = struct.unpack_from("=I", body, 4)
    start = 20 if flags & _NLM_F_CAPPED else 4 + ((length + 3) & ~3)
    return text(attributes(body, start).get(_NLMSGERR_ATTR_MSG, b""))


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """Attribute number → payload, of the attributes from `offset` to the end of `data`.

    The flags NLA_F_NESTED and NLA_F_NET_BYTEORDER are taken off; of doubled attributes the last
    one stays.  Raises ValueError when the lengths do not fit.
    """
    found: dict[int, bytes] = {}
    end = len(data)
    unpack = _ATTRIBUTE.unpack_from
    while offset + 4 <= end:
        length, kind = unpack(data, offset)
        if length < 4 or offset + length > end:
            raise ValueError(f"netlink attribute {kind} of {length} bytes at {offset} of {end}")
        found[kind & _NLA_TYPE_MASK] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute with its header and padding."""
    return _ATTRIBUTE.pack(4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def nested(kind: int, *parts: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | _NLA_F_NESTED, b"".join(parts))


def text(payload: bytes) -> str:
    """A NUL-terminated string; bytes that are not UTF-8 come back escaped."""
    return payload.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def u16(payload: bytes) -> int:
    """Host byte order."""
    return int.from_bytes(payload[:2], sys.byteorder)


def u32(payload: bytes) -> int:
    """Host byte order."""
    return int.from_bytes(payload[:4], sys.byteorder)
