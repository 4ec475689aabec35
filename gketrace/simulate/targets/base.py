"""What a target does to a packet, and the target that nobody knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from gketrace.quick import quick
from gketrace.ruleset.model import Target
from gketrace.ruleset.options import Option
from gketrace.simulate.state import Environment, NatRequest, PacketState, VerdictKind
from gketrace.trace import StepAction

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Effect", "UnknownTarget", "pass_on"]


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What becomes of a packet at a target: one of `verdict`, `jump`, `returns`, or none: on to
    the next rule."""

    action: StepAction
    state: PacketState
    """The packet after."""
    verdict: VerdictKind | None = None
    """The table's verdict."""
    jump: str = ""
    """Chain to go to."""
    goto: bool = False
    """With `jump`: do not come back here."""
    returns: bool = False
    """RETURN."""
    reject_with: str = ""
    nat: NatRequest | None = None
    """Without its citation; the evaluator adds it."""
    note: str = ""
    """One sentence for people."""
    otherwise: Effect | None = None
    """The other thing that may happen, where it is not known which; `note` says on what it hangs.
    Never longer than one."""


def pass_on(state: PacketState, note: str = "") -> Effect:
    """Nothing changed; on to the next rule."""
    return Effect(action=StepAction.CONTINUE, state=state, note=note)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownTarget(Target):
    """A target that is not in the registration tuple, or whose options are not understood."""

    name: ClassVar[str] = ""

    text: str
    """Verbatim."""
    reason: str

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        raise ValueError("made by the reader only")

    def apply(self, state: PacketState, env: Environment) -> Effect:
        return Effect(
            action=StepAction.UNKNOWN,
            state=state,
            verdict=VerdictKind.UNKNOWN,
            note=f"{self.text}: {self.reason}",
        )

    def render(self) -> str:
        return self.text
