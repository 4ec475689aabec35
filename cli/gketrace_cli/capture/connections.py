"""Stitched connections for people and as JSON: each printed as one, from tap to tap.

``client → node eth0 → DNAT → veth → pod``, with the time between hops, what was sent again, who
reset it, ICMP errors, and where a packet was last seen that did not arrive.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Final

from gketrace.capture.clock import Clocks
from gketrace.capture.conversations import Tracked
from gketrace.capture.packets import Tap
from gketrace.capture.passages import Flow, Repeat, Station
from gketrace.capture.plan import Crossing, Rewrite, rule_text
from gketrace.capture.segments import tuple5_of
from gketrace.capture.stitch import IcmpError, Stitched, StitchedConnection
from gketrace.capture.verdicts import (
    Death,
    State,
    deaths_of,
    failed,
    hop_times,
    sender_text,
    state_of,
)
from gketrace.errors import ExitCode
from gketrace.packet import IPAddress, Tuple5, protocol_name
from gketrace.trace import SUCCESS
from gketrace_cli.render.layout import Page

__all__ = [
    "cited",
    "connection_document",
    "draw_connection",
    "draw_connections",
    "exit_code",
    "packet_comments",
    "span",
]

_STYLES: Final = {
    State.OPEN: "green",
    State.CLOSED: "green",
    State.MIDDLE: "yellow",
    State.PENDING: "yellow",
}
_ERRORS: Final = {
    4: {
        (3, 0): "network unreachable",
        (3, 1): "host unreachable",
        (3, 2): "protocol unreachable",
        (3, 3): "port unreachable",
        (3, 4): "fragmentation needed",
        (3, 9): "network prohibited",
        (3, 10): "host prohibited",
        (3, 13): "administratively prohibited",
        (11, 0): "TTL exceeded",
        (11, 1): "fragments did not arrive in time",
    },
    6: {
        (1, 0): "no route",
        (1, 1): "administratively prohibited",
        (1, 3): "address unreachable",
        (1, 4): "port unreachable",
        (1, 5): "source refused by policy",
        (1, 6): "route refused",
        (2, 0): "packet too big",
        (3, 0): "hop limit exceeded",
        (3, 1): "fragments did not arrive in time",
    },
}


def span(nanoseconds: float) -> str:
    """``48 µs``, ``1.2 ms``, ``3 s``."""
    size = abs(nanoseconds)
    for unit, scale in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if size >= scale:
            value = nanoseconds / scale
            return f"{value:.3g} {unit}" if abs(value) < 1000 else f"{value:.0f} {unit}"
    return f"{nanoseconds:.0f} ns"


def exit_code(stitched: Stitched) -> ExitCode:
    """1 when a connection failed."""
    broken = any(failed(state_of(connection)) for connection in stitched.connections)
    return ExitCode.BROKEN if broken else ExitCode.OK


def draw_connections(
    page: Page,
    stitched: Stitched,
    names: Mapping[IPAddress, str] | None = None,
    clocks: Clocks | None = None,
    said: Sequence[str] = (),
) -> None:
    """All of them, a block each, and a line that counts them.

    `said`: the packets' comments, where they were read from a file: they name the rules that
    rewrote packets, when there is no plan to.
    """
    connections = stitched.connections
    for number, connection in enumerate(connections, 1):
        page.blank()
        draw_connection(page, connection, names or {}, clocks, number, said)
    page.blank()
    states = [state_of(connection) for connection in connections]
    counted = [f"{states.count(state)} {state.value}" for state in State if state in states]
    text = f"{len(connections)} connection{'' if len(connections) == 1 else 's'}"
    page.line(f"{text}: {', '.join(counted)}" if counted else text, "bold")
    for error in stitched.stray_errors:
        page.line(f"{_error_text(error)}, about {error.about}, which was not captured", "yellow")


def draw_connection(
    page: Page,
    connection: StitchedConnection,
    names: Mapping[IPAddress, str],
    clocks: Clocks | None = None,
    number: int = 0,
    said: Sequence[str] = (),
) -> None:
    """One of them."""
    state = state_of(connection)
    head = f"[{number}] " if number else ""
    text = f"{head}{_named(connection.first, names)}"
    if connection.first != connection.last:
        text += f", as {_named(connection.last, names)}"
    page.line(page.short(f"{text}: {state.value}"), _STYLES.get(state, "red"), "bold", hang=4)
    _draw_way(page, connection, connection.there, clocks, said)
    page.entry("there", _traffic(connection.there))
    page.entry("back", _traffic(connection.back))
    answered = connection.answered_in
    if answered is not None:
        page.entry("answered", f"in {span(answered)}")
    for tracked in connection.entries:
        page.entry("tracked", page.short(_tracked_text(tracked)))
    for ending in connection.endings:
        what = "reset" if ending.reset else "closed"
        page.entry(what, page.short(f"by {sender_text(connection, ending)}"))
    for error in connection.errors:
        page.entry("error", page.short(_error_text(error)), "red")
    for death in deaths_of(connection):
        page.entry("died" if death.certain else "unseen", page.short(_death(death)), "red")
    for flow, way in ((connection.there, "there"), (connection.back, "back")):
        if flow.rounds > 1:
            page.entry("loop", page.short(_loop(flow, way)), "red")
    for text in _foreseen(connection):
        page.entry("trace", page.short(text), "red")
    if not connection.client_known:
        page.entry("unsure", "its beginning was not captured: who asked whom is not known")
    if connection.contested:
        page.entry("unsure", "some of its packets could be another connection's", "yellow")


def _draw_way(
    page: Page,
    connection: StitchedConnection,
    flow: Flow,
    clocks: Clocks | None,
    said: Sequence[str],
) -> None:
    """Station after station, in the direction of the client."""
    if not flow.stations:
        page.entry("way", "no packet of the client was captured")
        return
    begun = flow.units[0].begin
    times: list[list[int]] = [[], *hop_times(flow)]
    wheres = [_where(page, station.tap) for station in flow.stations]
    width = max(map(len, wheres))
    last = None
    for place, (station, where) in enumerate(zip(flow.stations, wheres, strict=True)):
        changed = last is not None and station.flow != last.flow
        for text in _rewritten(connection, flow, place, said) if changed else ():
            page.line(page.short(text), "cyan", indent=6, hang=5)
        moment = _clock_text(begun) if place == 0 else _since(times[place], flow, place, clocks)
        shown = str(tuple5_of(station.flow)).rpartition(" ")[0]
        if last is not None and station.flow == last.flow:
            shown = ""
        line = f"   {where:<{width}}  {station.direction.value:<3}  {moment:<16} {shown}"
        page.lines.append(line.rstrip())
        last = station


_SAID: Final = re.compile(r"(?:^|; )((?:DNAT|SNAT|NAT) [^;(]* by [^ ;]+)")


def _rewritten(
    connection: StitchedConnection, flow: Flow, place: int, said: Sequence[str]
) -> list[str]:
    """What rewrote packets before this station: by the plan, by a file's comments, or only that
    something did."""
    rewrites = connection.rewrites(flow, place)
    if rewrites:
        return [_rewrite(rewrite) for rewrite in rewrites]
    for one in flow.stations[place].sightings[:1]:
        if one.number < len(said) and (found := _SAID.findall(said[one.number])):
            return [str(text) for text in found]
    return [f"rewritten; by {_evidence(connection)}"]


def _where(page: Page, tap: Tap) -> str:
    pod = f"{tap.pod.rpartition('/')[2]}:" if tap.pod else ""
    return page.short(f"{tap.node} {pod}{tap.interface}")


def _clock_text(now: int) -> str:
    seconds, rest = divmod(now, 10**9)
    return f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{rest // 1000:06d}"


def _since(times: Sequence[int], flow: Flow, place: int, clocks: Clocks | None) -> str:
    """The median time since the station before, and what the clocks leave open."""
    if not times:
        return "+?"
    text = f"+{span(median(times))}"
    before, here = flow.stations[place - 1].tap.node, flow.stations[place].tap.node
    if before == here or clocks is None:
        return text
    width = clocks.width(before, here)
    return f"{text} ± {span(width)}" if width is not None else "+? (clocks)"


def _rewrite(rewrite: Rewrite) -> str:
    before, after = rewrite.before, rewrite.after
    parts = []
    if (before.dst, before.dport) != (after.dst, after.dport):
        parts.append(f"to {_end(after.dst, after.dport)}")
    if (before.src, before.sport) != (after.src, after.sport):
        parts.append(f"from {_end(after.src, after.sport)}")
    return f"{rewrite.kind} {', '.join(parts)} by {rewrite.by}"


def _end(address: IPAddress, port: int | None) -> str:
    host = f"[{address}]" if address.version == 6 else str(address)
    return f"{host}:{'*' if port is None else port}"


def _tracked_text(tracked: Tracked) -> str:
    """``by conntrack of node n1: 203.0.113.10:4000 → 10.142.0.7:80 is 10.142.0.7:… → …``."""
    orig, after = tracked.entry.orig, tracked.entry.reply.inverted()
    before, behind = (
        f"{_end_of(half.src, half.sport)} → {_end_of(half.dst, half.dport)}"
        for half in (orig, after)
    )
    return f"by conntrack of node {tracked.node}: {before} is {behind}"


def _end_of(address: IPAddress, port: int | None) -> str:
    return str(address) if port is None else _end(address, port)


def _evidence(connection: StitchedConnection) -> str:
    return ", ".join(sorted(evidence.value for evidence in connection.evidence)) or "?"


def _named(half: Tuple5, names: Mapping[IPAddress, str]) -> str:
    """``203.0.113.10:35908 → 10.40.0.6:8080 (pod/default/web-0) tcp``."""

    def end(address: IPAddress, port: int | None) -> str:
        name = names.get(address)
        text = _end_of(address, port)
        return f"{text} ({name})" if name else text

    ends = f"{end(half.src, half.sport)} → {end(half.dst, half.dport)}"
    return f"{ends} {protocol_name(half.protocol)}"


def _traffic(flow: Flow) -> str:
    if not flow.units:
        return "nothing"
    text = f"{len(flow.units)} packet{'' if len(flow.units) == 1 else 's'}, {flow.bytes} bytes"
    for repeat in (Repeat.RETRANSMISSION, Repeat.REORDERED, Repeat.KEEPALIVE):
        if count := flow.count(repeat):
            plural = "s" if count > 1 and repeat is not Repeat.REORDERED else ""
            text += f", {count} {repeat.value}{plural}"
    merged = sum(not unit.whole for unit in flow.units)
    return f"{text}, {merged} merged by offloads" if merged else text


def _error_text(error: IcmpError) -> str:
    kinds = _ERRORS[error.family]
    what = kinds.get((error.type, error.code), f"type {error.type} code {error.code}")
    name = "ICMP" if error.family == 4 else "ICMPv6"
    mtu = f" (MTU {error.mtu})" if error.mtu else ""
    tap, direction, _, _ = error.seen[0]
    pod = f"{tap.pod}:" if tap.pod else ""
    place = f"{tap.node} {pod}{tap.interface}"
    return f"{name} {what}{mtu} from {error.source}, first seen {direction.value} at {place}"


def _death(death: Death) -> str:
    count = len(death.units)
    what = "1 packet" if count == 1 else f"{count} packets"
    what += " back" if death.back else ""
    text = f"{what} last seen {death.station.direction.value} at {_station(death.station)}"
    if death.next is None:
        return f"{text}, and never acknowledged" if death.unacknowledged else text
    if isinstance(death.next, Crossing):
        spot, direction = str(death.next.spot), death.next.direction.value
    else:
        spot, direction = _station(death.next), death.next.direction.value
    text += f", not {direction} at {spot}"
    if isinstance(death.next, Crossing):
        text += f" (hop {death.next.hop} of the plan)"
    return text if death.certain else f"{text}; the capture ended or lost packets there"


def _loop(flow: Flow, way: str) -> str:
    """Packets that come by the same place again."""
    unit = max(flow.units, key=lambda unit: unit.rounds)
    station = flow.stations[max(unit.laps, key=unit.laps.__getitem__)]
    return (
        f"a packet {way} came by {_station(station)} {unit.rounds} times, with a smaller TTL each "
        "time: routes lead in a circle"
    )


def _foreseen(connection: StitchedConnection) -> list[str]:
    """What the trace says of a way that does not arrive."""
    route = connection.route
    if route is None or not failed(state_of(connection)):
        return []
    outcome = route.outcome
    if outcome.disposition in SUCCESS:
        return []
    text = f"{outcome.disposition.value} in {outcome.netns} of node {outcome.netns.node}"
    if outcome.detail:
        text += f": {outcome.detail}"
    if outcome.citation is not None:
        text += f"; {rule_text(outcome.citation)} {outcome.citation.text}"
    return [text]


def _station(station: Station) -> str:
    tap = station.tap
    return f"{tap.node} {f'{tap.pod}:' if tap.pod else ''}{tap.interface}"


def packet_comments(stitched: Stitched) -> dict[int, str]:
    """Packet number → what a capture file says about it: connection, hop, and the rule that
    rewrote it on the way from the tap before."""
    made: dict[int, str] = {}
    for index, connection in enumerate(stitched.connections, 1):
        for flow, back in ((connection.there, False), (connection.back, True)):
            rewrites = [connection.rewrites(flow, place) for place in range(len(flow.stations))]
            for unit in flow.units:
                for passage in unit.passages:
                    text = f"connection {index}, hop {passage.station + 1} of "
                    text += f"{len(flow.stations)}{' back' if back else ''}"
                    for rewrite in rewrites[passage.station]:
                        text += f"; {cited(rewrite)}"
                    if unit.repeat is not Repeat.NOTHING:
                        text += f"; {unit.repeat.value}"
                    made[passage.number] = text
        for error in connection.errors:
            for _, _, _, number in error.seen:
                made[number] = f"connection {index}: {_error_text(error)}"
    return made


def cited(rewrite: Rewrite) -> str:
    """``DNAT to 10.40.0.6:8080 by KUBE-SEP-…:2 (-A KUBE-SEP-… -j DNAT …)``."""
    text = _rewrite(rewrite)
    return f"{text} ({rewrite.citation.text})" if rewrite.citation is not None else text


def connection_document(
    connection: StitchedConnection, names: Mapping[IPAddress, str], clocks: Clocks | None = None
) -> dict[str, Any]:
    """One element of ``connections``."""
    return {
        "client": _tuple_document(connection.first, names),
        "server": _tuple_document(connection.last, names),
        "protocol": protocol_name(connection.protocol),
        "state": state_of(connection).value,
        "failed": failed(state_of(connection)),
        "beginNs": connection.begin,
        "endNs": connection.end,
        "answeredNs": connection.answered_in,
        "clientKnown": connection.client_known,
        "contested": connection.contested,
        "evidence": sorted(evidence.value for evidence in connection.evidence),
        "conntrack": [
            {
                "node": tracked.node,
                "orig": _tuple_document(tracked.entry.orig, {}),
                "reply": _tuple_document(tracked.entry.reply, {}),
            }
            for tracked in connection.entries
        ],
        "there": _flow_document(connection, connection.there, clocks),
        "back": _flow_document(connection, connection.back, clocks),
        "endings": [
            {
                "kind": "RST" if ending.reset else "FIN",
                "by": sender_text(connection, ending),
                "timeNs": ending.time,
            }
            for ending in connection.endings
        ],
        "errors": [
            {
                "text": _error_text(error),
                "from": error.source,
                "type": error.type,
                "code": error.code,
                "mtu": error.mtu,
            }
            for error in connection.errors
        ],
        "trace": next(iter(_foreseen(connection)), None),
        "deaths": [
            {
                "back": death.back,
                "packets": len(death.units),
                "lastSeen": _station(death.station),
                "certain": death.certain,
                "text": _death(death),
            }
            for death in deaths_of(connection)
        ],
    }


def _flow_document(
    connection: StitchedConnection, flow: Flow, clocks: Clocks | None
) -> dict[str, Any]:
    times: list[list[int]] = [[], *hop_times(flow)] if flow.stations else []
    return {
        "packets": len(flow.units),
        "bytes": flow.bytes,
        "retransmissions": flow.count(Repeat.RETRANSMISSION),
        "reordered": flow.count(Repeat.REORDERED),
        "rounds": flow.rounds,
        "stations": [
            {
                "node": station.tap.node,
                "pod": station.tap.pod or None,
                "interface": station.tap.interface,
                "direction": station.direction.value,
                "tuple": _tuple_document(tuple5_of(station.flow), {}),
                "packets": station.packets,
                "sinceNs": round(median(times[place])) if times[place] else None,
                "sinceBoundNs": _bound(flow, place, clocks),
                "rewrites": [
                    {"kind": r.kind, "by": r.by, "rule": r.citation.text if r.citation else None}
                    for r in connection.rewrites(flow, place)
                ],
            }
            for place, station in enumerate(flow.stations)
        ],
    }


def _bound(flow: Flow, place: int, clocks: Clocks | None) -> int | None:
    if place == 0 or clocks is None:
        return None
    return clocks.width(flow.stations[place - 1].tap.node, flow.stations[place].tap.node)


def _tuple_document(half: Tuple5, names: Mapping[IPAddress, str]) -> dict[str, Any]:
    return {
        "src": str(half.src),
        "sport": half.sport,
        "srcName": names.get(half.src),
        "dst": str(half.dst),
        "dport": half.dport,
        "dstName": names.get(half.dst),
    }
