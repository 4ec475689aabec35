"""Packets as bytes, built from the simulator's `Packet`, and parsed back from headers."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from ipaddress import ip_address

from gketrace.packet import Packet, Protocol, TcpFlags

__all__ = ["Seen", "build", "parse"]

_SCTP_TABLE: list[int] = []


def build(packet: Packet, key: int, *, payload: bytes = b"", seq: int = 1, ack: int = 0) -> bytes:
    """The IP packet (no link header) with right checksums; `key` goes into the IPv4
    identification or the IPv6 flow label."""
    body = _transport(packet, payload, seq, ack)
    ttl = 64 if packet.ttl is None else packet.ttl
    tos = packet.dscp << 2 | packet.ecn
    if packet.family == 4:
        head = struct.pack(
            ">BBHHHBBH4s4s",
            0x45,
            tos,
            20 + len(body),
            key,
            0x4000 if packet.dont_fragment else 0,
            ttl,
            packet.protocol,
            0,
            packet.src.packed,
            packet.dst.packed,
        )
        return head[:10] + struct.pack(">H", _checksum(head)) + head[12:] + body
    return (
        struct.pack(
            ">IHBB16s16s",
            6 << 28 | tos << 20 | key,
            len(body),
            packet.protocol,
            ttl,
            packet.src.packed,
            packet.dst.packed,
        )
        + body
    )


def _transport(packet: Packet, payload: bytes, seq: int, ack: int) -> bytes:
    sport, dport = packet.sport or 0, packet.dport or 0
    if packet.protocol == Protocol.TCP:
        options = b"".join(
            _TCP_OPTION.get(kind, bytes((kind, 2))) for kind in packet.tcp_options or ()
        )
        options += b"\0" * (-len(options) % 4)
        flags = packet.tcp_flags
        head = struct.pack(
            ">HHIIBBHHH",
            sport,
            dport,
            seq,
            ack if flags & TcpFlags.ACK else 0,
            (5 + len(options) // 4) << 4,
            flags,
            64240,
            0,
            0,
        )
        body = head + options + payload
        return _put_checksum(packet, body, 16)
    if packet.protocol in (Protocol.UDP, Protocol.UDPLITE):
        coverage = 8 + len(payload)
        return _put_checksum(packet, struct.pack(">HHHH", sport, dport, coverage, 0) + payload, 6)
    if packet.protocol == Protocol.SCTP:
        chunk = struct.pack(">BBHIIHHI", 1, 0, 20, 0x1234, 65535, 1, 1, 1)
        body = struct.pack(">HHII", sport, dport, 0, 0) + chunk
        return body[:8] + struct.pack("<I", _crc32c(body)) + body[12:]
    if packet.protocol in (Protocol.ICMP, Protocol.ICMPV6):
        body = (
            struct.pack(
                ">BBHHH", packet.icmp_type or 0, packet.icmp_code or 0, 0, packet.icmp_id or 0, 1
            )
            + payload
        )
        if packet.protocol == Protocol.ICMPV6:
            return _put_checksum(packet, body, 2)
        return body[:2] + struct.pack(">H", _checksum(body)) + body[4:]
    return payload or b"\0" * 8


_TCP_OPTION = {
    1: b"\x01",
    2: b"\x02\x04\x05\xb4",
    3: b"\x03\x03\x07",
    4: b"\x04\x02",
    8: b"\x08\x0a" + bytes(8),
}


def _put_checksum(packet: Packet, body: bytes, at: int) -> bytes:
    if packet.family == 4:
        pseudo = struct.pack(
            ">4s4sBBH", packet.src.packed, packet.dst.packed, 0, packet.protocol, len(body)
        )
    else:
        pseudo = struct.pack(
            ">16s16sIHBB", packet.src.packed, packet.dst.packed, len(body), 0, 0, packet.protocol
        )
    value = _checksum(pseudo + body) or 0xFFFF
    return body[:at] + struct.pack(">H", value) + body[at + 2 :]


def _checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    total += total >> 16
    return ~total & 0xFFFF


def _crc32c(data: bytes) -> int:
    if not _SCTP_TABLE:
        for n in range(256):
            value = n
            for _ in range(8):
                value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
            _SCTP_TABLE.append(value)
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _SCTP_TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The header fields of a packet that the kernel showed."""

    src: str
    dst: str
    protocol: int
    sport: int | None
    dport: int | None
    tos: int
    ttl: int


def parse(header: bytes) -> Seen:
    """Network and transport header → fields.  Raises ValueError for a header cut short."""
    if header[0] >> 4 == 4:
        size = (header[0] & 15) * 4
        tos, ttl, protocol = header[1], header[8], header[9]
        src, dst = header[12:16], header[16:20]
    else:
        size, protocol, ttl = 40, header[6], header[7]
        tos = struct.unpack_from(">H", header, 0)[0] >> 4 & 0xFF
        src, dst = header[8:24], header[24:40]
    sport = dport = None
    if protocol in (Protocol.TCP, Protocol.UDP, Protocol.SCTP, Protocol.UDPLITE, Protocol.DCCP):
        if len(header) < size + 4:
            raise ValueError(f"header of {len(header)} bytes is cut short")
        sport, dport = struct.unpack_from(">HH", header, size)
    return Seen(
        src=str(ip_address(src)),
        dst=str(ip_address(dst)),
        protocol=protocol,
        sport=sport,
        dport=dport,
        tos=tos,
        ttl=ttl,
    )


_IP_FREEBIND, _IPV6_FREEBIND = 15, 78


def raw_socket(family: int, source: str, mark: int = 0) -> socket.socket:
    """A raw socket of the calling thread's namespace that takes whole IP packets.

    It is bound, so that routing knows the source, as it does for a program's bound socket.
    """
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    made = socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_RAW)
    if family == 4:
        made.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
    else:
        made.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
    made.bind((source, 0))
    if mark:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    return made


__all__ += ["raw_socket"]
