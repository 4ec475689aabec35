"""nft's data types: constants as the JSON has them → numbers.

Source: src/datatype.c, src/proto.c, src/meta.c, src/ct.c, src/fib.c of nftables; the numbers are
the kernel's and IANA's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final, TypeAlias

from gketrace.conntrack import CtStatus
from gketrace.simulate.nft.values import Scalar

__all__ = [
    "BITS",
    "PROTOCOLS",
    "Pattern",
    "Span",
    "Starts",
    "read_flags",
    "read_pattern",
    "read_scalar",
]

Json: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class Span:
    """An interval, both ends included."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Starts:
    """Names that begin with `text`: ``eth*``."""

    text: str


Pattern: TypeAlias = Scalar | Span | Starts

BITS: Final[Mapping[str, int]] = {
    "ipv4_addr": 32,
    "ipv6_addr": 128,
    "ether_addr": 48,
    "inet_proto": 8,
    "inet_service": 16,
    "mark": 32,
}
"""Widths of the types that have prefixes."""

PROTOCOLS: Final[Mapping[str, int]] = {
    "ip": 0, "hopopt": 0, "icmp": 1, "igmp": 2, "ggp": 3, "ipencap": 4, "st": 5, "tcp": 6,
    "egp": 8, "igp": 9, "pup": 12, "udp": 17, "dccp": 33, "ipv6": 41, "ipv6-route": 43,
    "ipv6-frag": 44, "rsvp": 46, "gre": 47, "esp": 50, "ah": 51, "skip": 57, "ipv6-icmp": 58,
    "icmpv6": 58, "icmp6": 58, "ipv6-nonxt": 59, "ipv6-opts": 60, "eigrp": 88, "ospf": 89,
    "ipip": 94, "etherip": 97, "encap": 98, "pim": 103, "ipcomp": 108, "comp": 108, "vrrp": 112,
    "l2tp": 115, "isis": 124, "sctp": 132, "mobility-header": 135, "udplite": 136,
    "mpls-in-ip": 137, "hip": 139, "shim6": 140,
}  # fmt: skip
_SYMBOLS: Final[Mapping[str, Mapping[str, int]]] = {
    "inet_proto": PROTOCOLS,
    "ct_state": {"invalid": 1, "established": 2, "related": 4, "new": 8, "untracked": 64},
    "ct_status": {
        "expected": CtStatus.EXPECTED, "seen-reply": CtStatus.SEEN_REPLY,
        "assured": CtStatus.ASSURED, "confirmed": CtStatus.CONFIRMED, "snat": CtStatus.SRC_NAT,
        "dnat": CtStatus.DST_NAT, "dying": CtStatus.DYING,
    },
    "ct_dir": {"original": 0, "reply": 1},
    "nf_proto": {"ipv4": 2, "ipv6": 10},
    "ether_type": {"ip": 0x0800, "arp": 0x0806, "ip6": 0x86DD, "vlan": 0x8100, "8021q": 0x8100,
                   "8021ad": 0x88A8},
    "icmp_type": {
        "echo-reply": 0, "destination-unreachable": 3, "source-quench": 4, "redirect": 5,
        "echo-request": 8, "router-advertisement": 9, "router-solicitation": 10,
        "time-exceeded": 11, "parameter-problem": 12, "timestamp-request": 13,
        "timestamp-reply": 14, "info-request": 15, "info-reply": 16, "address-mask-request": 17,
        "address-mask-reply": 18,
    },
    "icmp_code": {
        "net-unreachable": 0, "host-unreachable": 1, "prot-unreachable": 2, "port-unreachable": 3,
        "frag-needed": 4, "net-prohibited": 9, "host-prohibited": 10, "admin-prohibited": 13,
    },
    "icmpv6_type": {
        "destination-unreachable": 1, "packet-too-big": 2, "time-exceeded": 3,
        "parameter-problem": 4, "echo-request": 128, "echo-reply": 129, "mld-listener-query": 130,
        "mld-listener-report": 131, "mld-listener-done": 132, "mld-listener-reduction": 132,
        "nd-router-solicit": 133, "nd-router-advert": 134, "nd-neighbor-solicit": 135,
        "nd-neighbor-advert": 136, "nd-redirect": 137, "router-renumbering": 138,
        "ind-neighbor-solicit": 141, "ind-neighbor-advert": 142, "mld2-listener-report": 143,
    },
    "icmpv6_code": {
        "no-route": 0, "admin-prohibited": 1, "addr-unreachable": 3, "port-unreachable": 4,
        "policy-fail": 5, "reject-route": 6,
    },
    "tcp_flag": {"fin": 1, "syn": 2, "rst": 4, "psh": 8, "ack": 16, "urg": 32, "ecn": 64,
                 "cwr": 128},
    "dscp": {
        "cs0": 0, "cs1": 8, "cs2": 16, "cs3": 24, "cs4": 32, "cs5": 40, "cs6": 48, "cs7": 56,
        "df": 0, "be": 0, "lephb": 1, "va": 0x2C, "ef": 0x2E, "af11": 0x0A, "af12": 0x0C,
        "af13": 0x0E, "af21": 0x12, "af22": 0x14, "af23": 0x16, "af31": 0x1A, "af32": 0x1C,
        "af33": 0x1E, "af41": 0x22, "af42": 0x24, "af43": 0x26,
    },
    "ecn": {"not-ect": 0, "ect1": 1, "ect0": 2, "ce": 3},
    "fib_addrtype": {
        "unspec": 0, "unicast": 1, "local": 2, "broadcast": 3, "anycast": 4, "multicast": 5,
        "blackhole": 6, "unreachable": 7, "prohibit": 8, "throw": 9, "nat": 10, "xresolve": 11,
    },
    "pkt_type": {"host": 0, "unicast": 0, "broadcast": 1, "multicast": 2, "other": 3},
    "iface_type": {"ether": 1, "ppp": 512, "ipip": 768, "ipip6": 769, "loopback": 772,
                   "sit": 776, "ipgre": 778},
    "devgroup": {"default": 0},
    "uid": {"root": 0},
    "gid": {"root": 0},
}  # fmt: skip
_NAMES: Final = frozenset(("ifname", "string"))
_INDEX: Final = "iface_index"
_FLAGS: Final = frozenset(("ct_state", "ct_status", "tcp_flag"))


