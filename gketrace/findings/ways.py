"""Traced ways that fail: which rule, route, switch, neighbour or link stopped them.

The walk has found out already; here its last citation is named.  Ways that one citation stopped
are one finding.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from typing import Final

from gketrace.findings.making import at, cited, finding, proxy_logs
from gketrace.findings.model import Evidence, Finding, Severity, evidence
from gketrace.findings.stop import Stop, mend_untracked, strayed
from gketrace.findings.ties import families, trail
from gketrace.findings.undelivered import no_neighbour
from gketrace.findings.world import Way, World
from gketrace.objects import Pod
from gketrace.packet import IPAddress
from gketrace.snapshot import Unavailable
from gketrace.trace import (
    FAILURE,
    Disposition,
    NetnsKind,
    Source,
    StepAction,
    StepKind,
)

__all__ = ["failing_ways", "named", "stops"]

_PROXY_REJECTS: Final = re.compile(
    r"has no (?:local )?endpoints|^(?:KUBE-SERVICES|KUBE-EXTERNAL-SERVICES|KUBE-MARK-DROP)$"
)
_NFT_PROXY: Final = frozenset(
    {"reject-chain", "service-endpoints-check", "nodeport-endpoints-check", "cluster-ips-check"}
)
_FIREWALL: Final = re.compile(r"KUBE-PROXY-FIREWALL|KUBE-FW-|^firewall-|firewall-check")
_ROUTE_KINDS: Final = re.compile(r"^(?:\S+ )?(blackhole|unreachable|prohibit)\b|\bthrow\b")


def failing_ways(world: World) -> Iterator[Finding]:
    """One finding for each way that fails, to be grouped by its cause."""
    for stop in stops(way for way in world.ways if not way.stands_for):
        found = named(world, stop)
        if found is not None:
            yield replace(found, trail=trail(stop.way), families=families(stop.way))


def stops(ways: Iterable[Way]) -> Iterator[Stop]:
    """Where the broken ones of them ended, each once."""
    for way in ways:
        if way.standing != "broken":
            continue
        path = way.path
        if path.outcome.disposition not in FAILURE and path.reply is not None:
            path = path.reply
        outcome = path.outcome
        if outcome.disposition in FAILURE and outcome.citation is not None:
            yield Stop(way=way, path=path, outcome=outcome, citation=outcome.citation)


def named(world: World, stop: Stop) -> Finding | None:
    """What stopped it; None: it is as configured, or another detector says it."""
    if stop.way.astray:
        return None  # astray.py says which rule leads to no endpoint
    if (pod := _turned_away(world, stop)) is not None:
        return _without_address(stop, pod)
    source, kind = stop.citation.source, stop.outcome.disposition
    if source is Source.RULE and kind in (Disposition.DROPPED, Disposition.REJECTED):
        return _by_rule(world, stop)
    if source is Source.POLICY:
        return _by_policy(stop)
    if kind is Disposition.REFUSED:
        return _refused(world, stop)
    if kind is Disposition.NO_NEIGHBOUR:
        return no_neighbour(world, stop)
    if kind is Disposition.LOOPED:
        if stop.way.service and _at_the_door(stop):
            return _not_translated(world, stop, "it comes back to where it was")
        return _route(stop, "GKT-306", "comes back to where it was: routes lead in a circle")
    if kind is Disposition.UNREACHABLE:
        return _unreachable(world, stop)
    if kind is Disposition.DROPPED:
        return _drop(stop, f"is dropped by {stop.citation.text}")
    return None


def _by_rule(world: World, stop: Stop) -> Finding | None:
    cited_rule = stop.citation
    place = f"{cited_rule.table} {cited_rule.chain}:{cited_rule.position}"
    if _FIREWALL.search(cited_rule.chain) or "KUBE-FW-" in cited_rule.text:
        return None  # source ranges: services.source_ranges
    if (
        cited_rule.chain in _NFT_PROXY
        or _PROXY_REJECTS.search(cited_rule.chain)
        or _PROXY_REJECTS.search(cited_rule.text)
    ):
        return _proxy_says_none(world, stop)
    if stop.outcome.netns.kind is NetnsKind.POD:
        return finding(
            "GKT-322",
            f"A rule inside {stop.netns} drops: {place}",
            [stop.proof],
            remedy="look at who wrote rules in the pod: a mesh's sidecar, an init container",
            command=_show_chain(stop),
            subjects=[f"pod {stop.outcome.netns.pod}", *stop.subjects[:1]],
            nodes=[stop.node],
            cause=f"rules in {stop.outcome.netns.pod}",
            severity=Severity.ERROR,
        )
    if "INVALID" in cited_rule.text:
        remedy = "find why only one direction passes this node"
        command = f"gketrace conntrack --node {stop.node} --stats"
        proof = [stop.proof]
        if (rule := stop.untracked(stop.node)) is not None:
            remedy, command = mend_untracked(rule, stop.node)
            proof.insert(0, cited(rule, stop.node))
        return finding(
            "GKT-209",
            f"On node {stop.node} a packet of a connection that is not known there is dropped as "
            f"INVALID by {place}",
            proof,
            remedy=remedy,
            command=command,
            subjects=stop.subjects,
            nodes=[stop.node],
            cause=f"invalid {stop.node}",
            severity=Severity.ERROR,
        )
    if cited_rule.chain.startswith("cali-"):
        return finding(
            "GKT-321",
            f"A NetworkPolicy on node {stop.node} drops: {place}",
            [stop.proof],
            remedy="let a NetworkPolicy allow it, if it should pass",
            command="kubectl get networkpolicy -A",
            subjects=stop.subjects,
            nodes=[stop.node],
            cause=f"policy {stop.node} {cited_rule.chain}",
        )
    return _drop(stop, f"is {'rejected' if stop.outcome.reject_with else 'dropped'} by {place}")


def _drop(stop: Stop, verb: str) -> Finding:
    rule = stop.citation
    return finding(
        "GKT-303",
        f"On node {stop.node} {stop.what} {verb}",
        [stop.proof],
        remedy="find who made the rule, and whether it has to be there",
        command=_show_chain(stop),
        subjects=stop.subjects,
        nodes=[stop.node],
        cause=f"rule {stop.node} {stop.netns} {rule.table} {rule.chain} {rule.text}",
    )


def _show_chain(stop: Stop) -> str:
    """Draws the chain that stopped it, in the namespace that it is in."""
    rule, pod = stop.citation, stop.outcome.netns.pod
    where = f"pod/{pod.partition('/')[2]} -n {pod.partition('/')[0]}" if pod else stop.node
    only = f" --table {shlex.quote(rule.table)}" if rule.table else ""
    only += f" --chain {shlex.quote(rule.chain)}" if rule.chain else ""
    return f"gketrace rules {where}{only}"


def _by_policy(stop: Stop) -> Finding:
    rule = stop.citation
    inside = stop.outcome.netns.kind is NetnsKind.POD
    where = stop.netns if inside else f"node {stop.node}"
    return finding(
        "GKT-322" if inside else "GKT-302",
        f"The policy of {rule.table} {rule.chain} on {where} drops what no rule accepts, such as "
        f"{stop.what}",
        [stop.proof],
        remedy="add a rule that accepts it, or set the policy to ACCEPT",
        command=_show_chain(stop),
        subjects=stop.subjects,
        nodes=[stop.node],
        cause=f"policy {stop.node} {stop.netns} {rule.table} {rule.chain}",
        severity=Severity.ERROR,
    )


def _proxy_says_none(world: World, stop: Stop) -> Finding | None:
    """kube-proxy's own refusal: right, when the API says the same."""
    usable = any(
        one.usable
        for one in world.expected.values()
        if one.service.key == stop.way.service and one.port.name == stop.way.port
    )
    if not usable or stop.way.configured:
        return None
    return finding(
        "GKT-110",
        f"kube-proxy on node {stop.node} is behind: its rules refuse Service {stop.way.service}, "
        "which has endpoints",
        [stop.proof],
        remedy="if it stays so for more than 10 s, restart kube-proxy on this node",
        command=proxy_logs(world.pods, stop.node),
        subjects=stop.subjects[:1],
        nodes=[stop.node],
        cause=f"kube-proxy {stop.node}",
    )


