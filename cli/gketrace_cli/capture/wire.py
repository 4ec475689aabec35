"""CaptureReply messages off the wire: packets without a copy, all others parsed; and whether an
agent can have meant them.

Source: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from gketrace.errors import GketraceError
from gketrace_proto.v1alpha1 import capture_pb2 as pb

__all__ = ["RawPackets", "check_reply", "parse_reply"]

_VARINT: Final = 0
_LENGTH: Final = 2
_PACKETS: Final = 2 << 3 | _LENGTH
"""Tag of CaptureReply.packets."""
_TAP: Final = 1
_COUNTS: Final = 2
_LENGTHS: Final = 3
_DATA: Final = 4
_BITS: Final = 64
_LATEST: Final = 1 << 62
"""Nanoseconds: a clock that is later cannot be reckoned with."""
_SLOWEST: Final = 3600.0
"""Seconds of latency that an agent may grant."""
_LINK_TYPES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class RawPackets:
    """A CapturePackets message."""

    tap: int
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    data: memoryview
    """Part of the message as it came."""


def parse_reply(message: bytes) -> RawPackets | pb.CaptureReply | GketraceError:
    """The error for what is no CaptureReply: gRPC would say only that something was raised."""
    try:
        if message and message[0] == _PACKETS:
            size, place = _varint(message, 1)
            if place + size == len(message):
                return _packets(message, place)
        return pb.CaptureReply.FromString(message)
    except IndexError:
        return GketraceError("a message of packets is cut short")
    except DecodeError:
        return GketraceError("a message that is none of a capture's")
    except GketraceError as error:
        return error


def check_reply(reply: RawPackets | pb.CaptureReply, *, asked: int, taps: int) -> None:
    """Raises `GketraceError` for what no agent means; an agent may be anybody.

    `asked`: the taps that it was asked for; `taps`: those that it has started, 0: it has not yet.
    """
    if isinstance(reply, RawPackets):
        wrong = "packets of a tap that is not open" if reply.tap >= taps else ""
    elif reply.HasField("started"):
        wrong = _wrong_start(reply.started, asked, taps)
    elif reply.HasField("statistics"):
        said = reply.statistics
        wrong = "numbers of other taps" if len(said.taps) != taps else ""
        if max(said.wall_ns, said.monotonic_ns) >= _LATEST:
            wrong = "a time that no clock has"
    elif any(tap >= taps for tap in reply.end.taps):
        wrong = "the end of a tap that is not open"
    else:
        wrong = ""
    if wrong:
        raise GketraceError(f"it sent {wrong}")


def _wrong_start(said: pb.CaptureStarted, asked: int, taps: int) -> str:
    if taps or len(said.taps) != asked:
        return "the start of other taps"
    if max(said.wall_ns, said.monotonic_ns) >= _LATEST or not 0 <= said.latency_seconds <= _SLOWEST:
        return "a time that no clock has"
    if any(tap.link_type >= _LINK_TYPES for tap in said.taps):
        return "a link type that there is not"
    return ""


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
        if shift >= _BITS:
            raise GketraceError("a message of packets has a number that is too long")


def _varints(message: bytes, place: int, end: int) -> tuple[int, ...]:
    found: list[int] = []
    while place < end:
        value, place = _varint(message, place)
        found.append(value)
    return tuple(found)
