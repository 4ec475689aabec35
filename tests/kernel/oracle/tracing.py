"""The kernel's rule-by-rule trace.

nftables (and iptables-nft) send trace events to the NFNLGRP_NFTRACE multicast group of the
namespace (net/netfilter/nf_tables_trace.c).  Legacy iptables writes lines ``TRACE:
table:CHAIN:rule:N`` to the kernel log (net/ipv4/netfilter/ip_tables.c, trace_packet), which is one
for the whole machine, so lines are told apart by the packet's key.
"""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import struct
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

__all__ = ["Event", "LegacyLog", "Story", "TraceSocket", "own_keys", "packet_key"]

_NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_NETLINK_NO_ENOBUFS = 5
_NFNLGRP_NFTRACE = 9
_SO_RCVBUFFORCE = 33

_TABLE, _CHAIN, _HANDLE, _TYPE, _VERDICT, _ID = 1, 2, 3, 4, 5, 6
_NETWORK_HEADER, _TRANSPORT_HEADER, _IIF, _OIF, _MARK, _NFPROTO, _POLICY = 8, 9, 10, 12, 14, 15, 16

_TYPES = {1: "policy", 2: "return", 3: "rule"}
_VERDICTS = {
    0: "drop",
    1: "accept",
    2: "stolen",
    3: "queue",
    0xFFFFFFFF: "continue",
    0xFFFFFFFE: "break",
    0xFFFFFFFD: "jump",
    0xFFFFFFFC: "goto",
    0xFFFFFFFB: "return",
}

Key = tuple[int, int]
"""(address family, IPv4 identification or IPv6 flow label): marks one packet of the oracle's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of the kernel's trace."""

    backend: str
    """``nft`` or ``legacy``."""
    kind: str
    """``rule``, ``policy`` or ``return``."""
    table: str
    chain: str
    number: int
    """nft: the rule's handle.  legacy: its 1-based position."""
    verdict: str = ""
    header: bytes = b""
    """Network and transport header, where the event carries them (the first of each base chain)."""
    iif: int = 0
    oif: int = 0
    mark: int = 0


@dataclass(slots=True, kw_only=True)
class Story:
    """All that the kernel said of one packet, in order."""

    key: Key
    events: list[Event] = field(default_factory=list)


_SHARES, _SHARE = 16, 4096


@cache
def own_keys() -> range:
    """This process's own part of the keys: the kernel log is one for all runs on this machine.

    It is held by a name in the abstract namespace of unix sockets until the process ends.  Call it
    in the machine's own network namespace.  Raises RuntimeError when all parts are taken.
    """
    for number in range(_SHARES):
        holding = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            holding.bind(f"\0gketrace-oracle-keys-{number}")
        except OSError as error:
            holding.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            _HELD.append(holding)
            return range(_SHARE * number + 1, _SHARE * (number + 1))
    raise RuntimeError(f"{_SHARES} runs of the oracle are on this machine, and share all keys")


_HELD: list[socket.socket] = []


def packet_key(header: bytes) -> Key | None:
    """The key of a packet from its network header; None for a header that is too short."""
    if len(header) < 8:
        return None
    if header[0] >> 4 == 4:
        return 4, struct.unpack_from(">H", header, 4)[0]
    return 6, struct.unpack_from(">I", header, 0)[0] & 0xFFFFF


