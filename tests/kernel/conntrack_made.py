"""Connection-tracking entries made through netlink, where no traffic makes them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address
from itertools import islice

from gketrace_agent.kernel.netlink import NETLINK_NETFILTER, attribute, nested
from gketrace_agent.kernel.nfnetlink import NFNL_HEADER

_HEADER = struct.Struct("=IHHII")
_NEW, _DELETE = 0x0100, 0x0102
_REQUEST, _ACK, _CREATE, _EXCL = 0x1, 0x4, 0x400, 0x200


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """An entry to make.  Addresses and ports of NAT: what the reply tuple has instead."""

    src: str
    dst: str
    protocol: int = 6
    sport: int = 0
    dport: int = 0
    reply_src: str = ""
    reply_sport: int = 0
    reply_dst: str = ""
    reply_dport: int = 0
    state: int = 3
    status: int = 0
    timeout: int = 1000
    mark: int = 0
    zone: int = 0


def _tuple(src: str, dst: str, protocol: int, sport: int, dport: int) -> bytes:
    one, two = ip_address(src), ip_address(dst)
    base = 1 if one.version == 4 else 3
    ip = nested(1, attribute(base, one.packed), attribute(base + 1, two.packed))
    parts = [attribute(1, bytes((protocol,)))]
    if protocol in (1, 58):  # sport: the identifier, dport: the type
        first = 4 if protocol == 1 else 7
        parts += [
            attribute(first, struct.pack("!H", sport)),
            attribute(first + 1, bytes((dport,))),
            attribute(first + 2, b"\0"),
        ]
    elif protocol in (6, 17, 33, 47, 132, 136):
        parts += [
            attribute(2, struct.pack("!H", sport)),
            attribute(3, struct.pack("!H", dport)),
        ]
    return ip + nested(2, *parts)


_INVERSE = {8: 0, 128: 129, 0: 8, 129: 128}


def body(made: Made) -> bytes:
    """struct nfgenmsg and attributes of IPCTNL_MSG_CT_NEW."""
    version = ip_address(made.src).version
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    icmp = made.protocol in (1, 58)
    orig = _tuple(made.src, made.dst, made.protocol, made.sport, made.dport)
    reply = _tuple(
        made.reply_src or made.dst,
        made.reply_dst or made.src,
        made.protocol,
        made.sport if icmp else made.reply_sport or made.dport,
        _INVERSE.get(made.dport, made.dport) if icmp else made.reply_dport or made.sport,
    )
    parts = [
        NFNL_HEADER.pack(family, 0, 0),
        nested(1, orig),
        nested(2, reply),
        attribute(7, struct.pack("!I", made.timeout)),
        attribute(3, struct.pack("!I", made.status | 8)),  # confirmed
    ]
    if made.mark:
        parts.append(attribute(8, struct.pack("!I", made.mark)))
    if made.zone:
        parts.append(attribute(18, struct.pack("!H", made.zone)))
    if made.protocol == 6:
        loose = struct.pack("BB", 0x0A, 0x0A)
        parts.append(
            nested(
                4,
                nested(
                    1,
                    attribute(1, bytes((made.state,))),
                    attribute(4, loose),
                    attribute(5, loose),
                ),
            )
        )
    elif made.protocol == 132:
        tags = struct.pack("!I", 7)
        parts.append(
            nested(
                4,
                nested(
                    3, attribute(1, bytes((made.state,))), attribute(2, tags), attribute(3, tags)
                ),
            )
        )
    return b"".join(parts)


def requests(
    entries: Iterable[Made], *, delete: bool = False, update: bool = False
) -> Iterator[tuple[bytes, int]]:
    """Requests to make (or delete, or change) up to 200 entries each, and how many those are."""
    kind = _DELETE if delete else _NEW
    flags = _REQUEST if delete or update else _REQUEST | _CREATE | _EXCL
    todo = iter(entries)
    while some := list(islice(todo, 200)):
        parts = []
        for number, one in enumerate(some):
            data = body(one)
            more = _ACK if number == len(some) - 1 else 0
            parts.append(_HEADER.pack(16 + len(data), kind, flags | more, number, 0) + data)
            parts.append(b"\0" * (-len(data) % 4))
        yield b"".join(parts), len(some)


class Maker:
    """A socket in the calling thread's namespace that takes `requests`."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._socket.bind((0, 0))

    def __enter__(self) -> Maker:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, request: bytes, count: int) -> list[int]:
        """The kernel's error numbers."""
        self._socket.send(request)
        errors: list[int] = []
        while True:
            data = self._socket.recv(1 << 17)
            offset = 0
            while offset + 20 <= len(data):
                length, got, _, answers, _ = _HEADER.unpack_from(data, offset)
                if got == 2:
                    (number,) = struct.unpack_from("=i", data, offset + 16)
                    errors += [-number] if number else []
                    if answers == count - 1:
                        return errors
                offset += (length + 3) & ~3

    def flush(self) -> None:
        """Deletes all entries of the namespace."""
        data = NFNL_HEADER.pack(socket.AF_UNSPEC, 0, 0)
        request = _HEADER.pack(16 + len(data), _DELETE, _REQUEST | _ACK, 0, 0) + data
        assert not self.send(request, 1)


def make(entries: Iterable[Made], *, delete: bool = False, update: bool = False) -> int:
    """Makes (or deletes, or changes) entries in the calling thread's namespace; returns how many.

    Raises OSError with the kernel's number.
    """
    done = 0
    with Maker() as maker:
        for request, count in requests(entries, delete=delete, update=update):
            errors = maker.send(request, count)
            if errors and not delete:
                raise OSError(errors[0], "making conntrack entries")
            done += count
    return done


def flows(count: int, *, start: int = 0) -> Iterator[Made]:
    """What a node's table looks like: mostly TCP through a Service, some UDP, some half open."""
    for number in range(start, start + count):
        client = str(IPv4Address(0x0A280000 + number % 1009))
        service = str(IPv4Address(0x0A2B0000 + number % 211 + 1))
        pod = str(IPv4Address(0x0A290000 + number % 1511 + 1))
        port = 1024 + number // 1009 % 60000
        shape = number % 10
        if shape < 6:
            yield Made(
                src=client,
                dst=service,
                sport=port,
                dport=80,
                reply_src=pod,
                reply_sport=8080,
                status=6 if shape < 5 else 0,
                state=3 if shape < 5 else 1,
                timeout=86000,
            )
        elif shape < 9:
            yield Made(
                src=client,
                dst=service,
                protocol=17,
                sport=port,
                dport=53,
                reply_src=pod,
                reply_sport=53,
                status=2 if shape < 8 else 0,
                timeout=1170,
            )
        else:
            yield Made(src=client, dst=pod, sport=port, dport=443, status=6, timeout=86000)


__all__ = ["Made", "Maker", "body", "flows", "make", "requests"]
