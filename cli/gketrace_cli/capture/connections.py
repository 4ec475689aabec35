"""Stitched connections for people: each printed as one, from tap to tap.

``client → node eth0 → DNAT → veth → pod``, with the time between hops, what was sent again, who
reset it, ICMP errors, and where a packet was last seen that did not arrive.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final

from gketrace.capture.clock import Clocks
from gketrace.capture.packets import Tap
from gketrace.capture.passages import Flow, Repeat
from gketrace.capture.segments import tuple5_of
from gketrace.capture.stitch import Stitched, StitchedConnection
from gketrace.capture.verdicts import (
    State,
    deaths_of,
    failed,
    hop_times,
    sender_text,
    state_of,
)
from gketrace.errors import ExitCode
from gketrace.packet import IPAddress, Tuple5, protocol_name
from gketrace_cli.capture.connection_words import (
    death_text,
    end_text,
    error_text,
    foreseen,
    loop_text,
    rewrite_text,
    span,
    tracked_text,
)
from gketrace_cli.render.layout import Page

__all__ = ["draw_connection", "draw_connections", "exit_code"]

_STYLES: Final = {
    State.OPEN: "green",
    State.CLOSED: "green",
    State.MIDDLE: "yellow",
    State.PENDING: "yellow",
}


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
        page.line(f"{error_text(error)}, about {error.about}, which was not captured", "yellow")


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
        page.entry("tracked", page.short(tracked_text(tracked)))
    for ending in connection.endings:
        what = "reset" if ending.reset else "closed"
        page.entry(what, page.short(f"by {sender_text(connection, ending)}"))
    for error in connection.errors:
        page.entry("error", page.short(error_text(error)), "red")
    for death in deaths_of(connection):
        page.entry("died" if death.certain else "unseen", page.short(death_text(death)), "red")
    for flow, way in ((connection.there, "there"), (connection.back, "back")):
        if flow.rounds > 1:
            page.entry("loop", page.short(loop_text(flow, way)), "red")
    for text in foreseen(connection):
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
        return [rewrite_text(rewrite) for rewrite in rewrites]
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


def _evidence(connection: StitchedConnection) -> str:
    return ", ".join(sorted(evidence.value for evidence in connection.evidence)) or "?"


def _named(half: Tuple5, names: Mapping[IPAddress, str]) -> str:
    """``203.0.113.10:35908 → 10.40.0.6:8080 (pod/default/web-0) tcp``."""

    def end(address: IPAddress, port: int | None) -> str:
        name = names.get(address)
        text = end_text(address, port)
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
