"""pcapng files, written block by block; packets' blocks are laid out in `packet_blocks`.

Source: draft-ietf-opsawg-pcapng: section 4.1 (SHB), 4.2 (IDB), 4.5 (NRB), 4.6 (ISB).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from gketrace.capture.packets import Tap
from gketrace.packet import IPAddress
from gketrace.trace import NetnsKind
from gketrace_cli import __version__
from gketrace_cli.capture.batch import Array
from gketrace_cli.capture.merge import Chunk
from gketrace_cli.capture.packet_blocks import COMMENT, PacketBlocks, option
from gketrace_cli.capture.stream import TapStatistics

__all__ = ["TAP_COMMENT", "PcapngWriter", "tap_name"]

TAP_COMMENT: Final = "gketrace-tap: "
"""What an interface's comment begins with that has the tap as JSON, for reading it back."""

_SHB: Final = 0x0A0D0D0A
_IDB: Final = 1
_NRB: Final = 4
_ISB: Final = 5
_BYTE_ORDER: Final = 0x1A2B3C4D
_NANOSECONDS: Final = b"\x09"


def tap_name(tap: Tap) -> str:
    """``NODE:eth0``, or ``NAMESPACE/POD:eth0``."""
    where = tap.pod or tap.node or "here"
    if tap.netns.kind is not NetnsKind.HOST and not tap.pod:
        where = f"{tap.node} netns {tap.netns.inode}"
    return f"{where}:{tap.interface}"


class PcapngWriter:
    """Writes to a file descriptor, which stays the caller's.  Raises `OSError`."""

    def __init__(self, fd: int, *, comments: Sequence[str] = ()) -> None:
        """`comments`: of the section."""
        self._fd = fd
        self._interfaces: dict[Tap, int] = {}
        self._blocks = PacketBlocks()
        self.packets = 0
        options = [(COMMENT, text.encode()) for text in comments]
        options += [(3, f"{os.uname().sysname} {os.uname().release}".encode())]
        options += [(4, f"gketrace {__version__}".encode())]
        body = struct.pack("<IHHq", _BYTE_ORDER, 1, 0, -1)
        self._put(_block(_SHB, body + _options(options)))

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Those that have an interface, in the order of their numbers."""
        return tuple(self._interfaces)

    def names(self, names: Mapping[IPAddress, Sequence[str]]) -> None:
        """Name resolution records."""
        records: list[bytes] = []
        for address, texts in names.items():
            value = address.packed + b"".join(text.encode() + b"\0" for text in texts)
            records.append(struct.pack("<HH", 1 if address.version == 4 else 2, len(value)))
            records.append(_padded(value))
        if records:
            self._put(_block(_NRB, b"".join(records) + b"\0\0\0\0"))

    def interface(self, tap: Tap) -> int:
        """The tap's number; its block is written when it is new."""
        number = self._interfaces.get(tap)
        if number is None:
            number = self._interfaces[tap] = len(self._interfaces)
            self._put(_block(_IDB, _interface(tap)))
        return number

    def write(self, chunk: Chunk) -> None:
        """All packets of it."""
        if not len(chunk):
            return
        for batch in chunk.batches:
            self.interface(batch.tap)
        for piece in self._blocks.of(chunk, self._interfaces):
            self._put(piece)
        self.packets += len(chunk)

    def statistics(self, tap: Tap, numbers: TapStatistics, start_ns: int, end_ns: int) -> None:
        """Of one interface; to be written when its packets are."""
        body = struct.pack("<I", self.interface(tap)) + _timestamp(end_ns)
        options = [
            (2, _timestamp(start_ns)),
            (3, _timestamp(end_ns)),
            *(
                (code, struct.pack("<Q", value))
                for code, value in (
                    (4, numbers.received),
                    (5, numbers.dropped),
                    (6, numbers.received),
                    (7, numbers.dropped),
                    (8, numbers.packets),
                )
            ),
        ]
        self._put(_block(_ISB, body + _options(options)))

    def _put(self, data: bytes | Array) -> None:
        view = memoryview(data).cast("B") if isinstance(data, bytes) else data.data
        while view:
            view = view[os.write(self._fd, view) :]


# other blocks


def _interface(tap: Tap) -> bytes:
    """The body of its IDB."""
    told = {
        "node": tap.node,
        "netns": tap.netns.kind.value,
        "inode": tap.netns.inode,
        "pod": tap.pod,
        "interface": tap.interface,
        "ifindex": tap.ifindex,
        "mtu": tap.mtu,
        "description": tap.description,
        **({"interfaces": dict(tap.interfaces)} if tap.interfaces else {}),
    }
    words = [f"{tap.netns} on node {tap.node}" if tap.node else str(tap.netns), tap.description]
    options = [
        (COMMENT, (TAP_COMMENT + json.dumps(told, separators=(",", ":"))).encode()),
        (2, tap_name(tap).encode()),
        (3, "; ".join(filter(None, words)).encode()),
        (9, _NANOSECONDS),
    ]
    if tap.excluded:
        out = "; ".join(f"{text} ({why})" for text, why in tap.excluded)
        options.append((COMMENT, f"not captured: {out}".encode()))
    octets = bytes(int(part, 16) for part in tap.hardware.split(":")) if tap.hardware else b""
    if len(octets) == 6:
        options.append((6, octets))
    if tap.filter:
        options.append((11, b"\0" + tap.filter.encode()))
    return struct.pack("<HHI", tap.link_type, 0, tap.snap_length) + _options(options)


def _timestamp(time_ns: int) -> bytes:
    return struct.pack("<II", time_ns >> 32, time_ns & 0xFFFFFFFF)


def _options(options: Sequence[tuple[int, bytes]]) -> bytes:
    return b"".join(option(code, value) for code, value in options) + b"\0\0\0\0"


def _padded(value: bytes) -> bytes:
    return value + b"\0" * (-len(value) % 4)


def _block(kind: int, body: bytes) -> bytes:
    length = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + length + body + length
