"""Capture files, read: pcapng and classic pcap, of either byte order, of any writer.

Source: draft-ietf-opsawg-pcapng; draft-ietf-opsawg-pcap.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Any, BinaryIO, Final

from gketrace.capture.packets import CapturedPacket, Direction, PacketFlag, Tap
from gketrace.errors import GketraceError, UsageError
from gketrace.packet import IPAddress
from gketrace.trace import NetnsKind, NetnsRef
from gketrace_cli.capture.pcapng import TAP_COMMENT
from gketrace_cli.capture.stream import TapStatistics

__all__ = ["CaptureReader"]

_SHB: Final = 0x0A0D0D0A
_MAGIC: Final = 0x1A2B3C4D
_PCAP: Final = {0xA1B2C3D4: 1000, 0xA1B23C4D: 1}
"""Magic number → nanoseconds of a time's second part."""
_MOST: Final = 64 << 20
"""Bytes of a block or packet: what claims more is no capture file, or a damaged one."""
_KEPT: Final = 256 << 20
"""Bytes of what is kept in memory: interfaces, names, comments."""
_OBJECT: Final = 1024
"""Bytes that one of them takes, beside what it says."""
_SECOND: Final = 1_000_000_000
_LAST: Final = (1 << 63) - 1
"""Nanoseconds since the epoch, in 2262: what 64 bits can hold."""
_DIRECTIONS: Final = (Direction.UNKNOWN, Direction.IN, Direction.OUT, Direction.UNKNOWN)
_RECEPTION: Final = {
    2: PacketFlag.MULTICAST,
    3: PacketFlag.BROADCAST,
    4: PacketFlag.NOT_FOR_US,
}


@dataclass(slots=True)
class _Interface:
    tap: Tap
    ticks: int = 1_000_000
    """Of a timestamp, in a second."""
    offset: int = 0
    """Seconds."""


