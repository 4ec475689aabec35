"""Deliberate faults in the simulator.  Each must be caught by what the kernel did.

``python -m tests.kernel.oracle.mutate [--cases N]`` sends the cases once, keeps what the kernel
did, and judges each faulty simulator by it until the first disagreement.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final
from unittest.mock import patch

from gketrace.conntrack import CtState
from gketrace.ruleset.model import Match, Target
from gketrace.simulate import nat, tracking
from gketrace.simulate.matches import (
    addresses,
    conntrack,
    device,
    fields,
    header,
    icmp,
    ports,
    recent,
    statistic,
)
from gketrace.simulate.matches import ipset as set_match
from gketrace.simulate.matches import mark as mark_match
from gketrace.simulate.matches.base import NO, YES
from gketrace.simulate.running import Run
from gketrace.simulate.state import Direction, Ternary
from gketrace.simulate.targets import mark, passing, standard
from gketrace.simulate.targets import nat as nat_target
from gketrace.simulate.targets.base import pass_on
from gketrace.simulate.walk import walk
from tests.kernel.oracle.compare import Verdict
from tests.kernel.oracle.dumps import run_fixtures
from tests.kernel.oracle.random_sets import RandomRun
from tests.kernel.oracle.record import Record, replay

__all__ = ["FAULTS", "Fault", "caught_by", "record"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One wrong thing."""

    name: str
    owner: Any
    """What it is patched into."""
    attribute: str
    make: Callable[[Any], Any]
    """The right thing → the wrong one."""

    @contextmanager
    def injected(self) -> Iterator[None]:
        right = getattr(self.owner, self.attribute)
        with patch.object(self.owner, self.attribute, self.make(right)):
            yield


