"""What several matches share, and the match that nobody knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from gketrace.ruleset.model import Match
from gketrace.ruleset.options import Option, quote
from gketrace.simulate.state import NO, YES, Answer, Environment, PacketState, Ternary, unknown

if TYPE_CHECKING:
    from typing import Self

__all__ = [
    "UnknownMatch",
    "by_name",
    "every",
    "is_tracked",
    "negation",
    "only_options",
    "quote",
    "within",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownMatch(Match):
    """A match that is not in the registration tuple, or whose options are not understood."""

    module: ClassVar[str] = ""

    text: str
    """Verbatim."""
    reason: str

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        raise ValueError("made by the reader only")

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        return unknown(f"{self.text}: {self.reason}")

    def render(self) -> str:
        return self.text


def every(answers: Iterable[Answer]) -> Answer:
    """YES when all are; NO as soon as one is; else the first that is not known."""
    open_question: Answer | None = None
    for answer in answers:
        if answer.kind is Ternary.NO:
            return NO
        if answer.kind is Ternary.UNKNOWN and open_question is None:
            open_question = answer
    return open_question or YES


def within(number: int | None, pair: tuple[int, int], *, negated: bool, what: str) -> Answer:
    """Is `number` within `pair` (both ends included)?  ``None``: not known, unless `pair` is all
    of 0 to 65535."""
    if number is None:
        if pair == (0, 0xFFFF):
            return NO if negated else YES
        return unknown(f"the {what} is not known")
    return YES if (pair[0] <= number <= pair[1]) is not negated else NO


def by_name(options: tuple[Option, ...], aliases: Mapping[str, str] = {}) -> dict[str, Option]:
    """Options by name, `aliases` resolved.  Raises `ValueError` on a second of one name."""
    found: dict[str, Option] = {}
    for option in options:
        name = aliases.get(option.name, option.name)
        if name in found:
            raise ValueError(f"{option.name} twice")
        found[name] = option
    return found


def only_options(options: tuple[Option, ...], count: int) -> None:
    """Raises `ValueError` when there are not exactly `count` options."""
    if len(options) != count:
        raise ValueError(f"{len(options)} options where {count} are expected")


def negation(negated: bool) -> str:
    """``"! "`` or nothing."""
    return "! " if negated else ""


def is_tracked(state: PacketState) -> bool:
    """Does the packet have an nf_conn?  Not in raw, not when INVALID or UNTRACKED."""
    return state.ct is not None and state.ct.orig is not None
