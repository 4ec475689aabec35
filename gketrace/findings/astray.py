"""Connections to a Service that somebody else takes: GKT-119."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from gketrace.findings.making import cited, finding
from gketrace.findings.model import Finding
from gketrace.findings.world import Way, World
from gketrace.trace import Citation, Disposition, Source

__all__ = ["astray"]


def astray(world: World) -> Iterator[Finding]:
    """GKT-119: a way to a Service arrives at no endpoint of it, or is refused where one leads."""
    for way in world.ways:
        if way.astray and way.standing == "broken" and not way.stands_for:
            yield _taken(way)


def _taken(way: Way) -> Finding:
    end = way.path.outcome
    what = f"{way.path.source} → {way.path.target}"
    proof = [cited(end.citation, end.netns.node, str(end.netns), note=what)] if end.citation else []
    found = _leads(way)
    if found is None:
        node, does = end.netns.node, "no rule translates it, and a program of the node has its port"
        remedy = "stop the program, or give the Service another port"
        command = f"gketrace rules {node} --table nat"
        cause = f"taken by {node} {way.path.target}"
    else:
        rule, node = found
        place = f"{rule.chain}:{rule.position}" if rule.position else rule.chain
        does = f"{rule.table} {place} leads there" if rule.chain else f"{rule.text!r} leads there"
        proof.insert(0, cited(rule, node))
        remedy = "find who made the rule, and whether it has to be there"
        command = f"gketrace rules {node}"
        if rule.source is Source.RULE and rule.chain:
            command += f" --table {shlex.quote(rule.table)} --chain {shlex.quote(rule.chain)}"
        cause = f"rule {node} {rule.table} {rule.chain} {rule.text}"
    where = way.path.endpoint
    if end.disposition is Disposition.REFUSED:
        where = f"{end.packet.dst}:{end.packet.dport}, where nothing listens"
    return finding(
        "GKT-119",
        f"On node {node} connections to Service {way.service} go to {where}, which is no endpoint "
        f"of it: {does}",
        proof,
        remedy=remedy,
        command=command,
        subjects=[f"service {way.service}", f"node {node}"],
        nodes=[node],
        cause=cause,
    )


def _leads(way: Way) -> tuple[Citation, str] | None:
    """What gave the packet its last destination, and on which node."""
    for hop in reversed(way.path.hops):
        for step in reversed(hop.steps):
            before, after = step.before, step.after
            if (before.dst, before.dport) != (after.dst, after.dport) and step.citation is not None:
                return step.citation, hop.netns.node
    return None
