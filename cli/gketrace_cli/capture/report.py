"""What a capture says of itself: what it listens to, and at its end tcpdump's three lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from gketrace.capture.packets import CapturedPacket, LinkType, Tap
from gketrace_cli.capture.lines import Lines
from gketrace_cli.capture.merge import Chunk
from gketrace_cli.capture.running import Outcome, TapOutcome, tell
from gketrace_cli.render.documents import envelope

__all__ = [
    "JsonSink",
    "LineSink",
    "announce",
    "link_name",
    "packet_document",
    "summary_document",
    "tell_outcome",
]

_LINKS: Final[Mapping[int, str]] = {
    LinkType.ETHERNET: "EN10MB (Ethernet)",
    LinkType.RAW: "RAW (Raw IP)",
    LinkType.LINUX_SLL: "LINUX_SLL (Linux cooked v1)",
    LinkType.LINUX_SLL2: "LINUX_SLL2 (Linux cooked v2)",
}


def link_name(link_type: int) -> str:
    """As tcpdump names it."""
    return _LINKS.get(link_type, f"LINKTYPE {link_type}")


def announce(tap: Tap, said: set[str], *, asked_snap: bool) -> None:
    """What is captured there, and what is not, on standard error.  What was `said` is not said
    again."""
    snap = f"snapshot length {tap.snap_length} bytes"
    if not asked_snap:
        snap += " (headers; -s 0 for all)"
    tell(f"listening on {tap}, link-type {link_name(tap.link_type)}, {snap}")
    for text, why in tap.excluded:
        if text not in said:
            said.add(text)
            tell(f"not captured: {text} ({why}; --include-own captures it)")


def tell_outcome(outcome: Outcome) -> None:
    """tcpdump's three lines for each tap, on standard error."""
    several = len(outcome.taps) > 1
    for tap, one in outcome.taps.items():
        if several:
            print(f"{tap}:", file=sys.stderr)  # noqa: T201
        for text in _three_lines(one):
            print(f"{'  ' if several else ''}{text}", file=sys.stderr)  # noqa: T201
    if outcome.late:
        tell(f"{outcome.late} packets came after later ones had been handed on")
    for note in outcome.notes:
        tell(note)
    sys.stderr.flush()


def _three_lines(one: TapOutcome) -> tuple[str, str, str]:
    numbers = one.statistics
    dropped = f"{_count(numbers.dropped)} dropped by kernel"
    if numbers.dropped_waiting:
        dropped += f" ({numbers.dropped_waiting} of them while what reads this capture held it up)"
    return (
        f"{_count(one.captured)} captured",
        f"{_count(numbers.received)} received by filter",
        dropped,
    )


def _count(number: int) -> str:
    return f"{number} packet{'' if number == 1 else 's'}"


def summary_document(outcome: Outcome, files: tuple[str, ...]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "files": list(files),
        "captured": outcome.captured,
        "dropped": outcome.dropped,
        "late": outcome.late,
        "taps": [
            {
                **_tap_document(tap),
                "linkType": tap.link_type,
                "snapLength": tap.snap_length,
                "filter": tap.filter,
                "excluded": [{"filter": text, "reason": why} for text, why in tap.excluded],
                "captured": one.captured,
                "received": one.statistics.received,
                "dropped": one.statistics.dropped,
                "droppedWaiting": one.statistics.dropped_waiting,
                "freezes": one.statistics.freezes,
                "startedNs": one.started_ns,
                "endedNs": one.ended_ns,
                "end": one.end,
            }
            for tap, one in outcome.taps.items()
        ],
        "missing": [
            {"what": "capture", "why": error.message, "node": node}
            for node, error in outcome.failures.items()
        ],
    }


def _tap_document(tap: Tap) -> dict[str, Any]:
    return {
        "node": tap.node,
        "netns": tap.netns.kind.value,
        "pod": tap.pod,
        "interface": tap.interface,
        "description": tap.description,
    }


def packet_document(packet: CapturedPacket, line: str) -> dict[str, Any]:
    """`line`: its packet as text."""
    body: dict[str, Any] = {
        **_tap_document(packet.tap),
        "timeNs": packet.time_ns,
        "direction": packet.direction.value,
        "length": packet.original_length,
        "captured": len(packet.data),
        "flags": [flag.name for flag in type(packet.flags) if flag in packet.flags],
        "text": line,
        "data": packet.data.hex(),
    }
    if packet.vlan is not None:
        body["vlan"] = packet.vlan
    if packet.comment:
        body["comment"] = packet.comment
    return body


class LineSink:
    """Prints a line for each packet."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines

    def started(self, taps: tuple[Tap, ...]) -> None:
        self._lines.reserve(*taps)

    def write(self, chunk: Chunk) -> None:
        for packet in chunk.packets():
            sys.stdout.write(f"{self._lines.text(packet)}\n")
        sys.stdout.flush()

    def finish(self, outcome: Outcome) -> None:
        """Nothing is left to print."""


class JsonSink:
    """A document for each packet: printed, or kept for the whole one."""

    def __init__(self, lines: Lines, keep: Callable[[dict[str, Any]], None] | None = None) -> None:
        """`keep` None: print."""
        self._lines = lines
        self._keep = keep

    def started(self, taps: tuple[Tap, ...]) -> None:
        """Documents have no columns."""

    def write(self, chunk: Chunk) -> None:
        for packet in chunk.packets():
            body = packet_document(packet, self._lines.text(packet))
            if self._keep is not None:
                self._keep(body)
            else:
                sys.stdout.write(json.dumps(envelope("CapturedPacket", body)) + "\n")
        if self._keep is None:
            sys.stdout.flush()

    def finish(self, outcome: Outcome) -> None:
        if self._keep is None:
            summary = envelope("CaptureSummary", summary_document(outcome, ()))
            sys.stdout.write(json.dumps(summary) + "\n")
            sys.stdout.flush()
