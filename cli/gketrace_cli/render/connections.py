"""Connections as text: whole ones, joined across nodes, and the live ones of a Service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gketrace.connections import Half
from gketrace.conntrack import CtStatus
from gketrace.packet import Tuple5, protocol_name
from gketrace_cli.agreement import Agreement
from gketrace_cli.connection_reading import Joined, JoinedReading
from gketrace_cli.conntrack_reading import Place
from gketrace_cli.liveness import LiveReading, Standing
from gketrace_cli.render.conntrack import count_text, entry_document, traffic_text
from gketrace_cli.render.documents import envelope, missing_document
from gketrace_cli.render.layout import Page

__all__ = ["connections_document", "draw_connections", "draw_live"]


def draw_live(page: Page, live: LiveReading) -> None:
    """What existing connections of a Service are pinned to; nothing when there are none."""
    open_ones = [one for one in live.found if one.standing is not Standing.OVER]
    if not open_ones and not live.missing:
        return
    page.blank()
    text = f"Live connections: {len(open_ones)} on {count_text(len(live.nodes), 'node')}"
    draining = sum(1 for one in open_ones if one.standing is Standing.DRAINING)
    if draining:
        text += f", {draining} to endpoints that are not ready"
    text += f", {len(live.stale)} stale" if live.stale else ", none stale" if live.nodes else ""
    agreeing = live.in_agreement(Agreement.AGREES)
    if agreeing == live.in_agreement(*Agreement) == len(open_ones) and not live.one_sided:
        page.line(f"{text}, {'each' if agreeing > 1 else 'and'} as the rules would make it", "bold")
    else:
        page.line(text, "bold")
        _draw_agreement(page, live)
    for one in live.stale:
        page.line(f"{page.short(str(one.place))}: {one.entry}", "red", indent=3, hang=2)
        page.line(f"stale: {one.why}", indent=5, hang=2)
    for why in live.missing:
        page.line(page.short(f"Not seen: {why}"), "yellow", indent=3, hang=2)


_SHOWN: Final = 5
"""Entries of each kind; the rest is counted."""


def _draw_agreement(page: Page, live: LiveReading) -> None:
    """Beside the rules and the endpoint's node: in one line when all is as it should be."""
    compared = live.in_agreement(*Agreement) - live.in_agreement(Agreement.UNCOMPARED)
    if not compared:
        return
    differing = live.differing
    agree, unknown = (live.in_agreement(one) for one in (Agreement.AGREES, Agreement.UNKNOWN))
    parts = [f"{agree} as the rules would make them now"]
    if differing:
        parts.append(f"{len(differing)} otherwise")
    if unknown:
        parts.append(f"{unknown} not known")
    if left := live.in_agreement(Agreement.UNCOMPARED):
        parts.append(f"{left} not compared")
    page.line("Beside the rules: " + ", ".join(parts), "dim", indent=3, hang=2)
    for one in differing[:_SHOWN]:
        page.line(f"{page.short(str(one.place))}: {one.entry}", "yellow", indent=3, hang=2)
        page.line(one.comparison.why if one.comparison else "", indent=5, hang=2)
    for one in live.one_sided[:_SHOWN]:
        page.line(f"{page.short(str(one.place))}: {one.entry}", "yellow", indent=3, hang=2)
        page.line(page.short(f"missing: {one.absent_on} has no entry of it"), indent=5, hang=2)
    rest = max(len(differing) - _SHOWN, 0) + max(len(live.one_sided) - _SHOWN, 0)
    if rest:
        page.line(f"{rest} more: gketrace connections --service lists them", "dim", indent=3)


def _verdict(found: JoinedReading) -> str:
    total = count_text(len(found.connections), "connection")
    text = f"{total} on {count_text(len(found.nodes), 'node')}"
    stale = sum(one.standing in _STALE for one in found.connections)
    doubtful = sum(1 for one in found.connections if one.remarks) - stale
    if stale:
        text += f", {stale} stale"
    if doubtful > 0:
        text += f", {doubtful} with remarks"
    return f"{text}; not everything was seen." if found.missing else f"{text}."


_STALE = (Standing.STALE, Standing.UNTRANSLATED)


