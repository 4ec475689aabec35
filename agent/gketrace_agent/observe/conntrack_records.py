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

__all__ = ["RECORD_TYPE", "pack_batch", "pack_events", "pack_groups"]

_TYPES: Final = {"16s": "V16", "Q": "<u8", "I": "<u4", "H": "<u2", "B": "u1"}
RECORD_TYPE: Final = np.dtype([(name, _TYPES[code]) for name, code in FIELDS])
if RECORD_TYPE.itemsize != RECORD.size:
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
        if _fits(group):
            parts.append(_pack(group).tobytes())
        else:
            others.extend(group.entry(row) for row in range(len(group)))
    return b"".join(parts), others


def pack_events(
    batch: Batch, kinds: Array
) -> tuple[Array, Array, list[tuple[int, ConntrackEntry]]]:
    """Records of `RECORD_TYPE` and the kind of each, in the order in which they came; and the
    kinds and entries that a record has no room for."""
    fitting = [group for group in batch.groups if _fits(group)]
    others = Batch(batch.size, tuple(group for group in batch.groups if not _fits(group)))
    places = np.concatenate([np.empty(0, np.int64), *(group.at for group in fitting)])
    order = np.argsort(places)
    records = np.concatenate([np.empty(0, RECORD_TYPE), *map(_pack, fitting)])[order]
    rest = [(int(kinds[place]), entry) for place, entry in others.placed()]
    return records, kinds[places[order]], rest


def pack_groups(batch: Batch) -> list[Array]:
    """Records of `RECORD_TYPE` for each group, without what a record has no room for."""
    return [_pack(group) for group in batch.groups]


def _fits(group: Group) -> bool:
    """Whether a record holds all that these entries have."""
    counters = sum(name in group for name in _COUNTERS)
    if any(name in group for name in _BY_ITSELF) or counters not in (0, len(_COUNTERS)):
        return False
    return all(
        int(group.column(name).max()) < len(table)
        for name, table in _STATES.items()
        if name in group
    )


def _pack(group: Group) -> Array:
    counters = all(name in group for name in _COUNTERS)
    made = np.zeros(len(group), RECORD_TYPE)
    for name, table in _STATES.items():
        if name in group:
            made["state"] = table[np.minimum(group.column(name), len(table) - 1)]
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
