"""Connection-tracking entries over nfnetlink: one by its tuple, or those that a filter lets pass.

pyroute2 encodes and decodes the messages (0.1 ms each), our own socket carries them: see
`gketrace_agent.kernel.netlink`.  pyroute2 takes 0.2 s to import and is imported when it is first
needed; `preload` does it beforehand.

Source: kernel net/netfilter/nf_conntrack_netlink.c ctnetlink_get_conntrack(),
ctnetlink_dump_table(), ctnetlink_alloc_filter(); include/uapi/linux/netfilter/.
"""

from __future__ import annotations

import errno
import functools
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

from gketrace.conntrack import ConntrackEntry
from gketrace.packet import PORT_PROTOCOLS, IPAddress, Protocol, Tuple5
from gketrace_agent.kernel.netlink import Dump, NetlinkError, NetlinkSocket

__all__ = ["KernelFilter", "decode_entries", "decode_entry", "dump_entries", "get_entry", "preload"]

_NFNL_SUBSYS_CTNETLINK: Final = 1
_IPCTNL_MSG_CT_GET: Final = 1
_TYPE: Final = _NFNL_SUBSYS_CTNETLINK << 8 | _IPCTNL_MSG_CT_GET
_HEADER: Final = struct.Struct("=IHHII")

_SCTP_STATES: Final = (
    "NONE",
    "CLOSED",
    "COOKIE_WAIT",
    "COOKIE_ECHOED",
    "ESTABLISHED",
    "SHUTDOWN_SENT",
    "SHUTDOWN_RECD",
    "SHUTDOWN_ACK_SENT",
    "HEARTBEAT_SENT",
)
_DCCP_STATES: Final = (
    "NONE",
    "REQUEST",
    "RESPOND",
    "PARTOPEN",
    "OPEN",
    "CLOSEREQ",
    "CLOSING",
    "TIMEWAIT",
)
_TCP_STATES: Final = (
    "NONE",
    "SYN_SENT",
    "SYN_RECV",
    "ESTABLISHED",
    "FIN_WAIT",
    "CLOSE_WAIT",
    "LAST_ACK",
    "TIME_WAIT",
    "CLOSE",
    "SYN_SENT2",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFilter:
    """What the kernel can filter a dump by.  None: anything.

    Older kernels ignore what they do not know (tuples before 5.8), so filter again afterwards.
    """

    family: int = 0
    """4, 6, or 0 for both."""
    protocol: int | None = None
    src: IPAddress | None = None
    """Of the original tuple, as the ports."""
    dst: IPAddress | None = None
    sport: int | None = None
    dport: int | None = None
    mark: int | None = None
    mark_mask: int = 0xFFFFFFFF


@functools.cache
def _pyroute2() -> Any:  # pyroute2 has no type hints for its messages
    from pyroute2.netlink.nfnetlink import nfctsocket

    return nfctsocket


def preload() -> None:
    """Imports pyroute2 now, rather than at the first lookup."""
    _pyroute2()


def _body(family: int, **attributes: Any) -> bytes:
    message = _pyroute2().nfct_msg.create_from(**attributes)
    message["nfgen_family"] = family
    message.encode()
    return bytes(message.data[_HEADER.size :])


def _af(version: int) -> int:
    return {4: socket.AF_INET, 6: socket.AF_INET6, 0: socket.AF_UNSPEC}[version]


def get_entry(netfilter: NetlinkSocket, tuple5: Tuple5, *, zone: int = 0) -> ConntrackEntry | None:
    """The entry that has `tuple5` in either direction; None when there is none.

    Ports, or for ICMP type, code and identifier, must be known: raises ValueError otherwise, as
    the kernel would take them for 0.  Raises `NetlinkError` for what the kernel refuses.
    """
    family = _af(tuple5.src.version)
    values: dict[str, Any] = {"saddr": str(tuple5.src), "daddr": str(tuple5.dst)}
    if tuple5.protocol in (Protocol.ICMP, Protocol.ICMPV6):
        if tuple5.icmp_type is None or tuple5.sport is None:
            raise ValueError(f"{tuple5} has no ICMP type or identifier")
        values |= {
            "icmp_id": tuple5.sport,
            "icmp_type": tuple5.icmp_type,
            "icmp_code": tuple5.icmp_code or 0,
        }
    elif tuple5.protocol in PORT_PROTOCOLS:
        if tuple5.sport is None or tuple5.dport is None:
            raise ValueError(f"{tuple5} has an unknown port")
        values |= {"sport": tuple5.sport, "dport": tuple5.dport}
    elif tuple5.protocol == Protocol.GRE:
        # Version 0 has no keys: gre_pkt_to_tuple() leaves them 0, and ctnetlink wants them.
        values |= {"sport": 0, "dport": 0}
    wanted = _pyroute2().NFCTAttrTuple(family=family, proto=tuple5.protocol, **values)
    # The kernel looks in one hash that holds the tuples of both directions, whichever attribute
    # the tuple comes in (ctnetlink_get_conntrack, nf_conntrack_find_get).
    body = _body(family, tuple_orig=wanted, zone=zone or None)
    try:
        answer = netfilter.request(_TYPE, body, what=f"conntrack entry {tuple5}")
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return None if answer is None else decode_entry(answer.body)


def dump_entries(netfilter: NetlinkSocket, wanted: KernelFilter) -> Dump:
    """The messages of all entries that the kernel lets through `wanted`; decode with
    `decode_entry`."""
    family = _af(wanted.family)
    attributes: dict[str, Any] = {}
    part = _pyroute2().NFCTAttrTuple(
        family=family or socket.AF_INET,
        saddr=None if wanted.src is None else str(wanted.src),
        daddr=None if wanted.dst is None else str(wanted.dst),
        proto=wanted.protocol,
        sport=wanted.sport,
        dport=wanted.dport,
    )
    part.attrs()  # sets its flags
    # The kernel refuses a tuple filter without a family, and ports without a protocol.
    if part.flags and family and (wanted.protocol or wanted.sport is wanted.dport is None):
        attributes["tuple_orig"] = part
        attributes["filter"] = {"attrs": [["CTA_FILTER_ORIG_FLAGS", part.flags]]}
    if wanted.mark is not None:
        attributes |= {"mark": wanted.mark, "mark_mask": wanted.mark_mask}
    return netfilter.dump(_TYPE, _body(family, **attributes), what="conntrack entries")


def decode_entries(dump: Dump) -> Iterator[ConntrackEntry]:
    """The entries of a dump, decoded as they are asked for."""
    return (decode_entry(message.body) for message in dump.messages)


def decode_entry(body: bytes) -> ConntrackEntry:
    """One IPCTNL_MSG_CT_NEW message (without its header) → entry."""
    header = _HEADER.pack(_HEADER.size + len(body), _NFNL_SUBSYS_CTNETLINK << 8, 0, 0, 0)
    message = _pyroute2().nfct_msg(header + body)
    message.decode()
    zone = message.get_attr("CTA_ZONE")
    original, answer = (
        message.get_attr("CTA_COUNTERS_ORIG"),
        message.get_attr("CTA_COUNTERS_REPLY"),
    )
    return ConntrackEntry(
        orig=_tuple(message.get_attr("CTA_TUPLE_ORIG")),
        reply=_tuple(message.get_attr("CTA_TUPLE_REPLY")),
        status=message.get_attr("CTA_STATUS") or 0,
        tcp_state=_state(message.get_attr("CTA_PROTOINFO")),
        timeout=message.get_attr("CTA_TIMEOUT"),
        mark=message.get_attr("CTA_MARK"),
        zone=zone or 0,
        id=message.get_attr("CTA_ID"),
        orig_packets=_counter(original, "PACKETS"),
        orig_bytes=_counter(original, "BYTES"),
        reply_packets=_counter(answer, "PACKETS"),
        reply_bytes=_counter(answer, "BYTES"),
    )


def _counter(counters: Any, what: str) -> int | None:
    if counters is None:
        return None
    value = counters.get_attr(f"CTA_COUNTERS_{what}")
    return None if value is None else int(value)


def _tuple(message: Any) -> Tuple5:
    ip, proto = message.get_attr("CTA_TUPLE_IP"), message.get_attr("CTA_TUPLE_PROTO")
    version = "V6" if ip.get_attr("CTA_IP_V6_SRC") else "V4"
    number = proto.get_attr("CTA_PROTO_NUM")
    icmp = {Protocol.ICMP: "ICMP", Protocol.ICMPV6: "ICMPV6"}.get(number, "")
    src = ip_address(ip.get_attr(f"CTA_IP_{version}_SRC"))
    dst = ip_address(ip.get_attr(f"CTA_IP_{version}_DST"))
    if icmp:
        return Tuple5(
            src=src,
            dst=dst,
            protocol=number,
            sport=proto.get_attr(f"CTA_PROTO_{icmp}_ID"),
            icmp_type=proto.get_attr(f"CTA_PROTO_{icmp}_TYPE"),
            icmp_code=proto.get_attr(f"CTA_PROTO_{icmp}_CODE"),
        )
    # GRE's keys come in the ports' attributes.
    ports = number in PORT_PROTOCOLS
    return Tuple5(
        src=src,
        dst=dst,
        protocol=number,
        sport=proto.get_attr("CTA_PROTO_SRC_PORT") if ports else None,
        dport=proto.get_attr("CTA_PROTO_DST_PORT") if ports else None,
    )


def _state(info: Any) -> str:
    if info is None:
        return ""
    for name, states in (("TCP", _TCP_STATES), ("SCTP", _SCTP_STATES), ("DCCP", _DCCP_STATES)):
        part = info.get_attr(f"CTA_PROTOINFO_{name}")
        if part is not None:
            number = part.get_attr(f"CTA_PROTOINFO_{name}_STATE")
            if number is None:
                return ""
            return states[number] if number < len(states) else str(number)
    return ""