def draw_connections(page: Page, found: JoinedReading) -> None:
    """One line for each connection, and below it what each node makes of it."""
    stale = any(one.breaks for one in found.connections)
    page.line(_verdict(found), "yellow" if found.missing else "red" if stale else "green", "bold")
    for item in found.missing:
        page.line(page.short(f"Not seen: {item}"), "yellow", hang=3)
    settings = [
        (found.no_accounting, "Accounting is", "packets and bytes are"),
        (found.no_timestamps, "Timestamps are", "ages are"),
    ]
    if found.no_accounting == found.no_timestamps:
        both = "Accounting and timestamps are", "packets, bytes and ages are"
        settings = [(found.no_accounting, *both)]
    for nodes, setting, what in settings:
        if nodes:
            where = "all nodes" if len(nodes) == len(found.nodes) else page.short(", ".join(nodes))
            page.line(f"{setting} off on {where}: {what} not known.", "dim", hang=2)
    for one in found.connections:
        page.blank()
        _draw_connection(page, one)


def _draw_connection(page: Page, one: Joined) -> None:
    first, last = one.connection.first, one.connection.last
    way = [_end(first, source=True), _end(first)]
    if (last.dst, last.dport) != (first.dst, first.dport):
        way.append(_end(last))
    page.line(f"{protocol_name(first.protocol)}  {' -> '.join(way)}", "bold", hang=5)
    owners = zip((one.client, one.door, one.end), one.strangers, strict=True)
    names = [owner or stranger for owner, stranger in owners][: len(way)]
    if one.age is not None:
        names[-1] += f", for {duration_text(one.age)}"
    page.line(page.short(" -> ".join(names)), "dim", indent=5, hang=2)
    for half in one.connection.halves:
        page.entry(page.short(half.place.node), _half_text(half), indent=5, column=8)
    for remark in one.remarks:
        bad = one.standing in _STALE and remark == one.remarks[0]
        page.line(page.short(remark), "red" if bad else "yellow", indent=5, hang=2)


def _model_document(one: Joined) -> dict[str, Any] | None:
    """``model``: the entry that agrees least with the rules of its node."""
    if one.model is None:
        return None
    found = one.model.comparison
    return {
        "node": one.model.node,
        "agreement": found.agreement.value,
        "why": found.why or None,
        "olderThanRules": found.older,
    }


def duration_text(seconds: float) -> str:
    """``12 s``, ``3 min 5 s``, ``2 h 10 min``, ``4 d 3 h``."""
    whole = max(int(seconds), 0)
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    for index, (size, name) in enumerate(units):
        if whole >= size or size == 1:
            text = f"{whole // size} {name}"
            if size > 1:
                smaller, its_name = units[index + 1]
                text += f" {whole % size // smaller} {its_name}"
            return text
    raise AssertionError("the last unit takes everything")


def _half_text(half: Half) -> str:
    entry = half.entry
    inside = f"in pod {half.place.pod}: " if half.place.pod else ""
    replied = "answered" if entry.status & CtStatus.SEEN_REPLY else "no answer seen"
    out = entry.reply.inverted()
    changes = []
    if (out.dst, out.dport) != (entry.orig.dst, entry.orig.dport):
        changes.append(f"to {_end(out)}")
    if (out.src, out.sport) != (entry.orig.src, entry.orig.sport):
        changes.append(f"from {_end(out, source=True)}")
    parts = [entry.tcp_state, replied, "translated " + " ".join(changes) if changes else ""]
    return inside + ", ".join(part for part in (*parts, traffic_text(entry)) if part)


def _end(half: Tuple5, *, source: bool = False) -> str:
    address, port = (half.src, half.sport) if source else (half.dst, half.dport)
    host = f"[{address}]" if address.version == 6 and port is not None else str(address)
    return host if port is None else f"{host}:{port}"


def connections_document(found: JoinedReading, query: Mapping[str, Any]) -> dict[str, Any]:
    """What docs/schema/connections.json describes."""
    return envelope(
        "ConnectionList",
        {
            "query": dict(query),
            "verdict": _verdict(found),
            "complete": not found.missing,
            "missing": missing_document(found.missing),
            "noAccounting": list(found.no_accounting),
            "noTimestamps": list(found.no_timestamps),
            "connections": [
                {
                    "protocol": protocol_name(one.connection.first.protocol),
                    "client": _end(one.connection.first, source=True),
                    "clientName": one.client or None,
                    "door": _end(one.connection.first),
                    "doorName": one.door or None,
                    "end": _end(one.connection.last),
                    "endName": one.end or None,
                    "standing": one.standing.value if one.standing else None,
                    "ageSeconds": None if one.age is None else round(one.age, 3),
                    "model": _model_document(one),
                    "oneSided": [unseen.node for unseen in one.connection.unseen],
                    "remarks": list(one.remarks),
                    "entries": [
                        entry_document(Place(node=half.place.node), half.entry)
                        | {"netns": f"pod/{half.place.pod}" if half.place.pod else "host"}
                        for half in one.connection.halves
                    ],
                }
                for one in found.connections
            ],
        },
    )