def _negated(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(self: Match, state: Any, env: Any) -> Any:
        answer = right(self, state, env)
        if answer.kind is Ternary.UNKNOWN:
            return answer
        return replace(answer, kind=Ternary.NO if answer.kind is Ternary.YES else Ternary.YES)

    return wrong


def _always(answer: Any) -> Callable[[Any], Any]:
    return lambda right: lambda self, state, env: answer


def _does_nothing(right: Callable[..., Any]) -> Callable[..., Any]:
    """The target lets the packet go on to the next rule, unchanged."""
    return lambda self, state, env: pass_on(state)


def _keeps_action(right: Callable[..., Any]) -> Callable[..., Any]:
    """The target says what it does, and the packet stays as it was."""

    def wrong(self: Target, state: Any, env: Any) -> Any:
        return replace(right(self, state, env), state=state)

    return wrong


def _without_nat(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(self: Target, state: Any, env: Any) -> Any:
        return replace(right(self, state, env), nat=None)

    return wrong


def _as_verdict(word: str) -> Callable[[Any], Any]:
    """Every DROP, ACCEPT and RETURN that is not `word` itself becomes `word`."""

    def make(right: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(self: standard.Verdict, state: Any, env: Any) -> Any:
            return right(standard.Verdict(verdict=word), state, env)

        return wrong

    return make


def _return_accepts(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(self: standard.Verdict, state: Any, env: Any) -> Any:
        word = "ACCEPT" if self.verdict == "RETURN" else self.verdict
        return right(standard.Verdict(verdict=word), state, env)

    return wrong


def _goto_is_jump(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *rest, goto: right(self, *rest, goto=False)


def _jump_is_goto(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *rest, goto: right(self, *rest, goto=True)


def _policy_accepts(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(self: Run, threads: Any) -> None:
        base, self.base = self.base, replace(self.base, policy="ACCEPT")
        right(self, threads)
        self.base = base

    return wrong


def _one_way_only(right: Callable[..., Any]) -> Callable[..., Any]:
    """Replies are not translated back."""

    def wrong(packet: Any, ct: Any, manip: Any) -> Any:
        return packet if ct.direction is Direction.REPLY else right(packet, ct, manip)

    return wrong


def _never_settled(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda ct, manip: False


def _no_rewrite(manip: nat.Manip) -> Callable[[Any], Any]:
    def make(right: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(packet: Any, ct: Any, at: Any) -> Any:
            return packet if at is manip else right(packet, ct, at)

        return wrong

    return make


def _forgetful(right: Callable[..., Any]) -> Callable[..., Any]:
    """Existing connections are taken for new ones."""

    def wrong(packet: Any, netns: Any, flows: Any, *rest: Any, **words: Any) -> Any:
        seen = right(packet, netns, flows, *rest, **words)
        return tuple(
            replace(one, ct=replace(one.ct, state=CtState.NEW))
            if one.ct is not None and one.ct.state is CtState.ESTABLISHED
            else one
            for one in seen
        )

    return wrong


def _negation_of(cls: type[Match]) -> Fault:
    return Fault(f"{cls.__name__}: answer negated", cls, "evaluate", _negated)


FAULTS: tuple[Fault, ...] = (
    *map(
        _negation_of,
        (
            header.Source,
            header.Destination,
            header.InInterface,
            header.OutInterface,
            header.ProtocolIs,
            ports.TcpMatch,
            ports.UdpMatch,
            ports.SctpMatch,
            ports.MultiportMatch,
            icmp.IcmpMatch,
            addresses.AddrtypeMatch,
            addresses.IprangeMatch,
            conntrack.ConntrackMatch,
            conntrack.StateMatch,
            mark_match.MarkMatch,
            mark_match.ConnmarkMatch,
            recent.RecentMatch,
            set_match.SetMatch,
            device.PhysdevMatch,
            device.MacMatch,
            device.RpfilterMatch,
            fields.TosMatch,
            fields.DscpMatch,
            fields.EcnMatch,
            fields.LengthMatch,
            fields.TtlMatch,
        ),
    ),
    Fault("conntrack matches always", conntrack.ConntrackMatch, "evaluate", _always(YES)),
    Fault("statistic matches always", statistic.StatisticMatch, "evaluate", _always(YES)),
    Fault("statistic never matches", statistic.StatisticMatch, "evaluate", _always(NO)),
    Fault("MARK is not applied", mark.MarkTarget, "apply", _keeps_action),
    Fault("MARK ends the table", mark.MarkTarget, "apply", lambda right: lambda self, s, e: (
        standard.Verdict(verdict="ACCEPT").apply(s, e))),
    Fault("CONNMARK is not applied", mark.ConnmarkTarget, "apply", _keeps_action),
    Fault("DNAT changes nothing", nat_target.DnatTarget, "apply", _without_nat),
    Fault("SNAT changes nothing", nat_target.SnatTarget, "apply", _without_nat),
    Fault("MASQUERADE changes nothing", nat_target.MasqueradeTarget, "apply", _without_nat),
    Fault("REDIRECT changes nothing", nat_target.RedirectTarget, "apply", _without_nat),
    Fault("NETMAP changes nothing", nat_target.NetmapTarget, "apply", _without_nat),
    Fault("NOTRACK is ignored", passing.NotrackTarget, "apply", _does_nothing),
    Fault("DSCP is not set", passing.DscpTarget, "apply", _keeps_action),
    Fault("TOS is not set", passing.TosTarget, "apply", _keeps_action),
    Fault("TTL is not set", passing.TtlTarget, "apply", _keeps_action),
    Fault("REJECT lets pass", standard.RejectTarget, "apply", _does_nothing),
    Fault("DROP and RETURN accept", standard.Verdict, "apply", _as_verdict("ACCEPT")),
    Fault("RETURN accepts", standard.Verdict, "apply", _return_accepts),
    Fault("goto comes back", Run, "call", _goto_is_jump),
    Fault("jump does not come back", Run, "call", _jump_is_goto),
    Fault("policies are ignored", Run, "_policy", _policy_accepts),
    Fault("replies are not translated back", nat, "rewrite", _one_way_only),
    Fault("sources are not rewritten", nat, "rewrite", _no_rewrite(nat.Manip.SRC)),
    Fault("destinations are not rewritten", nat, "rewrite", _no_rewrite(nat.Manip.DST)),
    Fault("nat rules are asked for every packet", nat, "initialized", _never_settled),
    Fault("existing connections are taken for new", tracking, "track", _forgetful),
    Fault("CT attaches no template", passing, "template", lambda right: lambda family, zone: None),
)  # fmt: skip
"""At least 30; the first ones negate a match, the others are mistakes that peers really make."""

_STRIDE: Final = 37


def record(cases: int, seed: int) -> list[Record]:
    """What the kernel does with `cases` packets, half over the dumps, the rest random."""
    records: list[Record] = []
    run_fixtures(cases // 2, seed, records=records)
    RandomRun(seed=seed, walk=walk, records=records).run(cases - cases // 2)
    return records


def caught_by(fault: Fault, records: list[Record]) -> Record | None:
    """A packet whose story the faulty simulator tells wrong; None: not caught."""
    with fault.injected():
        for kept in _spread(records):
            try:
                verdict = replay(kept, walk).verdict
            except (AssertionError, ValueError, TypeError):
                return kept
            if verdict is Verdict.DISAGREE:
                return kept
    return None


def _spread(records: list[Record]) -> Iterator[Record]:
    """All of them, from far apart: neighbours are of one rule set, which may not have the rule."""
    for first in range(_STRIDE):
        yield from records[first::_STRIDE]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    records = record(options.cases, options.seed)
    print(f"{len(records)} packets on which kernel and simulator agree")
    missed = 0
    for fault in FAULTS:
        kept = caught_by(fault, records)
        missed += kept is None
        print(f"{'caught' if kept else 'NOT CAUGHT':10}  {fault.name}")
    print(f"{len(FAULTS)} faults, {len(FAULTS) - missed} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