def _refused(world: World, stop: Stop) -> Finding | None:
    if "the sender expects" in stop.outcome.detail or "the answer went to" in stop.outcome.detail:
        return strayed(world, stop)
    packet = stop.outcome.packet
    if stop.citation.source is not Source.SOCKET:
        return None
    if packet.dst in set(_cluster_ips(world)) or (stop.way.service and _at_the_door(stop)):
        return _not_translated(world, stop, "the node takes it for itself")
    if stop.outcome.netns.kind is NetnsKind.HOST and packet.dst in world.pod_by_address:
        return _taken_in(world, stop)
    if _looked_into(world, stop):
        return None  # listeners.py says it
    where = f"{packet.dst}:{packet.dport}"
    on_loopback = rf"(?:127\.0\.0\.1|\[::1\]):{packet.dport}\b"
    loopback = re.search(on_loopback, stop.citation.text) is not None
    pod = stop.outcome.netns.pod
    name, space = pod.partition("/")[2], pod.partition("/")[0]
    command = f"gketrace pod {name} -n {space}" if pod else f"gketrace rules {stop.node}"
    return finding(
        "GKT-106" if loopback else "GKT-105",
        f"Nothing in {stop.netns} on node {stop.node} listens on {where}"
        + (", only on the loopback" if loopback else ""),
        [stop.proof],
        remedy="bind the program to 0.0.0.0"
        if loopback
        else "correct the Service's targetPort, or make the program listen there",
        command=command,
        subjects=[f"pod {pod}" if pod else f"node {stop.node}", *stop.subjects[:1]],
        nodes=[stop.node],
        cause=f"listener {stop.node} {where}",
    )


