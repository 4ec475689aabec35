"""Requests for a dump of the connection-tracking table, filtered by the kernel.

Source: kernel net/netfilter/nf_conntrack_netlink.c ctnetlink_alloc_filter(),
ctnetlink_filter_match(), ctnetlink_parse_tuple_filter().
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from typing import Final

from gketrace.packet import IPAddress, Protocol
from gketrace_agent.kernel.netlink import attribute, nested
from gketrace_agent.kernel.nfnetlink import NFNL_HEADER

__all__ = ["KernelFilter", "TupleFilter", "dump_body"]

_CTA_TUPLE_ORIG: Final = 1
_CTA_TUPLE_REPLY: Final = 2
_CTA_STATUS: Final = 3
_CTA_MARK: Final = 8
_CTA_MARK_MASK: Final = 21
_CTA_FILTER: Final = 25
_CTA_STATUS_MASK: Final = 26
_CTA_FILTER_ORIG_FLAGS: Final = 1
_CTA_FILTER_REPLY_FLAGS: Final = 2
_F_IP_SRC: Final = 1 << 0
_F_IP_DST: Final = 1 << 1
_F_PROTO_NUM: Final = 1 << 3
_F_SRC_PORT: Final = 1 << 4
_F_DST_PORT: Final = 1 << 5
_PORTS_COMPARED: Final = frozenset({Protocol.TCP, Protocol.UDP})
"""ctnetlink_filter_match_tuple() compares the ports of these two only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TupleFilter:
    """What one direction of an entry must have.  None: anything."""

    src: IPAddress | None = None
    dst: IPAddress | None = None
    sport: int | None = None
    dport: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFilter:
    """What the kernel is asked to filter a dump by.

    It takes what it can and lets the rest through (tuples before Linux 5.8, status before 5.15,
    ports of other protocols than TCP and UDP), so filter again afterwards.
    """

    family: int = 0
    """4, 6, or 0 for both."""
    protocol: int | None = None
    orig: TupleFilter = field(default_factory=TupleFilter)
    reply: TupleFilter = field(default_factory=TupleFilter)
    mark: int | None = None
    mark_mask: int = 0xFFFFFFFF
    status: int = 0
    status_mask: int = 0


def dump_body(wanted: KernelFilter) -> bytes:
    """struct nfgenmsg and the attributes of an IPCTNL_MSG_CT_GET dump."""
    family = {4: socket.AF_INET, 6: socket.AF_INET6, 0: socket.AF_UNSPEC}[wanted.family]
    body = NFNL_HEADER.pack(family, 0, 0)
    if wanted.mark is not None:
        body += attribute(_CTA_MARK, _be32(wanted.mark))
        body += attribute(_CTA_MARK_MASK, _be32(wanted.mark_mask))
    if wanted.status_mask:
        body += attribute(_CTA_STATUS, _be32(wanted.status))
        body += attribute(_CTA_STATUS_MASK, _be32(wanted.status_mask))
    # Without a family the kernel refuses tuples (EOPNOTSUPP).
    flags = b""
    for half, kind, flag in (
        (wanted.orig, _CTA_TUPLE_ORIG, _CTA_FILTER_ORIG_FLAGS),
        (wanted.reply, _CTA_TUPLE_REPLY, _CTA_FILTER_REPLY_FLAGS),
    ):
        bits, attributes = _tuple(half, wanted.protocol)
        if bits and wanted.family:
            body += nested(kind, *attributes)
            flags += attribute(flag, struct.pack("=I", bits))
    return body + (nested(_CTA_FILTER, flags) if flags else b"")


def _be32(value: int) -> bytes:
    return struct.pack("!I", value)


def _tuple(half: TupleFilter, protocol: int | None) -> tuple[int, list[bytes]]:
    """CTA_FILTER flags, and what goes into the tuple."""
    bits = 0
    addresses: list[bytes] = []
    for address, kind, flag in ((half.src, 1, _F_IP_SRC), (half.dst, 2, _F_IP_DST)):
        # The kernel turns the comparison of IPv6 addresses round (it drops what is equal), so it
        # must not do that one: ctnetlink_filter_match_tuple(), `!ipv6_addr_cmp`.
        if address is not None and address.version == 4:
            addresses.append(attribute(kind, address.packed))
            bits |= flag
    ports: list[bytes] = []
    if protocol is not None:
        ports.append(attribute(1, bytes((protocol,))))
        bits |= _F_PROTO_NUM
    if protocol in _PORTS_COMPARED:
        for port, kind, flag in ((half.sport, 2, _F_SRC_PORT), (half.dport, 3, _F_DST_PORT)):
            if port is not None:
                ports.append(attribute(kind, struct.pack("!H", port)))
                bits |= flag
    parts = [nested(1, *addresses)] if addresses else []
    if ports:
        parts.append(nested(2, *ports))
    return bits, parts
