"""``mark`` and ``connmark``.

Source: mark_mt() in net/netfilter/xt_mark.c, connmark_mt() in xt_connmark.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from gketrace.ruleset.model import Match
from gketrace.ruleset.options import Option, value_mask
from gketrace.simulate.matches.base import is_tracked, negation, only_options
from gketrace.simulate.state import NO, Answer, Environment, PacketState, decide, unknown

if TYPE_CHECKING:
    from typing import Self

__all__ = ["TEMPLATE_MARK", "ConnmarkMatch", "MarkMatch"]

TEMPLATE_MARK: Final = "earlier packets may have marked the template that a CT target attached"
"""xt_connmark writes into templates, which live as long as their rule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkMatch(Match):
    """``-m mark --mark VALUE[/MASK]``."""

    module: ClassVar[str] = "mark"
    OPTIONS: ClassVar[Mapping[str, int]] = {"--mark": 1}

    value: int
    mask: int = 0xFFFFFFFF
    negated: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        only_options(options, 1)
        value, mask = value_mask(options[0].value)
        return cls(value=value, mask=mask, negated=options[0].negated)

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        return decide(state.packet.mark & self.mask == self.value, negated=self.negated)

    def render(self) -> str:
        mask = "" if self.mask == 0xFFFFFFFF else f"/{self.mask:#x}"
        return f"-m {self.module} {negation(self.negated)}--mark {self.value:#x}{mask}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnmarkMatch(MarkMatch):
    """``-m connmark --mark VALUE[/MASK]``; never matches, negated or not, what is not tracked."""

    module: ClassVar[str] = "connmark"

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        if state.ct is None or not is_tracked(state):
            return NO
        if state.ct.template:
            return unknown(TEMPLATE_MARK)
        return decide(state.ct.mark & self.mask == self.value, negated=self.negated)
