"""Connection-tracking tables as text and as documents (docs/schema/conntrack.json)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from gketrace.conntrack import ConntrackEntry, CtStatus
from gketrace.packet import IPAddress, Tuple5, protocol_name
from gketrace.trace import Missing
from gketrace_cli.addressbook import AddressBook
from gketrace_cli.conntrack_reading import Place, TableEnd
from gketrace_cli.render.documents import missing_document
from gketrace_cli.render.layout import Page
from gketrace_proto.v1alpha1 import agent_pb2 as pb

__all__ = [
    "count_text",
    "draw_entry",
    "draw_statistics",
    "end_document",
    "entry_document",
    "heading",
    "list_verdict",
    "statistics_document",
    "statistics_line",
    "traffic_text",
]

_STATE: Final = 12
_PROTOCOL: Final = 7


def count_text(count: int, one: str, many: str = "") -> str:
    """``1 entry``, ``2 entries``."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def list_verdict(ends: Sequence[TableEnd], missing: Sequence[Missing], *, fitting: bool) -> str:
    """The first line: how many entries, where, and whether that is all of them."""
    read = [end for end in ends if end.received or (end.summary and end.summary.tracked)]
    silent = [end for end in ends if end.not_tracked]
    total = sum(end.received for end in read)
    if silent and not read and not missing:
        where = "Nothing" if len(silent) > 1 else f"{silent[0].place}: nothing".capitalize()
        many = f" in any of {len(silent)} namespaces" if len(silent) > 1 else ""
        return f"{where} asks for connection tracking{many}: not tracked."
    pods = any(end.place.pod is not None for end in read)
    what = count_text(len(read), "namespace" if pods else "node")
    text = f"{count_text(total, 'entry', 'entries')}{' that fit' if fitting else ''} on {what}"
    if len(read) == 1:
        text = f"{text[: text.rindex(' on ')]} on {read[0].place}"
    if missing:
        return f"{text}; not everything was seen."
    whole = "the table was" if len(read) == 1 else "each table was"
    return f"{text}; {whole} read whole." if read else f"{text}."


def heading(nodes: int) -> str:
    """The line above the entries; `nodes` is the width of the first column."""
    return f"{'NODE':<{nodes}}  {'PROTO':<{_PROTOCOL}}{'STATE':<{_STATE}} FROM -> TO"


def draw_entry(
    page: Page, place: str, nodes: int, entry: ConntrackEntry, names: AddressBook | None
) -> None:
    """One entry: who asked whom, and below it what NAT and accounting say.  One line when wide."""
    orig = entry.orig
    lead = f"{place:<{nodes}}  {protocol_name(orig.protocol):<{_PROTOCOL}}{_state(entry):<{_STATE}}"
    start = _end(orig.src, orig.sport)
    goal = _end(orig.dst, orig.dport)
    if names is not None:
        start = _named(start, names.host(orig.src))
        goal = _named(goal, names.door(orig.dst, orig.dport, orig.protocol))
    if orig.icmp_type is not None:
        goal += f" type {orig.icmp_type} code {orig.icmp_code or 0}"
    first = f"{lead} {start} -> {goal}"
    details = [*_changes(entry, names), traffic_text(entry)]
    if entry.tcp_state and not entry.status & CtStatus.SEEN_REPLY:
        details.append("no answer seen")
    if page.wide:
        details += _wide(entry)
    details = [detail for detail in details if detail]
    if page.wide:
        page.lines.append("; ".join([first, *details]))
        return
    page.lines.append(first if len(first) <= page.width else f"{lead} {start}")
    indent = nodes + 2 + _PROTOCOL
    if len(first) > page.width:
        page.lines.append(" " * (indent + _STATE - 2) + f"-> {goal}")
    if details:
        page.line("; ".join(details), "dim", indent=indent, hang=2)


def _changes(entry: ConntrackEntry, names: AddressBook | None) -> list[str]:
    """What NAT made of the packet: the answer's tuple, turned round."""
    orig, reply = entry.orig, entry.reply
    found = []
    if (reply.src, reply.sport) != (orig.dst, orig.dport) and orig.icmp_type is None:
        text = _end(reply.src, reply.sport)
        found.append("to " + (_named(text, names.host(reply.src)) if names else text))
    elif reply.src != orig.dst:
        found.append(f"to {reply.src}")
    if (reply.dst, reply.dport) != (orig.src, orig.sport) and orig.icmp_type is None:
        text = _end(reply.dst, reply.dport)
        found.append("from " + (_named(text, names.host(reply.dst)) if names else text))
    elif reply.dst != orig.src:
        found.append(f"from {reply.dst}")
    return ["translated " + " ".join(found)] if found else []


def traffic_text(entry: ConntrackEntry) -> str:
    """``12 packets 840 bytes, back 9 packets 700 bytes``; empty when accounting is off."""
    if entry.orig_packets is None or entry.orig_bytes is None:
        return ""
    text = f"{count_text(entry.orig_packets, 'packet')} {entry.orig_bytes} bytes"
    if entry.reply_packets is None or entry.reply_bytes is None:
        return text
    return f"{text}, back {count_text(entry.reply_packets, 'packet')} {entry.reply_bytes} bytes"


def _wide(entry: ConntrackEntry) -> list[str]:
    numbers = {
        "expires in": f"{entry.timeout} s" if entry.timeout is not None else "",
        "mark": f"{entry.mark:#x}" if entry.mark else "",
        "zone": str(entry.zone or ""),
        "zone-orig": str(entry.zone_orig or ""),
        "zone-reply": str(entry.zone_reply or ""),
        "helper": entry.helper,
        "labels": entry.labels,
        "id": str(entry.id or ""),
    }
    return [f"{name} {value}" for name, value in numbers.items() if value]


