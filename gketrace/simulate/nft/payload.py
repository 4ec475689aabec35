"""Header fields: payload, exthdr and TCP options.

Source: nft_payload_eval() in net/netfilter/nft_payload.c, nft_exthdr.c.  nft leaves out of its
listing what it adds itself: ``tcp dport 80`` is also the test that the packet is TCP, ``ip saddr``
in an inet table that it is IPv4; so a field of a header that the packet has not breaks the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from gketrace.packet import Packet, Protocol
from gketrace.simulate.nft.scene import Scene
from gketrace.simulate.nft.values import BREAK, NotKnown, Value
from gketrace.trace import Hook

__all__ = ["exthdr", "exthdr_type", "ip_option", "payload", "payload_type", "tcp_option"]

Json: TypeAlias = Any
Reader: TypeAlias = Callable[[Packet], int | None]
"""None: the packet has the field and what is in it is not known."""

_PORTS: Final[Mapping[str, tuple[str, Reader]]] = {
    "sport": ("inet_service", lambda p: p.sport),
    "dport": ("inet_service", lambda p: p.dport),
}


def _hidden(kind: str = "integer") -> tuple[str, Reader]:
    return kind, lambda _: None


def _less(length: int | None, header: int) -> int | None:
    return None if length is None else length - header


def _fragment_field(packet: Packet) -> int | None:
    if packet.fragment:
        return None
    return 0x4000 if packet.dont_fragment else 0


def _version_of(icmp: str) -> int:
    return 4 if icmp == "icmp" else 6


_FIELDS: Final[Mapping[str, Mapping[str, tuple[str, Reader]]]] = {
    "ip": {
        "version": ("integer", lambda _: 4),
        "hdrlength": ("integer", lambda _: 5),
        "dscp": ("dscp", lambda p: p.dscp),
        "ecn": ("ecn", lambda p: p.ecn),
        "length": ("integer", lambda p: p.length),
        "id": _hidden(),
        "frag-off": ("integer", _fragment_field),
        "ttl": ("integer", lambda p: p.ttl),
        "protocol": ("inet_proto", lambda p: p.protocol),
        "checksum": _hidden(),
        "saddr": ("ipv4_addr", lambda p: int(p.src)),
        "daddr": ("ipv4_addr", lambda p: int(p.dst)),
    },
    "ip6": {
        "version": ("integer", lambda _: 6),
        "dscp": ("dscp", lambda p: p.dscp),
        "ecn": ("ecn", lambda p: p.ecn),
        "flowlabel": _hidden(),
        "length": ("integer", lambda p: _less(p.length, 40)),
        "nexthdr": ("inet_proto", lambda p: p.protocol),
        "hoplimit": ("integer", lambda p: p.ttl),
        "saddr": ("ipv6_addr", lambda p: int(p.src)),
        "daddr": ("ipv6_addr", lambda p: int(p.dst)),
    },
    "th": _PORTS,
    "tcp": {
        **_PORTS,
        "flags": ("tcp_flag", lambda p: p.tcp_flags),
        **dict.fromkeys(
            ("sequence", "ackseq", "doff", "reserved", "window", "checksum", "urgptr"), _hidden()
        ),
    },
    "udp": {**_PORTS, "length": _hidden(), "checksum": _hidden()},
    "udplite": {**_PORTS, "csumcov": _hidden(), "checksum": _hidden()},
    "dccp": {**_PORTS, "type": _hidden("dccp_pkttype")},
    "sctp": {**_PORTS, "vtag": _hidden(), "checksum": _hidden()},
    "icmp": {
        "type": ("icmp_type", lambda p: p.icmp_type),
        "code": ("icmp_code", lambda p: p.icmp_code),
        "id": ("integer", lambda p: p.icmp_id),
        **dict.fromkeys(("checksum", "sequence", "gateway", "mtu"), _hidden()),
    },
    "icmpv6": {
        "type": ("icmpv6_type", lambda p: p.icmp_type),
        "code": ("icmpv6_code", lambda p: p.icmp_code),
        "id": ("integer", lambda p: p.icmp_id),
        **dict.fromkeys(
            ("checksum", "sequence", "mtu", "parameter-problem", "max-delay"), _hidden()
        ),
    },
    "ah": dict.fromkeys(("nexthdr", "hdrlength", "reserved", "spi", "sequence"), _hidden()),
    "esp": dict.fromkeys(("spi", "sequence"), _hidden()),
    "comp": dict.fromkeys(("nexthdr", "flags", "cpi"), _hidden()),
    "gre": dict.fromkeys(("flags", "version", "protocol"), _hidden()),
    "igmp": dict.fromkeys(("type", "mrt", "checksum", "group"), _hidden()),
    "ether": {
        "saddr": ("ether_addr", lambda p: None if p.src_mac is None else _mac(p.src_mac)),
        "daddr": _hidden("ether_addr"),
        "type": ("ether_type", lambda p: 0x0800 if p.family == 4 else 0x86DD),
    },
}
_NUMBER: Final[Mapping[str, int]] = {
    "tcp": Protocol.TCP,
    "udp": Protocol.UDP,
    "udplite": Protocol.UDPLITE,
    "dccp": Protocol.DCCP,
    "sctp": Protocol.SCTP,
    "icmp": Protocol.ICMP,
    "icmpv6": Protocol.ICMPV6,
    "igmp": Protocol.IGMP,
    "gre": Protocol.GRE,
    "ah": Protocol.AH,
    "esp": Protocol.ESP,
    "comp": 108,
}
_ECHO: Final[Mapping[str, tuple[int, ...]]] = {"icmp": (0, 8), "icmpv6": (128, 129)}
_RAW: Final[Mapping[tuple[str, int, int], tuple[str, str]]] = {
    ("th", 0, 16): ("th", "sport"),
    ("th", 16, 16): ("th", "dport"),
}
"""Raw accesses that are fields by another name."""
_KINDS: Final[Mapping[str, int]] = {
    "eol": 0, "nop": 1, "noop": 1, "maxseg": 2, "mss": 2, "window": 3, "sack-permitted": 4,
    "sack-perm": 4, "sack": 5, "sack0": 5, "timestamp": 8, "fastopen": 34, "md5sig": 19,
    "mptcp": 30,
}  # fmt: skip


def _mac(text: str) -> int:
    return int(text.replace(":", ""), 16)


def _name(body: Json) -> tuple[str, str] | None:
    if "base" in body:
        return _RAW.get((body["base"], body["offset"], body["len"]))
    return body["protocol"], body["field"]


def payload_type(body: Json) -> str:
    """The data type of a field; ``integer`` for raw and unknown ones."""
    name = _name(body)
    if name is None:
        return "integer"
    return _FIELDS.get(name[0], {}).get(name[1], ("integer",))[0]


def payload(body: Json, scene: Scene) -> Value:
    """``{"payload": body}``."""
    packet = scene.packet
    name = _name(body)
    if name is None:
        if body["base"] == "th" and packet.fragment:
            return BREAK
        return NotKnown(f"the bytes @{body['base']},{body['offset']},{body['len']} of the packet")
    header, field = name
    known = _FIELDS.get(header, {}).get(field)
    if known is None:
        return NotKnown(f"the field {header} {field} is not modelled")
    if not _present(header, field, scene):
        return BREAK
    if header == "th" and not packet.has_ports:
        return NotKnown(f"what the packet has where others have their {field}")
    value = known[1](packet)
    return NotKnown(f"the packet's {header} {field} is not known") if value is None else value


def _present(header: str, field: str, scene: Scene) -> bool:
    """Whether the packet has the header, and nft's own tests before the field pass."""
    packet = scene.packet
    if header in ("ip", "ip6"):
        return packet.family == (4 if header == "ip" else 6)
    if header == "ether":
        # The test of the input interface's type comes first, and there is none for local packets.
        return _from_ethernet(scene)
    if packet.fragment:
        return False
    if header == "th":
        return True
    if packet.protocol != _NUMBER.get(header):
        return False
    if header in _ECHO:
        if packet.family != _version_of(header):
            return False
        if field in ("id", "sequence"):
            return packet.icmp_type in _ECHO[header]
    return True