def _looked_into(world: World, stop: Stop) -> bool:
    """Whether the namespace's sockets were read, so that every endpoint in it was judged."""
    sight = world.sights.get(stop.node)
    shot = sight.snapshot(stop.outcome.netns) if sight is not None else None
    return shot is not None and not isinstance(shot, Unavailable)


def _taken_in(world: World, stop: Stop) -> Finding | None:
    """The node takes a packet to a pod of its own for one to itself."""
    routes = [s.citation for s in stop.steps if s.kind is StepKind.ROUTE and s.citation]
    if not routes:
        return None
    pod = world.pod_by_address[stop.outcome.packet.dst]
    return finding(
        "GKT-310",
        f"A local route of node {stop.node} takes what is sent to pod {pod.key} "
        f"({stop.outcome.packet.dst}) for the node's own",
        [cited(routes[-1], stop.node, stop.netns), stop.proof],
        remedy="remove it; for the guest agent, set ip_aliases = false there",
        command=at(f"ip route get {stop.outcome.packet.dst}", stop.node),
        subjects=[f"node {stop.node}", f"pod {pod.key}"],
        nodes=[stop.node],
        cause=f"route {stop.node} {routes[-1].text}",
    )


def _cluster_ips(world: World) -> Iterator[IPAddress]:
    for one in world.expected.values():
        yield from map(ip_address, one.service.cluster_ips)


def _at_the_door(stop: Stop) -> bool:
    """Whether the packet itself, and not its answer, still has the address that was asked for, and
    that is the Service's and no pod's."""
    packet, asked = stop.outcome.packet, stop.way.path
    host = f"[{packet.dst}]" if packet.family == 6 else str(packet.dst)
    target = f"{host}:{packet.dport}"
    return (
        stop.path is asked
        and asked.front_door in ("ClusterIP", "NodePort", "LoadBalancer", "ExternalIP")
        and asked.target.partition("/")[0] == target
    )


def _not_translated(world: World, stop: Stop, then: str) -> Finding:
    return finding(
        "GKT-110",
        f"No rule on node {stop.node} translates {stop.way.path.target}: {then}",
        [stop.proof],
        remedy="see why kube-proxy has no rule for the Service there",
        command=proxy_logs(world.pods, stop.node),
        subjects=stop.subjects[:1],
        nodes=[stop.node],
        cause=f"kube-proxy {stop.node}",
    )


def _unreachable(world: World, stop: Stop) -> Finding | None:
    text = stop.citation.text
    if stop.citation.source is Source.OBJECT and "clusterIP" in text:
        nodes = [hop.netns.node for hop in stop.path.hops if hop.netns.node]
        sight = world.sights.get(nodes[-1]) if nodes else None
        absent = (
            sight is not None
            and not sight.programme.present_for(stop.outcome.packet.family)
            and not sight.programme.unreadable
        )
        if absent:
            return None  # proxy.drift says that the node has no rules at all
        return finding(
            "GKT-110",
            f"No rule on node {nodes[-1] if nodes else stop.node} translates "
            f"{stop.way.path.target}",
            [stop.proof],
            remedy="see why kube-proxy has no rule for the Service there",
            command=proxy_logs(world.pods, stop.node),
            subjects=stop.subjects[:1],
            nodes=nodes[-1:],
            cause=f"kube-proxy {nodes[-1] if nodes else stop.node}",
        )
    if "rp_filter" in stop.outcome.detail or "rp_filter" in text:
        device = next((s.interface for s in reversed(stop.steps) if s.interface), "all")
        return finding(
            "GKT-304",
            f"The reverse-path filter of {stop.where} drops {stop.what}: {stop.outcome.detail}",
            _all_checks(stop),
            remedy="set rp_filter to 2 (loose) on the interface, or correct the route back",
            command=at(
                f"sysctl -w net.ipv4.conf.{device.replace('.', '/')}.rp_filter=2",
                stop.node,
                stop.netns,
            ),
            subjects=stop.subjects,
            nodes=[stop.node],
            cause=f"rp_filter {stop.node} {stop.netns}",
        )
    if "forward" in text and stop.citation.source is Source.SYSCTL:
        return _not_forwarding(stop)
    last = [s.citation for s in stop.steps[-4:] if s.citation]
    rules = [one for one in last if one.source is Source.POLICY_RULE]
    if rules:
        rule = rules[-1].text
        return _route(stop, "GKT-308", f"is led astray by the policy rule {rule!r}", rule)
    if _ROUTE_KINDS.search(text):
        return _route(stop, "GKT-306", f"ends in the route {text!r}")
    if "no route" in stop.outcome.detail.lower() or "no route" in text.lower():
        if stop.outcome.packet.dst in world.pod_by_address and _looked_into(world, stop):
            return None  # routes.py says it, of all pods
        return _route(stop, "GKT-305", "finds no route")
    return _route(stop, "GKT-306", stop.outcome.detail)


