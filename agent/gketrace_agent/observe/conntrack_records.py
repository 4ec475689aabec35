"""Columns → the records of `gketrace.conntrack_records`."""

from __future__ import annotations

from typing import Final

import numpy as np

from gketrace.conntrack import ConntrackEntry
from gketrace.conntrack_records import (
    FIELDS,
    HAS_COUNTERS,
    HAS_ID,
    HAS_MARK,
    HAS_STARTED,
    HAS_TIMEOUT,
    HAS_USE,
    RECORD,
    STATE_NAMES,
)
from gketrace_agent.kernel.conntrack_columns import Array, Batch, Group
from gketrace_agent.kernel.conntrack_layout import STATES

__all__ = ["pack_batch"]

_TYPES: Final = {"16s": "V16", "Q": "<u8", "I": "<u4", "H": "<u2", "B": "u1"}
_DTYPE: Final = np.dtype([(name, _TYPES[code]) for name, code in FIELDS])
if _DTYPE.itemsize != RECORD.size:
    raise AssertionError("a record's size")
_BITS: Final = (
    ("timeout", HAS_TIMEOUT),
    ("mark", HAS_MARK),
    ("id", HAS_ID),
    ("use", HAS_USE),
    ("started", HAS_STARTED),
)
_COUNTERS: Final = ("orig_packets", "orig_bytes", "reply_packets", "reply_bytes")
_BY_ITSELF: Final = ("helper", "secctx", "labels", "stopped")
_STATES: Final = {
    name: np.array([STATE_NAMES.index(state) for state in states], np.uint8)
    for name, states in STATES.items()
}


def pack_batch(batch: Batch) -> tuple[bytes, list[ConntrackEntry]]:
    """Records, in no order that matters, and the entries that a record has no room for."""
    parts: list[bytes] = []
    others: list[ConntrackEntry] = []
    for group in batch.groups:
        packed = _pack(group)
        if packed is None:
            others.extend(group.entry(row) for row in range(len(group)))
        else:
            parts.append(packed.tobytes())
    return b"".join(parts), others


def _pack(group: Group) -> Array | None:
    """None: these entries have more than a record holds."""
    counters = sum(name in group for name in _COUNTERS)
    if any(name in group for name in _BY_ITSELF) or counters not in (0, len(_COUNTERS)):
        return None
    made = np.zeros(len(group), _DTYPE)
    for name, table in _STATES.items():
        if name in group:
            states = group.column(name)
            if int(states.max()) >= len(table):
                return None
            made["state"] = table[states]
    for half in ("orig", "reply"):
        for end in ("src", "dst"):
            octets = group.octets(f"{half}_{end}")
            wide = np.zeros((len(group), 16), np.uint8)
            wide[:, : octets.shape[1]] = octets
            made[f"{half}_{end}"] = wide.view("V16").ravel()
        for name in ("sport", "dport", "icmp_type", "icmp_code"):
            if f"{half}_{name}" in group:
                made[f"{half}_{name}"] = group.column(f"{half}_{name}")
        if f"{half}_icmp_id" in group:
            made[f"{half}_sport"] = group.column(f"{half}_icmp_id")
    for name in (*_COUNTERS, *(name for name, _ in _BITS), "status", "zone"):
        if name in group:
            made[name] = group.column(name)
    for name in ("zone_orig", "zone_reply"):
        if name in group:
            made[name] = group.column(name)
    made["has"] = sum(bit for name, bit in _BITS if name in group) | (
        HAS_COUNTERS if counters else 0
    )
    made["family"] = group.layout.family
    made["protocol"] = group.layout.protocol
    return made
