"""Where the fields of a connection-tracking message are, and one message → `ConntrackEntry`.

Entries with the same attributes have the same layout: it is found once, by walking the attributes
(`layout_of`), and holds for every message whose attribute headers are the same bytes at the same
places.  `gketrace_agent.kernel.conntrack_columns` decodes such messages together.

Source: kernel net/netfilter/nf_conntrack_netlink.c ctnetlink_fill_info(),
include/uapi/linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final, TypeAlias

from gketrace.conntrack import ConntrackEntry
from gketrace.packet import PORT_PROTOCOLS, IPAddress, Protocol, Tuple5

__all__ = [
    "HEADERS",
    "STATES",
    "Field",
    "Layout",
    "entry_of",
    "layout_of",
]

HEADERS: Final = 20
"""Bytes of struct nlmsghdr and struct nfgenmsg."""
_ATTRIBUTE: Final = struct.Struct("=HH")
_TYPE_MASK: Final = 0x3FFF
_Tree: TypeAlias = Mapping[int, "str | _Tree"]

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
    "HEARTBEAT_ACKED",
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
    "IGNORE",
    "INVALID",
)
STATES: Final[Mapping[str, tuple[str, ...]]] = {
    "tcp_state": _TCP_STATES,
    "sctp_state": _SCTP_STATES,
    "dccp_state": _DCCP_STATES,
}
"""Field → its values' names, by number (enum tcp_conntrack, sctp_conntrack, ct_dccp_states)."""


def _tuple_tree(prefix: str) -> _Tree:
    return {
        1: {1: f"{prefix}_src", 2: f"{prefix}_dst", 3: f"{prefix}_src", 4: f"{prefix}_dst"},
        2: {
            1: f"{prefix}_proto",
            2: f"{prefix}_sport",
            3: f"{prefix}_dport",
            4: f"{prefix}_icmp_id",
            5: f"{prefix}_icmp_type",
            6: f"{prefix}_icmp_code",
            7: f"{prefix}_icmp_id",
            8: f"{prefix}_icmp_type",
            9: f"{prefix}_icmp_code",
        },
        3: f"zone_{prefix}",
    }


_TREE: Final[_Tree] = {
    1: _tuple_tree("orig"),
    2: _tuple_tree("reply"),
    3: "status",
    4: {1: {1: "tcp_state"}, 2: {1: "dccp_state"}, 3: {1: "sctp_state"}},
    5: {1: "helper"},
    7: "timeout",
    8: "mark",
    9: {1: "orig_packets", 2: "orig_bytes"},
    10: {1: "reply_packets", 2: "reply_bytes"},
    11: "use",
    12: "id",
    18: "zone",
    19: {1: "secctx"},
    20: {1: "started", 2: "stopped"},
    22: "labels",
}
"""Attribute number → the field that it is, or the attributes inside it."""