def _not_forwarding(stop: Stop) -> Finding:
    """Of IPv4, of one interface only, or of IPv6: each is another switch.  Writing to ip_forward
    the 1 that it has changes no interface (net/ipv4/devinet.c devinet_sysctl_forward())."""
    proof = _all_checks(stop)
    name = stop.citation.text.partition(" = ")[0]
    text, switch = f"Forwarding is off on {stop.where}: nothing passes it", "net.ipv4.ip_forward"
    if name.startswith("net.ipv6."):
        text, switch = f"Forwarding of IPv6 is off on {stop.where}: no IPv6 packet passes it", name
    elif any(one.citation.text == "net.ipv4.ip_forward = 1" for one in proof):
        device = name.removeprefix("net.ipv4.conf.").removesuffix(".forwarding")
        text = f"Forwarding is off for {device} of {stop.where}: nothing from there passes it"
        switch = f"net.ipv4.conf.{device.replace('.', '/')}.forwarding"
    return finding(
        "GKT-301",
        text,
        proof,
        remedy="switch forwarding on, and find what switches it off",
        command=at(f"sysctl -w {switch}=1", stop.node, stop.netns),
        subjects=stop.subjects,
        nodes=[stop.node],
        cause=f"forwarding {stop.node} {stop.netns} {switch}",
    )


def _turned_away(world: World, stop: Stop) -> Pod | None:
    """The pod that got a packet for its own address and did not take it for its own: it would
    have forwarded it."""
    if stop.outcome.disposition not in (Disposition.UNREACHABLE, Disposition.LOOPED):
        return None
    for hop in stop.path.hops:
        for step in hop.steps if hop.netns.pod and hop.ingress.interface else ():
            pod = world.pod_by_address.get(step.before.dst)
            sent_on = step.kind is StepKind.ROUTE and step.action is StepAction.FORWARD
            refused = step.citation is not None and ".forwarding = 0" in step.citation.text
            if pod is not None and pod.key == hop.netns.pod and (sent_on or refused):
                return pod
    return None


def _without_address(stop: Stop, pod: Pod) -> Finding:
    """What is sent to the pod is nothing that its own namespace takes for its own."""
    address = stop.outcome.packet.dst
    return finding(
        "GKT-305",
        f"Pod {pod.key} has no local route to its own address {address}: it takes nothing that is "
        "sent there",
        [stop.proof, evidence(Source.OBJECT, f"Pod {pod.key}: status.podIPs {address}")],
        remedy="start the pod again, or give its interface the address back",
        command=f"gketrace pod {pod.name} -n {pod.namespace}",
        subjects=[f"pod {pod.key}", *stop.subjects[:1]],
        nodes=[stop.node],
        cause=f"address {pod.key} {address}",
    )


def _all_checks(stop: Stop) -> list[Evidence]:
    """Every switch and route that the last decision looked at."""
    shown = [
        cited(s.citation, stop.node, stop.netns)
        for s in stop.steps[-5:]
        if s.citation is not None and s.kind in (StepKind.CHECK, StepKind.ROUTE)
    ]
    return [stop.proof, *shown]


def _route(stop: Stop, code: str, verb: str, rule: str = "") -> Finding:
    """The cause is that of routes.py, which says the same of a pod's route."""
    inside = stop.netns if stop.outcome.netns.pod else rule
    destination = stop.outcome.packet.dst
    return finding(
        code,
        f"{'In' if stop.outcome.netns.pod else 'On'} {stop.where} {stop.what} {verb}",
        _all_checks(stop),
        remedy="correct the route to " + str(destination),
        command=at(f"ip route get {destination}", stop.node, stop.netns),
        subjects=stop.subjects,
        nodes=[stop.node],
        cause=f"route {stop.node} {inside} {stop.citation.text}",
    )
