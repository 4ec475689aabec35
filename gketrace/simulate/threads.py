"""The ways through a chain that are still open, and how they share what they have in common."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Final

from gketrace.ruleset.model import Rule
from gketrace.simulate.state import CERTAIN, PacketState
from gketrace.trace import Step

__all__ = ["Fork", "Link", "Thread", "common_start", "items_of", "joined_exits"]

_ASSUMPTIONS: Final = 4
"""How many unknowns an alternative's `because` spells out."""


class Link:
    """A list that grows at its end and is shared by the threads that forked from it."""

    __slots__ = ("before", "item")

    def __init__(self, before: Link | None, item: Step | str) -> None:
        self.before, self.item = before, item


class Fork:
    """An unknown match: what the thread was before, and whether anything went another way since."""

    __slots__ = ("lost", "parent", "reason", "rule")

    def __init__(self, parent: Thread, rule: Rule, reason: str) -> None:
        self.parent, self.rule, self.reason = parent, rule, reason
        self.lost = False


class Thread:
    """One way through the rules so far."""

    __slots__ = ("assumed", "chance", "drawn", "forks", "missed", "state", "steps")

    def __init__(self, state: PacketState) -> None:
        self.state = state
        self.steps: Link | None = None
        self.chance: Fraction | None = CERTAIN
        self.assumed: Link | None = None
        """What it hangs on, oldest first."""
        self.drawn = ""
        """The last draw that it won."""
        self.missed = 0
        """Draws lost since."""
        self.forks: tuple[Fork, ...] = ()

    def copy(self) -> Thread:
        other = Thread(self.state)
        other.steps, other.chance, other.assumed = self.steps, self.chance, self.assumed
        other.drawn, other.missed, other.forks = self.drawn, self.missed, self.forks
        return other

    def lose(self) -> None:
        """It leaves the chain for good: its forks cannot be joined without a loss."""
        for fork in self.forks:
            fork.lost = True

    def because(self) -> str:
        parts = [str(item) for item in items_of(self.assumed)]
        if len(parts) > _ASSUMPTIONS:
            more = len(parts) - _ASSUMPTIONS
            parts = [f"{more} earlier assumptions", *parts[-_ASSUMPTIONS:]]
        if self.drawn:
            parts.append(self.drawn)
        if self.missed:
            parts.append(f"{self.missed} draw{'s' if self.missed > 1 else ''} lost")
        return "; ".join(parts)


def items_of(link: Link | None) -> list[Step | str]:
    items: list[Step | str] = []
    while link is not None:
        items.append(link.item)
        link = link.before
    items.reverse()
    return items


def joined_exits(
    exits: list[tuple[Fraction | None, PacketState]],
) -> Iterator[tuple[Fraction | None, PacketState]]:
    """Exits that leave the packet the same are one."""
    states: list[PacketState] = []
    for _, state in exits:
        if state not in states:
            states.append(state)
    for state in states:
        total: Fraction | None = Fraction(0)
        for chance, left in exits:
            if left == state:
                total = None if total is None or chance is None else total + chance
        yield total, state


def common_start(links: list[Link | None]) -> Link | None:
    """The longest list that all have in common at their beginning."""
    chains: list[list[Link]] = []
    for link in links:
        way: list[Link] = []
        while link is not None:
            way.append(link)
            link = link.before
        chains.append(way[::-1])
    last: Link | None = None
    for level in zip(*chains, strict=False):
        if any(link is not level[0] for link in level):
            break
        last = level[0]
    return last
