"""What is said of a stitched connection: words that are the same drawn, in JSON and in files."""

from __future__ import annotations

from typing import Final

from gketrace.capture.conversations import Tracked
from gketrace.capture.passages import Flow, Repeat, Station
from gketrace.capture.plan import Crossing, Rewrite, rule_text
from gketrace.capture.stitch import IcmpError, Stitched, StitchedConnection
from gketrace.capture.verdicts import Death, failed, state_of
from gketrace.packet import IPAddress
from gketrace.trace import SUCCESS

__all__ = [
    "cited",
    "death_text",
    "end_text",
    "error_text",
    "foreseen",
    "loop_text",
    "packet_comments",
    "rewrite_text",
    "span",
    "station_text",
    "tracked_text",
]

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


def rewrite_text(rewrite: Rewrite) -> str:
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


def tracked_text(tracked: Tracked) -> str:
    """``by conntrack of node n1: 203.0.113.10:4000 → 10.142.0.7:80 is 10.142.0.7:… → …``."""
    orig, after = tracked.entry.orig, tracked.entry.reply.inverted()
    before, behind = (
        f"{end_text(half.src, half.sport)} → {end_text(half.dst, half.dport)}"
        for half in (orig, after)
    )
    return f"by conntrack of node {tracked.node}: {before} is {behind}"


def end_text(address: IPAddress, port: int | None) -> str:
    return str(address) if port is None else _end(address, port)


def error_text(error: IcmpError) -> str:
    kinds = _ERRORS[error.family]
    what = kinds.get((error.type, error.code), f"type {error.type} code {error.code}")
    name = "ICMP" if error.family == 4 else "ICMPv6"
    mtu = f" (MTU {error.mtu})" if error.mtu else ""
    tap, direction, _, _ = error.seen[0]
    pod = f"{tap.pod}:" if tap.pod else ""
    place = f"{tap.node} {pod}{tap.interface}"
    return f"{name} {what}{mtu} from {error.source}, first seen {direction.value} at {place}"


def death_text(death: Death) -> str:
    count = len(death.units)
    what = "1 packet" if count == 1 else f"{count} packets"
    what += " back" if death.back else ""
    text = f"{what} last seen {death.station.direction.value} at {station_text(death.station)}"
    if death.next is None:
        return f"{text}, and never acknowledged" if death.unacknowledged else text
    if isinstance(death.next, Crossing):
        spot, direction = str(death.next.spot), death.next.direction.value
    else:
        spot, direction = station_text(death.next), death.next.direction.value
    text += f", not {direction} at {spot}"
    if isinstance(death.next, Crossing):
        text += f" (hop {death.next.hop} of the plan)"
    return text if death.certain else f"{text}; the capture ended or lost packets there"


def loop_text(flow: Flow, way: str) -> str:
    """Packets that come by the same place again."""
    unit = max(flow.units, key=lambda unit: unit.rounds)
    station = flow.stations[max(unit.laps, key=unit.laps.__getitem__)]
    return (
        f"a packet {way} came by {station_text(station)} {unit.rounds} times, with a smaller TTL "
        "each time: routes lead in a circle"
    )


def foreseen(connection: StitchedConnection) -> list[str]:
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


def station_text(station: Station) -> str:
    tap = station.tap
    return f"{tap.node} {f'{tap.pod}:' if tap.pod else ''}{tap.interface}"


def cited(rewrite: Rewrite) -> str:
    """``DNAT to 10.40.0.6:8080 by KUBE-SEP-…:2 (-A KUBE-SEP-… -j DNAT …)``."""
    text = rewrite_text(rewrite)
    return f"{text} ({rewrite.citation.text})" if rewrite.citation is not None else text


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
                made[number] = f"connection {index}: {error_text(error)}"
    return made
