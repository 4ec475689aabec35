"""Where and why a traced way ended, and answers that come back untranslated."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Final

from gketrace.findings.making import at, cited, finding, sysctl
from gketrace.findings.model import Confidence, Evidence, Finding
from gketrace.findings.world import Way, World
from gketrace.snapshot import Unavailable
from gketrace.trace import Citation, NetnsKind, Outcome, Path, Source, Step, StepKind

__all__ = ["Stop", "mend_untracked", "strayed"]

_NOTRACK: Final = re.compile(r"-j (?:NOTRACK|CT .*--notrack)|(?:^|\s)notrack$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Where and why a way ended."""

    way: Way
    path: Path
    """The way itself, or the way back."""
    outcome: Outcome
    citation: Citation

    @property
    def node(self) -> str:
        if self.outcome.netns.node:
            return self.outcome.netns.node
        # It ended between the nodes: the last one that sent it on.
        sent = [hop.netns.node for hop in self.path.hops if hop.netns.node]
        return sent[-1] if sent else self.way.sender_node

    @property
    def netns(self) -> str:
        return str(self.outcome.netns) if self.outcome.netns.node else "host"

    @property
    def where(self) -> str:
        """``node m69d``, ``pod default/web-0 on node m69d``."""
        inside = self.outcome.netns.kind is NetnsKind.POD
        return f"{self.netns} on node {self.node}" if inside else f"node {self.node}"

    @property
    def what(self) -> str:
        back = "the answer of " if self.path is not self.way.path else ""
        return f"{back}{self.way.path.source} → {self.way.path.target}"

    @property
    def proof(self) -> Evidence:
        return cited(self.citation, self.node, self.netns, note=self.what)

    @property
    def subjects(self) -> list[str]:
        found = [f"service {self.way.service}"] if self.way.service else []
        if not found and self.way.path.endpoint.startswith("pod/"):
            found.append(f"pod {self.way.path.endpoint.partition(' ')[0][4:]}")
        return [*found, f"node {self.node}"] if self.node else found

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(step for hop in self.path.hops for step in hop.steps)

    def untracked(self, node: str) -> Citation | None:
        """The rule by which `node` does not track the connection, in either direction."""
        paths = (self.path,) if self.path is self.way.path else (self.way.path, self.path)
        hops = (hop for path in paths for hop in path.hops if hop.netns.node == node)
        for step in (step for hop in hops for step in hop.steps):
            rule = step.citation
            if rule is not None and rule.source is Source.RULE and _NOTRACK.search(rule.text):
                return rule
        return None


def mend_untracked(rule: Citation, node: str) -> tuple[str, str]:
    """(remedy, command) where a rule keeps a connection from being tracked."""
    only = f"--table {shlex.quote(rule.table)} --chain {shlex.quote(rule.chain)}"
    return (
        "find who made the rule that keeps it from being tracked, and whether it has to be there",
        f"gketrace rules {node} {only}",
    )


def strayed(world: World, stop: Stop) -> Finding:
    """The answer came with addresses that nobody waits for: it was not translated back."""
    bridged = _bridged_past_rules(stop)
    if bridged is not None:
        node, citation = bridged
        proof = [cited(citation, node, note="bridged without any rule")]
        sight = world.sights.get(node)
        if sight is not None and not isinstance(sight.host.sysctls, Unavailable):
            name = "net.bridge.bridge-nf-call-iptables"
            proof.insert(0, sysctl(sight.host, name, sight.host.sysctls.get(name, "absent")))
        return finding(
            "GKT-314",
            f"On node {node} bridged frames bypass the rules, so the answer is not translated back",
            [*proof, stop.proof],
            remedy="load br_netfilter and switch it on",
            command=at(
                "modprobe br_netfilter; sysctl -w net.bridge.bridge-nf-call-iptables=1", node
            ),
            subjects=[*stop.subjects[:1], f"node {node}"],
            nodes=[node],
            cause=f"bridge-nf {node}",
        )
    node = _translator(stop) or stop.way.sender_node or stop.node
    if (rule := stop.untracked(node)) is not None:
        remedy, command = mend_untracked(rule, node)
        return finding(
            "GKT-303",
            f"On node {node} a rule keeps {stop.what} from being tracked, and so from being "
            f"translated: {stop.outcome.detail}",
            [cited(rule, node), stop.proof],
            remedy=remedy,
            command=command,
            subjects=[*stop.subjects[:1], f"node {node}"],
            nodes=[node],
            cause=f"untracked {node} {rule.text}",
        )
    return finding(
        "GKT-318",
        f"{stop.what} comes back by a way that does not translate it: {stop.outcome.detail}",
        [stop.proof],
        remedy="see why the connection is not masqueraded (KUBE-POSTROUTING, KUBE-MARK-MASQ)",
        command=f"gketrace rules {node} --chain KUBE-POSTROUTING",
        subjects=[*stop.subjects[:1], f"node {node}"],
        nodes=[node],
        cause=f"masquerade {node}",
        confidence=Confidence.LIKELY,
    )


def _translator(stop: Stop) -> str:
    """The node that gave the packet its destination, and has to see the answer."""
    for hop in stop.way.path.hops:
        if any(step.before.dst != step.after.dst for step in hop.steps):
            return hop.netns.node
    return ""


def _bridged_past_rules(stop: Stop) -> tuple[str, Citation] | None:
    """The node whose bridge took the answer from one port to another, and no rule was asked."""
    asked = (StepKind.RULE, StepKind.POLICY, StepKind.CONNTRACK, StepKind.NAT)
    for hop in stop.path.hops:
        ports = [s for s in hop.steps if s.kind is StepKind.BRIDGE and s.citation is not None]
        if ports and hop.netns.node and not any(s.kind in asked for s in hop.steps):
            citation = ports[-1].citation
            assert citation is not None
            return hop.netns.node, citation
    return None
