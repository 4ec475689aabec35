"""What became of a connection, as far as conntrack says, and what that rests on.

Conntrack does not keep who sent a RST (enum tcp_conntrack has one CLOSE for both), nor ICMP errors;
packets do.  Source: kernel net/netfilter/nf_conntrack_proto_tcp.c, nf_conntrack_core.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from gketrace.connections import Connection, Place
from gketrace.follow.entries import Sight
from gketrace.packet import Protocol

__all__ = ["FAILED", "UNANSWERED_AFTER", "Judgement", "Outcome", "judge"]

UNANSWERED_AFTER: Final = 3.0
"""Seconds without an answer that make a connection unanswered: the second SYN is sent after one
second, the third after three (RFC 6298)."""
_EXACT: Final = 0.05
"""Seconds: what times of events are known to, at best."""
_TRACKED_STATES: Final = frozenset({Protocol.TCP, Protocol.SCTP, Protocol.DCCP})
_CLOSING: Final = frozenset(
    {"FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "SHUTDOWN_SENT", "SHUTDOWN_ACK_SENT"}
)
"""At least one side has closed in order: a RST after that is how some programs end."""


class Outcome(Enum):
    """What became of a connection."""

    OPENING = "opening"
    """No answer yet."""
    OPEN = "open"
    """Answered, and not over."""
    CLOSED = "closed"
    """Over in the usual way; without states (UDP), it was answered and has expired."""
    RESET = "reset"
    """A RST ended it, after the other side had answered, before either had closed its side."""
    REFUSED = "refused"
    """Its entries were removed at once, without an answer other than what removed them: a RST."""
    UNANSWERED = "unanswered"
    """No answer."""
    NO_RETURN = "answer lost"
    """One node has seen an answer, a node before it none."""
    HANDSHAKE = "handshake unfinished"
    """The answer was seen everywhere, and no third packet of the handshake."""
    EXPIRED = "expired"
    """Answered, never closed, and its entries ran out of time."""
    REMOVED = "removed"
    """Answered, not closed, and its entries were deleted before their time."""
    STALLED = "stalled"
    """Answered, and then something was sent again and again that never arrived or was never
    acknowledged.  Packets say so, not conntrack."""
    UNREACHABLE = "unreachable"
    """An ICMP error, and no other answer.  Packets say so."""
    ASTRAY = "astray"
    """A Service's, led to what is no endpoint of it, whatever became of it there.  Objects say so,
    not conntrack."""
    UNSEEN = "end not seen"
    """It ended while events were lost."""


FAILED: Final = frozenset(
    {
        Outcome.RESET,
        Outcome.REFUSED,
        Outcome.UNANSWERED,
        Outcome.NO_RETURN,
        Outcome.HANDSHAKE,
        Outcome.STALLED,
        Outcome.UNREACHABLE,
        Outcome.ASTRAY,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """An outcome and its evidence."""

    outcome: Outcome
    failed: bool
    because: str = ""
    """One sentence; empty where the states alone say it."""
    last: Place | None = None
    """Of what was not answered: the last place that has an entry of it, so the packets left it."""
    next_node: str = ""
    """… and the node that they should have come to next, which was read and has none."""


def judge(
    connection: Connection, sights: Sequence[Sight], *, now: float, protocol: int
) -> Judgement:
    """`sights` are those of `connection.halves`, in their order; `now`: by the places' clocks."""
    states = {state for sight in sights for state in sight.states}
    replied = [sight.replied for sight in sights]
    if not any(replied):
        return _unanswered(connection, sights, now=now, protocol=protocol)
    if not all(replied) and (lost := _no_return(connection, sights, now)) is not None:
        return lost
    if states & _CLOSING:
        ended = all(s.ended is not None for s in sights) or bool(states & {"TIME_WAIT", "CLOSE"})
        return Judgement(outcome=Outcome.CLOSED if ended else Outcome.OPEN, failed=False)
    if "CLOSE" in states:
        if "ESTABLISHED" in states or "SYN_RECV" in states:
            because = "conntrack went to CLOSE without a FIN; it does not keep who sent the RST"
            return Judgement(outcome=Outcome.RESET, failed=True, because=because)
        return Judgement(
            outcome=Outcome.REFUSED, failed=True, because="conntrack went to CLOSE: a RST answered"
        )
    ended = all(sight.ended is not None for sight in sights)
    if not ended:
        return _lasting(states, sights, now)
    if not all(sight.complete for sight in sights):
        return Judgement(
            outcome=Outcome.UNSEEN, failed=False, because="events were lost while it was open"
        )
    if protocol not in _TRACKED_STATES:
        return Judgement(outcome=Outcome.CLOSED, failed=False)
    early = max((s.left for s in sights if s.left is not None), default=None)
    if early is not None:
        because = f"its entry was deleted {early:.0f} s before its time"
        return Judgement(outcome=Outcome.REMOVED, failed=False, because=because)
    if states <= {"SYN_SENT", "SYN_SENT2", "SYN_RECV"}:
        return Judgement(outcome=Outcome.HANDSHAKE, failed=True)
    return Judgement(outcome=Outcome.EXPIRED, failed=False)


