"""What a joiner is told and tells."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from gketrace.connections import Connection, Place
from gketrace.follow.entries import EventKind, Sight
from gketrace.follow.outcome import UNANSWERED_AFTER, Judgement

__all__ = ["Followed", "Limits", "Phase", "Step"]


class Phase(Enum):
    """Why a connection is told."""

    OPENED = "opened"
    """It has been open for a while."""
    UNANSWERED = "unanswered"
    """Nobody has answered for a while; it may still be."""
    CLOSED = "closed"
    """It is over: the record of it."""
    STILL_OPEN = "still open"
    """The following ended before it did, or there were too many: the record of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of memory, and how long to wait.  Seconds."""

    flows: int = 100_000
    """Connections that are not over; beyond that, the one that changed least recently is told."""
    remembered: int = 1_000_000
    """Entries of connections that were told, whose last events must not be taken for news."""
    remember_for: float = 180.0
    """TIME_WAIT is 120 s."""
    settle: float = 0.3
    """From the end of a connection to its record, at least: other places' events come later."""
    settle_at_most: float = 3.0
    """… and at most, when a place has missed the end, or its counters are not to be had."""
    behind_at_most: float = 60.0
    """… and when a place is behind with its events."""
    recover_at_most: float = 30.0
    """… and when a place has lost events and its table has not been read again, from the loss."""
    late: float = 5.0
    """How long after its record a connection still takes in what comes of it."""
    opened_after: float = 1.0
    unanswered_after: float = UNANSWERED_AFTER + 0.5
    skew: float = 0.25
    """By which the clocks of two places differ, and the time until an event is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """One connection at one moment."""

    number: int
    """In the order of their beginning; the same in each phase."""
    phase: Phase
    connection: Connection
    sights: tuple[Sight, ...]
    """Of the connection's halves, in their order."""
    judgement: Judgement
    began: float | None
    """None: before it was followed."""
    ended: float | None
    """None: it is not over, or its end was not seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One event, for those who want each."""

    number: int
    at: float
    place: Place
    kind: EventKind
    polled: bool
    state: str
