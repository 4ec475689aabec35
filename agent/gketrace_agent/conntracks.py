"""The RPCs about connection tracking: lists in three forms, statistics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from gketrace_agent.kernel.conntrack_columns import Batch
from gketrace_agent.kernel.conntrack_dump import TableReading
from gketrace_agent.observe.conntrack_filter import ConntrackFilters
from gketrace_agent.observe.conntrack_lines import render_batch
from gketrace_agent.observe.conntrack_records import pack_batch
from gketrace_agent.observe.conntrack_table import ConntrackTable
from gketrace_proto import codec
from gketrace_proto.v1alpha1 import agent_pb2

__all__ = ["list_entries", "statistics"]

_CHUNK: Final = 500
"""ConntrackEntry messages in one reply: about 100 KiB."""


def list_entries(
    table: ConntrackTable,
    wanted: ConntrackFilters,
    form: int,
    limit: int,
) -> Iterator[agent_pb2.ListConntrackReply]:
    """The entries that `wanted` takes, at most `limit`, as messages, text or records (`form`, a
    ConntrackFormat); the last reply has the summary.

    What the caller alone knows of the summary (``tracked``, ``netns``) is left to it.
    """
    reading = table.read(wanted)
    sent, truncated = 0, False
    for batch in reading.batches():
        if sent + len(batch) > limit:
            batch, truncated = _first(batch, limit - sent), True
        sent += len(batch)
        yield from _replies(batch, form)
        if truncated:
            break
    yield agent_pb2.ListConntrackReply(
        summary=agent_pb2.ConntrackSummary(
            sent=sent,
            consistent=reading.consistent,
            lost=_lost(reading),
            truncated=truncated,
            accounting=table.settings.accounting,
            duplicates=reading.duplicates,
            readings=reading.readings,
            read=reading.read,
        )
    )


def _lost(reading: TableReading) -> int:
    """Dumps that the kernel broke off and that no later attempt made whole."""
    return 0 if reading.consistent else reading.failures


def _first(batch: Batch, count: int) -> Batch:
    """The first `count` entries of a batch."""
    places = sorted(place for group in batch.groups for place in group.at.tolist())
    end = places[count]
    cut = (group.take(group.at < end) for group in batch.groups)
    return Batch(batch.size, tuple(group for group in cut if len(group)))


def _replies(batch: Batch, form: int) -> Iterator[agent_pb2.ListConntrackReply]:
    if not batch.groups:
        return
    if form == agent_pb2.CONNTRACK_FORMAT_TEXT:
        yield agent_pb2.ListConntrackReply(text=render_batch(batch, now=time.time()))
        return
    if form == agent_pb2.CONNTRACK_FORMAT_RECORDS:
        records, others = pack_batch(batch)
        yield agent_pb2.ListConntrackReply(records=records, entries=map(codec.encode, others))
        return
    entries = list(batch.entries())
    for start in range(0, len(entries), _CHUNK):
        some = entries[start : start + _CHUNK]
        yield agent_pb2.ListConntrackReply(entries=map(codec.encode, some))


def statistics(table: ConntrackTable) -> agent_pb2.GetConntrackStatsReply:
    """All but ``tracked`` and ``netns``, which the caller knows."""
    size = table.size()
    return agent_pb2.GetConntrackStatsReply(
        entries=size.entries,
        limit=table.limit(),
        buckets=table.buckets(),
        cpus=[
            agent_pb2.ConntrackCpuStats(cpu=one.cpu, counters=one.counters)
            for one in table.statistics()
        ],
        accounting=table.settings.accounting,
        events=table.settings.events,
    )