def _lasting(states: set[str], sights: Sequence[Sight], now: float) -> Judgement:
    if "SYN_RECV" not in states or not states <= {"SYN_SENT", "SYN_SENT2", "SYN_RECV"}:
        return Judgement(outcome=Outcome.OPEN, failed=False)
    age = now - min((s.began for s in sights if s.began is not None), default=now)
    if age <= UNANSWERED_AFTER:
        return Judgement(outcome=Outcome.OPENING, failed=False)
    because = f"it has been in SYN_RECV for {age:.0f} s"
    return Judgement(outcome=Outcome.HANDSHAKE, failed=True, because=because)


def _unanswered(
    connection: Connection, sights: Sequence[Sight], *, now: float, protocol: int
) -> Judgement:
    last = connection.halves[-1].place
    next_node = next((one.node for one in connection.unseen if one.node != last.node), "")
    stateful = protocol in _TRACKED_STATES
    early = [sight for sight in sights if sight.left is not None]
    if early and stateful:
        one = early[0]
        lasted = ""
        if one.began is not None and one.ended is not None:
            after = max(one.ended - one.began, 0)
            took = (
                f"{1000 * after:.0f} ms" if after >= _EXACT else f"less than {1000 * _EXACT:.0f} ms"
            )
            lasted = f" {took} after it was made"
        because = (
            f"its entry on {one.place} was removed{lasted}, {one.left:.0f} s before its time: "
            "conntrack does so for a RST that is the first answer"
        )
        return Judgement(outcome=Outcome.REFUSED, failed=True, because=because, last=last)
    if any(sight.ended is not None and not sight.complete for sight in sights):
        return Judgement(
            outcome=Outcome.UNSEEN, failed=False, because="events were lost while it was open"
        )
    begun = [sight.began for sight in sights if sight.began is not None]
    ended = all(sight.ended is not None for sight in sights)
    age = now - min(begun) if begun else None
    # One that was there already has been waiting for longer than we know.
    if not ended and age is not None and age <= UNANSWERED_AFTER:
        return Judgement(outcome=Outcome.OPENING, failed=False)
    if ended:
        because = "its entries expired without an answer"
    elif age is None:
        because = "no answer since before it was followed"
    else:
        because = f"no answer for {age:.0f} s"
    return Judgement(
        outcome=Outcome.UNANSWERED,
        failed=stateful,
        because=because,
        last=last,
        next_node=next_node,
    )


def _no_return(connection: Connection, sights: Sequence[Sight], now: float) -> Judgement | None:
    """None: the places agree, or it is too early to say that they do not."""
    silent = [s for s in sights if not s.replied]
    if any(not sight.complete for sight in silent):
        return None
    begun = [sight.began for sight in sights if sight.began is not None]
    ended = all(sight.ended is not None for sight in sights)
    if not ended and (not begun or now - min(begun) <= UNANSWERED_AFTER):
        return None
    answered = next(sight.place for sight in sights if sight.replied)
    because = f"{answered} has seen an answer, {silent[-1].place} has not"
    return Judgement(
        outcome=Outcome.NO_RETURN, failed=True, because=because, last=connection.halves[-1].place
    )