def _from_ethernet(scene: Scene) -> bool:
    state = scene.state
    if state.hook in (Hook.OUTPUT, Hook.POSTROUTING) or not state.in_iface:
        return False
    link = scene.env.links.get(state.in_iface)
    return link is None or "LOOPBACK" not in link.flags


def tcp_option(body: Json, scene: Scene) -> Value:
    """``tcp option NAME [FIELD]``: without a field, whether it is there."""
    packet = scene.packet
    presence = "field" not in body and "offset" not in body
    if packet.protocol != Protocol.TCP or packet.fragment:
        # nft adds no test for TCP here: "missing" is true of all else.
        return 0 if presence else BREAK
    kind = _KINDS.get(str(body.get("name", "")), body.get("base"))
    if packet.tcp_options is None or not isinstance(kind, int):
        return NotKnown("the packet's TCP options are not known")
    there = kind in packet.tcp_options
    if presence:
        return int(there)
    return NotKnown(f"what its TCP option {body.get('name')} says") if there else BREAK


def exthdr(body: Json, scene: Scene) -> Value:
    """IPv6 extension headers; packets here have none but a fragment header."""
    packet = scene.packet
    if packet.family != 6:
        return BREAK
    there = body.get("name") == "frag" and packet.fragment
    if "field" not in body:
        return int(there)
    return NotKnown("the packet's fragment header") if there else BREAK


def exthdr_type(body: Json) -> str:
    return "inet_proto" if body.get("field") == "nexthdr" else "integer"


def ip_option(body: Json, scene: Scene) -> Value:
    """IPv4 options; packets here have none."""
    if scene.packet.family != 4:
        return BREAK
    return 0 if "field" not in body else BREAK
