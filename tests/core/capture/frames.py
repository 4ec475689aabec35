"""Frames made by hand, checksums right."""

from __future__ import annotations

import struct
from ipaddress import ip_address

MAC_A = bytes.fromhex("0a580a280001")
MAC_B = bytes.fromhex("0a580a280006")


def checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ethernet(payload: bytes, *, vlans: tuple[int, ...] = (), kind: int = 0) -> bytes:
    kind = kind or (0x0800 if payload[0] >> 4 == 4 else 0x86DD)
    tags = b"".join(struct.pack("!HH", 0x8100, tag) for tag in vlans)
    return MAC_B + MAC_A + tags + struct.pack("!H", kind) + payload


def ip(
    source: str,
    destination: str,
    protocol: int,
    payload: bytes,
    *,
    ttl: int = 64,
    identity: int = 0,
    flags: int = 2,
    offset: int = 0,
    options: bytes = b"",
    tos: int = 0,
    extensions: bytes = b"",
) -> bytes:
    """IPv4 or IPv6.  `extensions` begin with their own header's type in `protocol`."""
    src, dst = ip_address(source).packed, ip_address(destination).packed
    if len(src) == 16:
        size = len(extensions) + len(payload)
        head = struct.pack("!IHBB", 6 << 28 | tos << 20, size, protocol, ttl)
        return head + src + dst + extensions + payload
    size = 20 + len(options)
    fields = (
        4 << 4 | size // 4,
        tos,
        size + len(payload),
        identity,
        flags << 13 | offset // 8,
        ttl,
        protocol,
    )
    head = struct.pack("!BBHHHBB", *fields)
    rest = src + dst + options
    return head + struct.pack("!H", checksum(head + b"\0\0" + rest)) + rest + payload


def _summed(source: str, destination: str, protocol: int, segment: bytes, at: int) -> bytes:
    src, dst = ip_address(source).packed, ip_address(destination).packed
    pseudo = src + dst + struct.pack("!II", len(segment), protocol)
    value = checksum(pseudo + segment)
    if protocol == 17 and value == 0:
        value = 0xFFFF
    return segment[:at] + struct.pack("!H", value) + segment[at + 2 :]


def tcp(
    source: str,
    sport: int,
    destination: str,
    dport: int,
    *,
    flags: int,
    seq: int = 0,
    ack: int = 0,
    window: int = 64240,
    options: bytes = b"",
    payload: bytes = b"",
    urgent: int = 0,
    **header: int,
) -> bytes:
    """An IP packet with a TCP segment."""
    size = 20 + len(options)
    bits = size // 4 << 12 | flags
    fixed = struct.pack("!HHIIHHHH", sport, dport, seq, ack, bits, window, 0, urgent)
    segment = _summed(source, destination, 6, fixed + options + payload, 16)
    return ip(source, destination, 6, segment, **header)


def udp(
    source: str, sport: int, destination: str, dport: int, payload: bytes, **header: int
) -> bytes:
    segment = struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload
    return ip(source, destination, 17, _summed(source, destination, 17, segment, 6), **header)


def icmp(
    source: str, destination: str, kind: int, code: int, rest: int, payload: bytes, **header: int
) -> bytes:
    """ICMP or ICMPv6, by the addresses."""
    message = struct.pack("!BBHI", kind, code, 0, rest) + payload
    if ip_address(source).version == 6:
        return ip(source, destination, 58, _summed(source, destination, 58, message, 2), **header)
    message = message[:2] + struct.pack("!H", checksum(message)) + message[4:]
    return ip(source, destination, 1, message, **header)


def arp(operation: int, sender: str, target: str) -> bytes:
    head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
    known = MAC_B if operation == 2 else bytes(6)
    body = MAC_A + ip_address(sender).packed + known + ip_address(target).packed
    return ethernet(head + body, kind=0x0806)


SYN_OPTIONS = bytes.fromhex("020405b4 0402 080a 00000001 00000000 01 030307")
TIMESTAMP = bytes.fromhex("01 01 080a 00000002 00000001")


def pcap(frames: list[tuple[int, bytes]], linktype: int = 1, snap: int = 262144) -> bytes:
    """A savefile with nanoseconds."""
    out = [struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, snap, linktype)]
    for time, frame in frames:
        kept = frame[:snap]
        stamp = divmod(time, 10**9)
        out += [struct.pack("<IIII", *stamp, len(kept), len(frame)), kept]
    return b"".join(out)
