"""Columns → the lines of ``conntrack -L``, many at once.

Each line is a row of 32-bit words: constant text, and four characters of a number, an address or a
state at a time, taken from tables.  What a row does not fill is NUL, and goes away when the rows
are joined.  `gketrace.conntrack_text.render_entry` says what a line is; it prints the few entries
that have what is not a number (a helper, a security context).
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv6Address
from typing import Final

import numpy as np

from gketrace.conntrack import CtStatus
from gketrace.conntrack_text import PROTOCOL_NAMES, address_text, render_entry, state_text
from gketrace.packet import PORT_PROTOCOLS, Protocol
from gketrace_agent.kernel.conntrack_columns import Array, Batch, Group
from gketrace_agent.kernel.conntrack_layout import STATES

__all__ = ["PREFIXES", "render_batch"]

_IPV6_TEXT: Final = 48
"""Bytes for INET6_ADDRSTRLEN, 46."""
_NANOSECONDS: Final = 1_000_000_000


def _table(texts: list[str], size: int) -> Array:
    """Texts → (texts, size / 4) words, NUL behind each text."""
    raw = b"".join(text.encode().ljust(size, b"\0") for text in texts)
    return np.frombuffer(raw, np.uint32).reshape(len(texts), size // 4)


_OCTETS: Final = _table([str(n) for n in range(256)], 4)[:, 0]
_OCTETS_DOT: Final = _table([f"{n}." for n in range(256)], 4)[:, 0]
_DIGITS: Final = _table(
    [str(n) for n in range(10_000)]
    + [f"{n:04}" for n in range(10_000)]
    + [""]
    + [str(n) for n in range(1, 10_000)],
    4,
)[:, 0]
"""Four digits: as the only ones; after others; before others, where 0 is nothing."""
_AFTER: Final = 10_000
_BEFORE: Final = 20_000
_STATES: Final[Mapping[str, Array]] = {
    name: _table([f"{state_text(state)} " for state in (*states, *["0"] * (256 - len(states)))], 20)
    for name, states in STATES.items()
}


PREFIXES: Final = ("", "    [NEW] ", " [UPDATE] ", "[DESTROY] ", "")
"""What conntrack(8) -E puts before a line, by `EventKind`; nothing before what was there."""
_PREFIXES: Final = _table(list(PREFIXES), 12)


class _Rows:
    """Lines being written, word by word."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._columns: list[Array | int] = []
        self._text = ""

    def text(self, text: str) -> None:
        """The same text in every line."""
        self._text += text

    def words(self, *columns: Array) -> None:
        """Four characters of each line for each column."""
        self._flush()
        self._columns += columns

    def where(self, which: Array, text: str) -> None:
        """Text in the lines for which `which` is true."""
        self.words(*(np.where(which, word, np.uint32(0)) for word in _words(text)))

    def number(self, values: Array) -> None:
        """A decimal number of any width."""
        top = int(values.max(initial=0))
        parts: list[Array] = []
        rest = values
        while top >= 10_000:
            high = rest // 10_000
            low = (rest - high * 10_000).astype(np.int64)
            # Without anything before it, the lowest part is the whole number.
            alone = 0 if not parts else _BEFORE
            parts.append(_DIGITS[np.where(high > 0, low + _AFTER, low + alone)])
            rest, top = high, top // 10_000
        parts.append(_DIGITS[rest.astype(np.int64) + (_BEFORE if parts else 0)])
        self.words(*reversed(parts))

    def matrix(self) -> Array:
        """(lines, words); `text` that is still waiting ends the lines."""
        self._flush()
        made = np.empty((self._count, len(self._columns)), np.uint32)
        for index, column in enumerate(self._columns):
            made[:, index] = column
        return made

    def _flush(self) -> None:
        self._columns += _words(self._text)
        self._text = ""


def _words(text: str) -> list[int]:
    raw = text.encode()
    raw += b"\0" * (-len(raw) % 4)
    return list(map(int, np.frombuffer(raw, np.uint32)))


def render_batch(batch: Batch, *, now: float, kinds: Array | None = None) -> bytes:
    """The lines of a batch, in the order in which its entries came; before each the name of its
    kind, where `kinds` (as in `gketrace_agent.kernel.conntrack_events.EventBatch`) is given."""
    parts: list[tuple[Group, Array]] = []
    for group in batch.groups:
        if "helper" in group or "secctx" in group or "stopped" in group:
            parts.append((group, _one_by_one(group, now, kinds)))
        else:
            parts.append((group, _render_group(group, now, kinds)))
    width = max((matrix.shape[1] for _, matrix in parts), default=0)
    lines = np.zeros((batch.size, width), np.uint32)
    for group, matrix in parts:
        lines[group.at, : matrix.shape[1]] = matrix
    # What ends with a blank ends with it in every line of its group: an event has no use.
    return lines.tobytes().translate(None, b"\0").replace(b" \n", b"\n")