_TEXTS: Final = frozenset(("helper", "secctx", "labels"))
_NUMBERS: Final = frozenset((1, 2, 4, 8))
"""Sizes that a number may have."""
_SIZES: Final[Mapping[str, frozenset[int]]] = {
    **dict.fromkeys(("orig_src", "orig_dst", "reply_src", "reply_dst"), frozenset((4, 16))),
    **dict.fromkeys(("orig_proto", "reply_proto", *STATES), frozenset((1,))),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A payload inside a message."""

    offset: int
    """Bytes from the start of struct nlmsghdr."""
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where everything is in messages of one length and one set of attributes."""

    length: int
    family: int
    """4 or 6; 0 for what is neither."""
    protocol: int
    fields: Mapping[str, Field]
    """All numbers in them are big-endian, however wide."""
    signature: tuple[int, ...]
    """Offsets of the 32-bit words that tell whether another message has this layout: the
    attributes' headers, the family, and the protocol's number."""


def layout_of(message: bytes) -> Layout:
    """Walks the attributes of one message (its headers included).

    Raises ValueError when their lengths do not fit in one another, for a field of another size than
    it can have, and without two tuples.
    """
    if len(message) < HEADERS:
        raise ValueError(f"a conntrack message of {len(message)} bytes")
    fields: dict[str, Field] = {}
    signature = [16]
    _walk(message, HEADERS, len(message), _TREE, fields, signature)
    for name, field in fields.items():
        if name not in _TEXTS and field.size not in _SIZES.get(name, _NUMBERS):
            raise ValueError(f"conntrack {name} of {field.size} bytes")
    for half in ("orig", "reply"):
        ends = [fields.get(f"{half}_{end}") for end in ("src", "dst")]
        if None in ends or len({end.size for end in ends if end is not None}) > 1:
            raise ValueError("a conntrack tuple without its two addresses")
    protocol = fields.get("orig_proto")
    if protocol is not None:
        signature.append(protocol.offset)
    return Layout(
        length=len(message),
        family={2: 4, 10: 6}.get(message[16], 0),
        protocol=0 if protocol is None else message[protocol.offset],
        fields=fields,
        signature=tuple(signature),
    )


def _walk(
    message: bytes,
    offset: int,
    end: int,
    tree: _Tree,
    fields: dict[str, Field],
    signature: list[int],
) -> None:
    while offset + 4 <= end:
        size, kind = _ATTRIBUTE.unpack_from(message, offset)
        if size < 4 or offset + size > end:
            raise ValueError(f"netlink attribute {kind} of {size} bytes at {offset} of {end}")
        signature.append(offset)
        what = tree.get(kind & _TYPE_MASK)
        if isinstance(what, str):
            fields[what] = Field(offset=offset + 4, size=size - 4)
        elif what is not None:
            _walk(message, offset + 4, offset + size, what, fields, signature)
        offset += (size + 3) & ~3


def entry_of(message: bytes, layout: Layout) -> ConntrackEntry:
    """One message that has `layout` → entry.  Raises ValueError without two tuples."""
    fields = layout.fields

    def number(name: str) -> int | None:
        field = fields.get(name)
        if field is None:
            return None
        return int.from_bytes(message[field.offset : field.offset + field.size], "big")

    def string(name: str) -> str:
        field = fields.get(name)
        if field is None:
            return ""
        raw = message[field.offset : field.offset + field.size]
        return raw.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")

    labels = fields.get("labels")
    keys = None
    if layout.protocol == Protocol.GRE and "orig_sport" in fields and "reply_sport" in fields:
        keys = tuple(number(f"{half}_{port}") or 0 for half in ("orig", "reply") for port in _PORTS)
    return ConntrackEntry(
        orig=_tuple(message, layout, "orig"),
        reply=_tuple(message, layout, "reply"),
        status=number("status") or 0,
        tcp_state=_state(message, layout),
        timeout=number("timeout"),
        mark=number("mark"),
        zone=number("zone") or 0,
        id=number("id"),
        orig_packets=number("orig_packets"),
        orig_bytes=number("orig_bytes"),
        reply_packets=number("reply_packets"),
        reply_bytes=number("reply_bytes"),
        zone_orig=number("zone_orig") or 0,
        zone_reply=number("zone_reply") or 0,
        use=number("use"),
        started=number("started"),
        stopped=number("stopped"),
        helper=string("helper"),
        secctx=string("secctx"),
        labels="" if labels is None else message[labels.offset : labels.offset + labels.size].hex(),
        gre_keys=keys,
    )


_PORTS: Final = ("sport", "dport")


def _address(message: bytes, field: Field | None) -> IPAddress:
    if field is not None:
        raw = message[field.offset : field.offset + field.size]
        if field.size == 4:
            return IPv4Address(raw)
        if field.size == 16:
            return IPv6Address(raw)
    raise ValueError("a conntrack tuple without an address")


def _tuple(message: bytes, layout: Layout, half: str) -> Tuple5:
    fields = layout.fields

    def number(name: str) -> int | None:
        field = fields.get(f"{half}_{name}")
        if field is None:
            return None
        return int.from_bytes(message[field.offset : field.offset + field.size], "big")

    protocol = number("proto") or 0
    icmp = protocol in (Protocol.ICMP, Protocol.ICMPV6)
    ports = protocol in PORT_PROTOCOLS
    return Tuple5(
        src=_address(message, fields.get(f"{half}_src")),
        dst=_address(message, fields.get(f"{half}_dst")),
        protocol=protocol,
        sport=number("icmp_id") if icmp else number("sport") if ports else None,
        dport=number("dport") if ports else None,
        icmp_type=number("icmp_type") if icmp else None,
        icmp_code=number("icmp_code") if icmp else None,
    )


def _state(message: bytes, layout: Layout) -> str:
    for name, states in STATES.items():
        field = layout.fields.get(name)
        if field is not None:
            value = message[field.offset]
            return states[value] if value < len(states) else str(value)
    return ""
