"""What a captured packet consists of, layer by layer.

Addresses are the bytes on the wire, so that no objects are made of them that nobody looks at;
`address` makes one.  Lengths are bytes.  Named tuples, not dataclasses, for speed.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple, TypeAlias

from gketrace.packet import IPAddress, Protocol, Tuple5

__all__ = [
    "FRAGMENT_HEADER",
    "Arp",
    "Cooked",
    "Dissection",
    "Ethernet",
    "Icmp",
    "Ip4",
    "Ip6",
    "Sctp",
    "Tcp",
    "Udp",
    "address",
    "tuple_of",
]

FRAGMENT_HEADER: Final = 44
"""Next header value of the fragment header."""


class Ethernet(NamedTuple):
    """Ethernet II or 802.3, with the VLAN tags in front of the type."""

    source: bytes
    destination: bytes
    ethertype: int
    """Of what is behind the tags; below 0x600: a length (802.3)."""
    vlans: tuple[int, ...] = ()
    """Tag control information of each tag: priority (3 bits), DEI, VLAN id (12 bits)."""


class Cooked(NamedTuple):
    """Linux cooked capture (LINKTYPE_LINUX_SLL, LINKTYPE_LINUX_SLL2)."""

    packet_type: int
    """0 to us, 1 broadcast, 2 multicast, 3 to somebody else, 4 sent by us."""
    hardware: int
    """ARPHRD_*."""
    source: bytes
    ethertype: int
    ifindex: int = 0
    """0: version 1 of the format has none."""


class Arp(NamedTuple):
    """RFC 826, Ethernet and IPv4."""

    operation: int
    sender_mac: bytes
    sender: bytes
    target_mac: bytes
    target: bytes


class Ip4(NamedTuple):
    """RFC 791."""

    source: bytes
    destination: bytes
    protocol: int
    ttl: int
    tos: int
    id: int
    flags: int
    """3 bits: 4 reserved, 2 DF, 1 MF."""
    offset: int
    """Of this fragment, in bytes."""
    total_length: int
    """As the header has it; 0 with segmentation offload."""
    header_length: int
    checksum: int
    options: bytes = b""

    @property
    def fragment(self) -> bool:
        """It is one of several, or the first."""
        return self.offset > 0 or bool(self.flags & 1)


class Ip6(NamedTuple):
    """RFC 8200, its extension headers walked through."""

    source: bytes
    destination: bytes
    protocol: int
    """Of what is behind the extension headers."""
    ttl: int
    """Hop limit."""
    tos: int
    """Traffic class."""
    id: int
    """Of the fragment header; 0 without one."""
    flags: int
    """1: more fragments follow."""
    offset: int
    """Of this fragment, in bytes."""
    payload_length: int
    header_length: int
    """With all extension headers."""
    flow_label: int
    next_header: int
    """What the fixed header names first."""
    extensions: tuple[int, ...] = ()

    @property
    def fragment(self) -> bool:
        return FRAGMENT_HEADER in self.extensions


class Tcp(NamedTuple):
    """RFC 9293."""

    sport: int
    dport: int
    seq: int
    ack: int
    flags: int
    """9 bits, `gketrace.packet.TcpFlags`, 0x100 is AE."""
    window: int
    checksum: int
    urgent: int
    header_length: int
    """0: only ports were captured, and the sequence number or 0."""
    options: tuple[tuple[int, bytes], ...] = ()
    """Kind and data of each; a malformed rest is kind -1."""


class Udp(NamedTuple):
    """RFC 768."""

    sport: int
    dport: int
    length: int
    checksum: int


class Icmp(NamedTuple):
    """ICMP (RFC 792) and ICMPv6 (RFC 4443)."""

    type: int
    code: int
    checksum: int
    rest: int
    """The four bytes behind the checksum."""
    quoted: Dissection | None = None
    """The packet that an error is about."""

    @property
    def id(self) -> int:
        """Of echo messages."""
        return self.rest >> 16

    @property
    def sequence(self) -> int:
        return self.rest & 0xFFFF


class Sctp(NamedTuple):
    """RFC 9260."""

    sport: int
    dport: int
    tag: int
    chunks: tuple[tuple[int, int, bytes], ...] = ()
    """Type, flags and value of each that was captured whole, and of the first cut one."""


Link: TypeAlias = Ethernet | Cooked
Network: TypeAlias = Ip4 | Ip6 | Arp
Transport: TypeAlias = Tcp | Udp | Icmp | Sctp


class Dissection(NamedTuple):
    """One packet taken apart."""

    link: Link | None
    network: Network | None
    """None: neither IP nor ARP, or too little of it was captured."""
    transport: Transport | None
    """None: another protocol, a later fragment, or too little of it was captured."""
    network_offset: int
    """Where the network layer begins in the captured bytes."""
    payload_offset: int
    """Where the last layer's payload begins; beyond the end of what was captured, possibly."""
    length: int
    """Of the network layer on the wire, header included."""
    payload_length: int
    """On the wire, by the packet's own lengths."""
    cut: str = ""
    """The layer that ends before its header does: ``ethernet``, ``ip``, ``ip6``, ``tcp``, …; a
    payload that was not captured whole is not a cut."""


@lru_cache(maxsize=4096)
def address(raw: bytes) -> IPAddress:
    """4 or 16 bytes → address."""
    return IPv4Address(raw) if len(raw) == 4 else IPv6Address(raw)


def tuple_of(packet: Dissection) -> Tuple5 | None:
    """The tuple that connection tracking makes of it; None where there is none to be seen."""
    ip, layer = packet.network, packet.transport
    if ip is None or isinstance(ip, Arp):
        return None
    source, destination = address(ip.source), address(ip.destination)
    if isinstance(layer, Icmp):
        return Tuple5(
            src=source,
            dst=destination,
            protocol=ip.protocol,
            sport=layer.id if _is_query(ip.protocol, layer.type) else None,
            icmp_type=layer.type,
            icmp_code=layer.code,
        )
    if layer is None:
        return Tuple5(src=source, dst=destination, protocol=ip.protocol)
    return Tuple5(
        src=source, dst=destination, protocol=ip.protocol, sport=layer.sport, dport=layer.dport
    )


def _is_query(protocol: int, kind: int) -> bool:
    if protocol == Protocol.ICMPV6:
        return kind in (128, 129)
    return kind in (0, 8, 13, 14, 15, 16, 17, 18)
