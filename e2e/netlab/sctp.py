"""The two SCTP packets that a probe needs: INIT and INIT ACK (RFC 9260, 3.1, 3.3.2, 3.3.3).

Kernels without SCTP sockets still route, translate and track SCTP, so the lab speaks just enough
of it over raw sockets: the answer's State Cookie carries what the pod saw, as JSON.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

__all__ = ["INIT", "INIT_ACK", "SctpPacket", "crc32c", "pack_init", "pack_init_ack", "parse_sctp"]

INIT = 1
INIT_ACK = 2
_STATE_COOKIE = 7


def _table() -> tuple[int, ...]:
    entries = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        entries.append(crc)
    return tuple(entries)


_TABLE = _table()


@dataclass(frozen=True, slots=True, kw_only=True)
class SctpPacket:
    """A packet with one INIT or INIT ACK chunk; `cookie` is empty in an INIT."""

    source_port: int
    destination_port: int
    tag: int
    kind: int
    initiate_tag: int
    cookie: bytes


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC, as RFC 9260, Appendix A reflects it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def pack_init(source_port: int, destination_port: int, initiate_tag: int) -> bytes:
    """An INIT: its verification tag is 0 (RFC 9260, 8.5.1)."""
    return _pack(source_port, destination_port, 0, INIT, initiate_tag, b"")


def pack_init_ack(init: SctpPacket, initiate_tag: int, cookie: bytes) -> bytes:
    """The INIT ACK that answers `init`."""
    parameter = struct.pack("!HH", _STATE_COOKIE, 4 + len(cookie)) + cookie
    parameter += b"\0" * (-len(parameter) % 4)
    return _pack(
        init.destination_port,
        init.source_port,
        init.initiate_tag,
        INIT_ACK,
        initiate_tag,
        parameter,
    )


def _pack(
    source_port: int, destination_port: int, tag: int, kind: int, initiate_tag: int, rest: bytes
) -> bytes:
    chunk = struct.pack("!BBHIIHHI", kind, 0, 20 + len(rest), initiate_tag, 65536, 1, 1, 1) + rest
    head = struct.pack("!HHI", source_port, destination_port, tag)
    # The checksum is sent with its least significant byte first.
    crc = struct.pack("<I", crc32c(head + b"\0\0\0\0" + chunk))
    return head + crc + chunk


def parse_sctp(data: bytes) -> SctpPacket | None:
    """A packet that starts with INIT or INIT ACK and whose checksum holds; else None."""
    if len(data) < 32:
        return None
    source_port, destination_port, tag, crc = struct.unpack_from("!HHI", data) + struct.unpack_from(
        "<I", data, 8
    )
    if crc != crc32c(data[:8] + b"\0\0\0\0" + data[12:]):
        return None
    kind, _flags, length, initiate_tag = struct.unpack_from("!BBHI", data, 12)
    if kind not in (INIT, INIT_ACK) or length < 20 or 12 + length > len(data):
        return None
    cookie, at, end = b"", 32, 12 + length
    while at + 4 <= end:
        parameter, size = struct.unpack_from("!HH", data, at)
        if size < 4:
            return None
        if parameter == _STATE_COOKIE:
            cookie = data[at + 4 : at + size]
        at += size + (-size % 4)
    return SctpPacket(
        source_port=source_port,
        destination_port=destination_port,
        tag=tag,
        kind=kind,
        initiate_tag=initiate_tag,
        cookie=cookie,
    )
