"""The RPCs about connection tracking: lists and follows in three forms, deletion, statistics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from typing import Final, cast

from gketrace.conntrack import ConntrackEntry
from gketrace.conntrack_records import entry_from_record, records_from_bytes
from gketrace.conntrack_text import render_entry
from gketrace.errors import UsageError
from gketrace_agent.calls import LOSSES
from gketrace_agent.kernel.conntrack_columns import Batch
from gketrace_agent.kernel.conntrack_dump import TableReading
from gketrace_agent.kernel.conntrack_events import EventKind
from gketrace_agent.log import logger
from gketrace_agent.observe.conntrack_filter import ConntrackFilters
from gketrace_agent.observe.conntrack_follow import Changes, Follower, Polled
from gketrace_agent.observe.conntrack_lines import PREFIXES, render_batch
from gketrace_agent.observe.conntrack_records import pack_batch, pack_events
from gketrace_agent.observe.conntrack_table import ConntrackTable
from gketrace_proto import codec
from gketrace_proto.v1alpha1 import agent_pb2

__all__ = ["asked_kinds", "delete_asked", "follow_entries", "list_entries", "statistics"]

_CHUNK: Final = 500
"""ConntrackEntry messages in one reply: about 100 KiB."""
_DELETED: Final = 20_000
"""Entries that one request may name."""
_POLLED: Final = 128
"""In FollowConntrackReply.kinds."""


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
    if not reading.consistent:
        LOSSES.add("conntrack_dumps", 1)
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
            at=time.time(),
            timestamps=table.settings.timestamps,
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
    # One at a time: all of a batch, as objects, are 20 MB.
    entries = map(codec.encode, batch.entries())
    while some := list(islice(entries, _CHUNK)):
        yield agent_pb2.ListConntrackReply(entries=some)


def asked_kinds(request: agent_pb2.FollowConntrackRequest) -> frozenset[EventKind]:
    """The kinds that a request names; all of them, when it names none."""
    asked = {
        EventKind.NEW: request.news,
        EventKind.UPDATE: request.updates,
        EventKind.DESTROY: request.destroys,
    }
    return frozenset(kind for kind, yes in asked.items() if yes) or frozenset(EventKind)


def follow_entries(
    follower: Follower, form: int, base: agent_pb2.FollowConntrackStatus
) -> Iterator[agent_pb2.FollowConntrackReply]:
    """What follows, for ever; `base` is what its caller knows of each status."""
    sent = told = 0
    heard = follower.heard
    for one in follower.changes():
        at = time.time()
        if one is None:
            LOSSES.add("conntrack_events", follower.lost - told)
            told = follower.lost
            status = agent_pb2.FollowConntrackStatus(
                at=follower.heard,
                sent=sent,
                overruns=follower.overruns,
                lost=follower.lost,
                resyncs=follower.resyncs,
                mode=follower.mode,
                reason=follower.reason,
            )
            status.MergeFrom(base)
            yield agent_pb2.FollowConntrackReply(status=status)
        elif isinstance(one, Polled):
            sent += len(one.records)
            reply = _polled(one, form)
            reply.at, reply.after = at, heard
            yield reply
        else:
            sent += len(one.batch)
            reply = _changed(one, form)
            reply.at, reply.after = at, heard
            yield reply
        heard = follower.heard


def _changed(one: Changes, form: int) -> agent_pb2.FollowConntrackReply:
    if form == agent_pb2.CONNTRACK_FORMAT_TEXT:
        text = render_batch(one.batch, now=time.time(), kinds=one.kinds)
        return agent_pb2.FollowConntrackReply(text=text)
    if form == agent_pb2.CONNTRACK_FORMAT_RECORDS:
        records, kinds, others = pack_events(one.batch, one.kinds)
        return agent_pb2.FollowConntrackReply(
            records=records.tobytes(),
            kinds=kinds.tobytes(),
            events=[_event(kind, entry) for kind, entry in others],
        )
    placed = one.batch.placed()
    events = [_event(int(one.kinds[place]), entry) for place, entry in placed]
    return agent_pb2.FollowConntrackReply(events=events)


def _polled(one: Polled, form: int) -> agent_pb2.FollowConntrackReply:
    records = one.records.tobytes()
    if form == agent_pb2.CONNTRACK_FORMAT_RECORDS:
        kinds = bytes((one.kind | _POLLED,)) * len(one.records)
        return agent_pb2.FollowConntrackReply(records=records, kinds=kinds)
    entries = map(entry_from_record, records_from_bytes(records))
    if form == agent_pb2.CONNTRACK_FORMAT_TEXT:
        now, prefix = time.time(), PREFIXES[one.kind]
        lines = (f"{prefix}{render_entry(entry, now=now)}\n" for entry in entries)
        return agent_pb2.FollowConntrackReply(text="".join(lines).encode())
    events = [_event(one.kind, entry, polled=True) for entry in entries]
    return agent_pb2.FollowConntrackReply(events=events)


def _event(kind: int, entry: ConntrackEntry, *, polled: bool = False) -> agent_pb2.ConntrackEvent:
    number = cast(agent_pb2.ConntrackEventKind.ValueType, kind)
    return agent_pb2.ConntrackEvent(kind=number, entry=codec.encode(entry), polled=polled)


def delete_asked(
    table: ConntrackTable, request: agent_pb2.DeleteConntrackRequest
) -> agent_pb2.DeleteConntrackReply:
    """Deletes the entries that a request names.

    Raises `UsageError` when it names none, too many, or one without an id.
    """
    entries = list(map(entry_from_record, records_from_bytes(request.records)))
    entries += (codec.decode(ConntrackEntry, one) for one in request.entries)
    if not entries:
        raise UsageError("the request names no entry: a table is never deleted as a whole")
    if len(entries) > _DELETED:
        raise UsageError(f"{len(entries)} entries in one request; at most {_DELETED} are deleted")
    if any(entry.id is None for entry in entries):
        raise UsageError("an entry without an id cannot be told from others")
    reply = agent_pb2.DeleteConntrackReply()
    told: dict[str, None] = {}
    for entry, done in zip(entries, table.delete(entries), strict=True):
        reply.outcomes.append(cast(agent_pb2.ConntrackDeletion.ValueType, int(done.outcome)))
        if done.error:
            told[done.error] = None
        fields = {"entry": str(entry), "outcome": done.outcome.name}
        logger.info("conntrack deletion", extra={"fields": fields})
    reply.errors.extend(told)
    return reply


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
