"""By cause, not by symptom: findings of one code and one cause are one.

Each detector names the cause: the rule, route, switch, link or node that explains what it saw.
Forty endpoints behind one switch are one finding with forty subjects.  What another finding
explains is listed under that one, and nowhere else:

* a traced way that ends badly, where it met just what the other finding holds to be wrong
  (`gketrace.findings.ties`), and only if all ways that end so did;
* what two findings of the same node or subject show by their codes, as in `_EXPLAINS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Final, TypeAlias

from gketrace.findings.model import Evidence, Finding
from gketrace.findings.registry import CODES
from gketrace.trace import Citation, Source

__all__ = ["grouped"]

_EVIDENCE: Final = 8
"""What is shown of one finding's evidence."""
_ORDER: Final = {one.code: position for position, one in enumerate(CODES)}
_NOBODY: Final = frozenset({"GKT-105", "GKT-106", "GKT-119", "GKT-305", "GKT-306", "GKT-312"})
"""How a way ends that leads to an address which nobody has, or somebody else by now."""
_FOLLOWS: Final[dict[str, frozenset[str]]] = {
    # The cause → codes of ways that met what it holds to be wrong, and ended so because of it.
    "GKT-111": _NOBODY,
    "GKT-117": _NOBODY,
    # Both say that answers take another way.  Entries were seen; a trace says what would be.
    "GKT-208": frozenset({"GKT-318"}),
}
_EXPLAINS: Final[dict[str, frozenset[str]]] = {
    # The cause → codes that the same nodes or subjects show because of it.
    "GKT-112": frozenset({"GKT-110", "GKT-111", "GKT-113", "GKT-115", "GKT-303", "GKT-318"}),
    "GKT-107": frozenset({"GKT-101"}),
    "GKT-106": frozenset({"GKT-105"}),
    "GKT-109": frozenset({"GKT-119"}),
    "GKT-117": frozenset({"GKT-111"}),
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


_Key: TypeAlias = tuple[str, str]
"""Code and cause."""


def grouped(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Joined, with what each explains under it, the worst first."""
    groups: dict[_Key, list[Finding]] = {}
    for one in findings:
        groups.setdefault((one.code, one.cause), []).append(one)
    above = _tied(groups)
    joined = {key: reduce(_join, group) for key, group in groups.items()}
    free = {key: one for key, one in joined.items() if key not in above}
    for key, one in free.items():
        cause = next((k for k, other in free.items() if _explained(one, other)), None)
        if cause is not None:
            above[key] = cause
    below: dict[_Key, list[Finding]] = {}
    for key in above:
        root = above[key]
        while root in above:
            root = above[root]
        below.setdefault(root, []).append(joined[key])
    kept = [
        _with(one, _sorted(below.get(key, ()))) for key, one in joined.items() if key not in above
    ]
    return tuple(_cut(one) for one in _sorted(kept))


def _tied(groups: Mapping[_Key, Sequence[Finding]]) -> dict[_Key, _Key]:
    """Findings of ways → those that say why the ways ended so."""
    causes = [(key, one) for key, group in groups.items() for one in group if one.faulty]
    found: dict[_Key, _Key] = {}
    for key, group in groups.items() if causes else ():
        why = [
            next(
                (
                    known
                    for known, cause in causes
                    if one.code in _FOLLOWS.get(cause.code, ()) and one.trail & cause.faulty
                ),
                None,
            )
            for one in group
        ]
        first = why[0]
        if first is not None and None not in why:
            found[key] = first
    return found


def _with(one: Finding, consequences: Sequence[Finding]) -> Finding:
    """As bad as the worst of what it explains."""
    worst = min((one, *consequences), key=lambda each: each.severity.rank)
    return replace(one, severity=worst.severity, consequences=tuple(map(_cut, consequences)))


def _sorted(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(
        findings,
        key=lambda one: (one.severity.rank, -_reach(one), _ORDER[one.code], one.subjects),
    )


def _reach(one: Finding) -> int:
    """Causes in a node's kernel stand before what is wrong with one Service."""
    return 1 if one.code >= "GKT-3" and one.severity.rank == 0 else 0


def _join(first: Finding, second: Finding) -> Finding:
    """The worse and surer one's words; else those of what was read, and not of a way."""
    best, other = sorted(
        (first, second),
        key=lambda one: (one.severity.rank, one.confidence.rank, bool(one.trail)),
    )
    told = bool(first.families and second.families)
    families = first.families | second.families if told else frozenset()
    return replace(
        best,
        evidence=tuple(dict.fromkeys((*best.evidence, *other.evidence))),
        subjects=tuple(dict.fromkeys((*best.subjects, *other.subjects))),
        nodes=tuple(dict.fromkeys((*best.nodes, *other.nodes))),
        families=families,
    )


def _explained(one: Finding, other: Finding) -> bool:
    if one.code not in _EXPLAINS.get(other.code, ()):
        return False
    if one.families and other.families and not one.families <= other.families:
        return False  # a node without IPv6 rules explains nothing of IPv4
    if set(one.subjects) & set(other.subjects):
        return True
    return bool(one.nodes) and set(one.nodes) <= set(other.nodes)


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
