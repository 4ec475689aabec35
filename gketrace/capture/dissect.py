"""Captured bytes → layers.  Never raises: what was cut off or makes no sense is said so.

Links: Ethernet with VLAN tags (802.1Q, 802.1ad), Linux cooked (SLL, SLL2), raw IP, BSD loopback.
Networks: ARP, IPv4 with options and fragments, IPv6 with its extension headers.  Transports: TCP,
UDP and UDP-Lite, ICMP and ICMPv6 with the packet that an error quotes, SCTP's chunks.

Sources: the RFCs that `gketrace.capture.layers` names; libpcap's LINKTYPE_ registry.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from gketrace.capture.layers import (
    Arp,
    Cooked,
    Dissection,
    Ethernet,
    Icmp,
    Ip4,
    Ip6,
    Link,
    Sctp,
    Tcp,
    Transport,
    Udp,
)

__all__ = [
    "LINKTYPE_ETHERNET",
    "LINKTYPE_IPV4",
    "LINKTYPE_IPV6",
    "LINKTYPE_LINUX_SLL",
    "LINKTYPE_LINUX_SLL2",
    "LINKTYPE_LOOP",
    "LINKTYPE_NULL",
    "LINKTYPE_RAW",
    "dissect",
    "dissect_ip",
]

LINKTYPE_NULL: Final = 0
LINKTYPE_ETHERNET: Final = 1
LINKTYPE_RAW: Final = 101
LINKTYPE_LOOP: Final = 108
LINKTYPE_LINUX_SLL: Final = 113
LINKTYPE_IPV4: Final = 228
LINKTYPE_IPV6: Final = 229
LINKTYPE_LINUX_SLL2: Final = 276
_DLT_RAW: Final = 12
"""What Linux calls LINKTYPE_RAW inside of libpcap."""

_ETHERNET: Final = Struct("!6s6sH")
_SLL: Final = Struct("!HHH8sH")
_SLL2: Final = Struct("!HHIHBB8s")
_ARP: Final = Struct("!HHBBH6s4s6s4s")
_IP4: Final = Struct("!BBHHHBBH4s4s")
_IP6: Final = Struct("!IHBB16s16s")
_TCP: Final = Struct("!HHIIHHHH")
_UDP: Final = Struct("!HHHH")
_ICMP: Final = Struct("!BBHI")
_SCTP: Final = Struct("!HHI")
_PAIR: Final = Struct("!HH")

_VLAN: Final = frozenset({0x8100, 0x88A8, 0x9100})
_IPV4: Final = 0x0800
_IPV6: Final = 0x86DD
_ARP_TYPE: Final = 0x0806
_EXTENSIONS: Final = frozenset({0, 43, 60, 135, 139, 140})
"""Hop-by-hop, routing, destination options, mobility, HIP, shim6: length in units of 8 bytes."""
_FRAGMENT: Final = 44
_AUTHENTICATION: Final = 51
_MAX_EXTENSIONS: Final = 16
_ICMP_ERRORS: Final = frozenset({3, 4, 5, 11, 12})


def dissect(linktype: int, data: bytes, original_length: int = 0) -> Dissection:
    """`linktype` is a LINKTYPE_ number; `original_length` is that on the wire (0: all is there)."""
    size = len(data)
    wire = max(original_length, size)
    if linktype == LINKTYPE_ETHERNET:
        if size < 14:
            return _cut(None, "ethernet", size, wire)
        destination, source, kind = _ETHERNET.unpack_from(data)
        if kind not in _VLAN:
            return _network(Ethernet(source, destination, kind), kind, data, 14, wire)
        tags: list[int] = []
        at = 14
        while kind in _VLAN:
            if size < at + 4:
                link = Ethernet(source, destination, kind, tuple(tags))
                return _cut(link, "vlan", at, wire)
            tag, kind = _PAIR.unpack_from(data, at)
            tags.append(tag)
            at += 4
        return _network(Ethernet(source, destination, kind, tuple(tags)), kind, data, at, wire)
    if linktype == LINKTYPE_LINUX_SLL:
        if size < 16:
            return _cut(None, "sll", size, wire)
        direction, hardware, length, raw, kind = _SLL.unpack_from(data)
        link1 = Cooked(direction, hardware, raw[: min(length, 8)], kind)
        return _network(link1, kind, data, 16, wire)
    if linktype == LINKTYPE_LINUX_SLL2:
        if size < 20:
            return _cut(None, "sll2", size, wire)
        kind, _, ifindex, hardware, direction, length, raw = _SLL2.unpack_from(data)
        link2 = Cooked(direction, hardware, raw[: min(length, 8)], kind, ifindex)
        return _network(link2, kind, data, 20, wire)
    if linktype in (LINKTYPE_RAW, _DLT_RAW, LINKTYPE_IPV4, LINKTYPE_IPV6):
        return _ip(None, data, 0, wire, 0)
    if linktype in (LINKTYPE_NULL, LINKTYPE_LOOP):
        if size < 4:
            return _cut(None, "loop", size, wire)
        return _ip(None, data, 4, wire, 0)
    return Dissection(None, None, None, 0, 0, wire, wire)


def dissect_ip(data: bytes, original_length: int = 0) -> Dissection:
    """A packet that begins with its IP header."""
    return _ip(None, data, 0, max(original_length, len(data)), 0)


def _cut(link: Link | None, layer: str, at: int, wire: int) -> Dissection:
    rest = max(wire - at, 0)
    return Dissection(link, None, None, at, at, rest, rest, layer)


def _network(link: Link, kind: int, data: bytes, at: int, wire: int) -> Dissection:
    if kind in (_IPV4, _IPV6):
        return _ip(link, data, at, wire, 0)
    rest = max(wire - at, 0)
    if kind == _ARP_TYPE:
        if len(data) < at + 28:
            return _cut(link, "arp", at, wire)
        hardware, protocol, mac, ip, operation, *ends = _ARP.unpack_from(data, at)
        if (hardware, protocol, mac, ip) == (1, _IPV4, 6, 4):
            arp = Arp(operation, *ends)
            return Dissection(link, arp, None, at, at + 28, rest, max(rest - 28, 0))
    return Dissection(link, None, None, at, at, rest, rest)


def _ip(link: Link | None, data: bytes, at: int, wire: int, depth: int) -> Dissection:
    if len(data) <= at:
        return _cut(link, "ip", at, wire)
    version = data[at] >> 4
    if version == 4:
        return _ip4(link, data, at, wire, depth)
    if version == 6:
        return _ip6(link, data, at, wire, depth)
    rest = max(wire - at, 0)
    return Dissection(link, None, None, at, at, rest, rest)


def _ip4(link: Link | None, data: bytes, at: int, wire: int, depth: int) -> Dissection:
    if len(data) < at + 20:
        return _cut(link, "ip", at, wire)
    first, tos, total, identity, place, ttl, protocol, checksum, source, destination = (
        _IP4.unpack_from(data, at)
    )
    header = (first & 15) * 4
    # A segmentation offload writes 0 for what does not fit (IPv4 BIG TCP).
    length = total or max(wire - at, 0)
    if header < 20 or length < header:
        return _cut(link, "ip", at, wire)
    options = data[at + 20 : at + header] if header > 20 else b""
    offset = (place & 0x1FFF) * 8
    ip = Ip4(
        source,
        destination,
        protocol,
        ttl,
        tos,
        identity,
        place >> 13,
        offset,
        total,
        header,
        checksum,
        options,
    )
    if len(data) < at + header:
        return Dissection(link, ip, None, at, at + header, length, length - header, "ip")
    return _transport(link, ip, data, at, length, at + header, length - header, depth)


def _ip6(link: Link | None, data: bytes, at: int, wire: int, depth: int) -> Dissection:
    if len(data) < at + 40:
        return _cut(link, "ip6", at, wire)
    first, declared, following, limit, source, destination = _IP6.unpack_from(data, at)
    # A jumbogram, or a segmentation offload (BIG TCP): the length does not fit.
    payload = declared or max(wire - at - 40, 0)
    protocol, header, identity, flags, offset = following, 40, 0, 0, 0
    passed: list[int] = []
    cut = ""
    while len(passed) < _MAX_EXTENSIONS:
        here = at + header
        known = protocol in _EXTENSIONS or protocol in (_FRAGMENT, _AUTHENTICATION)
        if known and (len(data) < here + 8 or header + 8 > 40 + payload):
            cut = "ip6"
            break
        if protocol in _EXTENSIONS:
            size = (data[here + 1] + 1) * 8
        elif protocol == _FRAGMENT:
            size = 8
            place = int.from_bytes(data[here + 2 : here + 4], "big")
            offset, flags = place & 0xFFF8, place & 1
            identity = int.from_bytes(data[here + 4 : here + 8], "big")
        elif protocol == _AUTHENTICATION:
            size = (data[here + 1] + 2) * 4
        else:
            break
        passed.append(protocol)
        protocol = data[here]
        header += size
        if offset:
            break
    ip = Ip6(
        source,
        destination,
        protocol,
        limit,
        first >> 20 & 0xFF,
        identity,
        flags,
        offset,
        declared,
        header,
        first & 0xFFFFF,
        following,
        tuple(passed),
    )
    rest = max(40 + payload - header, 0)
    if cut or len(data) < at + header:
        return Dissection(link, ip, None, at, at + header, 40 + payload, rest, "ip6")
    return _transport(link, ip, data, at, 40 + payload, at + header, rest, depth)


def _transport(
    link: Link | None,
    ip: Ip4 | Ip6,
    data: bytes,
    start: int,
    length: int,
    at: int,
    rest: int,
    depth: int,
) -> Dissection:
    """`at`: where it begins; `rest`: how long it is on the wire, its header included."""
    layer: Transport | None = None
    protocol = ip.protocol
    # Ethernet pads short frames: what is behind the packet's own end does not belong to it.
    have = min(len(data) - at, rest)
    header, cut = 0, ""
    if ip.offset:
        return Dissection(link, ip, None, start, at, length, rest)
    if protocol == 6:
        if have < 20:
            cut = "tcp"
            if have >= 4:  # an ICMP error must quote no more than 8 bytes (RFC 792)
                sport, dport = _PAIR.unpack_from(data, at)
                seq = int.from_bytes(data[at + 4 : at + 8], "big") if have >= 8 else 0
                layer, header = Tcp(sport, dport, seq, 0, 0, 0, 0, 0, 0), min(have, 8)
        else:
            sport, dport, seq, ack, bits, window, checksum, urgent = _TCP.unpack_from(data, at)
            header = (bits >> 12) * 4
            options = _options(data, at + 20, at + min(header, have)) if header > 20 else ()
            layer = Tcp(
                sport, dport, seq, ack, bits & 0x1FF, window, checksum, urgent, header, options
            )
            if header < 20 or header > have:
                cut = "tcp"
    elif protocol in (17, 136):
        if have < 8:
            cut = "udp"
        else:
            layer, header = Udp(*_UDP.unpack_from(data, at)), 8
    elif protocol in (1, 58):
        if have < 8:
            cut = "icmp"
        else:
            kind, code, checksum, word = _ICMP.unpack_from(data, at)
            error = kind in _ICMP_ERRORS if protocol == 1 else kind < 128
            quoted = None
            if error and depth == 0 and have > 8:
                quoted = _ip(None, data[at + 8 : at + have], 0, 0, depth + 1)
            layer, header = Icmp(kind, code, checksum, word, quoted), 8
    elif protocol == 132:
        if have < 12:
            cut = "sctp"
        else:
            sport, dport, tag = _SCTP.unpack_from(data, at)
            layer, header = Sctp(sport, dport, tag, _chunks(data, at + 12, at + have)), 12
    payload = max(rest - header, 0)
    return Dissection(link, ip, layer, start, at + header, length, payload, cut)


def _options(data: bytes, at: int, end: int) -> tuple[tuple[int, bytes], ...]:
    """TCP options; kind -1 for a rest whose length makes no sense."""
    found: list[tuple[int, bytes]] = []
    while at < end:
        kind = data[at]
        if kind == 0:
            found.append((0, b""))
            break
        if kind == 1:
            found.append((1, b""))
            at += 1
            continue
        size = data[at + 1] if at + 1 < end else 0
        if size < 2 or at + size > end:
            found.append((-1, data[at:end]))
            break
        found.append((kind, data[at + 2 : at + size]))
        at += size
    return tuple(found)


def _chunks(data: bytes, at: int, end: int) -> tuple[tuple[int, int, bytes], ...]:
    found: list[tuple[int, int, bytes]] = []
    while at + 4 <= end:
        kind, flags = data[at], data[at + 1]
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        if size < 4:
            break
        found.append((kind, flags, data[at + 4 : min(at + size, end)]))
        at += size + 3 & ~3
    return tuple(found)
