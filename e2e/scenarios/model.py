"""One scenario."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gketrace.findings.world import World

if TYPE_CHECKING:
    from e2e.scenarios.stage import Stage

__all__ = ["BOTH", "Scenario"]

BOTH = ("bridge", "ptp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A fault, and what gketrace has to say of it."""

    code: str
    title: str
    """What was broken, in a few words."""
    fault: Callable[[Stage], None]
    """Stages it on the lab; what it changes is undone by the stage."""
    proof: tuple[str, ...]
    """Each stands in the finding's evidence, as a part of its text."""
    symptom: Callable[[Stage], bool] | None = None
    """Real traffic: True while the fault is there, False when it is not.  None: nothing fails yet
    (the finding is of something that will fail, or is as configured)."""
    alter: Callable[[World], World] | None = None
    """What this kernel lacks: the fault is put into what was read, and `fault` does nothing."""
    also: frozenset[str] = frozenset()
    """Codes that are true consequences of the same fault."""
    own: bool = False
    """The fault is in a Service of its own, which is gone when it is removed."""
    topologies: tuple[str, ...] = BOTH
    ask: tuple[str, ...] = ()
    """Words of another command than check that names it, for what counts only when asked for."""

    @property
    def how(self) -> str:
        if self.alter is not None:
            return "snapshot"
        return "asked" if self.ask else "kernel"
