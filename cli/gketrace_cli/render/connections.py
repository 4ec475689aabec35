"""Connections as text: whole ones, joined across nodes, and the live ones of a Service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gketrace.connections import Half
from gketrace.conntrack import CtStatus
from gketrace.packet import Tuple5, protocol_name
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
    page.line(text, "bold")
    for one in live.stale:
        page.line(f"{page.short(str(one.place))}: {one.entry}", "red", indent=3, hang=2)
        page.line(f"stale: {one.why}", indent=5, hang=2)
    for why in live.missing:
        page.line(page.short(f"Not seen: {why}"), "yellow", indent=3, hang=2)


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
    if found.no_accounting:
        nodes = ", ".join(found.no_accounting)
        where = "all nodes" if len(found.no_accounting) == len(found.nodes) else page.short(nodes)
        page.line(f"Accounting is off on {where}: packets and bytes are not known.", "dim", hang=2)
    for one in found.connections:
        page.blank()
        _draw_connection(page, one)


def _draw_connection(page: Page, one: Joined) -> None:
    first, last = one.connection.first, one.connection.last
    way = [_end(first, source=True), _end(first)]
    if (last.dst, last.dport) != (first.dst, first.dport):
        way.append(_end(last))
    page.line(f"{protocol_name(first.protocol)}  {' -> '.join(way)}", "bold", hang=5)
    names = [one.client or "outside", one.door or "outside"]
    if len(way) > 2:
        names.append(one.end or "outside")
    page.line(page.short(" -> ".join(names)), "dim", indent=5, hang=2)
    for half in one.connection.halves:
        page.entry(page.short(half.place.node), _half_text(half), indent=5, column=8)
    for remark in one.remarks:
        bad = one.standing in _STALE and remark == one.remarks[0]
        page.line(page.short(remark), "red" if bad else "yellow", indent=5, hang=2)


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
