"""A stitched connection → how it went, and where it died.

Nothing here is inferred from silence alone: a packet counts as lost only where a later tap was
open and lost nothing, and where no tap stands behind the last one, that is what is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from gketrace.capture.packets import Direction
from gketrace.capture.passages import GRACE, Fate, Flow, Repeat, Station, Unit
from gketrace.capture.plan import Crossing
from gketrace.capture.segments import ACK, FIN, RST, SYN
from gketrace.capture.stitch import Ending, StitchedConnection
from gketrace.packet import Protocol

__all__ = ["Death", "State", "deaths_of", "failed", "hop_times", "sender_text", "state_of"]

_TRIES: Final = 3
_MASK: Final = 0xFFFFFFFF
_HALF: Final = 1 << 31


class State(Enum):
    """How a connection went, as far as was captured."""

    OPEN = "open"
    """Answered; neither side has ended it."""
    CLOSED = "closed"
    """Ended with a FIN."""
    RESET = "reset"
    """Ended with a RST after it had been answered."""
    REFUSED = "refused"
    """A RST answered its first packet."""
    UNREACHABLE = "unreachable"
    """An ICMP error, and no other answer."""
    UNANSWERED = "unanswered"
    """Packets were sent, and nothing came back to where they came from."""
    STALLED = "stalled"
    """Answered, and then something was sent again and again, and never arrived or was never
    acknowledged."""
    PENDING = "pending"
    """Not answered when the capture ended, too soon to tell."""
    MIDDLE = "middle"
    """Its beginning was not captured; nothing is wrong with the rest."""


_FAILED = frozenset(
    {State.RESET, State.REFUSED, State.UNREACHABLE, State.UNANSWERED, State.STALLED}
)


def failed(state: State) -> bool:
    return state in _FAILED


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """Where packets of one direction were seen last."""

    back: bool
    """They are answers."""
    station: Station
    next: Station | Crossing | None
    """Where they should have been seen next: a tap that other packets passed, or one of the plan;
    None: there is no tap behind."""
    units: tuple[Unit, ...]
    certain: bool
    """False: the capture ended soon after, or lost packets at the next tap."""
    unacknowledged: bool = False
    """They got as far as was captured, were sent again and again, and nobody acknowledged them."""


def state_of(connection: StitchedConnection) -> State:
    """See `State`."""
    if connection.protocol != Protocol.TCP:
        return _without_tcp(connection)
    answer = connection.answer
    resets = [ending for ending in connection.endings if ending.reset]
    begun = connection.opening is not None or answer is not None
    if begun and answer is None and not _moved(connection):
        if any(not reset.by_client for reset in resets):
            return State.REFUSED
        return _silent(connection)
    if answer is not None and not _came_back(connection, answer):
        return _silent(connection)
    stuck = _stuck(connection)
    if stuck and not (resets and resets[0].time <= min(unit.begin for unit in stuck)):
        return State.STALLED
    if resets and not _after_closing(connection, resets[0]):
        return State.RESET
    if any(not ending.reset for ending in connection.endings):
        return State.CLOSED
    return State.OPEN if begun else State.MIDDLE


def _without_tcp(connection: StitchedConnection) -> State:
    if connection.back.units:
        arrived = any(_came_back(connection, unit) for unit in connection.back.units)
        return State.OPEN if arrived else _silent(connection)
    return _silent(connection)


def _silent(connection: StitchedConnection) -> State:
    if connection.errors:
        return State.UNREACHABLE
    return State.PENDING if connection.ended_early else State.UNANSWERED


def _moved(connection: StitchedConnection) -> bool:
    """Data was acknowledged, so that its beginning must have been answered."""
    return any(unit.first.flags & (SYN | RST) == 0 for unit in connection.back.units)


def _came_back(connection: StitchedConnection, answer: Unit) -> bool:
    """Whether it, or the same sent again, got as far back as was captured."""
    flow = connection.back
    same = [
        unit
        for unit in flow.units
        if unit.first.seq == answer.first.seq and unit.first.flags == answer.first.flags
    ]
    return not connection.expected_back and any(
        unit.last.station == len(flow.stations) - 1 for unit in same
    )


def _after_closing(connection: StitchedConnection, reset: Ending) -> bool:
    """A RST behind both FINs ends nothing that anybody still uses."""
    fins = [ending for ending in connection.endings if not ending.reset]
    return len({fin.by_client for fin in fins}) == 2 and reset.time >= fins[-1].time


def _stuck(connection: StitchedConnection) -> list[Unit]:
    there, back = connection.there, connection.back
    return [
        unit
        for flow, answers in ((there, back), (back, there))
        for unit in (*_never_arrived(flow), *_unacknowledged(connection, flow, answers))
    ]


def _unacknowledged(connection: StitchedConnection, flow: Flow, answers: Flow) -> list[Unit]:
    """Data that was sent at least three times, for a second or more, and that no packet of the
    other side acknowledges, wherever that was seen."""
    if connection.protocol != Protocol.TCP or any(ending.reset for ending in connection.endings):
        return []
    copies: dict[int, list[Unit]] = {}
    for unit in flow.units:
        if unit.first.size:
            copies.setdefault(unit.first.seq, []).append(unit)
    acks = [unit.first.ack for unit in answers.units if unit.first.flags & ACK]
    return [
        unit
        for seq, same in copies.items()
        if len(same) >= _TRIES
        and same[0].begin + GRACE <= connection.end
        and not any(0 < ((ack - seq) & _MASK) < _HALF for ack in acks)
        for unit in same
    ]


def _never_arrived(flow: Flow) -> list[Unit]:
    """Units that were sent again at least once, and of whose first byte no copy arrived."""
    copies: dict[int, list[Unit]] = {}
    for unit in flow.units:
        if unit.first.size or unit.first.flags & (SYN | FIN):
            copies.setdefault(unit.first.seq, []).append(unit)
    return [
        unit
        for same in copies.values()
        if all(one.fate is Fate.LOST for one in same)
        and any(one.repeat is Repeat.RETRANSMISSION for one in same)
        for unit in same
    ]


def deaths_of(connection: StitchedConnection) -> tuple[Death, ...]:
    """Where packets did not get further, the furthest place of each direction first."""
    found: list[Death] = []
    for back, flow, expected in (
        (False, connection.there, connection.expected),
        (True, connection.back, connection.expected_back),
    ):
        if flow.stations and expected:
            last = len(flow.stations) - 1
            units = tuple(unit for unit in flow.units if unit.last.station == last)
            found.append(
                Death(
                    back=back,
                    station=flow.stations[last],
                    next=expected[0],
                    units=units,
                    certain=True,
                )
            )
        places: dict[int, list[Unit]] = {}
        for unit in flow.units:
            if unit.fate is not Fate.ARRIVED:
                places.setdefault(unit.last.station, []).append(unit)
        for place, gone in sorted(places.items(), reverse=True):
            # Of the latest it is too soon to tell: they do not make the others less certain.
            lost = [unit for unit in gone if unit.fate is Fate.LOST]
            found.append(
                Death(
                    back=back,
                    station=flow.stations[place],
                    next=flow.stations[place + 1],
                    units=tuple(lost or gone),
                    certain=bool(lost),
                )
            )
    there, back_flow = connection.there, connection.back
    for back, flow, answers in ((False, there, back_flow), (True, back_flow, there)):
        units = tuple(_unacknowledged(connection, flow, answers))
        if units and not any(death.back == back for death in found):
            place = max(unit.last.station for unit in units)
            found.append(
                Death(
                    back=back,
                    station=flow.stations[place],
                    next=None,
                    units=units,
                    certain=True,
                    unacknowledged=True,
                )
            )
    if not found and there.stations and state_of(connection) is State.UNANSWERED:
        last = len(there.stations) - 1
        units = tuple(unit for unit in there.units if unit.last.station == last)
        found.append(
            Death(back=False, station=there.stations[last], next=None, units=units, certain=True)
        )
    return tuple(found)


def sender_text(connection: StitchedConnection, ending: Ending) -> str:
    """Who sent a FIN or RST: ``pod default/web-0``, ``node n1``, ``203.0.113.10``.

    What comes in where it is first seen was sent from beyond.  A node makes the packets of its own
    processes and of its rules (``REJECT --reject-with tcp-reset``); what goes out of it may also
    come from a pod whose interfaces were not captured, and then only the address is told.
    """
    tap, direction = ending.station.tap, ending.station.direction
    if direction is Direction.OUT and tap.pod:
        return f"pod {tap.pod}"
    if direction is Direction.OUT and connection.made_at(ending):
        return f"node {tap.node}"
    address = str(connection.first.src if ending.by_client else connection.last.dst)
    if direction is Direction.OUT:
        return f"{address}, as first seen going out of node {tap.node}"
    return address


def hop_times(flow: Flow) -> list[list[int]]:
    """For each station behind the first: the nanoseconds since the one before, of each packet
    that was seen whole at both.  By corrected clocks."""
    made: list[list[int]] = [[] for _ in flow.stations]
    for unit in flow.units:
        for one, other in zip(unit.passages, unit.passages[1:], strict=False):
            if other.station == one.station + 1 and not one.merged and not other.merged:
                made[other.station].append(other.time - one.time)
    return made[1:]
