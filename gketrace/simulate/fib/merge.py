"""From look-up outcomes to decisions: errors, assumptions, and one answer where all agree."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from gketrace.simulate.evolve import evolve
from gketrace.simulate.fib.decision import RouteDecision, RouteKind
from gketrace.simulate.fib.rules import RuleOutcome, rule_citation
from gketrace.simulate.fib.table import route_citation
from gketrace.simulate.fib.view import kernel_check
from gketrace.simulate.state import CERTAIN
from gketrace.trace import Citation

__all__ = ["assumed", "evidence", "failure", "finish"]

_KIND = {
    "EHOSTUNREACH": RouteKind.UNREACHABLE,
    "ENETUNREACH": RouteKind.UNREACHABLE,
    "EACCES": RouteKind.PROHIBIT,
    "EINVAL": RouteKind.BLACKHOLE,
}


def evidence(outcome: RuleOutcome | None) -> tuple[Citation, ...]:
    """The policy rule and the route of an outcome."""
    if outcome is None:
        return ()
    cited: list[Citation] = []
    if outcome.rule is not None:
        cited.append(rule_citation(outcome.rule))
    if outcome.hit is not None and outcome.hit.route is not None:
        cited.append(route_citation(outcome.hit.route))
    return tuple(cited)


def assumed(decision: RouteDecision, outcome: RuleOutcome | None) -> RouteDecision:
    """The decision, carrying what its outcome assumed; its chance is then not known."""
    if outcome is None or not outcome.assumptions:
        return decision
    because = "; ".join(filter(None, (*outcome.assumptions, decision.because)))
    return evolve(decision, chance=None, because=because)


def failure(outcome: RuleOutcome) -> RouteDecision:
    """The decision for an outcome that led to no usable route."""
    hit = outcome.hit
    if hit is None:
        return assumed(
            RouteDecision(
                kind=RouteKind.NO_ROUTE,
                errno="ENETUNREACH",
                citations=(kernel_check("fib_rules_lookup: no rule led to a route"),),
                detail="no route matches",
            ),
            outcome,
        )
    kind = _KIND[hit.error]
    what = "the route says" if hit.route is not None else "the policy rule says"
    return assumed(
        RouteDecision(
            kind=kind,
            errno=hit.error,
            route=hit.route,
            rule=outcome.rule,
            citations=evidence(outcome),
            detail=f"{what} {kind.value}",
        ),
        outcome,
    )


def finish(decisions: Iterable[RouteDecision]) -> tuple[RouteDecision, ...]:
    """Joins decisions that say the same thing, and drops assumptions that made no difference."""
    found: dict[tuple[object, ...], list[RouteDecision]] = {}
    for decision in decisions:
        key = (
            decision.kind,
            decision.interface,
            decision.next_hop,
            decision.source,
            decision.errno,
            decision.mtu,
        )
        found.setdefault(key, []).append(decision)
    result: list[RouteDecision] = []
    for same in found.values():
        first = same[0]
        if len(found) == 1 and len(same) > 1:
            first = evolve(first, chance=CERTAIN, because="")
        elif len(same) > 1:
            chances = [d.chance for d in same]
            known = [chance for chance in chances if chance is not None]
            total = sum(known, Fraction(0)) if len(known) == len(chances) else None
            first = evolve(first, chance=total)
        result.append(first)
    return tuple(result)