def read_scalar(value: Json, kind: str) -> Scalar:
    """A constant of data type `kind`.  Raises `ValueError` for what is not understood."""
    if isinstance(value, bool):
        return int(value)
    if kind == _INDEX:
        # nft prints the name of an interface, or its number when there is none any more.
        if isinstance(value, str) and not value.isdecimal():
            return value
        return f"#{int(value)}" if int(value) else ""
    if isinstance(value, int):
        return value
    if isinstance(value, list):
        return read_flags(value, kind)
    if isinstance(value, dict):
        if "|" in value:
            return read_flags(value["|"], kind)
        raise ValueError(f"not a constant: {value}")
    if not isinstance(value, str):
        raise ValueError(f"not a constant: {value!r}")
    if kind in _NAMES:
        return value
    if kind == "ipv4_addr":
        return int(IPv4Address(value))
    if kind == "ipv6_addr":
        return int(IPv6Address(value))
    if kind == "ether_addr":
        return int(value.replace(":", ""), 16)
    number = _SYMBOLS.get(kind, {}).get(value)
    if number is not None:
        return int(number)
    if value[:1].isdigit():
        return int(value, 0)
    raise ValueError(f"{value!r} is no known value of type {kind or 'integer'}")


def read_flags(value: Json, kind: str) -> int:
    """Flags, or-ed together.  Raises `ValueError`."""
    if kind == "ct_label":
        return 1 << int(value)
    items = value if isinstance(value, list) else [value]
    total = 0
    for item in items:
        bits = read_scalar(item, kind)
        if not isinstance(bits, int):
            raise ValueError(f"{item!r} is not a flag")
        total |= bits
    return total


def read_pattern(value: Json, kind: str) -> Pattern:
    """A constant, ``{"prefix": …}``, ``{"range": …}`` or ``eth*``.  Raises `ValueError`."""
    if isinstance(value, dict):
        if "prefix" in value:
            body = value["prefix"]
            low = read_scalar(body["addr"], kind)
            bits = BITS.get(kind)
            if bits is None or not isinstance(low, int):
                raise ValueError(f"a prefix of type {kind}")
            host = (1 << (bits - int(body["len"]))) - 1
            return Span(low & ~host, low | host)
        if "range" in value:
            low, high = (read_scalar(end, kind) for end in value["range"])
            if not isinstance(low, int) or not isinstance(high, int):
                raise ValueError(f"a range of type {kind}")
            return Span(low, high)
    if kind == "ifname" and isinstance(value, str) and value.endswith("*"):
        if value.endswith("\\*"):
            return value[:-2] + "*"
        return Starts(value[:-1])
    return read_scalar(value, kind)
