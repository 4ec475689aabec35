"""Connections to a Service that go to no endpoint of it: GKT-119, GKT-201 and GKT-202."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from gketrace.findings.making import at, cited, finding, proxy_logs
from gketrace.findings.model import Finding, evidence
from gketrace.findings.ties import families, trail
from gketrace.findings.world import Way, World
from gketrace.packet import Protocol, protocol_name
from gketrace.trace import SUCCESS, Citation, Disposition, NetnsRef, Source, StepKind

__all__ = ["astray"]

_PROXY: Final = re.compile(r"KUBE-SEP-|endpoint-|service-|external-|local-")
"""Chains of kube-proxy in which it translates, of its iptables and nftables modes."""


def astray(world: World) -> Iterator[Finding]:
    """A way to a Service arrives at no endpoint of it, or fails where a rule or entry leads it."""
    for way in world.ways:
        if way.astray and way.standing == "broken" and not way.stands_for:
            if way.meant and (way.service or _leads(way) is None):
                found = _of_another(way)
            else:
                found = _taken(world, way)
            yield replace(found, trail=trail(way), families=families(way))


def _taken(world: World, way: Way) -> Finding:
    end = way.path.outcome
    what = f"{way.path.source} → {way.path.target}"
    proof = [cited(end.citation, end.netns.node, str(end.netns), note=what)] if end.citation else []
    found = _leads(way)
    if found is not None and found[0].source is Source.CONNTRACK:
        return _outlived(way, *found)
    if found is None:
        node, does = end.netns.node, "no rule translates it, and a program of the node has its port"
        remedy = "stop the program, or give the Service another port"
        command = f"gketrace rules {node} --table nat"
        cause, place = f"taken by {node} {way.path.target}", f"node {node}"
    else:
        rule, netns = found
        node, place = netns.node, f"pod {netns.pod}" if netns.pod else f"node {netns.node}"
        chain = f"{rule.chain}:{rule.position}" if rule.position else rule.chain
        does = f"{rule.table} {chain} leads there" if rule.chain else f"{rule.text!r} leads there"
        proof.insert(0, cited(rule, node, str(netns)))
        remedy = "find who made the rule, and whether it has to be there"
        command = _show(rule, netns)
        if not netns.pod and _PROXY.match(rule.chain):
            remedy = "if it stays so for more than 10 s, restart kube-proxy on this node"
            command = proxy_logs(world.pods, node)
        cause = f"rule {node} {netns} {rule.table} {rule.chain} {rule.text}"
    return finding(
        "GKT-119",
        f"On {place} connections to {_asked(way)} go to {_where(way)}, which is no "
        f"endpoint of it: {does}"
        if way.service
        else f"On {place} connections to {_asked(way)} go to {_where(way)}: {does}",
        proof,
        remedy=remedy,
        command=command,
        subjects=[f"service {way.service}" if way.service else f"pod {way.meant}", place],
        nodes=[node],
        cause=cause,
    )


def _of_another(way: Way) -> Finding:
    """Two pods have one address: GKT-311, as where the addresses themselves were read."""
    end = way.path.outcome
    taker, address = end.netns.pod, end.packet.dst
    proof = [
        cited(step.citation, hop.netns.node, str(hop.netns))
        for hop in way.path.hops[-2:]
        for step in hop.steps
        if step.kind is StepKind.ROUTE and step.citation is not None and step.before.dst == address
    ]
    both = sorted((way.meant, taker))
    return finding(
        "GKT-311",
        f"{' and '.join(both)} both have the address {address}",
        [*proof, evidence(Source.OBJECT, f"Pod {way.meant}: status.podIPs {address}")],
        remedy="delete one of the pods; if it happens again, look at the CNI plugin's IPAM",
        command=f"kubectl get pods -A -o wide --field-selector status.podIP={address}",
        subjects=[f"pod {key}" for key in both],
        nodes=[end.netns.node],
        cause=f"address {address}",
    )


def _outlived(way: Way, entry: Citation, netns: NetnsRef) -> Finding:
    """An existing connection that keeps to what was an endpoint: GKT-201, GKT-202."""
    packet, node = way.path.outcome.packet, netns.node
    udp, name = packet.protocol == Protocol.UDP, protocol_name(packet.protocol)
    door = way.path.target.partition("/")[0].rpartition(":")[0].strip("[]")
    return finding(
        "GKT-201" if udp else "GKT-202",
        f"A {name.upper()} connection of {way.path.source} to Service {way.service} on node {node} "
        f"keeps to {_where(way)}, which is no endpoint any more",
        [cited(entry, node, str(netns), note=f"{way.path.source} → {way.path.target}")],
        remedy="delete the entry: the next packet goes by the rules of now",
        command=at(
            f"conntrack -D -p {name} --orig-dst {door} --reply-src {packet.dst}", node, str(netns)
        ),
        subjects=[f"service {way.service}", f"node {node}"],
        nodes=[node],
        cause=f"stale {node} {way.service} {_where(way)}",
    )


def _asked(way: Way) -> str:
    return f"Service {way.service}" if way.service else f"pod {way.meant}"


def _where(way: Way) -> str:
    """Who takes it, or the address at which nobody does."""
    end = way.path.outcome
    if end.disposition in SUCCESS:
        return way.path.endpoint
    host = f"[{end.packet.dst}]" if end.packet.family == 6 else str(end.packet.dst)
    where = host if end.packet.dport is None else f"{host}:{end.packet.dport}"
    return f"{where}, where nothing listens" if end.disposition is Disposition.REFUSED else where


def _show(rule: Citation, netns: NetnsRef) -> str:
    """Draws the rule, in the namespace that it is in."""
    space, _, name = netns.pod.partition("/")
    command = f"gketrace rules pod/{name} -n {space}" if name else f"gketrace rules {netns.node}"
    if rule.source is Source.RULE and rule.chain:
        command += f" --table {shlex.quote(rule.table)} --chain {shlex.quote(rule.chain)}"
    return command


def _leads(way: Way) -> tuple[Citation, NetnsRef] | None:
    """What gave the packet its last destination, and where."""
    for hop in reversed(way.path.hops):
        for step in reversed(hop.steps):
            before, after = step.before, step.after
            if (before.dst, before.dport) != (after.dst, after.dport) and step.citation is not None:
                return step.citation, hop.netns
    return None
