"""What ticks by itself, and is a difference only where it changed a verdict: counters.

A node's packets are counted all the time, so that two bundles of one cluster never have the same
counters.  Some findings rest on nothing else: packets dropped as INVALID, entries that could not be
inserted.  For these the counters that they cite are what changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gketrace.findings.model import Finding
from gketrace.findings.tables import STATS
from gketrace.findings.world import Sight, World
from gketrace.ruleset.iptables import IptablesRuleset
from gketrace.ruleset.nft import NftRuleset
from gketrace.snapshot import Unavailable
from gketrace.trace import Citation, Source
from gketrace_cli.bundle.differences import Difference, Part
from gketrace_cli.bundle.model import HOST

__all__ = ["ticking"]


def ticking(before: World, after: World, findings: Iterable[Finding]) -> tuple[Difference, ...]:
    """The counters that the findings cite: of rules, and of connection tracking."""
    found: dict[tuple[Part, str], Difference] = {}
    for one in findings:
        for node in one.nodes:
            then, now = before.sights.get(node), after.sights.get(node)
            if then is None or now is None:
                continue
            rules = [
                proof.citation
                for proof in one.evidence
                if proof.node == node and proof.citation.source is Source.RULE
            ]
            said = " ".join(proof.citation.text for proof in one.evidence if proof.node == node)
            for made in (*_rules(node, then, now, rules), *_tables(node, then, now, said)):
                found.setdefault((made.part, made.name), made)
    return tuple(found.values())


def _rules(node: str, then: Sight, now: Sight, cited: Iterable[Citation]) -> Iterator[Difference]:
    for citation in cited:
        # IPv4 and IPv6 may have the same rule: the first of them that counted.
        for earlier, later in zip(_counts(then, citation), _counts(now, citation), strict=False):
            if earlier != later:
                yield Difference(
                    part=Part(noun="rulesets", node=node, pod=HOST),
                    kind="changed",
                    name=citation.text,
                    before=f"{earlier} packets",
                    after=f"{later} packets",
                    table=f"{citation.backend} {citation.table}",
                )
                break


def _counts(sight: Sight, citation: Citation) -> list[int]:
    """The packets of each rule that is as the cited one."""
    found: list[Citation] = []
    for one in sight.host.rulesets:
        if isinstance(one, IptablesRuleset):
            found += [r.citation for r in one.chain(citation.table, citation.chain) or ()]
        elif isinstance(one, NftRuleset):
            found += [r.citation for r in one.chain(citation.chain) or ()]
    mine = (citation.backend, citation.table, citation.text)
    return [one.packets or 0 for one in found if (one.backend, one.table, one.text) == mine]


def _tables(node: str, then: Sight, now: Sight, said: str) -> Iterator[Difference]:
    if isinstance(then.table, Unavailable) or isinstance(now.table, Unavailable):
        return
    for name, count in now.table.counters.items():
        earlier = then.table.counters.get(name, 0)
        if earlier != count and f": {name} {count}" in said:
            yield Difference(
                part=Part(noun="conntrack", node=node, pod=HOST),
                kind="changed",
                name=f"{STATS}: {name}",
                before=str(earlier),
                after=str(count),
            )
