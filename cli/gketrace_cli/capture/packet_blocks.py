"""Packets as pcapng's enhanced packet blocks, laid out with NumPy for many packets at a time.

What comes between the data of two packets, the tail of one block and the head of the next, has one
size: it is put there as one.  Pieces are small enough to stay in the processor's cache until they
are written.

Source: draft-ietf-opsawg-pcapng: section 4.3 (EPB).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from gketrace.capture.packets import PacketFlag, Tap
from gketrace_cli.capture.batch import Array, PacketBatch
from gketrace_cli.capture.merge import Chunk

__all__ = ["COMMENT", "PacketBlocks", "option"]

COMMENT: Final = 1
"""opt_comment."""
_EPB: Final = 6
_EPB_FLAGS: Final = 2
_LONGEST: Final = 65_532
"""Bytes of an option's value."""
_HEAD: Final = 28
"""Bytes of an EPB before its data."""
_TAIL: Final = 16
"""Bytes after its data, and its comment: flags, end of options, length."""
_WORDS: Final = (_TAIL + _HEAD) // 4
# Of a row of so many words: a tail, and the head of the next block.
_FLAGS_WORD: Final = 1
_LAST_WORD: Final = 3
_LENGTH_WORD: Final = 5
_NUMBER_WORD: Final = 6
_HIGH_WORD: Final = 7
_LOW_WORD: Final = 8
_CAPTURED_WORD: Final = 9
_ORIGINAL_WORD: Final = 10
_ROW: Final = np.array([4 << 16 | _EPB_FLAGS, 0, 0, 0, _EPB, 0, 0, 0, 0, 0, 0], np.uint32)
_PIECE: Final = 640 << 10
"""Bytes that are laid out at a time, if one packet is not more."""
_MERGED: Final = 8 << 20
"""The same for packets of several batches, which cost more to tell apart than caches save."""
_CLASS: Final = 32
"""Data is copied in multiples of so many bytes.  What is copied too much is less than the next
tail and head, which are written over it."""
_LARGE: Final = 2048
"""Data from so many bytes on is copied packet by packet: the copying costs more than the step."""
_WIDE: Final = 512
"""Data up to so many bytes is copied all at one width where its order allows it."""
_STEP: Final = 1024
"""Packets that are copied at a time: what they take stays in the processor's cache."""

_REST: Final = np.array([0, 0xFF, 0xFFFF, 0xFFFFFF], np.uint32)
"""What of a word is data, by bytes."""

# epb_flags by PACKET_ value: inbound (1) or outbound (2); unicast, multicast, broadcast or
# promiscuous reception (1 to 4, shifted by 2).
_FLAGS: Final = np.array(
    [1 | 1 << 2, 1 | 3 << 2, 1 | 2 << 2, 1 | 4 << 2, 2, 1, 1, 1] + [0] * 248, np.uint32
)