def _state(entry: ConntrackEntry) -> str:
    if entry.tcp_state:
        return entry.tcp_state
    if not entry.status & CtStatus.SEEN_REPLY:
        return "UNREPLIED"
    return "ASSURED" if entry.status & CtStatus.ASSURED else "REPLIED"


def _end(address: IPAddress, port: int | None) -> str:
    host = f"[{address}]" if address.version == 6 and port is not None else str(address)
    return host if port is None else f"{host}:{port}"


def _named(text: str, name: str) -> str:
    return f"{text} ({name})" if name else text


# documents


def entry_document(place: Place, entry: ConntrackEntry) -> dict[str, Any]:
    """One element of ``entries``."""
    status = CtStatus(entry.status)
    return {
        "node": place.node,
        "netns": place.netns,
        "protocol": protocol_name(entry.orig.protocol),
        "state": entry.tcp_state or None,
        "timeoutSeconds": entry.timeout,
        "original": _half(entry.orig, entry.orig_packets, entry.orig_bytes),
        "reply": _half(entry.reply, entry.reply_packets, entry.reply_bytes),
        "status": [flag.name for flag in CtStatus if flag and flag in status],
        "mark": entry.mark,
        "zone": entry.zone,
        "zoneOriginal": entry.zone_orig,
        "zoneReply": entry.zone_reply,
        "id": entry.id,
        "use": entry.use,
        "startedNs": entry.started,
        "helper": entry.helper or None,
        "secctx": entry.secctx or None,
        "labels": entry.labels or None,
    }


def _half(half: Tuple5, packets: int | None, octets: int | None) -> dict[str, Any]:
    icmp = half.icmp_type is not None
    return {
        "src": str(half.src),
        "dst": str(half.dst),
        "sport": None if icmp else half.sport,
        "dport": None if icmp else half.dport,
        "icmpType": half.icmp_type,
        "icmpCode": half.icmp_code,
        "icmpId": half.sport if icmp else None,
        "packets": packets,
        "bytes": octets,
    }


def end_document(
    verdict: str,
    ends: Iterable[TableEnd],
    missing: Sequence[Missing],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """What follows the entries: how each table was read."""
    return {
        "verdict": verdict,
        "complete": not missing,
        "missing": missing_document(missing),
        "notes": list(notes),
        "tables": [
            {
                "node": end.place.node,
                "netns": end.place.netns,
                "entries": end.summary.sent,
                "consistent": end.summary.consistent,
                "lost": end.summary.lost,
                "truncated": end.summary.truncated,
                "tracked": end.summary.tracked,
                "accounting": end.summary.accounting,
                "duplicates": end.summary.duplicates,
                "readings": end.summary.readings,
                "read": end.summary.read,
            }
            for end in ends
            if end.summary is not None
        ],
    }


# counts and statistics


def statistics_line(one: pb.ConntrackCpuStats) -> str:
    """A line as conntrack(8) -S prints it."""
    counters = " ".join(
        f"{name.replace('chain_toolong', 'chaintoolong')}={one.counters[name]}"
        for name in _COUNTERS
        if name in one.counters
    )
    return f"cpu={one.cpu:<4}\t{counters} "


_COUNTERS: Final = (
    *("found", "invalid", "insert", "insert_failed", "drop", "early_drop", "error"),
    *("search_restart", "clash_resolve", "chain_toolong"),
)
_TROUBLE: Final[Mapping[str, str]] = {
    "insert_failed": "entries that could not be added (two packets of one flow raced)",
    "drop": "packets dropped: no room in the table, or no memory",
    "early_drop": "entries evicted to make room",
    "invalid": "packets that tracking could not place",
    "error": "packets with errors",
    "chain_toolong": "packets dropped: a hash chain was too long",
}


def draw_statistics(page: Page, place: Place, reply: pb.GetConntrackStatsReply) -> None:
    """One namespace's table: how full, and what the kernel counted since it was made."""
    share = f" ({100 * reply.entries / reply.limit:.1f} %)" if reply.limit else ""
    limit = str(reply.limit) if reply.limit else "an unknown number"
    tracked = "" if reply.tracked else "; not tracked: nothing there asks for it"
    page.blank()
    title = f"{place}: {count_text(reply.entries, 'entry', 'entries')} of {limit}{share}{tracked}"
    page.line(page.short(title), "bold", hang=2)
    totals = {
        name: sum(cpu.counters.get(name, 0) for cpu in reply.cpus)
        for name in _COUNTERS
        if any(name in cpu.counters for cpu in reply.cpus)
    }
    for name, total in totals.items():
        note = f": {_TROUBLE[name]}" if total and name in _TROUBLE else ""
        page.entry(name, f"{total}{note}", *(["yellow"] if note else []), column=16)
    page.entry("buckets", str(reply.buckets), column=16)
    page.entry("accounting", "on" if reply.accounting else "off: bytes are unknown", column=16)


def statistics_document(place: Place, reply: pb.GetConntrackStatsReply) -> dict[str, Any]:
    """One element of ``tables``."""
    return {
        "node": place.node,
        "netns": place.netns,
        "entries": reply.entries,
        "limit": reply.limit or None,
        "buckets": reply.buckets,
        "tracked": reply.tracked,
        "accounting": reply.accounting,
        "events": reply.events,
        "cpus": [{"cpu": one.cpu, "counters": dict(one.counters)} for one in reply.cpus],
    }
