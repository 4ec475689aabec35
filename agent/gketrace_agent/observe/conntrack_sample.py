"""One reading of a whole connection-tracking table, summed up for metrics.

It keeps sums, not entries: its memory is bounded by how many different destinations it counts.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final

import numpy as np

from gketrace.conntrack import CtStatus
from gketrace.conntrack_text import PROTOCOL_NAMES
from gketrace.packet import protocol_name
from gketrace_agent.kernel.conntrack_columns import Array, Group
from gketrace_agent.kernel.conntrack_layout import STATES
from gketrace_agent.observe.conntrack_filter import ConntrackFilters
from gketrace_agent.observe.conntrack_names import Destination
from gketrace_agent.observe.conntrack_table import ConntrackTable

__all__ = ["Sample", "take_sample"]

_KEPT: Final = 20_000
"""Destinations that are counted at a time; of more, those with the fewest entries are given up."""


@dataclass(slots=True)
class Sample:
    """Sums over one table."""

    states: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(protocol, state or "") → entries."""
    unreplied: Counter[str] = field(default_factory=Counter)
    translated: Counter[Destination] = field(default_factory=Counter)
    """Original destination → entries whose destination was translated: Services' entries."""
    snat: Counter[Destination] = field(default_factory=Counter)
    """Where to → entries whose source was translated: each takes a source port of the node."""
    given_up: int = 0
    """Entries of destinations beyond those that are counted."""
    read: int = 0
    finished: bool = False
    """False: it ran out of time, and the sums are of a part of the table."""
    consistent: bool = True
    at: float = 0.0
    """Seconds since the epoch, when it began."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of the thread that read."""


def take_sample(table: ConntrackTable, *, time_limit: float) -> Sample:
    """Reads the table, for `time_limit` seconds at most."""
    sample = Sample(at=time.time())
    begun, cpu = time.monotonic(), time.thread_time()
    reading = table.read(ConntrackFilters())
    for batch in reading.batches():
        for group in batch.groups:
            _add(sample, group)
        for counted in (sample.translated, sample.snat):
            _bound(sample, counted)
        if time.monotonic() - begun > time_limit:
            break
    else:
        sample.finished = True
    sample.read, sample.consistent = reading.read, reading.consistent
    sample.seconds = time.monotonic() - begun
    sample.cpu_seconds = time.thread_time() - cpu
    return sample


def _add(sample: Sample, group: Group) -> None:
    # As few names as series: what has no name is one.
    number = group.layout.protocol
    protocol = protocol_name(number) if number in PROTOCOL_NAMES else "other"
    status = group.column("status") if "status" in group else np.zeros(len(group), np.uint32)
    sample.unreplied[protocol] += int((status & CtStatus.SEEN_REPLY == 0).sum())
    for name, states in STATES.items():
        if name in group:
            counts = np.bincount(group.column(name))
            for value, count in enumerate(counts.tolist()):
                if count:
                    state = states[value] if value < len(states) else "other"
                    sample.states[protocol, state] += count
            break
    else:
        sample.states[protocol, ""] += len(group)
    for bit, counted, end, port in (
        (CtStatus.DST_NAT, sample.translated, "orig_dst", "orig_dport"),
        (CtStatus.SRC_NAT, sample.snat, "reply_src", "reply_sport"),
    ):
        which = status & bit != 0
        if port in group and which.any():
            _count(counted, group.take(which), end, port, protocol)


def _count(counted: Counter[Destination], group: Group, end: str, port: str, protocol: str) -> None:
    octets = group.octets(end)
    size = octets.shape[1]
    keys = np.empty((len(group), size + 2), np.uint8)
    keys[:, :size] = octets
    keys[:, size:] = group.column(port).astype(">u2").view(np.uint8).reshape(-1, 2)
    found, counts = _unique(keys)
    for raw, count in zip(found, counts, strict=True):
        address = str(ip_address(raw[:size]))
        counted[address, int.from_bytes(raw[size:], "big"), protocol] += count


def _unique(keys: Array) -> tuple[list[bytes], list[int]]:
    """Rows of bytes, each once, and how often each was there."""
    wide = np.zeros((len(keys), 8 if keys.shape[1] <= 8 else 24), np.uint8)
    wide[:, : keys.shape[1]] = keys
    words = wide.view(np.uint64)
    if words.shape[1] == 1:
        found, counts = np.unique(words[:, 0], return_counts=True)
        rows = found[:, None]
    else:
        rows, counts = np.unique(words, axis=0, return_counts=True)
    raw = np.ascontiguousarray(rows).view(np.uint8)[:, : keys.shape[1]]
    return [row.tobytes() for row in raw], counts.tolist()


def _bound(sample: Sample, counted: Counter[Destination]) -> None:
    if len(counted) > 2 * _KEPT:
        kept = dict(counted.most_common(_KEPT))
        sample.given_up += sum(counted.values()) - sum(kept.values())
        counted.clear()
        counted.update(kept)
