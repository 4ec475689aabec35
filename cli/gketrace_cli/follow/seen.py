"""What packets say of a followed connection, beside what conntrack does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from gketrace.capture.passages import Fate, Repeat, Station
from gketrace.capture.stitch import StitchedConnection
from gketrace.capture.verdicts import State, deaths_of, hop_times, sender_text, state_of
from gketrace.follow.outcome import Judgement, Outcome
from gketrace_cli.capture.connection_document import connection_document
from gketrace_cli.follow.packets import SeenPackets

__all__ = [
    "Hop",
    "judge_alone",
    "packet_lines",
    "packets_document",
    "place_of",
    "refine",
    "times_of",
]

Hop = tuple[str, str]
"""From where to where: ``NODE INTERFACE DIRECTION``, pods' with ``NS/NAME:`` before it."""
_ENDED: Final = frozenset({Outcome.CLOSED, Outcome.OPEN, Outcome.EXPIRED, Outcome.REMOVED})
_LARGE: Final = 256
"""Bytes of data: what is smaller fits any path (RFC 791: 576 with its headers)."""
_OUTCOMES: Final = {
    State.UNANSWERED: Outcome.UNANSWERED,
    State.REFUSED: Outcome.REFUSED,
    State.UNREACHABLE: Outcome.UNREACHABLE,
}


def refine(judgement: Judgement, seen: SeenPackets) -> Judgement:
    """Conntrack's judgement with what packets know better: who sent a RST, ICMP errors, where the
    last packet was seen, and that something never arrived though the connection looks open."""
    connection = seen.connection
    state = state_of(connection)
    document = _document(seen)
    resets = [one for one in connection.endings if one.reset]
    errors = [str(one["text"]) for one in document["errors"]]
    deaths = [str(one["text"]) for one in document["deaths"]]
    outcome = judgement.outcome
    if outcome in (Outcome.RESET, Outcome.REFUSED) and resets:
        by = sender_text(connection, resets[0])
        return replace(judgement, because=f"RST by {by}")
    if outcome is Outcome.REFUSED and errors:
        return replace(judgement, because=f"{errors[0]}; {judgement.because}")
    if outcome is Outcome.UNANSWERED:
        if errors:
            return replace(
                judgement, outcome=Outcome.UNREACHABLE, failed=judgement.failed, because=errors[0]
            )
        return replace(judgement, because="; ".join([judgement.because, *deaths[:1]]))
    if outcome in _ENDED and state is State.STALLED:
        facts = [*errors[:1], *deaths[:1], *_too_large(connection)]
        because = "; ".join(facts) or "data was sent again and again"
        return Judgement(outcome=Outcome.STALLED, failed=True, because=because)
    if outcome in (Outcome.NO_RETURN, Outcome.HANDSHAKE) and deaths:
        return replace(judgement, because="; ".join([judgement.because, deaths[0]]))
    return judgement


def _too_large(connection: StitchedConnection) -> Iterator[str]:
    """At the first place of death: that size alone tells what is lost from what is not."""
    for death in deaths_of(connection)[:1]:
        flow = connection.back if death.back else connection.there
        lost = [unit.first.size for unit in death.units]
        came = [
            unit.first.size
            for unit in flow.units
            if unit.fate is Fate.ARRIVED and unit not in death.units
        ]
        if lost and came and min(lost) > max(_LARGE, *came):
            yield (
                f"each of these has {min(lost):,} bytes of data or more, and packets with up to "
                f"{max(came):,} came through: as where the MTU is too small and no ICMP says so"
            )


def judge_alone(seen: SeenPackets) -> Judgement:
    """Of packets that have no entry anywhere; their state is one of those that failed."""
    connection = seen.connection
    state = state_of(connection)
    document = _document(seen)
    facts = [f"RST by {sender_text(connection, e)}" for e in connection.endings[:1] if e.reset]
    facts += [str(one["text"]) for one in document["errors"][:1]]
    if state is State.UNANSWERED:
        facts += [str(one["text"]) for one in document["deaths"][:1]]
    facts.append("no node has an entry of it: it was dropped or rejected before that")
    return Judgement(outcome=_OUTCOMES[state], failed=True, because="; ".join(facts))


def _document(seen: SeenPackets) -> dict[str, Any]:
    return connection_document(seen.connection, {}, seen.clocks)


def packets_document(seen: SeenPackets) -> dict[str, Any]:
    """``packets`` of a record."""
    whole = _document(seen)
    kept = ("state", "answeredNs", "there", "back", "endings", "errors", "deaths", "contested")
    return {**{key: whole[key] for key in kept}, "complete": seen.whole}


def place_of(station: Station) -> str:
    tap = station.tap
    pod = f"{tap.pod}:" if tap.pod else ""
    return f"{tap.node} {pod}{tap.interface} {station.direction.value}"


def times_of(seen: SeenPackets) -> Iterator[tuple[Hop, list[int], int | None]]:
    """Each hop, the nanoseconds that packets took over it, and what clocks leave open of them."""
    for flow in (seen.connection.there, seen.connection.back):
        if len(flow.stations) < 2:
            continue
        for place, times in enumerate(hop_times(flow), 1):
            before, here = flow.stations[place - 1], flow.stations[place]
            bound = seen.clocks.width(before.tap.node, here.tap.node)
            yield (place_of(before), place_of(here)), times, bound


def packet_lines(seen: SeenPackets, because: str) -> list[str]:
    """For people, beside the connection's line and `because`, the outcome's."""
    from statistics import median

    from gketrace_cli.capture.connection_words import span

    flow = seen.connection.there
    lines = []
    if flow.stations:
        way = [place_of(flow.stations[0])]
        for place, times in enumerate(hop_times(flow), 1):
            one = place_of(flow.stations[place])
            way.append(f"+{span(median(times))} {one}" if times else one)
        lines.append("packets: " + " → ".join(way))
    counts = [
        f"{number} {text}"
        for number, text in (
            (flow.count(Repeat.RETRANSMISSION), "retransmitted there"),
            (seen.connection.back.count(Repeat.RETRANSMISSION), "retransmitted back"),
        )
        if number
    ]
    if counts:
        lines.append(", ".join(counts))
    errors = dict.fromkeys(str(one["text"]) for one in _document(seen)["errors"])
    lines += [f"packets: {text}" for text in errors if text not in because]
    if not seen.whole:
        lines.append("not all of its packets were captured")
    return lines
