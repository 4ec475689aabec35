"""Packets as the stitcher sees them: what stays the same while addresses and ports are rewritten.

NAT leaves sequence numbers, timestamps, the IP identification and the payload alone; routers count
the TTL down; offloads merge neighbouring TCP segments (GRO, LRO) and cut large ones (TSO, GSO).  So
a segment is known by its `Sighting.key` where it was not merged, and by its range of sequence
numbers where it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Final, NamedTuple, TypeAlias

from gketrace.capture.dissect import dissect
from gketrace.capture.layers import Arp, Dissection, Icmp, Ip4, Sctp, Tcp, Udp, address
from gketrace.capture.packets import CapturedPacket, Direction, Tap
from gketrace.packet import PORT_PROTOCOLS, Protocol, Tuple5

__all__ = [
    "ACK",
    "FIN",
    "RST",
    "SYN",
    "ErrorSighting",
    "FlowKey",
    "Sighting",
    "flow_key",
    "reverse_key",
    "sightings",
    "tuple5_of",
]

FIN: Final = 1
SYN: Final = 2
RST: Final = 4
ACK: Final = 16
_MASK: Final = 0xFFFFFFFF
_HASHED: Final = 512
"""Payload bytes that count: as many as any snap length is likely to keep at all taps alike."""

FlowKey: TypeAlias = tuple[int, bytes, int, bytes, int]
"""Protocol, source, source port, destination, destination port: one direction of a conversation.
Of echo messages both ports are the identifier; of other protocols they are 0."""


class Sighting(NamedTuple):
    """One packet at one tap."""

    number: int
    """Which of the packets."""
    tap: Tap
    direction: Direction
    flow: FlowKey
    time: int
    """Nanoseconds, by the node's clock."""
    ttl: int
    flags: int
    """TCP: FIN, SYN, RST, ACK; else 0."""
    seq: int
    """TCP: of the first byte; ICMP: the echo's sequence number."""
    ack: int
    size: int
    """Payload bytes on the wire."""
    stamp: int
    """TCP: the timestamp value, -1 without the option; else a hash of the payload."""
    identity: int
    """IPv4 identification or that of the IPv6 fragment header; 0: none."""
    query: bool
    """ICMP: a request, not a reply.  TCP: a SYN without ACK."""
    offset: int = 0
    """Of a later fragment."""
    ifindex: int = 0
    """Where the tap is ``any``."""

    @property
    def end(self) -> int:
        """TCP: the sequence number behind it; SYN and FIN count."""
        return (self.seq + self.size + bool(self.flags & SYN) + bool(self.flags & FIN)) & _MASK

    @property
    def key(self) -> tuple[int, ...]:
        """What is the same at every hop, unless it was merged or cut."""
        return (
            self.flow[0],
            self.flags,
            self.seq,
            self.ack if self.flags & ACK else 0,
            self.size,
            self.stamp,
            self.identity,
            self.offset,
        )


class ErrorSighting(NamedTuple):
    """An ICMP error at one tap."""

    number: int
    tap: Tap
    direction: Direction
    time: int
    sender: bytes
    """The address that it comes from, as seen here."""
    type: int
    code: int
    rest: int
    quoted: FlowKey
    """The packet that it is about, as that looked here."""
    key: tuple[int, ...]
    """What is the same at every hop."""


def flow_key(packet: Dissection) -> FlowKey | None:
    """None: no IP packet, or too little of it is there."""
    ip, layer = packet.network, packet.transport
    if ip is None or isinstance(ip, Arp):
        return None
    if isinstance(layer, Tcp | Udp | Sctp):
        return ip.protocol, ip.source, layer.sport, ip.destination, layer.dport
    if isinstance(layer, Icmp):
        if layer.type not in ((128, 129) if ip.protocol == Protocol.ICMPV6 else (0, 8)):
            return None
        return ip.protocol, ip.source, layer.id, ip.destination, layer.id
    if ip.protocol in PORT_PROTOCOLS:
        return None
    return ip.protocol, ip.source, 0, ip.destination, 0


def reverse_key(key: FlowKey) -> FlowKey:
    """Of the answers."""
    protocol, source, sport, destination, dport = key
    return protocol, destination, dport, source, sport


def tuple5_of(key: FlowKey) -> Tuple5:
    protocol, source, sport, destination, dport = key
    ports = protocol in PORT_PROTOCOLS
    echo = protocol in (Protocol.ICMP, Protocol.ICMPV6)
    return Tuple5(
        src=address(source),
        dst=address(destination),
        protocol=protocol,
        sport=sport if ports or echo else None,
        dport=dport if ports else None,
    )


def sightings(
    packets: Iterable[CapturedPacket],
) -> tuple[list[Sighting], list[ErrorSighting], int]:
    """The packets that belong to conversations, the ICMP errors, and how many were neither.

    Later fragments without ports are neither.
    """
    seen: list[Sighting] = []
    errors: list[ErrorSighting] = []
    others = 0
    for number, packet in enumerate(packets):
        found = dissect(packet.tap.link_type, packet.data, packet.original_length)
        key = flow_key(found)
        if key is not None:
            seen.append(_sighting(number, packet, found, key))
            continue
        error = _error(number, packet, found)
        if error is not None:
            errors.append(error)
        else:
            others += 1
    return seen, errors, others


def _sighting(number: int, packet: CapturedPacket, found: Dissection, key: FlowKey) -> Sighting:
    ip, layer = found.network, found.transport
    assert ip is not None
    assert not isinstance(ip, Arp)
    flags = seq = ack = 0
    query = False
    if isinstance(layer, Tcp):
        flags, seq, ack = layer.flags & (FIN | SYN | RST | ACK), layer.seq, layer.ack
        stamp = next((int.from_bytes(d[:4], "big") for k, d in layer.options if k == 8), -1)
        query = flags & (SYN | ACK) == SYN
    else:
        body = packet.data[found.payload_offset :][: min(found.payload_length, _HASHED)]
        stamp = int.from_bytes(blake2b(body, digest_size=8).digest(), "big")
        if isinstance(layer, Icmp):
            seq, query = layer.sequence, layer.type in (8, 128)
    return Sighting(
        number,
        packet.tap,
        packet.direction,
        key,
        packet.time_ns,
        ip.ttl,
        flags,
        seq,
        ack,
        found.payload_length,
        stamp,
        ip.id,
        query,
        ip.offset,
        packet.ifindex,
    )


def _error(number: int, packet: CapturedPacket, found: Dissection) -> ErrorSighting | None:
    ip, layer = found.network, found.transport
    if not isinstance(layer, Icmp) or layer.quoted is None or ip is None or isinstance(ip, Arp):
        return None
    quoted = flow_key(layer.quoted)
    if quoted is None:
        return None
    inner, about = layer.quoted.network, layer.quoted.transport
    assert inner is not None
    assert not isinstance(inner, Arp)
    seq = about.seq if isinstance(about, Tcp) else 0
    identity = inner.id if isinstance(inner, Ip4) else 0
    return ErrorSighting(
        number,
        packet.tap,
        packet.direction,
        packet.time_ns,
        ip.source,
        layer.type,
        layer.code,
        layer.rest,
        quoted,
        (layer.type, layer.code, layer.rest, seq, identity, ip.id),
    )
