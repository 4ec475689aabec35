"""RTM_GETROUTE over a raw socket, many queries at a time: the kernel's own answer to a look-up."""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

RTM_NEWROUTE, RTM_GETROUTE = 24, 26
NLM_F_REQUEST = 1
NLMSG_ERROR = 2
RTM_F_LOOKUP_TABLE = 0x1000

RTA_DST, RTA_SRC, RTA_IIF, RTA_OIF, RTA_GATEWAY, RTA_PREFSRC = 1, 2, 3, 4, 5, 7
RTA_TABLE, RTA_MARK, RTA_VIA, RTA_UID, RTA_IP_PROTO, RTA_SPORT, RTA_DPORT = (
    15, 16, 18, 25, 27, 28, 29,
)  # fmt: skip

TYPES = (
    "unspec", "unicast", "local", "broadcast", "anycast", "multicast", "blackhole", "unreachable",
    "prohibit", "throw", "nat", "xresolve",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One question.  `iif` 0: a locally made packet."""

    family: int
    dst: IPv4Address | IPv6Address
    src: IPv4Address | IPv6Address | None = None
    oif: int = 0
    iif: int = 0
    mark: int = 0
    tos: int = 0
    protocol: int = 17
    sport: int = 0
    dport: int = 0
    uid: int = 0

    def message(self, sequence: int) -> bytes:
        family = socket.AF_INET if self.family == 4 else socket.AF_INET6
        bits = 32 if self.family == 4 else 128
        body = struct.pack(
            "=BBBBBBBBI", family, bits, bits if self.src else 0, self.tos, 0, 0, 0, 0,
            RTM_F_LOOKUP_TABLE,
        )  # fmt: skip
        body += _attribute(RTA_DST, self.dst.packed)
        if self.src is not None:
            body += _attribute(RTA_SRC, self.src.packed)
        for kind, number in ((RTA_OIF, self.oif), (RTA_IIF, self.iif), (RTA_MARK, self.mark)):
            if number:
                body += _attribute(kind, struct.pack("=I", number))
        body += _attribute(RTA_UID, struct.pack("=I", self.uid))
        body += _attribute(RTA_IP_PROTO, bytes([self.protocol]))
        for kind, port in ((RTA_SPORT, self.sport), (RTA_DPORT, self.dport)):
            if port:
                body += _attribute(kind, struct.pack("!H", port))
        header = struct.pack("=IHHII", 16 + len(body), RTM_GETROUTE, NLM_F_REQUEST, sequence, 0)
        return header + body


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the kernel said."""

    error: str = ""
    type: str = ""
    oif: int = 0
    gateway: IPv4Address | IPv6Address | None = None
    prefsrc: IPv4Address | IPv6Address | None = None
    table: int = 0


class RouteSocket:
    """A netlink socket of the namespace that the opening thread is in."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._socket.settimeout(10)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def ask(self, queries: list[Query], batch: int = 64) -> list[Answer]:
        answers: list[Answer] = []
        for start in range(0, len(queries), batch):
            part = queries[start : start + batch]
            first = self._sequence + 1
            self._sequence += len(part)
            self._socket.send(b"".join(q.message(first + i) for i, q in enumerate(part)))
            found: dict[int, Answer] = {}
            while len(found) < len(part):
                data = self._socket.recv(1 << 20)
                offset = 0
                while offset + 16 <= len(data):
                    length, kind, _, sequence, _ = struct.unpack_from("=IHHII", data, offset)
                    found[sequence] = _answer(kind, data[offset + 16 : offset + length])
                    offset += (length + 3) & ~3
            answers += [found[first + i] for i in range(len(part))]
        return answers


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _answer(kind: int, body: bytes) -> Answer:
    if kind == NLMSG_ERROR:
        number = -struct.unpack_from("=i", body)[0]
        return Answer(error=errno.errorcode.get(number, os.strerror(number)))
    values: dict[int, bytes] = {}
    offset = 12
    while offset + 4 <= len(body):
        length, attribute = struct.unpack_from("=HH", body, offset)
        values[attribute & 0x3FFF] = body[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    gateway = None
    if RTA_GATEWAY in values:
        gateway = ip_address(values[RTA_GATEWAY])
    elif RTA_VIA in values:
        gateway = ip_address(values[RTA_VIA][2:])
    return Answer(
        type=TYPES[body[7]],
        oif=struct.unpack("=I", values[RTA_OIF])[0] if RTA_OIF in values else 0,
        gateway=gateway,
        prefsrc=ip_address(values[RTA_PREFSRC]) if RTA_PREFSRC in values else None,
        table=struct.unpack("=I", values[RTA_TABLE])[0] if RTA_TABLE in values else body[4],
    )
