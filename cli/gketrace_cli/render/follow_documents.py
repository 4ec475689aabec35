"""Followed connections as documents for programs, and their summary: docs/schema/follow.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from gketrace.connections import Half
from gketrace.follow.entries import Sight
from gketrace.follow.joiner import Phase, Step
from gketrace.follow.outcome import Judgement
from gketrace.packet import Tuple5, protocol_name
from gketrace.trace import Citation, Missing
from gketrace_cli.follow.packets import SeenPackets
from gketrace_cli.follow.seen import packets_document
from gketrace_cli.follow.tally import Tally, percentiles
from gketrace_cli.follow.view import View
from gketrace_cli.render.documents import envelope, missing_document
from gketrace_cli.render.follow import end_text
from gketrace_cli.render.follow_summary import verdict

__all__ = ["alone_document", "connection_document", "step_document", "summary_document"]


def connection_document(view: View) -> dict[str, Any]:
    """What docs/schema/follow.json describes."""
    followed = view.followed
    connection, judgement = followed.connection, followed.judgement
    first, last = connection.first, connection.last
    source, target = connection.halves[0], followed.sights[0]
    answered = any(sight.replied for sight in followed.sights)
    return envelope(
        "FollowedConnection",
        {
            "number": followed.number,
            "phase": followed.phase.value,
            "outcome": judgement.outcome.value,
            "failed": judgement.failed,
            "because": judgement.because or None,
            "protocol": protocol_name(first.protocol),
            "client": end_text(first, source=True),
            "clientName": view.client or None,
            "door": end_text(first),
            "doorName": view.door or None,
            "endpoint": end_text(last),
            "endpointName": view.endpoint or None,
            "endpointNode": view.endpoint_node or None,
            "sourceSeen": end_text(last, source=True) if answered else None,
            "began": _stamp(followed.began),
            "ended": _stamp(followed.ended),
            "durationSeconds": None if view.duration is None else round(view.duration, 3),
            "traffic": _traffic(source, target),
            "died": _death_document(view),
            "remarks": list(view.remarks),
            "entries": [
                _entry(half, sight, rules)
                for half, sight, rules in zip(
                    connection.halves, followed.sights, view.rules, strict=True
                )
            ],
            "packets": None if view.packets is None else packets_document(view.packets),
        },
    )


def alone_document(
    seen: SeenPackets, judgement: Judgement, number: int, names: Callable[[Tuple5], tuple[str, str]]
) -> dict[str, Any]:
    """As `connection_document`, of one that only packets tell: it has no entries.  `names`: of
    its client and its front door."""
    connection = seen.connection
    client, door = names(connection.first)
    begin, end = connection.begin / 1e9, connection.end / 1e9
    packets = packets_document(seen)
    deaths = packets["deaths"]
    return envelope(
        "FollowedConnection",
        {
            "number": number,
            "phase": Phase.CLOSED.value,
            "outcome": judgement.outcome.value,
            "failed": True,
            "because": judgement.because,
            "protocol": protocol_name(connection.protocol),
            "client": end_text(connection.first, source=True),
            "clientName": client or None,
            "door": end_text(connection.first),
            "doorName": door or None,
            "endpoint": None,
            "endpointName": None,
            "endpointNode": None,
            "sourceSeen": None,
            "began": _stamp(begin),
            "ended": _stamp(end),
            "durationSeconds": round(end - begin, 3),
            "traffic": None,
            "died": {
                "lastSeen": deaths[0]["lastSeen"] if deaths else None,
                "notSeenOn": None,
                "walk": None,
            },
            "remarks": [],
            "entries": [],
            "packets": packets,
        },
    )


def _death_document(view: View) -> dict[str, Any] | None:
    judgement = view.followed.judgement
    if not judgement.failed:
        return None
    return {
        "lastSeen": str(judgement.last) if judgement.last is not None else None,
        "notSeenOn": judgement.next_node or None,
        "walk": view.death or None,
    }


def _entry(half: Half, sight: Sight, rules: Sequence[Citation]) -> dict[str, Any]:
    entry = half.entry
    out = entry.reply.inverted()
    changed_to = (out.dst, out.dport) != (entry.orig.dst, entry.orig.dport)
    changed_from = (out.src, out.sport) != (entry.orig.src, entry.orig.sport)
    return {
        "node": half.place.node,
        "netns": f"pod/{half.place.pod}" if half.place.pod else "host",
        "source": end_text(entry.orig, source=True),
        "destination": end_text(entry.orig),
        "destinationNat": end_text(out) if changed_to else None,
        "sourceNat": end_text(out, source=True) if changed_from else None,
        "state": entry.tcp_state or None,
        "states": list(sight.states),
        "replied": sight.replied,
        "began": _stamp(sight.began),
        "removed": _stamp(sight.ended),
        "removedEarlySeconds": sight.left,
        "traffic": _traffic(half, sight),
        "complete": sight.complete,
        "rules": [
            {
                "backend": rule.backend or None,
                "table": rule.table or None,
                "chain": rule.chain or None,
                "position": rule.position or None,
                "text": rule.text,
            }
            for rule in rules
        ],
    }


def _traffic(half: Half, sight: Sight) -> dict[str, Any] | None:
    """None: accounting is off, or the counters were not read in time."""
    entry = half.entry
    if not sight.counted or entry.orig_bytes is None:
        return None
    return {
        "packets": entry.orig_packets,
        "bytes": entry.orig_bytes,
        "replyPackets": entry.reply_packets,
        "replyBytes": entry.reply_bytes,
    }


def step_document(step: Step) -> dict[str, Any]:
    return envelope(
        "ConnectionStep",
        {
            "number": step.number,
            "at": _stamp(step.at),
            "node": step.place.node,
            "netns": f"pod/{step.place.pod}" if step.place.pod else "host",
            "event": step.kind.name,
            "polled": step.polled,
            "state": step.state or None,
        },
    )


def _stamp(at: float | None) -> str | None:
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# the summary


def summary_document(
    title: str, tally: Tally, seconds: float, missing: Sequence[Missing], names: Mapping[str, str]
) -> dict[str, Any]:
    """`names`: endpoint → the pod's name."""
    percent = tally.percentiles()
    return envelope(
        "FollowSummary",
        {
            "followed": title,
            "verdict": verdict(title, tally, seconds, missing),
            "seconds": round(seconds, 1),
            "connections": tally.connections,
            "failed": tally.failed,
            "outcomes": {one.value: count for one, count in tally.outcomes.items()},
            "failures": [
                {
                    "outcome": one.outcome.value,
                    "endpoint": one.where,
                    "count": one.count,
                    "because": one.because or None,
                    "walk": one.death or None,
                }
                for one in tally.failures.values()
            ],
            "endpoints": [
                {
                    "endpoint": end,
                    "name": names.get(end),
                    "connections": share.connections,
                    "share": _ratio(share.connections, tally.shared),
                    "expectedShare": _ratio(share.expected, tally.with_odds),
                }
                for end, share in tally.ordered()
            ],
            "durationSeconds": {f"p{p}": round(value, 3) for p, value in percent.items()} or None,
            "hopLatency": [
                {
                    "from": hop[0],
                    "to": hop[1],
                    "packets": times.packets,
                    "nanoseconds": {
                        f"p{p}": round(value) for p, value in percentiles(times.nanoseconds).items()
                    },
                    "boundNs": times.bound,
                }
                for hop, times in tally.hops.items()
            ],
            "lostPackets": dict(tally.lost_packets),
            "droppedPackets": tally.dropped_packets,
            "passedOver": tally.passed_over,
            "bytes": tally.bytes if tally.counted else None,
            "notThroughTheService": tally.beside,
            "lostEvents": dict(tally.lost),
            "behind": list(tally.behind),
            "gaps": [
                {
                    "where": gap.where,
                    "why": gap.why,
                    "begin": _stamp(gap.begin),
                    "end": _stamp(gap.end),
                }
                for gap in tally.gaps
            ],
            "unwritten": tally.unwritten,
            "forgotten": tally.forgotten,
            "unheard": tally.unheard,
            "only": list(tally.only),
            "missing": missing_document(missing),
            "notes": list(tally.notes),
        },
    )


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None
