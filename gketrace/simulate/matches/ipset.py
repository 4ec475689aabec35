"""``set``: membership in an ipset.

Source: set_match_v4() in net/netfilter/xt_set.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from gketrace.ruleset.model import Match
from gketrace.ruleset.options import Option, flags_text
from gketrace.simulate.matches.base import by_name, negation
from gketrace.simulate.matches.set_lookup import in_set
from gketrace.simulate.state import (
    NO,
    YES,
    Answer,
    Environment,
    PacketState,
    Ternary,
    unknown,
)
from gketrace.snapshot import Unavailable

if TYPE_CHECKING:
    from typing import Self

__all__ = ["SetMatch", "parse_sides"]

_COUNTERS = (
    "--packets-eq",
    "--packets-lt",
    "--packets-gt",
    "--bytes-eq",
    "--bytes-lt",
    "--bytes-gt",
)


def parse_sides(text: str) -> tuple[str, ...]:
    """``src,dst`` → its words.  Raises `ValueError`."""
    words = tuple(text.lower().split(","))
    if not 1 <= len(words) <= 6 or not {"src", "dst"}.issuperset(words):
        raise ValueError(f"no list of src and dst: {text}")
    return words


@dataclass(frozen=True, slots=True, kw_only=True)
class SetMatch(Match):
    """``-m set --match-set NAME src,dst``."""

    module: ClassVar[str] = "set"
    OPTIONS: ClassVar[Mapping[str, int]] = {
        "--match-set": 2,
        "--return-nomatch": 0,
        "--update-counters": 0,
        "--update-subcounters": 0,
        **dict.fromkeys(_COUNTERS, 1),
    }

    name: str
    sides: tuple[str, ...]
    negated: bool = False
    return_nomatch: bool = False
    still: tuple[str, ...] = ()
    """``--update-counters``, ``--update-subcounters`` that are negated."""
    counters: tuple[tuple[str, str, bool], ...] = ()
    """Comparisons with the element's counters: option, value, negated."""

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        option = found.get("--match-set")
        if option is None:
            raise ValueError("set without --match-set")
        return cls(
            name=option.args[0],
            sides=parse_sides(option.args[1]),
            negated=option.negated,
            return_nomatch="--return-nomatch" in found,
            still=tuple(o.name for o in options if o.name.startswith("--update") and o.negated),
            counters=tuple((o.name, o.value, o.negated) for o in options if o.name in _COUNTERS),
        )

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        ipset = env.ipset(self.name)
        if isinstance(ipset, Unavailable):
            return unknown(f"set {self.name}: {ipset.reason}")
        answer = in_set(ipset, self.sides, state, env, return_nomatch=self.return_nomatch)
        if answer.kind is Ternary.UNKNOWN:
            return answer
        hit = (answer is YES) is not self.negated
        if hit and self.counters:
            return unknown(f"the counters of set {self.name} are not read")
        return YES if hit else NO

    def render(self) -> str:
        return (
            f"-m set {negation(self.negated)}--match-set {self.name} {','.join(self.sides)}"
            + flags_text(((self.return_nomatch, "--return-nomatch"),))
            + "".join(f" ! {name}" for name in self.still)
            + "".join(f" {negation(n)}{name} {value}" for name, value, n in self.counters)
        )
