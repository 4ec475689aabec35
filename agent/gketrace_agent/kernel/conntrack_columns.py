"""A datagram's worth and more of connection-tracking messages, decoded together as NumPy columns.

Messages of one layout (`gketrace_agent.kernel.conntrack_layout`) are rows of one array; a field is
a strided view into it.  What a layout is costs once; what a message costs is a few array
operations shared with thousands of others: 262,144 entries in about a quarter of the time that the
kernel takes to send them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from gketrace.conntrack import ConntrackEntry
from gketrace.errors import UnavailableError
from gketrace_agent.kernel.conntrack_layout import Layout, entry_of, layout_of

__all__ = ["Array", "Batch", "Group", "Layouts", "frame"]

Array: TypeAlias = npt.NDArray[Any]
_KEY: Final = (
    "orig_src",
    "orig_dst",
    "orig_proto",
    "orig_sport",
    "orig_dport",
    "orig_icmp_id",
    "orig_icmp_type",
    "orig_icmp_code",
    "zone",
    "zone_orig",
)
"""What no two entries of a table have in common."""
_MULTIPLIERS: Final = np.random.default_rng(0x67_6B_65).integers(
    1, 1 << 63, 64, dtype=np.uint64
) | np.uint64(1)


@dataclass(frozen=True, slots=True)
class Group:
    """Messages of one layout."""

    layout: Layout
    rows: Array
    """uint32, one message a row, headers included, in the byte order of the wire."""
    at: Array
    """Where in its batch each row was, ascending."""

    def __len__(self) -> int:
        return len(self.at)

    def __contains__(self, name: str) -> bool:
        return name in self.layout.fields

    def column(self, name: str) -> Array:
        """A number of each row, in the machine's byte order, of its own width."""
        field = self.layout.fields[name]
        view = np.ndarray(
            (len(self.rows),),
            f">u{field.size}",
            self.rows,
            field.offset,
            (self.rows.strides[0],),
        )
        return view.astype(f"=u{field.size}")

    def octets(self, name: str) -> Array:
        """An address of each row: (rows, 4 or 16) uint8."""
        field = self.layout.fields[name]
        return np.ndarray(
            (len(self.rows), field.size),
            np.uint8,
            self.rows,
            field.offset,
            (self.rows.strides[0], 1),
        )

    def entry(self, row: int) -> ConntrackEntry:
        """One row, decoded the long way."""
        return entry_of(self.rows[row].tobytes(), self.layout)

    def take(self, which: Array) -> Group:
        """The rows for which `which` (bool) is true."""
        return Group(self.layout, self.rows[which], self.at[which])

    def keys(self) -> Array:
        """A 64-bit number of each row that is the same for the same original tuple and zone.

        Two different connections of a table share one with a probability of n²/2⁶⁵: 2 in a
        thousand million for a table of 262,144.
        """
        total = np.full(len(self.rows), self.layout.family, np.uint64)
        salt = 0
        for name in _KEY:
            field = self.layout.fields.get(name)
            if field is None:
                salt += 4
                continue
            if field.size < 4:
                words = self.column(name).astype(np.uint64)[:, None]
            else:
                words = self.rows[:, field.offset // 4 : (field.offset + field.size) // 4].astype(
                    np.uint64
                )
            for index in range(words.shape[1]):
                total += words[:, index]
                total *= _MULTIPLIERS[(salt + index) % 64]
                total ^= total >> np.uint64(29)
            salt += 4
        return total


@dataclass(frozen=True, slots=True)
class Batch:
    """What one reading of the socket brought."""

    size: int
    """Messages that were read, those that a filter took away included: `Group.at` is below it."""
    groups: tuple[Group, ...]

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def placed(self) -> Iterator[tuple[int, ConntrackEntry]]:
        """Where each entry was, and the entry, in the order in which they came."""
        order = sorted(
            (place, group, row)
            for group, one in enumerate(self.groups)
            for row, place in enumerate(one.at.tolist())
        )
        for place, group, row in order:
            yield place, self.groups[group].entry(row)

    def entries(self) -> Iterator[ConntrackEntry]:
        """All entries, in the order in which they came."""
        return (entry for _, entry in self.placed())


def frame(words: Array, sequence: int) -> Array | None:
    """Where each message starts, in words; None when that cannot be told by the sequence number.

    Finds every word that is `sequence` at once, and keeps the answer only when each message ends
    where the next one begins: then it is what walking from message to message finds.
    """
    starts = np.flatnonzero(words == np.uint32(sequence)) - 2
    if not len(starts) or starts[0] != 0:
        return None
    ends = starts + ((words[starts] + 3) >> 2).astype(np.int64)
    if ends[-1] != len(words) or not np.array_equal(ends[:-1], starts[1:]):
        return None
    return starts


class Layouts:
    """Knows the layouts that have been met.  One for each dump; not for several threads."""

    def __init__(self) -> None:
        self._by_length: dict[int, list[tuple[Layout, Array, Array]]] = {}

    def batch(self, words: Array, starts: Array) -> Batch:
        """The messages that begin at `starts` (in words) of `words`, grouped.

        Raises `UnavailableError` for what is no message of connection tracking.
        """
        lengths = words[starts].astype(np.int64)
        if len(starts) and int((starts + ((lengths + 3) >> 2)).max()) > len(words):
            raise UnavailableError("conntrack: a message is longer than its datagram")
        groups: list[Group] = []
        for length in np.unique(lengths).tolist():
            at = np.flatnonzero(lengths == length)
            size = (length + 3) >> 2
            rows = words[starts[at][:, None] + np.arange(size)]
            self._split(length, rows, at, groups)
        return Batch(len(starts), tuple(groups))

    def _split(self, length: int, rows: Array, at: Array, groups: list[Group]) -> None:
        """Parts rows of one length by layout."""
        known = self._by_length.setdefault(length, [])
        for layout, places, values in known:
            if not len(at):
                return
            same = (rows[:, places] == values).all(axis=1)
            if same.all():
                groups.append(Group(layout, rows, at))
                return
            if same.any():
                groups.append(Group(layout, rows[same], at[same]))
                rows, at = rows[~same], at[~same]
        while len(at):
            try:
                layout = layout_of(rows[0].tobytes()[:length])
            except ValueError as error:
                raise UnavailableError(
                    f"conntrack: the kernel's answer is not understood: {error}"
                ) from None
            places = np.array([offset // 4 for offset in layout.signature])
            values = rows[0, places]
            known.append((layout, places, values))
            same = (rows[:, places] == values).all(axis=1)
            groups.append(Group(layout, rows[same], at[same]))
            rows, at = rows[~same], at[~same]
