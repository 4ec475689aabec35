"""Stitched connections as JSON: ``connections`` of docs/schema/capture.json."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from gketrace.capture.clock import Clocks
from gketrace.capture.passages import Flow, Repeat
from gketrace.capture.segments import tuple5_of
from gketrace.capture.stitch import StitchedConnection
from gketrace.capture.verdicts import deaths_of, failed, hop_times, sender_text, state_of
from gketrace.packet import IPAddress, Tuple5, protocol_name
from gketrace_cli.capture.connection_words import (
    death_text,
    error_text,
    foreseen,
    station_text,
)

__all__ = ["connection_document"]


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
                "text": error_text(error),
                "from": error.source,
                "type": error.type,
                "code": error.code,
                "mtu": error.mtu,
            }
            for error in connection.errors
        ],
        "trace": next(iter(foreseen(connection)), None),
        "deaths": [
            {
                "back": death.back,
                "packets": len(death.units),
                "lastSeen": station_text(death.station),
                "certain": death.certain,
                "text": death_text(death),
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
