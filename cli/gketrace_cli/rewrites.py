"""What rewrote a packet on its way, and which rules led there: a path in a few facts.

Pure.  A rule is cited by where it stands, ``KUBE-SVC-7D6H5YV7GTUSLGXR:2``: rule 2 of that chain on
the node named, as ``iptables -L --line-numbers`` counts.  The steps have its text and counters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gketrace.packet import Packet
from gketrace.trace import Citation, Hop, NetnsKind, Path, Source, Step, StepAction, StepKind

__all__ = ["Rewrite", "by_affinity", "host_nodes", "rewrites", "where"]

_DISPATCH: Final = frozenset(
    {"PREROUTING", "OUTPUT", "POSTROUTING", "KUBE-SERVICES", "KUBE-NODEPORTS"}
    | {"nat-prerouting", "nat-output", "nat-postrouting", "services"}
)
"""Chains that every packet meets, of iptables and of kube-proxy's nftables mode: only the last rule
in one of them says anything about this packet."""

_AFFINITY: Final = re.compile(r"-m recent --rcheck .*--name KUBE-SEP-|\bsaddr @affinity-")
"""Of kube-proxy's iptables and nftables modes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """One address translation."""

    node: str
    """Where; empty: in the network, between nodes."""
    pod: str
    """``namespace/name``, when it was in a pod's namespace."""
    before: Packet
    after: Packet
    named_by: str
    """The rule that sorted this packet out of all others: ``KUBE-NODEPORTS:10``; may be empty."""
    rules: tuple[str, ...]
    """From there to the rule that rewrites: ``KUBE-SVC-…:2``, ``KUBE-SEP-…:2``."""

    @property
    def by(self) -> str:
        """What rewrites; a rule that stands in one of those chains is its own sorter."""
        return (self.rules[-1] if self.rules else self.named_by) or "what is not known"

    @property
    def of_destination(self) -> bool:
        return (self.before.dst, self.before.dport) != (self.after.dst, self.after.dport)

    @property
    def of_source(self) -> bool:
        return (self.before.src, self.before.sport) != (self.after.src, self.after.sport)


def where(cited: Citation) -> str:
    """``KUBE-SERVICES:24``; the rule's place as it is counted by ``--line-numbers``."""
    if cited.position:
        return f"{cited.chain}:{cited.position}"
    if cited.handle is not None:
        return f"{cited.chain} handle {cited.handle}"
    return cited.chain


def rewrites(path: Path) -> tuple[Rewrite, ...]:
    """All translations on the way there, in order."""
    return tuple(found for hop in path.hops for found in _in_hop(hop))


def _in_hop(hop: Hop) -> list[Rewrite]:
    found: list[Rewrite] = []
    way: list[Citation] = []
    for step in hop.steps:
        cited = step.citation
        if step.kind is StepKind.POLICY:
            way = []
        elif step.kind is StepKind.RULE and cited is not None:
            _enter(way, cited)
        elif step.kind is StepKind.NAT:
            found.append(_rewrite(hop, step, way))
            way = []
    return found


def _enter(way: list[Citation], cited: Citation) -> None:
    """`way` is the chain of jumps that leads to `cited`.

    Another rule of a chain that is on the way: what was jumped to from there has returned.
    """
    for depth, earlier in enumerate(way):
        same = (earlier.backend, earlier.table) == (cited.backend, cited.table)
        if not same or earlier.chain == cited.chain:
            del way[depth:]
            break
    way.append(cited)


def _rewrite(hop: Hop, step: Step, way: Sequence[Citation]) -> Rewrite:
    cited = step.citation
    rules = list(way)
    if cited is None or cited.source is not Source.RULE:
        rules = []
    elif not rules or (rules[-1].chain, rules[-1].position) != (cited.chain, cited.position):
        rules.append(cited)
    common = [place for place, rule in enumerate(rules) if rule.chain in _DISPATCH]
    first = common[-1] + 1 if common else 0
    shown = tuple(where(rule) for rule in rules[first:])
    if not rules and cited is not None:
        shown = ("an existing conntrack entry" if _of_entry(cited) else cited.text,)
    return Rewrite(
        node=hop.netns.node,
        pod=hop.netns.pod if hop.netns.kind is NetnsKind.POD else "",
        before=step.before,
        after=step.after,
        named_by=where(rules[common[-1]]) if common else "",
        rules=shown,
    )


def _of_entry(cited: Citation) -> bool:
    return cited.source is Source.CONNTRACK


def by_affinity(path: Path) -> str:
    """``KUBE-SVC-…:2 on node n1``: the rule by which session affinity chose the endpoint, that is,
    a list of the kernel has the client; empty: none did."""
    for hop in path.hops:
        for step in hop.steps:
            jumps = step.action in (StepAction.JUMP, StepAction.GOTO)
            if jumps and step.citation is not None and _AFFINITY.search(step.citation.text):
                return f"{where(step.citation)} on node {hop.netns.node}"
    return ""


def host_nodes(path: Path) -> tuple[str, ...]:
    """The nodes in whose own namespaces the packet is, in order, each once per visit."""
    nodes: list[str] = []
    for hop in path.hops:
        node = hop.netns.node
        if node and hop.netns.kind is NetnsKind.HOST and (not nodes or nodes[-1] != node):
            nodes.append(node)
    return tuple(nodes)