@dataclass(slots=True)
class CaptureReader:
    """Iterate over its packets, in the order of the file; `close` it then.

    What else the file says fills up on the way.
    """

    source: str
    """File name, or ``-``."""
    comments: list[str] = field(default_factory=list)
    """Of the sections."""
    names: dict[IPAddress, list[str]] = field(default_factory=dict)
    statistics: dict[Tap, TapStatistics] = field(default_factory=dict)
    count: int = 0
    _file: BinaryIO = field(init=False)
    _stack: ExitStack = field(init=False, default_factory=ExitStack)
    _order: str = field(init=False, default="<")
    _interfaces: list[_Interface] = field(init=False, default_factory=list)
    _kept: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Raises `UsageError` when there is no such file."""
        if self.source == "-":
            self._file = sys.stdin.buffer
            return
        try:
            self._file = self._stack.enter_context(open(self.source, "rb"))  # noqa: SIM115
        except OSError as error:
            raise UsageError(f"cannot read {self.source}: {error.strerror}") from None

    def close(self) -> None:
        self._stack.close()

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Those that the file has named so far."""
        return tuple(one.tap for one in self._interfaces)

    def __iter__(self) -> Iterator[CapturedPacket]:
        """Raises `UsageError` for what is no capture file; `GketraceError` where it is cut short or
        damaged, after the packets that stand before."""
        start = self._read(4)
        if len(start) < 4:
            raise UsageError(f"{self.source} is no capture file: it has {len(start)} bytes")
        for order in "<>":
            magic = struct.unpack(f"{order}I", start)[0]
            if magic in _PCAP:
                self._order = order
                yield from self._classic(_PCAP[magic])
                return
        if struct.unpack("<I", start)[0] != _SHB:
            raise UsageError(f"{self.source} is no capture file: neither pcapng nor pcap")
        yield from self._pcapng(start)

    def _take(self, size: int) -> bytes:
        if size > _MOST:
            raise self._damaged(f"something of {size} bytes")
        data = self._read(size)
        if len(data) < size:
            raise GketraceError(f"{self.source} is cut off after {self.count} packets")
        return data

    def _read(self, size: int) -> bytes:
        """Fewer at the end of the file."""
        try:
            return self._file.read(size)
        except OSError as error:
            raise GketraceError(
                f"cannot read {self.source} after {self.count} packets: {error.strerror}"
            ) from None

    def _keep(self, body: bytes) -> None:
        """Counts what is kept of a block: a file may be endless."""
        self._kept += len(body) + _OBJECT
        if self._kept > _KEPT:
            raise self._damaged(f"more than {_KEPT >> 20} MiB that are not packets")

    def _damaged(self, what: str) -> GketraceError:
        return GketraceError(f"{self.source} is damaged after {self.count} packets: {what}")

    # classic pcap

    def _classic(self, unit: int) -> Iterator[CapturedPacket]:
        order = self._order
        _, _, _, _, snap, network = struct.unpack(f"{order}HHiIII", self._take(20))
        tap = Tap(
            node="",
            netns=NetnsRef(node=""),
            interface="",
            link_type=network & 0xFFFF,
            snap_length=snap,
        )
        self._interfaces.append(_Interface(tap))
        header = struct.Struct(f"{order}IIII")
        while start := self._read(1):
            seconds, part, size, length = header.unpack(start + self._take(15))
            data = self._take(size)
            self.count += 1
            yield CapturedPacket(
                tap=tap, time_ns=seconds * _SECOND + part * unit, data=data, original_length=length
            )

    # pcapng

    def _pcapng(self, start: bytes) -> Iterator[CapturedPacket]:
        while start:
            if len(start) < 4:
                start += self._take(4 - len(start))
            kind = struct.unpack(f"{self._order}I", start)[0]
            if start == struct.pack("<I", _SHB):  # the same in both byte orders
                self._section()
            else:
                body = self._body(struct.unpack(f"{self._order}I", self._take(4))[0])
                packet = self._block(kind, body)
                if packet is not None:
                    self.count += 1
                    yield packet
            start = self._read(4)

    def _body(self, length: int, head: int = 8) -> bytes:
        if length < head + 4 or length % 4:
            raise self._damaged(f"a block of {length} bytes")
        body = self._take(length - head - 4)
        if struct.unpack(f"{self._order}I", self._take(4))[0] != length:
            raise self._damaged("a block whose two lengths differ")
        return body

    def _section(self) -> None:
        raw, mark = self._take(4), self._take(4)
        for order in "<>":
            if struct.unpack(f"{order}I", mark)[0] == _MAGIC:
                self._order = order
                break
        else:
            raise self._damaged("a section of no known byte order")
        body = self._body(struct.unpack(f"{self._order}I", raw)[0], head=12)
        self._interfaces.clear()
        self._keep(body)
        for code, value in self._options(body[12:]):
            if code == 1:
                self.comments.append(_text(value))

    def _block(self, kind: int, body: bytes) -> CapturedPacket | None:
        """The packet that a block has; None: it has something else."""
        try:
            if kind == 1:
                self._keep(body)
                self._interface(body)
            elif kind == 4:
                self._keep(body)
                self._names(body)
            elif kind == 5:
                self._statistics(body)
            elif kind == 6:
                return self._enhanced(body)
            elif kind == 3:
                return self._simple(body)
        except (struct.error, IndexError, ValueError, TypeError) as error:
            raise self._damaged(f"a block of type {kind}: {error}") from None
        return None  # others are to be skipped

    def _interface(self, body: bytes) -> None:
        link_type, _, snap = struct.unpack_from(f"{self._order}HHI", body)
        told: dict[str, Any] = {}
        name = description = text = ""
        ticks, offset = 1_000_000, 0
        for code, value in self._options(body[8:]):
            if code == 1 and value.startswith(TAP_COMMENT.encode()):
                told = _tap_comment(value[len(TAP_COMMENT) :])
            elif code == 2:
                name = _text(value)
            elif code == 3:
                description = _text(value)
            elif code == 9:
                ticks = 2 ** (value[0] & 0x7F) if value[0] & 0x80 else 10 ** value[0]
            elif code == 11 and value[:1] == b"\0":
                text = _text(value[1:])
            elif code == 14:
                offset = struct.unpack(f"{self._order}q", value)[0]
        node = str(told.get("node", ""))
        tap = Tap(
            node=node,
            netns=NetnsRef(
                node=node,
                kind=NetnsKind(told.get("netns", NetnsKind.HOST.value)),
                inode=int(told.get("inode", 0)),
                pod=str(told.get("pod", "")),
            ),
            interface=str(told.get("interface", name)),
            link_type=link_type,
            ifindex=int(told.get("ifindex", 0)),
            mtu=int(told.get("mtu", 0)),
            snap_length=snap,
            filter=text,
            index=len(self._interfaces),
            description=str(told.get("description", description)),
            interfaces=_names(told.get("interfaces")),
        )
        self._interfaces.append(_Interface(tap, ticks, offset))

    def _enhanced(self, body: bytes) -> CapturedPacket:
        number, high, low, size, length = struct.unpack_from(f"{self._order}IIIII", body)
        interface = self._interfaces[number]
        data = body[20 : 20 + size]
        if len(data) < size:
            raise ValueError(f"{size} bytes of data in {len(body)}")
        flags, comment = 0, ""
        for code, value in self._options(body[20 + (size + 3 & ~3) :]):
            if code == 2:
                flags = struct.unpack(f"{self._order}I", value)[0]
            elif code == 1:
                comment = f"{comment}\n{_text(value)}".lstrip("\n")
        ticks = interface.ticks
        time = (high << 32 | low) * _SECOND // ticks + interface.offset * _SECOND
        if not -_LAST <= time <= _LAST:
            raise ValueError("a time that is centuries away")
        return CapturedPacket(
            tap=interface.tap,
            time_ns=time,
            data=data,
            original_length=length,
            direction=_DIRECTIONS[flags & 3],
            flags=_RECEPTION.get(flags >> 2 & 7, PacketFlag.NONE),
            comment=comment,
        )

    def _simple(self, body: bytes) -> CapturedPacket:
        """It has no time."""
        length = struct.unpack_from(f"{self._order}I", body)[0]
        tap = self._interfaces[0].tap
        size = min(length, tap.snap_length or length)
        return CapturedPacket(tap=tap, time_ns=0, data=body[4 : 4 + size], original_length=length)

    def _names(self, body: bytes) -> None:
        at = 0
        while at + 4 <= len(body):
            kind, size = struct.unpack_from(f"{self._order}HH", body, at)
            value = body[at + 4 : at + 4 + size]
            at += 4 + (size + 3 & ~3)
            if kind == 0:
                break
            width = {1: 4, 2: 16}.get(kind)
            if width is None:
                continue
            raw = value[:width]
            found: IPAddress = IPv4Address(raw) if width == 4 else IPv6Address(raw)
            texts = value[width:].rstrip(b"\0").split(b"\0")
            self.names.setdefault(found, []).extend(map(_text, texts))

    def _statistics(self, body: bytes) -> None:
        number = struct.unpack_from(f"{self._order}I", body)[0]
        counts = {
            code: struct.unpack(f"{self._order}Q", value)[0]
            for code, value in self._options(body[12:])
            if code in (4, 5, 6, 7, 8)
        }
        self.statistics[self._interfaces[number].tap] = TapStatistics(
            received=counts.get(6, counts.get(4, 0)),
            dropped=counts.get(7, counts.get(5, 0)),
            packets=counts.get(8, 0),
        )

    def _options(self, raw: bytes) -> Iterator[tuple[int, bytes]]:
        at = 0
        while at + 4 <= len(raw):
            code, size = struct.unpack_from(f"{self._order}HH", raw, at)
            if code == 0:
                return
            yield code, raw[at + 4 : at + 4 + size]
            at += 4 + (size + 3 & ~3)


def _text(value: bytes) -> str:
    return value.decode(errors="replace")


def _tap_comment(value: bytes) -> dict[str, Any]:
    """What `PcapngWriter` told of a tap.  Raises `ValueError`."""
    try:
        told = json.loads(value)
    except RecursionError:
        raise ValueError("a comment nested too deep") from None
    if not isinstance(told, dict):
        raise ValueError("a tap's comment that tells nothing")
    return {key: one for key, one in told.items() if isinstance(one, str | int | dict)}


def _names(told: Any) -> dict[int, str]:
    """Interfaces by index, as `PcapngWriter` tells them."""
    if not isinstance(told, dict):
        return {}
    return {int(index): str(name) for index, name in told.items() if index.isdecimal()}
