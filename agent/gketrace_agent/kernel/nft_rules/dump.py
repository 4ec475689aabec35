"""The kernel's chains and rules, chain by chain.

The kernel answers a dump in pieces of at most 32 KiB, and for each piece steps over all rules
before it: a whole table of 160,000 rules takes 9 s of its time, one of 320,000 some 40 s.  Asked
for one chain it looks that up by its name.

Source: kernel net/netfilter/nf_tables_api.c (nf_tables_dump_chains, nf_tables_dump_rules,
nf_tables_fill_rule_info), net/netlink/af_netlink.c (netlink_dump).
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from gketrace.errors import TimeoutExceeded
from gketrace_agent.kernel.netlink import (
    NETLINK_NETFILTER,
    NetlinkError,
    NetlinkSocket,
    attribute,
    attributes,
)
from gketrace_agent.kernel.nfnetlink import NFNL_HEADER, NFNL_SUBSYS_NFTABLES, nfnl_type
from gketrace_agent.kernel.nft_rules.words import string

__all__ = ["Chain", "Hook", "RuleDump", "chains_of", "head_of"]

_NFT_MSG_GETCHAIN: Final = 4
_NEWRULE: Final = nfnl_type(NFNL_SUBSYS_NFTABLES, 6)
_GETRULE: Final = nfnl_type(NFNL_SUBSYS_NFTABLES, 7)
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY = 1, 3, 4, 5
_CHAIN_USE, _CHAIN_TYPE, _CHAIN_COUNTERS = 6, 7, 8
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_COUNTER_BYTES, _COUNTER_PACKETS = 1, 2
_RULE_TABLE, _RULE_CHAIN = 1, 2
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_DUMP_REQUEST: Final = 0x301
_NLM_F_DUMP_INTR: Final = 0x10
_HEADER: Final = struct.Struct("=IHHII")
_ERRNO: Final = struct.Struct("=i")
_RECEIVE: Final = 1 << 16
"""Bytes; twice of what the kernel fills at most."""
_TIMEOUT: Final = 5.0
"""Seconds without a datagram."""
_ATTEMPTS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """What a base chain has and others have not."""

    number: int
    """NF_INET_PRE_ROUTING (0) to NF_INET_POST_ROUTING (4)."""
    priority: int
    type: str
    policy: int
    """NF_DROP (0) or NF_ACCEPT (1)."""
    packets: int
    bytes: int


class Chain(NamedTuple):
    """A chain of one table."""

    name: str
    """Latin-1: each character is a byte."""
    hook: Hook | None
    use: int
    """Its rules, and the jumps to it (nft_chain->use)."""


def chains_of(netfilter: NetlinkSocket, family: int) -> dict[str, list[Chain]]:
    """Table → its chains, of one family (AF_INET or AF_INET6).  Raises `NetlinkError`."""
    tables: dict[bytes, dict[bytes, Chain]] = {}

    def take(body: bytes) -> bool:
        # An interrupted dump comes again: a chain counts once.
        parts = attributes(body, NFNL_HEADER.size)
        name = parts.get(_CHAIN_NAME, b"")
        tables.setdefault(parts.get(_CHAIN_TABLE, b""), {})[name] = Chain(
            name=string(name),
            hook=_hook(parts) if _CHAIN_HOOK in parts else None,
            use=int.from_bytes(parts.get(_CHAIN_USE, b""), "big"),
        )
        return False

    netfilter.dump(
        nfnl_type(NFNL_SUBSYS_NFTABLES, _NFT_MSG_GETCHAIN),
        NFNL_HEADER.pack(family, 0, 0),
        what="nf_tables chains",
        wanted=take,
    )
    return {string(table): list(chains.values()) for table, chains in tables.items()}


def _hook(parts: dict[int, bytes]) -> Hook:
    hook = attributes(parts[_CHAIN_HOOK])
    counters = attributes(parts.get(_CHAIN_COUNTERS, b""))
    return Hook(
        number=int.from_bytes(hook.get(_HOOK_NUMBER, b"\xff"), "big"),
        priority=int.from_bytes(hook.get(_HOOK_PRIORITY, b""), "big", signed=True),
        type=string(parts.get(_CHAIN_TYPE, b"")),
        policy=int.from_bytes(parts.get(_CHAIN_POLICY, b"\xff"), "big"),
        packets=int.from_bytes(counters.get(_COUNTER_PACKETS, b""), "big"),
        bytes=int.from_bytes(counters.get(_COUNTER_BYTES, b""), "big"),
    )


class RuleDump:
    """Asks for the rules of one chain after the other; a socket of the calling thread's namespace.

    Not `NetlinkSocket`: with a hundred thousand chains what happens around a request counts.
    """

    def __init__(self, family: int) -> None:
        self._generic = NFNL_HEADER.pack(family, 0, 0)
        self._sequence = 0
        self._view = memoryview(bytearray(_RECEIVE))
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER
        )
        self._socket.settimeout(_TIMEOUT)
        self._socket.bind((0, 0))

    def __enter__(self) -> RuleDump:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def rules(self, head: bytes) -> list[bytes]:
        """The bodies of a chain's rules, in order: struct nfgenmsg, `head`, and other attributes.

        `head`: as `head_of`.  Raises `NetlinkError`, `TimeoutExceeded`.  Read again, a bounded
        number of times, when the rules changed meanwhile; whether they changed between two chains
        is for the caller to see.
        """
        body = self._generic + head
        try:
            for _ in range(_ATTEMPTS):
                found, interrupted = self._ask(body)
                if not interrupted:
                    break
        except TimeoutError:
            raise TimeoutExceeded(
                f"nf_tables rules: the kernel did not answer in {_TIMEOUT} s"
            ) from None
        except OSError as error:
            raise NetlinkError(error.errno or 0, "nf_tables rules") from None
        return found

    def _ask(self, body: bytes) -> tuple[list[bytes], int]:
        self._sequence = sequence = self._sequence % 0x7FFFFFFF + 1
        header = _HEADER.pack(_HEADER.size + len(body), _GETRULE, _DUMP_REQUEST, sequence, 0)
        view, receive, unpack = self._view, self._socket.recv_into, _HEADER.unpack_from
        found: list[bytes] = []
        interrupted = 0
        self._socket.send(header + body)
        while True:
            size = receive(view, 0, socket.MSG_TRUNC)
            if size > _RECEIVE:
                raise NetlinkError(errno.EMSGSIZE, "nf_tables rules", "longer than the buffer")
            offset = 0
            while offset + 16 <= size:
                length, kind, flags, answers, _ = unpack(view, offset)
                if length < 16 or offset + length > size:
                    raise NetlinkError(errno.EBADMSG, "nf_tables rules")
                if answers == sequence:
                    interrupted |= flags & _NLM_F_DUMP_INTR
                    if kind == _NEWRULE:
                        found.append(bytes(view[offset + 16 : offset + length]))
                    elif kind in (_NLMSG_DONE, _NLMSG_ERROR):
                        number = _ERRNO.unpack_from(view, offset + 16)[0] if length >= 20 else 0
                        if number < 0:
                            raise NetlinkError(-number, "nf_tables rules")
                        return found, interrupted
                offset += (length + 3) & ~3


def head_of(table: str, chain: str) -> bytes:
    """The attributes that each rule of a chain, and the request for them, begin with."""
    return b"".join(
        attribute(kind, name.encode("latin-1") + b"\0")
        for kind, name in ((_RULE_TABLE, table), (_RULE_CHAIN, chain))
    )
