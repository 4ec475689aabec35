"""SET: adds the packet's element to an ipset, or deletes it.

Source: set_target_v3() in net/netfilter/xt_set.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from gketrace.ruleset.model import Target
from gketrace.ruleset.options import Option
from gketrace.simulate.evolve import evolve
from gketrace.simulate.matches.base import by_name
from gketrace.simulate.matches.ipset import parse_sides
from gketrace.simulate.matches.set_lookup import element_of
from gketrace.simulate.state import Environment, PacketState, SetChange, VerdictKind
from gketrace.simulate.targets.base import Effect, pass_on
from gketrace.simulate.targets.passing import render_options
from gketrace.snapshot import Unavailable
from gketrace.trace import StepAction

if TYPE_CHECKING:
    from typing import Self

__all__ = ["SetTarget"]

_ACTIONS: Final = ("--add-set", "--del-set", "--map-set")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetTarget(Target):
    """``-j SET --add-set|--del-set|--map-set NAME src,dst``."""

    name: ClassVar[str] = "SET"
    OPTIONS: ClassVar[Mapping[str, int]] = {
        **dict.fromkeys(_ACTIONS, 2),
        "--exist": 0,
        "--timeout": 1,
        "--map-mark": 0,
        "--map-prio": 0,
        "--map-queue": 0,
    }

    options: tuple[Option, ...]
    action: str
    set_name: str
    sides: tuple[str, ...]
    marks: bool = False
    """--map-mark: the set's element says what the mark becomes."""

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        actions = [found[name] for name in _ACTIONS if name in found]
        if len(actions) != 1:
            raise ValueError("SET takes one of --add-set, --del-set, --map-set")
        return cls(
            options=options,
            action=actions[0].name,
            set_name=actions[0].args[0],
            sides=parse_sides(actions[0].args[1]),
            marks="--map-mark" in found,
        )

    def apply(self, state: PacketState, env: Environment) -> Effect:
        if self.action == "--map-set":
            if self.marks:
                return Effect(
                    action=StepAction.UNKNOWN,
                    state=state,
                    verdict=VerdictKind.UNKNOWN,
                    note=f"the mark that set {self.set_name} gives is not read",
                )
            return pass_on(state)
        ipset = env.ipset(self.set_name)
        element: tuple[str, ...] | Unavailable | None = (
            ipset if isinstance(ipset, Unavailable) else element_of(ipset, self.sides, state)
        )
        if element is None:
            return pass_on(state, "the packet has no element for this set")
        # An empty element says: something changed, and it is not known what.
        known = () if isinstance(element, Unavailable) else element
        change = SetChange(name=self.set_name, element=known, add=self.action == "--add-set")
        return pass_on(evolve(state, sets=(*state.sets, change)))

    def render(self) -> str:
        return " ".join(("-j SET", *render_options(self.options)))
