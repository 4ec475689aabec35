"""Rules that differ only in values: read once by their structure, then by their values alone.

A large set has hundreds of thousands of rules of a dozen shapes: the same expressions with other
addresses, ports, counters, comments and chains.  A `Template` is such a shape: which bytes of a
rule's attributes are values, what prints each, and that every other byte is as it was in the rule
that it was made from.  What the text says besides the values depends on those other bytes alone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

__all__ = ["Piece", "Pieces", "Template", "Value"]


class Value(NamedTuple):
    """Bytes `start` to `end` of a rule's attributes."""

    start: int
    end: int
    show: Callable[[bytes], object] | None
    """None: a big-endian number of 2 or 8 bytes.  May raise NotRendered."""


Piece: TypeAlias = str | Value
Pieces: TypeAlias = list[Piece]
_NUMBERS: Final = {2: "H", 8: "Q"}


class Template:
    """The shape of one rule.  `rest` is its text behind ``-A CHAIN``."""

    __slots__ = ("_counters", "_fixed", "_format", "_shown", "_unpack")

    def __init__(
        self,
        data: bytes,
        counters: tuple[Value, Value] | None,
        rest: Sequence[Piece],
        unseen: Sequence[Value] = (),
    ) -> None:
        """`counters`: packets and bytes; `unseen`: values that are not printed."""
        values = [piece for piece in rest if isinstance(piece, Value)]
        ordered = sorted({*values, *unseen, *(counters or ())}, key=lambda value: value.start)
        layout, at = ">", 0
        for value in ordered:
            kind = (
                f"{value.end - value.start}s" if value.show else _NUMBERS[value.end - value.start]
            )
            layout += f"{value.start - at}s{kind}"
            at = value.end
        layout += f"{len(data) - at}s"
        packed = struct.Struct(layout)
        self._unpack: Callable[[bytes], tuple[Any, ...]] = packed.unpack
        self._fixed = packed.unpack(data)[::2]
        place = {value.start: 2 * number + 1 for number, value in enumerate(ordered)}
        self._counters = counters and (place[counters[0].start], place[counters[1].start])
        self._shown = [(place[value.start], value.show) for value in values]
        self._format = "".join(
            piece.replace("%", "%%") if isinstance(piece, str) else "%s" for piece in rest
        )

    def line(self, data: bytes, chain: str) -> str | None:
        """The rule as iptables-nft-save -c prints it, for attributes of the same length; None for
        those of another shape."""
        found = self._unpack(data)
        if found[::2] != self._fixed:
            return None
        shown = tuple([show(found[at]) if show else found[at] for at, show in self._shown])
        counters = self._counters
        if counters is None:
            return f"[0:0] -A {chain}{self._format % shown}"
        return f"[{found[counters[0]]}:{found[counters[1]]}] -A {chain}{self._format % shown}"