def option(code: int, value: bytes) -> bytes:
    value = value[:_LONGEST]
    return struct.pack("<HH", code, len(value)) + value + b"\0" * (-len(value) % 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """One element for each packet of a chunk, batch after batch."""

    sizes: Array
    """int64; captured bytes."""
    lengths: Array
    """int64; of the blocks."""
    times: Array
    original: Array
    flags: Array
    numbers: Array | int
    """Of the interfaces."""
    comments: tuple[_Comments, ...]
    """Of each batch."""


class PacketBlocks:
    """Lays out chunk after chunk in the same memory."""

    def __init__(self) -> None:
        self._room: Array = np.empty(0, np.uint8)
        self._rows: Array = np.empty((0, _WORDS), np.uint32)

    def of(self, chunk: Chunk, numbers: Mapping[Tap, int]) -> Iterator[Array]:
        """The chunk's blocks in pieces, uint8; each is valid until the next one is asked for.

        `numbers`: of the taps' interfaces.
        """
        if chunk.order is None and len(chunk.batches) > 1:
            for batch in chunk.batches:
                yield from self.of(Chunk(batches=(batch,)), numbers)
            return
        columns = _columns(chunk, numbers)
        order = chunk.order
        ends = np.cumsum(columns.lengths if order is None else columns.lengths[order])
        most = _PIECE if order is None else _MERGED
        first = begin = 0
        while first < len(ends):
            end = max(int(np.searchsorted(ends, begin + most, side="right")), first + 1)
            edges = np.zeros(end - first + 1, np.int64)
            np.subtract(ends[first:end], begin, out=edges[1:])
            yield self._piece(chunk, columns, first, end, edges)
            first, begin = end, int(ends[end - 1])

    def _piece(self, chunk: Chunk, columns: _Columns, first: int, end: int, edges: Array) -> Array:
        """The blocks of the packets from `first` to before `end`, in the chunk's order.

        `edges`: where each block begins in the piece, and where the last one ends.
        """
        which = slice(first, end) if chunk.order is None else chunk.order[first:end]
        sizes, lengths = columns.sizes[which], columns.lengths[which]
        total = int(edges[-1])
        # A tail comes before the first block, and a head after the last one, that nobody reads.
        out = self._memory(_TAIL + total + _HEAD + _WIDE)
        data = edges[:-1] + (_TAIL + _HEAD)
        parts = _parts(chunk, which)
        for part in parts:
            _copy_data(part, out, data)
        _pad(out, data, sizes)
        _scatter(out, edges, self._between(columns, which, sizes, lengths))
        for part, comment in zip(parts, columns.comments, strict=True):
            if part.batch.heads is not None:
                _scatter(out, data[part.rows], part.batch.heads[part.mine])
            if comment.options:
                comment.put(part.mine, out, (data + ((sizes + 3) & ~3))[part.rows])
        return out[_TAIL : _TAIL + total]

    def _between(
        self, columns: _Columns, which: Array | slice, sizes: Array, lengths: Array
    ) -> Array:
        """What comes before each packet's data, and after the last one's."""
        count = len(sizes) + 1
        if count > len(self._rows):
            self._rows = np.tile(_ROW, (count * 5 // 4, 1))
        rows = self._rows[:count]
        tails, heads = rows[1:], rows[:-1]
        tails[:, _FLAGS_WORD] = columns.flags[which]
        tails[:, _LAST_WORD] = lengths
        heads[:, _LENGTH_WORD] = lengths
        numbers = columns.numbers
        heads[:, _NUMBER_WORD] = numbers if isinstance(numbers, int) else numbers[which]
        halves = columns.times[which].view(np.uint32).reshape(-1, 2)
        heads[:, _HIGH_WORD] = halves[:, 1]
        heads[:, _LOW_WORD] = halves[:, 0]
        heads[:, _CAPTURED_WORD] = sizes
        heads[:, _ORIGINAL_WORD] = columns.original[which]
        return rows

    def _memory(self, size: int) -> Array:
        if size > len(self._room):
            self._room = np.empty((size + 3) & ~3, np.uint8)
        return self._room


def _columns(chunk: Chunk, numbers: Mapping[Tap, int]) -> _Columns:
    batches = chunk.batches
    comments = tuple(_Comments(batch) for batch in batches)
    sizes = _joined([one.sizes + one.head_size if one.head_size else one.sizes for one in batches])
    lengths = sizes + (3 + _HEAD + _TAIL)
    lengths &= ~3
    if any(one.options for one in comments):
        lengths += np.concatenate([one.sizes for one in comments])
    own = [numbers[batch.tap] for batch in batches]
    return _Columns(
        sizes=sizes,
        lengths=lengths,
        times=_joined([batch.times for batch in batches]),
        original=_joined([batch.lengths for batch in batches]),
        flags=_joined([_epb_flags(batch) for batch in batches]),
        numbers=own[0] if len(own) == 1 else np.repeat(own, [len(one) for one in batches]),
        comments=comments,
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """What a piece has of one batch."""

    batch: PacketBatch
    mine: Array | slice
    """Which of its packets, in their order."""
    rows: Array | slice
    """Where they are in the piece; a slice: the piece has no others."""


def _parts(chunk: Chunk, which: Array | slice) -> list[_Part]:
    if isinstance(which, slice):
        return [_Part(chunk.batches[0], which, slice(None))]
    parts: list[_Part] = []
    begin = 0
    if len(which) == len(chunk):
        places = np.empty_like(which)
        places[which] = np.arange(len(which))
        for batch in chunk.batches:
            end = begin + len(batch)
            parts.append(_Part(batch, slice(None), places[begin:end]))
            begin = end
        return parts
    for batch in chunk.batches:
        end = begin + len(batch)
        rows = np.flatnonzero((which >= begin) & (which < end))
        parts.append(_Part(batch, which[rows] - begin, rows))
        begin = end
    return parts


def _joined(parts: list[Array]) -> Array:
    return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)


class _Comments:
    """The comment options of a batch; most batches have none."""

    def __init__(self, batch: PacketBatch) -> None:
        self._count = len(batch)
        self.options: list[bytes] = []
        if batch.comments is None or not any(batch.comments):
            return
        texts = sorted(set(batch.comments) - {""})
        number = {text: place for place, text in enumerate(texts)}
        self.options = [option(COMMENT, text.encode()) for text in texts]
        self._which = np.array([number.get(text, -1) for text in batch.comments])
        """Of `options`; -1: none."""

    @property
    def sizes(self) -> Array:
        """Bytes before each packet's tail."""
        if not self.options:
            return np.zeros(self._count, np.int64)
        lengths: Array = np.array([*map(len, self.options), 0])
        return lengths.take(self._which)

    def put(self, mine: Array | slice, out: Array, places: Array) -> None:
        """Those of some packets."""
        which = self._which[mine]
        for place in np.unique(which[which >= 0]).tolist():
            made = self.options[place]
            rows = np.flatnonzero(which == place)
            _windows(out, len(made))[places[rows]] = np.frombuffer(made, f"V{len(made)}")


def _windows(buffer: Array, size: int) -> Array:
    """`size` bytes from each byte on, as one element each: NumPy copies them as a whole."""
    count = max(len(buffer) - size + 1, 0)
    return np.ndarray((count,), f"V{size}", buffer.data, strides=(1,))


def _scatter(out: Array, places: Array, rows: Array) -> None:
    """Puts each of `rows` where its place says."""
    size = rows.shape[1] * rows.itemsize
    _windows(out, size)[places] = rows.view(f"V{size}")[:, 0]


def _copy_data(part: _Part, out: Array, data: Array) -> None:
    """The packets' bytes, to where `data` says for each packet of the piece.

    When all of the piece is of one batch, each packet is copied after the one before it in `out`:
    what that one copied too much is written over, and one width does for all.  Otherwise all of
    about one size are copied together, see `_CLASS`.
    """
    batch = part.batch
    source, starts, sizes = batch.buffer, batch.starts[part.mine], batch.sizes[part.mine]
    places = data[part.rows] + batch.head_size if batch.head_size else data[part.rows]
    width = (int(sizes.max(initial=0)) + _CLASS - 1) // _CLASS * _CLASS
    whole = isinstance(part.rows, slice)
    if not whole or not 0 < width * len(sizes) <= 2 * int(sizes.sum()) or width > _WIDE:
        _copy_by_size(source, starts, sizes, out, places)
        return
    at, to = starts, places
    last = np.zeros(0, np.int64)
    if int(starts.max()) + width > len(source):
        inside = starts + width <= len(source)
        last = np.flatnonzero(~inside)
        at, to = starts[inside], places[inside]
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
    """Zeros up to a multiple of 4 bytes."""
    # By the lowest byte of each: what is smaller is done sooner.
    rows = np.flatnonzero((sizes.view(np.uint8)[:: sizes.itemsize] & 3) != 0)
    if len(rows):
        # Data begins at multiples of 4: the last word is masked.
        sizes = sizes[rows]
        words = out.view("<u4")
        words[(data[rows] + sizes) >> 2] &= _REST[sizes & 3]


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
