"""A flow as it is now → what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from gketrace.connections import Half, Place, PlaceEntries, join_connections
from gketrace.conntrack_records import STATE_NAMES, Record
from gketrace.follow.entries import POLLED, EventKind, Seen
from gketrace.follow.flow import Flow
from gketrace.follow.model import Followed, Phase, Step
from gketrace.follow.outcome import judge
from gketrace.follow.places import Here
from gketrace.packet import IPAddress

__all__ = ["records_of", "step_of"]


def records_of(
    flow: Flow,
    phase: Phase,
    now: float,
    places: Mapping[Place, Here],
    owner: Callable[[IPAddress], str],
) -> list[Followed]:
    """Usually one; several where the entries do not say what belongs together.  `places`: all that
    are followed."""
    by_place: dict[Place, list[Record]] = {place: [] for place in places}
    by_record: dict[int, Seen] = {}
    for one in flow.seen:
        by_place.setdefault(one.place, []).append(one.record)
        by_record[id(one.record)] = one
    tables = [
        PlaceEntries(
            place=place,
            entries=records,
            complete=(here := places.get(place)) is not None
            and here.complete
            and here.heard >= flow.first_heard,  # else its event may be on the way
        )
        for place, records in by_place.items()
    ]
    found = []
    for connection in join_connections(tables, owner):
        seen = [by_record[id(half.seen)] for half in connection.halves]
        # Decoded once: what a half has is asked for again and again.
        halves = tuple(Half(one.place, one.entry, one.reversed) for one in connection.halves)
        connection = replace(connection, halves=halves)
        sights = tuple(one.sight() for one in seen)
        begun = [one.began for one in seen if one.began is not None]
        over = [one.over_at for one in seen if one.over_at is not None and one.end_seen]
        found.append(
            Followed(
                number=flow.number,
                phase=phase,
                connection=connection,
                sights=sights,
                judgement=judge(connection, sights, now=now, protocol=seen[0].record.protocol),
                began=min(begun, default=None),
                ended=max(over, default=None) if phase is Phase.CLOSED else None,
            )
        )
    return found


def step_of(flow: Flow, one: Seen, kind: int, at: float) -> Step:
    """One event of one of its entries; `kind` as it was fed."""
    state = one.record.state
    return Step(
        number=flow.number,
        at=at,
        place=one.place,
        kind=EventKind(kind & ~POLLED),
        polled=bool(kind & POLLED),
        state=STATE_NAMES[state] if state < len(STATE_NAMES) else "",
    )
