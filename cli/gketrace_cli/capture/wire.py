"""CaptureReply messages off the wire: packets without a copy, all others parsed.

Source: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gketrace.errors import GketraceError
from gketrace_proto.v1alpha1 import capture_pb2 as pb

__all__ = ["RawPackets", "parse_reply"]

_VARINT: Final = 0
_LENGTH: Final = 2
_PACKETS: Final = 2 << 3 | _LENGTH
"""Tag of CaptureReply.packets."""
_TAP: Final = 1
_COUNTS: Final = 2
_LENGTHS: Final = 3
_DATA: Final = 4


@dataclass(frozen=True, slots=True)
class RawPackets:
    """A CapturePackets message."""

    tap: int
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    data: memoryview
    """Part of the message as it came."""


def parse_reply(message: bytes) -> RawPackets | pb.CaptureReply:
    """Raises `GketraceError` for what is no CaptureReply."""
    if message and message[0] == _PACKETS:
        try:
            size, place = _varint(message, 1)
            if place + size == len(message):
                return _packets(message, place)
        except IndexError:
            raise GketraceError("a message of packets is cut short") from None
    return pb.CaptureReply.FromString(message)


def _packets(message: bytes, place: int) -> RawPackets:
    tap = 0
    counts: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    data = memoryview(b"")
    while place < len(message):
        tag, place = _varint(message, place)
        number, kind = tag >> 3, tag & 7
        value, place = _varint(message, place)
        if kind == _VARINT:
            if number == _TAP:
                tap = value
            continue
        if kind != _LENGTH or place + value > len(message):
            raise GketraceError("a message of packets is not understood")
        if number == _DATA:
            data = memoryview(message)[place : place + value]
        elif number in (_COUNTS, _LENGTHS):
            numbers = _varints(message, place, place + value)
            if number == _COUNTS:
                counts = numbers
            else:
                lengths = numbers
        place += value
    return RawPackets(tap, counts, lengths, data)


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = shift = 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7


def _varints(message: bytes, place: int, end: int) -> tuple[int, ...]:
    found: list[int] = []
    while place < end:
        value, place = _varint(message, place)
        found.append(value)
    return tuple(found)
