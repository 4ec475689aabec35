"""pcapng files, written block by block: a chunk of packets is laid out as a whole, with NumPy.

Source: draft-ietf-opsawg-pcapng: section 4.1 (SHB), 4.2 (IDB), 4.3 (EPB), 4.5 (NRB), 4.6 (ISB).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from gketrace.capture.packets import PacketFlag, Tap
from gketrace.packet import IPAddress
from gketrace.trace import NetnsKind
from gketrace_cli import __version__
from gketrace_cli.capture.batch import Array, PacketBatch
from gketrace_cli.capture.merge import Chunk
from gketrace_cli.capture.stream import TapStatistics

__all__ = ["TAP_COMMENT", "PcapngWriter", "tap_name"]

TAP_COMMENT: Final = "gketrace-tap: "
"""What an interface's comment begins with that has the tap as JSON, for reading it back."""

_SHB: Final = 0x0A0D0D0A
_IDB: Final = 1
_NRB: Final = 4
_ISB: Final = 5
_EPB: Final = 6
_BYTE_ORDER: Final = 0x1A2B3C4D
_COMMENT: Final = 1
_EPB_FLAGS: Final = 2
_NANOSECONDS: Final = b"\x09"
_HEAD: Final = 28
"""Bytes of an EPB before its data."""
_TAIL: Final = 16
"""Bytes after its data, and its comment: flags, end of options, length."""
_CLASS: Final = 32
"""Data is copied in multiples of so many bytes.  What is copied too much is less than the next
tail and head, which are written over it."""
_LONGEST: Final = 65_532
"""Bytes of an option's value."""
_LARGE: Final = 2048
"""Data from so many bytes on is copied packet by packet: the copying costs more than the step."""
_WIDE: Final = 512
"""Data up to so many bytes is copied all at one width where its order allows it."""
_STEP: Final = 1024
"""Packets that are copied at a time: what they take stays in the processor's cache."""

