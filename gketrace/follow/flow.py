"""The entries of one connection, as far as they have come."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address

from gketrace.connections import Place
from gketrace.follow.entries import Seen
from gketrace.packet import IPAddress

__all__ = ["Flow"]


class Flow:
    """Entries that tuples put together, of one generation.  Mutable; the joiner's own."""

    __slots__ = (
        "changed",
        "done",
        "due",
        "merged",
        "number",
        "opened",
        "seen",
        "told_at",
        "waiting",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        """In the order in which they were first heard of."""
        self.seen: list[Seen] = []
        self.changed = 0.0
        self.opened = False
        """Told as open."""
        self.waiting = False
        """Told as unanswered."""
        self.done = False
        """Told as closed: what else comes of it is no news."""
        self.told_at = 0.0
        self.due: float | None = None
        """When it is to be looked at again."""
        self.merged: Flow | None = None
        """The one that it became part of."""

    @property
    def began(self) -> float | None:
        return min((one.began for one in self.seen if one.began is not None), default=None)

    @property
    def first_heard(self) -> float:
        return min(one.began if one.began is not None else one.changed for one in self.seen)

    @property
    def earliest(self) -> float:
        """It surely did not begin before.  What a reading of the table says of that is vague: it
        counts only where nothing else is known."""
        begun = [one for one in self.seen if one.began is not None]
        return min(
            one.since if one.since is not None else one.changed for one in begun or self.seen
        )

    @property
    def over_at(self) -> float | None:
        """When the first place saw its end; None: none has."""
        return min((one.over_at for one in self.seen if one.over_at is not None), default=None)

    @property
    def over(self) -> bool:
        return all(one.over_at is not None for one in self.seen)

    @property
    def replied(self) -> bool:
        return any(one.replied for one in self.seen)

    def lacks(self, place: Place, owner: Callable[[IPAddress], str]) -> bool:
        """Whether an entry of the place may be part of it that is not, or not to its end: one of
        its addresses is the place's node's."""
        mine = [one for one in self.seen if one.place == place]
        if mine:
            return any(one.ended is None for one in mine)
        ends = {end for one in self.seen for key in (one.taken, one.let_out) for end in key[:2]}
        return any(owner(ip_address(end)) == place.node for end in ends)

    def rival(self, other: Seen) -> Seen | None:
        """An entry of the same place with one of the other's tuples, which are unique in a table:
        so the two are of different times."""
        for one in self.seen:
            if one.place == other.place and (
                one.taken == other.taken or one.let_out == other.let_out
            ):
                return one
        return None
