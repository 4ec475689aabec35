"""Ways through a base chain of iptables that a packet took before, to be gone again faster.

The packets of ten endpoints differ in one address and take the same way through most chains.  A
path is such a way where nothing forked: the rules in order, which of their matches said yes, which
one said no, what their targets led to.  Going it again (`gketrace.simulate.chains`) asks every one
of these matches again and applies every target again, for the packet at hand; only where each
leads is not looked up again.  As soon as one answers otherwise, the path is left and the chain is
run in full.  So a path is never believed, it only saves the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from gketrace.ruleset.iptables import Chain
from gketrace.ruleset.model import Match, Rule
from gketrace.simulate.targets.base import Effect

__all__ = ["MOST_PATHS", "MOST_STEPS", "Chosen", "Leads", "Path", "Turn", "leads"]

MOST_PATHS: Final = 4
"""Paths that are kept for one base chain."""
MOST_STEPS: Final = 256
"""Longer paths are not kept."""

Leads: TypeAlias = tuple[bool, bool, bool, bool]
"""What a target leads to: a jump, a goto, RETURN, a verdict."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One rule of a path."""

    rule: Rule
    yes: tuple[Match, ...]
    """Those that matched, in the order in which they are asked."""
    no: Match | None
    """The one that did not, and ended the rule."""
    leads: Leads | None
    """None: the rule did not match, or has no target."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A long chain is entered: only these of its rules are asked (`Chain.selection`)."""

    chain: Chain
    positions: Sequence[int]


Path: TypeAlias = tuple[Turn | Chosen, ...]


def leads(effect: Effect) -> Leads:
    """Where a packet goes from a target with this effect."""
    return (bool(effect.jump), effect.goto, effect.returns, effect.verdict is not None)