class TraceSocket:
    """Trace events of one namespace.  Made in a thread that is in that namespace."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTRACE)
        self._keys: dict[int, Key] = {}

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self, stories: dict[Key, Story]) -> bool:
        """Reads what is there, adds it to `stories`; other packets' events are left out.

        False when nothing was there.  Raises OSError (ENOBUFS) when the kernel dropped events.
        """
        found = False
        while select.select([self._socket], [], [], 0)[0]:
            found = True
            data = self._socket.recv(1 << 18)
            offset = 0
            while offset + 20 <= len(data):
                length = struct.unpack_from("=I", data, offset)[0]
                self._take(_attributes(data[offset + 20 : offset + length]), stories)
                offset += (length + 3) & ~3
        return found

    def _take(self, found: dict[int, bytes], stories: dict[Key, Story]) -> None:
        trace_id = int.from_bytes(found.get(_ID, b""), "big")
        header = found.get(_NETWORK_HEADER, b"")
        if header:
            key = packet_key(header)
            if key is None:
                return
            self._keys[trace_id] = key
        known = self._keys.get(trace_id)
        if known is None or known not in stories:
            return
        verdict = _attributes(found.get(_VERDICT, b""))
        code = int.from_bytes(verdict.get(1, b""), "big")
        if _POLICY in found:
            code = int.from_bytes(found[_POLICY], "big")
        stories[known].events.append(
            Event(
                backend="nft",
                kind=_TYPES.get(int.from_bytes(found.get(_TYPE, b""), "big"), "?"),
                table=_text(found.get(_TABLE, b"")),
                chain=_text(found.get(_CHAIN, b"")),
                number=int.from_bytes(found.get(_HANDLE, b""), "big"),
                verdict=_VERDICTS.get(code, str(code)),
                header=header + found.get(_TRANSPORT_HEADER, b""),
                iif=int.from_bytes(found.get(_IIF, b""), "big"),
                oif=int.from_bytes(found.get(_OIF, b""), "big"),
                mark=int.from_bytes(found.get(_MARK, b""), "big"),
            )
        )


_LINE = re.compile(
    rb"TRACE: (?P<table>\w+):(?P<chain>[^ ]+):(?P<kind>rule|return|policy):(?P<number>\d+) "
    rb"(?P<rest>.*)"
)
_ID4 = re.compile(rb" ID=(\d+) ")
_ID6 = re.compile(rb" FLOWLBL=(\d+) ")


_ALL_NAMESPACES = Path("/proc/sys/net/netfilter/nf_log_all_netns")


class LegacyLog:
    """``TRACE:`` lines of the kernel log, from now on."""

    def __init__(self) -> None:
        # Without it the kernel logs for no other namespace than the machine's own
        # (net/netfilter/nf_log_syslog.c, sysctl_nf_log_all_netns).  It stays on, as others may be
        # using it by now.
        if _ALL_NAMESPACES.read_text().strip() == "0":
            _ALL_NAMESPACES.write_text("1")
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._fd, 0, os.SEEK_END)

    def close(self) -> None:
        os.close(self._fd)

    def read(self, stories: dict[Key, Story]) -> bool:
        """Reads what is there, adds it to `stories`; False when nothing was there.

        Where the log's ring overran, lines are lost: the story is then cut short, disagrees, and is
        told again alone.
        """
        found = False
        while True:
            try:
                record = os.read(self._fd, 8192)
            except BlockingIOError:
                return found
            except BrokenPipeError:
                continue
            line = _LINE.search(record)
            if line is None:
                continue
            rest = b" " + line["rest"] + b" "
            number4, number6 = _ID4.search(rest), _ID6.search(rest)
            if number6:
                key = (6, int(number6[1]))
            elif number4:
                key = (4, int(number4[1]))
            else:
                continue
            if key not in stories:
                continue
            found = True
            stories[key].events.append(
                Event(
                    backend="legacy",
                    kind=line["kind"].decode(),
                    table=line["table"].decode(),
                    chain=line["chain"].decode(),
                    number=int(line["number"]),
                )
            )


def gather(
    stories: dict[Key, Story],
    sockets: TraceSocket,
    log: LegacyLog | None,
    done: int,
    deadline: float,
    quiet: float,
) -> None:
    """Fills `stories` until `quiet` seconds pass without an event.

    `deadline` is a time.monotonic().

    `done` is how many stories are expected to have an event; waits longer for the first.
    """
    last = time.monotonic()
    while (now := time.monotonic()) < deadline:
        more = sockets.read(stories)
        if log is not None:
            more = log.read(stories) or more
        if more:
            last = now
            continue
        heard = sum(1 for story in stories.values() if story.events)
        if now - last > quiet and heard >= done:
            break
        if now - last > quiet * 10:
            break
        select.select([sockets], [], [], quiet / 4)


__all__ += ["Key", "gather"]


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode()
