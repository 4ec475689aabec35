"""One connection-tracking entry by its tuple, over nfnetlink.

Reading many entries: `gketrace_agent.kernel.conntrack_dump`.

Source: kernel net/netfilter/nf_conntrack_netlink.c ctnetlink_get_conntrack();
include/uapi/linux/netfilter/.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Final

from gketrace.conntrack import ConntrackEntry
from gketrace.packet import PORT_PROTOCOLS, Protocol, Tuple5
from gketrace_agent.kernel.conntrack_layout import entry_of, layout_of
from gketrace_agent.kernel.netlink import NetlinkError, NetlinkSocket, attribute, nested
from gketrace_agent.kernel.nfnetlink import NFNL_HEADER

__all__ = ["decode_entry", "get_entry"]

_NFNL_SUBSYS_CTNETLINK: Final = 1
_IPCTNL_MSG_CT_GET: Final = 1
_TYPE: Final = _NFNL_SUBSYS_CTNETLINK << 8 | _IPCTNL_MSG_CT_GET
_CTA_TUPLE_ORIG: Final = 1
_CTA_ZONE: Final = 18
_HEADER: Final = struct.Struct("=IHHII")


def get_entry(netfilter: NetlinkSocket, tuple5: Tuple5, *, zone: int = 0) -> ConntrackEntry | None:
    """The entry that has `tuple5` in either direction; None when there is none.

    Ports, or for ICMP type, code and identifier, must be known: raises ValueError otherwise, as
    the kernel would take them for 0.  Raises `NetlinkError` for what the kernel refuses.
    """
    # The kernel looks in one hash that holds the tuples of both directions, whichever attribute
    # the tuple comes in (ctnetlink_get_conntrack, nf_conntrack_find_get).
    body = _question(tuple5, zone)
    try:
        answer = netfilter.request(_TYPE, body, what=f"conntrack entry {tuple5}")
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return None if answer is None else decode_entry(answer.body)


def _question(tuple5: Tuple5, zone: int) -> bytes:
    """struct nfgenmsg, CTA_TUPLE_ORIG and CTA_ZONE (ctnetlink_parse_tuple)."""
    six = tuple5.src.version == 6
    protocol = tuple5.protocol
    parts = [attribute(1, bytes((protocol,)))]
    if protocol in (Protocol.ICMP, Protocol.ICMPV6):
        if tuple5.icmp_type is None or tuple5.sport is None:
            raise ValueError(f"{tuple5} has no ICMP type or identifier")
        first = 7 if protocol == Protocol.ICMPV6 else 4
        parts += [
            attribute(first, _be16(tuple5.sport)),
            attribute(first + 1, bytes((tuple5.icmp_type,))),
            attribute(first + 2, bytes((tuple5.icmp_code or 0,))),
        ]
    elif protocol in PORT_PROTOCOLS:
        if tuple5.sport is None or tuple5.dport is None:
            raise ValueError(f"{tuple5} has an unknown port")
        parts += [attribute(2, _be16(tuple5.sport)), attribute(3, _be16(tuple5.dport))]
    elif protocol == Protocol.GRE:
        # Version 0 has no keys: gre_pkt_to_tuple() leaves them 0, and ctnetlink wants them.
        parts += [attribute(2, _be16(0)), attribute(3, _be16(0))]
    first = 3 if six else 1
    addresses = nested(
        1, attribute(first, tuple5.src.packed), attribute(first + 1, tuple5.dst.packed)
    )
    body = NFNL_HEADER.pack(socket.AF_INET6 if six else socket.AF_INET, 0, 0)
    body += nested(_CTA_TUPLE_ORIG, addresses, nested(2, *parts))
    return body + (attribute(_CTA_ZONE, _be16(zone)) if zone else b"")


def _be16(value: int) -> bytes:
    return struct.pack("!H", value)


def decode_entry(body: bytes) -> ConntrackEntry:
    """One IPCTNL_MSG_CT_NEW message (without its header) → entry."""
    header = _HEADER.pack(_HEADER.size + len(body), _NFNL_SUBSYS_CTNETLINK << 8, 0, 0, 0)
    message = header + body
    return entry_of(message, layout_of(message))
