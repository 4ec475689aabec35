"""Targets: what ``-j NAME`` does with a packet.

To add one: a class in a file here with its options, `parse`, `apply` and `render`; its line in
`TARGETS`; a test in tests/core/simulate.  A target that is neither a chain nor in `TARGETS` becomes
an `UnknownTarget`, which ends the table with a verdict UNKNOWN that quotes the rule.
"""

from __future__ import annotations

from typing import Final

from gketrace.ruleset.model import Target
from gketrace.simulate.targets.base import Effect, UnknownTarget
from gketrace.simulate.targets.elsewhere import ELSEWHERE, TproxyTarget
from gketrace.simulate.targets.ipset import SetTarget
from gketrace.simulate.targets.mark import ConnmarkTarget, MarkTarget
from gketrace.simulate.targets.nat import (
    DnatTarget,
    MasqueradeTarget,
    NetmapTarget,
    RedirectTarget,
    SnatTarget,
)
from gketrace.simulate.targets.passing import (
    PASSING,
    CtTarget,
    DscpTarget,
    EcnTarget,
    HlTarget,
    NotrackTarget,
    TcpmssTarget,
    TosTarget,
    TtlTarget,
)
from gketrace.simulate.targets.standard import Jump, RejectTarget, Verdict

__all__ = ["TARGETS", "Effect", "Jump", "Target", "UnknownTarget", "Verdict"]

TARGETS: Final[tuple[type[Target], ...]] = (
    ConnmarkTarget,
    CtTarget,
    DnatTarget,
    DscpTarget,
    EcnTarget,
    HlTarget,
    MarkTarget,
    MasqueradeTarget,
    NetmapTarget,
    NotrackTarget,
    RedirectTarget,
    RejectTarget,
    SetTarget,
    SnatTarget,
    TcpmssTarget,
    TosTarget,
    TproxyTarget,
    TtlTarget,
    *ELSEWHERE,
    *PASSING,
)
"""Every target that is understood, by its name after ``-j``."""
