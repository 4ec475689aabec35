"""What an expression gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import Final, TypeAlias

from gketrace.simulate.state import CERTAIN

__all__ = [
    "BREAK",
    "Branch",
    "Break",
    "NotKnown",
    "Scalar",
    "Value",
    "certain",
    "combine",
    "merged",
    "not_known",
    "times",
]


class Break(Enum):
    """NFT_BREAK: the rule ends here and has not matched."""

    BREAK = "break"


BREAK: Final = Break.BREAK


@dataclass(frozen=True, slots=True)
class NotKnown:
    """A register whose content is not known."""

    reason: str


Scalar: TypeAlias = int | str
"""Names of interfaces, kinds and helpers are text; all else is a number, in host order."""
Value: TypeAlias = Scalar | tuple[Scalar | NotKnown, ...] | NotKnown | Break
"""A tuple is a concatenation; single fields of it may be unknown."""


@dataclass(frozen=True, slots=True)
class Branch:
    """One thing that an expression may give."""

    value: Value
    chance: Fraction | None = CERTAIN
    """None: it is not known how likely."""
    drawn: str = ""
    """What was drawn, for people."""
    note: str = ""
    """Evidence: the element of a map that was found."""


def certain(value: Value, note: str = "") -> tuple[Branch, ...]:
    return (Branch(value, note=note),)


def not_known(reason: str) -> tuple[Branch, ...]:
    return (Branch(NotKnown(reason)),)


def times(one: Fraction | None, other: Fraction | None) -> Fraction | None:
    if one is None or other is None:
        return None
    # A product of fractions looks for common factors, also where one of them is 1.
    return other if one is CERTAIN else one if other is CERTAIN else one * other


def combine(
    parts: Iterable[tuple[Branch, ...]], join: Callable[[tuple[Value, ...]], Value]
) -> tuple[Branch, ...]:
    """All combinations; a part that breaks breaks the whole, from left to right."""
    parts = list(parts)
    if all(len(branches) == 1 and _plain(branches[0]) for branches in parts):
        return (Branch(join(tuple([branches[0].value for branches in parts]))),)
    open_: list[tuple[tuple[Value, ...], Branch]] = [((), Branch(0))]
    done: list[Branch] = []
    for branches in parts:
        further: list[tuple[tuple[Value, ...], Branch]] = []
        for values, so_far in open_:
            for branch in branches:
                both = Branch(
                    branch.value,
                    times(so_far.chance, branch.chance),
                    branch.drawn or so_far.drawn,
                    "; ".join(filter(None, (so_far.note, branch.note))),
                )
                if branch.value is BREAK:
                    done.append(both)
                else:
                    further.append(((*values, branch.value), both))
        open_ = further
    for values, branch in open_:
        done.append(Branch(join(values), branch.chance, branch.drawn, branch.note))
    return tuple(done)


def _plain(branch: Branch) -> bool:
    """A value that is certain, and that needs no evidence."""
    return (
        branch.chance is CERTAIN
        and branch.value is not BREAK
        and not branch.drawn
        and not branch.note
    )


def merged(branches: Iterable[Branch]) -> tuple[Branch, ...]:
    """Branches that give the same are one; their chances add up."""
    branches = tuple(branches)
    if len(branches) == 1:
        return branches
    found: dict[Value, Branch] = {}
    for branch in branches:
        known = found.get(branch.value)
        if known is None:
            found[branch.value] = branch
            continue
        both = (known.chance, branch.chance)
        total = None if both[0] is None or both[1] is None else both[0] + both[1]
        found[branch.value] = Branch(branch.value, total, known.drawn, known.note)
    return tuple(found.values())