# epb_flags by PACKET_ value: inbound (1) or outbound (2); unicast, multicast, broadcast or
# promiscuous reception (1 to 4, shifted by 2).
_FLAGS: Final = np.array(
    [1 | 1 << 2, 1 | 3 << 2, 1 | 2 << 2, 1 | 4 << 2, 2, 1, 1, 1] + [0] * 248, np.uint32
)


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
        self.packets = 0
        options = [(_COMMENT, text.encode()) for text in comments]
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
        self._put(self._encode(chunk))
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

    # packets

    def _encode(self, chunk: Chunk) -> Array:
        """The chunk's blocks, one after the other."""
        batches = chunk.batches
        sizes = np.concatenate([batch.sizes + batch.head_size for batch in batches])
        comments = [_Comments(batch) for batch in batches]
        lengths = ((sizes + 3) & ~3) + np.concatenate([one.sizes for one in comments])
        lengths += _HEAD + _TAIL
        if chunk.order is None:
            ends = np.cumsum(lengths)
        else:
            ends = np.empty_like(lengths)
            ends[chunk.order] = np.cumsum(lengths[chunk.order])
        begins = ends - lengths
        total = int(lengths.sum())
        out = np.empty(total + _WIDE, np.uint8)
        at = 0
        places = [slice(at, at := at + len(batch)) for batch in batches]
        for batch, place in zip(batches, places, strict=True):
            data = begins[place] + (_HEAD + batch.head_size)
            _copy_data(batch, out, data, ascending=chunk.order is None)
        # Heads and tails last: they are written over what data was copied too much.
        for batch, place, comment in zip(batches, places, comments, strict=True):
            begin, length, size = begins[place], lengths[place], sizes[place]
            heads = np.empty((len(batch), _HEAD // 4), np.uint32)
            heads[:, 0] = _EPB
            heads[:, 1] = length
            heads[:, 2] = self._interfaces[batch.tap]
            heads[:, 3] = batch.times >> 32
            heads[:, 4] = batch.times & 0xFFFFFFFF
            heads[:, 5] = size
            heads[:, 6] = batch.lengths
            _scatter(out, begin, heads)
            if batch.heads is not None:
                _scatter(out, begin + _HEAD, batch.heads)
            _pad(out, begin + _HEAD, size)
            comment.put(out, begin + _HEAD + ((size + 3) & ~3))
            tails = np.empty((len(batch), _TAIL // 4), np.uint32)
            tails[:, 0] = 4 << 16 | _EPB_FLAGS
            tails[:, 1] = _epb_flags(batch)
            tails[:, 2] = 0
            tails[:, 3] = length
            _scatter(out, begin + length - _TAIL, tails)
        return out[:total]


class _Comments:
    """The comment options of a batch; most batches have none."""

    def __init__(self, batch: PacketBatch) -> None:
        self.sizes: Array = np.zeros(len(batch), np.int64)
        self._rows: dict[bytes, Array] = {}
        if batch.comments is None or not any(batch.comments):
            return
        texts = sorted(set(batch.comments) - {""})
        number = {text: place for place, text in enumerate(texts)}
        which = np.array([number.get(text, -1) for text in batch.comments])
        for place, text in enumerate(texts):
            option = _option(_COMMENT, text.encode())
            self._rows[option] = rows = np.flatnonzero(which == place)
            self.sizes[rows] = len(option)

    def put(self, out: Array, places: Array) -> None:
        for option, rows in self._rows.items():
            _windows(out, len(option))[places[rows]] = np.frombuffer(option, f"V{len(option)}")


def _windows(buffer: Array, size: int) -> Array:
    """`size` bytes from each byte on, as one element each: NumPy copies them as a whole."""
    count = max(len(buffer) - size + 1, 0)
    return np.ndarray((count,), f"V{size}", buffer.data, strides=(1,))


def _scatter(out: Array, places: Array, rows: Array) -> None:
    """Puts each of `rows` where its place says."""
    size = rows.shape[1] * rows.itemsize
    _windows(out, size)[places] = rows.view(f"V{size}")[:, 0]


def _copy_data(batch: PacketBatch, out: Array, places: Array, *, ascending: bool) -> None:
    """The packets' bytes.

    With `ascending` places: each packet is copied after the one before it in `out`, so what that
    one copied too much is written over, and one width does for all.  Otherwise all of about one
    size are copied together, see `_CLASS`.
    """
    source, starts, sizes = batch.buffer, batch.starts, batch.sizes
    width = (int(sizes.max(initial=0)) + _CLASS - 1) // _CLASS * _CLASS
    if not ascending or not 0 < width * len(sizes) <= 2 * int(sizes.sum()) or width > _WIDE:
        _copy_by_size(source, starts, sizes, out, places)
        return
    inside = starts + width <= len(source)
    last = np.flatnonzero(~inside)
    at, to = (starts, places) if not len(last) else (starts[inside], places[inside])
    sources, targets = _windows(source, width), _windows(out, width)
    for step in range(0, len(at), _STEP):
        targets[to[step : step + _STEP]] = sources[at[step : step + _STEP]]
    _copy_singly(source, starts, sizes, out, places, last)


def _copy_by_size(source: Array, starts: Array, sizes: Array, out: Array, places: Array) -> None:
    rounded = (sizes + _CLASS - 1) // _CLASS * _CLASS
    large = (rounded > _LARGE) | (starts + rounded > len(source))
    if large.any():
        _copy_singly(source, starts, sizes, out, places, np.flatnonzero(large))
        rounded[large] = 0
    present = np.flatnonzero(np.bincount(rounded // _CLASS)).tolist()
    for number in present:
        if not number:
            continue
        size = number * _CLASS
        if len(present) == 1:
            _windows(out, size)[places] = _windows(source, size)[starts]
        else:
            rows = np.flatnonzero(rounded == size)
            _windows(out, size)[places[rows]] = _windows(source, size)[starts[rows]]


def _copy_singly(
    source: Array, starts: Array, sizes: Array, out: Array, places: Array, rows: Array
) -> None:
    for row in rows.tolist():
        start, place, size = int(starts[row]), int(places[row]), int(sizes[row])
        out[place : place + size] = source[start : start + size]


def _pad(out: Array, data: Array, sizes: Array) -> None:
    """Zeros up to a multiple of 4 bytes, and into what follows, which is written later."""
    rows = np.flatnonzero(sizes & 3)
    if len(rows):
        _windows(out, 3)[data[rows] + sizes[rows]] = np.zeros(1, "V3")


def _epb_flags(batch: PacketBatch) -> Array:
    pkttypes = batch.pkttypes
    if pkttypes is not None:
        return _FLAGS[pkttypes]
    made = batch.directions.astype(np.uint32)  # 1 in, 2 out, 0 not known: as epb_flags has them
    flags = batch.flags
    for flag, kind in (
        (PacketFlag.MULTICAST, 2),
        (PacketFlag.BROADCAST, 3),
        (PacketFlag.NOT_FOR_US, 4),
    ):
        made[(flags & int(flag)) != 0] |= kind << 2
    return made


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
        (_COMMENT, (TAP_COMMENT + json.dumps(told, separators=(",", ":"))).encode()),
        (2, tap_name(tap).encode()),
        (3, "; ".join(filter(None, words)).encode()),
        (9, _NANOSECONDS),
    ]
    if tap.excluded:
        out = "; ".join(f"{text} ({why})" for text, why in tap.excluded)
        options.append((_COMMENT, f"not captured: {out}".encode()))
    octets = bytes(int(part, 16) for part in tap.hardware.split(":")) if tap.hardware else b""
    if len(octets) == 6:
        options.append((6, octets))
    if tap.filter:
        options.append((11, b"\0" + tap.filter.encode()))
    return struct.pack("<HHI", tap.link_type, 0, tap.snap_length) + _options(options)


def _timestamp(time_ns: int) -> bytes:
    return struct.pack("<II", time_ns >> 32, time_ns & 0xFFFFFFFF)


def _option(code: int, value: bytes) -> bytes:
    value = value[:_LONGEST]
    return struct.pack("<HH", code, len(value)) + _padded(value)


def _options(options: Sequence[tuple[int, bytes]]) -> bytes:
    return b"".join(_option(code, value) for code, value in options) + b"\0\0\0\0"


def _padded(value: bytes) -> bytes:
    return value + b"\0" * (-len(value) % 4)


def _block(kind: int, body: bytes) -> bytes:
    length = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + length + body + length
