"""By cause, not by symptom: findings of one code and one cause are one.

Each detector names the cause: the rule, route, switch, link or node that explains what it saw.
Forty endpoints behind one switch are one finding with forty subjects.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from gketrace.findings.model import Evidence, Finding
from gketrace.findings.registry import CODES
from gketrace.trace import Citation, Source

__all__ = ["grouped"]

_EVIDENCE: Final = 8
"""What is shown of one finding's evidence."""
_ORDER: Final = {one.code: position for position, one in enumerate(CODES)}
_EXPLAINS: Final[dict[str, frozenset[str]]] = {
    # The cause → codes that the same nodes or subjects show because of it.
    "GKT-112": frozenset({"GKT-110", "GKT-111", "GKT-113", "GKT-115", "GKT-303", "GKT-318"}),
    "GKT-107": frozenset({"GKT-101"}),
    "GKT-106": frozenset({"GKT-105"}),
    "GKT-109": frozenset({"GKT-119"}),
    "GKT-111": frozenset({"GKT-119"}),
    "GKT-117": frozenset({"GKT-111", "GKT-119"}),
    "GKT-205": frozenset({"GKT-204"}),
    # Without its route a packet goes back by the default route, and comes again.
    "GKT-305": frozenset({"GKT-306"}),
    "GKT-308": frozenset({"GKT-306", "GKT-312"}),
    "GKT-309": frozenset({"GKT-306", "GKT-312"}),
    "GKT-310": frozenset({"GKT-306"}),
    "GKT-313": frozenset({"GKT-305", "GKT-306", "GKT-312"}),
    "GKT-317": frozenset({"GKT-316"}),
    "GKT-318": frozenset({"GKT-208"}),
    "GKT-321": frozenset({"GKT-303"}),
}


def grouped(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Joined, without those that another one explains, the worst first."""
    joined: dict[tuple[str, str], Finding] = {}
    for one in findings:
        key = (one.code, one.cause)
        joined[key] = _join(joined[key], one) if key in joined else one
    kept = [one for one in joined.values() if not _explained(one, joined.values())]
    kept.sort(key=lambda one: (one.severity.rank, -_reach(one), _ORDER[one.code], one.subjects))
    return tuple(_cut(one) for one in kept)


def _reach(one: Finding) -> int:
    """Causes in a node's kernel stand before what is wrong with one Service."""
    return 1 if one.code >= "GKT-3" and one.severity.rank == 0 else 0


def _join(first: Finding, second: Finding) -> Finding:
    worse = min((first, second), key=lambda one: (one.severity.rank, one.confidence.rank))
    return replace(
        worse,
        evidence=tuple(dict.fromkeys((*first.evidence, *second.evidence))),
        subjects=tuple(dict.fromkeys((*first.subjects, *second.subjects))),
        nodes=tuple(dict.fromkeys((*first.nodes, *second.nodes))),
    )


def _explained(one: Finding, others: Iterable[Finding]) -> bool:
    for other in others:
        if one.code not in _EXPLAINS.get(other.code, ()):
            continue
        if set(one.subjects) & set(other.subjects):
            return True
        if one.nodes and set(one.nodes) <= set(other.nodes):
            return True
    return False


def _cut(one: Finding) -> Finding:
    proof = _once(one.evidence)
    more = len(proof) - _EVIDENCE
    return replace(one, evidence=proof[:_EVIDENCE], more=max(0, more))


def _once(proof: Iterable[Evidence]) -> tuple[Evidence, ...]:
    """What is cited for several ways, once: the first note, and how many more there were."""
    by_source: dict[tuple[Citation, str, str], list[Evidence]] = {}
    for one in proof:
        what = one.citation
        if what.source is Source.ROUTE:  # its table is not always told
            what = replace(what, table="")
        by_source.setdefault((what, one.node, one.netns), []).append(one)
    return tuple(
        replace(same[0], note=f"{same[0].note} and {len(same) - 1} more")
        if len(same) > 1 and all(one.note for one in same)
        else next((one for one in same if one.note), same[0])
        for same in by_source.values()
    )