def _one_by_one(group: Group, now: float, kinds: Array | None) -> Array:
    before = [""] * len(group) if kinds is None else [PREFIXES[k] for k in kinds[group.at]]
    lines = [
        (before[row] + render_entry(group.entry(row), now=now) + "\n").replace("\0", "")
        for row in range(len(group))
    ]
    size = max(len(line.encode()) for line in lines)
    return _table(lines, size + -size % 4)


def _render_group(group: Group, now: float, kinds: Array | None) -> Array:
    rows = _Rows(len(group))
    protocol = group.layout.protocol
    status = group.column("status") if "status" in group else np.zeros(len(group), np.uint32)
    if kinds is not None:
        named = _PREFIXES[kinds[group.at]]
        rows.words(*(named[:, index] for index in range(named.shape[1])))
    rows.text(f"{PROTOCOL_NAMES.get(protocol, 'unknown'):<8} {protocol} ")
    if "timeout" in group:
        rows.number(group.column("timeout"))
        rows.text(" ")
    for name, table in _STATES.items():
        if name in group:
            found = table[group.column(name)]
            # Most states of most tables are short.
            used = np.flatnonzero(found.any(axis=0))
            rows.words(*(found[:, index] for index in used))
    _half(rows, group, "orig")
    rows.where(status & CtStatus.SEEN_REPLY == 0, "[UNREPLIED] ")
    _half(rows, group, "reply")
    hardware = status & CtStatus.HW_OFFLOAD != 0
    offload = (status & CtStatus.OFFLOAD != 0) & ~hardware
    rows.where((status & CtStatus.ASSURED != 0) & ~hardware & ~offload, "[ASSURED] ")
    if hardware.any() or offload.any():
        rows.where(hardware, "[HW_OFFLOAD] ")
        rows.where(offload, "[OFFLOAD] ")
    for name in ("mark", "zone"):
        if name in group:
            rows.text(f"{name}=")
            rows.number(group.column(name))
            rows.text(" ")
    if "started" in group:
        rows.text("delta-time=")
        begun = group.column("started") // np.uint64(_NANOSECONDS)
        rows.number(np.uint64(int(now)) - begun)
        rows.text(" ")
    if "use" in group:
        rows.text("use=")
        rows.number(group.column("use"))
    rows.text("\n")
    return rows.matrix()


def _half(rows: _Rows, group: Group, half: str) -> None:
    protocol = group.layout.protocol
    for end in ("src", "dst"):
        rows.text(f"{end}=")
        _address(rows, group.octets(f"{half}_{end}"))
        rows.text(" ")
    if protocol in PORT_PROTOCOLS:
        _numbers(rows, group, half, ("sport", "sport"), ("dport", "dport"))
    elif protocol == Protocol.GRE:
        for text, name in (("srckey=", "sport"), ("dstkey=", "dport")):
            rows.text(text)
            _hexadecimal(rows, _column(group, f"{half}_{name}"))
            rows.text(" ")
    elif protocol in (Protocol.ICMP, Protocol.ICMPV6):
        _numbers(rows, group, half, ("type", "icmp_type"), ("code", "icmp_code"), ("id", "icmp_id"))
    if f"zone_{half}" in group:
        _numbers(rows, group, "zone", (f"zone-{half}", half))
    if f"{half}_packets" in group and f"{half}_bytes" in group:
        _numbers(rows, group, half, ("packets", "packets"), ("bytes", "bytes"))


def _numbers(rows: _Rows, group: Group, half: str, *pairs: tuple[str, str]) -> None:
    for text, name in pairs:
        rows.text(f"{text}=")
        rows.number(_column(group, f"{half}_{name}"))
        rows.text(" ")


def _column(group: Group, name: str) -> Array:
    return group.column(name) if name in group else np.zeros(len(group), np.uint32)


def _hexadecimal(rows: _Rows, values: Array) -> None:
    texts, which = np.unique(values, return_inverse=True)
    table = _table([f"{value:#x}" for value in texts.tolist()], 8)
    found = table[which]
    rows.words(found[:, 0], found[:, 1])


def _address(rows: _Rows, octets: Array) -> None:
    if octets.shape[1] == 4:
        first, second, third, last = (octets[:, index] for index in range(4))
        rows.words(_OCTETS_DOT[first], _OCTETS_DOT[second], _OCTETS_DOT[third], _OCTETS[last])
        return
    packed = np.ascontiguousarray(octets).view("V16").ravel()
    known: dict[bytes, int] = {}
    raw = packed.tolist()
    which = np.fromiter((known.setdefault(one, len(known)) for one in raw), np.int64, len(raw))
    table = _table([address_text(IPv6Address(one)) for one in known], _IPV6_TEXT)
    found = table[which]
    rows.words(*(found[:, index] for index in range(found.shape[1])))
