"""Single connections: stale, older than a rule, one-sided, unreplied.

An entry decides before any nat rule, so it outlives the rule and the endpoint that made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Final

from gketrace.conntrack import ConntrackEntry, CtStatus
from gketrace.findings.expected import Expected
from gketrace.findings.making import at, cited, finding, of_endpoint
from gketrace.findings.model import Confidence, Evidence, Finding, evidence
from gketrace.findings.ties import entered, first_chain
from gketrace.findings.world import Sight, World
from gketrace.kubenames import endpoint_text
from gketrace.packet import IPAddress, Packet, Protocol, Tuple5, protocol_name, protocol_number
from gketrace.snapshot import Unavailable
from gketrace.trace import Citation, Ingress, Leaf, Source

__all__ = ["one_sided", "older_than_rules", "stale", "unreplied"]

_OVER: Final = frozenset({"CLOSE", "TIME_WAIT", "LAST_ACK", "CLOSED", "FIN_WAIT", "CLOSE_WAIT"})
_UNREPLIED: Final = 5
"""So many unanswered SYNs to one place are more than a few lost packets."""
_WALKED: Final = 20
"""Connections of each node that are walked again by the rules of now."""
_Door = tuple[IPAddress, int, int]
"""Address, port, protocol number."""


def _doors(world: World) -> dict[_Door, Expected]:
    found: dict[_Door, Expected] = {}
    nodes = list(world.node_by_address)
    for one in world.expected.values():
        service, number = one.service, protocol_number(one.port.protocol)
        direct = [*service.cluster_ips, *service.external_ips]
        direct += [entry.ip for entry in service.ingress if entry.ip]
        for text in direct:
            found[ip_address(text), one.port.port, number] = one
        if one.port.node_port:
            for address in nodes:
                found[address, one.port.node_port, number] = one
    return found


def _cite(sight: Sight, entry: ConntrackEntry, note: str = "") -> Evidence:
    return cited(Citation(source=Source.CONNTRACK, text=str(entry)), sight.node, note=note)


def stale(world: World) -> Iterator[Finding]:
    """GKT-201 and GKT-202."""
    doors = _doors(world)
    for sight in world.sights.values():
        if isinstance(sight.entries, Unavailable):
            continue
        for entry in sight.entries:
            orig = entry.orig
            one = doors.get((orig.dst, orig.dport or 0, orig.protocol))
            if one is None or entry.tcp_state in _OVER or entry.tcp_state == "SYN_SENT":
                continue
            found = _stale(world, sight, one, entry)
            if found is not None:
                yield found


def _stale(world: World, sight: Sight, one: Expected, entry: ConntrackEntry) -> Finding | None:
    family = entry.orig.dst.version
    end = endpoint_text(str(entry.reply.src), entry.reply.sport or 0)
    udp = entry.orig.protocol == Protocol.UDP
    if not entry.dst_nat:
        if not udp or not one.usable or entry.orig.dst in world.node_by_address:
            return None
        why = "was made when no rule led to an endpoint, and keeps its packets untranslated"
    elif end in one.all_addresses(family):
        return None
    elif udp:
        why = f"still sends its datagrams to {end}, which is no endpoint any more"
    elif entry.reply.src in world.pod_by_address or entry.reply.src in world.node_by_address:
        return None  # the pod lives: a TCP connection may go on with it
    else:
        why = f"goes on towards {end}, which no pod has any more"
    name = protocol_name(entry.orig.protocol)
    # All that lead to the endpoint that is gone, and none of those that live.
    delete = f"-p {name} --orig-dst {entry.orig.dst} --reply-src {entry.reply.src}"
    return finding(
        "GKT-201" if udp else "GKT-202",
        f"A {name.upper()} connection of {entry.orig.src} to Service {one.service.key} on node "
        f"{sight.node} {why}",
        [_cite(sight, entry), *(of_endpoint(e) for e in one.usable[:3])],
        remedy="delete the entry: the next packet goes by the rules of now",
        command=at(f"conntrack -D {delete}", sight.node),
        subjects=[f"service {one.service.key}", f"node {sight.node}"],
        nodes=[sight.node],
        cause=f"stale {sight.node} {one.service.key} {end if entry.dst_nat else 'untranslated'}",
    )


def older_than_rules(world: World) -> Iterator[Finding]:
    """GKT-203: what the rules of now would make of the same packet, where it comes from a pod of
    this node or is translated already."""
    doors = _doors(world)
    for sight in world.sights.values():
        if isinstance(sight.entries, Unavailable) or not sight.by_rules:
            continue
        done = 0
        for entry in sight.entries:
            orig = entry.orig
            pod = world.pod_by_address.get(orig.src)
            if pod is None or pod.node != sight.node or pod.key not in sight.pods:
                continue
            if entry.tcp_state in _OVER or orig.dport is None or done >= _WALKED:
                continue
            if (orig.dst, orig.dport, orig.protocol) in doors or orig.dst in world.pod_by_address:
                continue  # endpoints are chosen anew for each connection; see `stale`
            done += 1
            now = _source_now(sight, pod.key, orig)
            if now is None or now == entry.reply.dst:
                continue
            before = entry.reply.dst
            yield finding(
                "GKT-203",
                f"The connection {orig.src} → {orig.dst}:{orig.dport} of pod {pod.key} is older "
                f"than a rule: it goes out as {before}, a new one would as {now}",
                [_cite(sight, entry), *_rule_now(sight, pod.key, orig)],
                remedy="let the program connect anew, or delete the entry",
                command=at(
                    f"conntrack -D -p {protocol_name(orig.protocol)} --orig-src {orig.src} "
                    f"--orig-port-src {orig.sport} --orig-dst {orig.dst}",
                    sight.node,
                ),
                subjects=[f"pod {pod.key}", f"node {sight.node}"],
                nodes=[sight.node],
                cause=f"older {sight.node} {before} {now}",
            )


def _walk_now(sight: Sight, pod: str, orig: Tuple5) -> tuple[Leaf, ...]:
    """The packet of a new connection, from the pod on."""
    from gketrace.simulate.walk import WalkQuery, walk

    inside = sight.pods[pod]
    if isinstance(inside, Unavailable):
        return ()
    packet = Packet(
        src=orig.src, dst=orig.dst, protocol=orig.protocol, sport=orig.sport, dport=orig.dport
    )
    query = WalkQuery(
        ingress=Ingress(netns=inside.netns), packet=packet, flows=(), use_conntrack=False
    )
    return tuple(walk(sight, query).leaves())


def _source_now(sight: Sight, pod: str, orig: Tuple5) -> IPAddress | None:
    """The source address that leaves the node; None: it does not leave, or that is not known."""
    leaves = _walk_now(sight, pod, orig)
    sources = {
        leaf.outcome.packet.src
        for leaf in leaves
        if leaf.outcome.disposition.value == "transmitted"
    }
    return sources.pop() if len(leaves) == 1 and len(sources) == 1 else None


def _rule_now(sight: Sight, pod: str, orig: Tuple5) -> Iterator[Evidence]:
    """The rule that translates now."""
    for leaf in _walk_now(sight, pod, orig):
        for branch in leaf.branches:
            for step in branch.steps:
                if step.citation is None:
                    continue
                text = step.citation.text
                if "MASQUERADE" in text or "-j SNAT" in text or " masquerade" in text:
                    yield cited(step.citation, sight.node, note="the rule of now")


def one_sided(world: World) -> Iterator[Finding]:
    """GKT-208: one node saw no answer to a connection that another node saw answered."""
    answered: dict[Tuple5, tuple[Sight, ConntrackEntry]] = {}
    for sight in world.sights.values():
        if not isinstance(sight.entries, Unavailable):
            for entry in sight.entries:
                if entry.status & CtStatus.SEEN_REPLY or entry.tcp_state == "SYN_RECV":
                    answered[entry.orig] = (sight, entry)
    doors = _stray_doors(world)
    for sight in world.sights.values():
        if isinstance(sight.entries, Unavailable):
            continue
        for entry in sight.entries:
            if entry.status & CtStatus.SEEN_REPLY or entry.orig.protocol != Protocol.TCP:
                continue
            far = answered.get(entry.reply.inverted())
            if far is None or far[0] is sight:
                continue
            other, seen = far
            lopsided = finding(
                "GKT-208",
                f"Node {sight.node} sees no answer to {entry.orig.src} → {entry.orig.dst}:"
                f"{entry.orig.dport}, and node {other.node} does: the answers take another way",
                [
                    _cite(sight, entry, "no answer seen"),
                    _cite(other, seen, "answered"),
                    *_way_back(other, entry),
                ],
                remedy="make the answers come back through the node that translated",
                command=f"gketrace connections --from {entry.orig.src}",
                subjects=[f"node {sight.node}", f"node {other.node}"],
                nodes=[sight.node, other.node],
                cause=f"one-sided {sight.node} {other.node}",
            )
            where = (sight.node, entry.orig.dst, entry.orig.dport)
            yield replace(lopsided, faulty=frozenset(doors.get(where, ())))


def _stray_doors(world: World) -> dict[tuple[str, IPAddress, int | None], set[str]]:
    """Where traces say, too, that answers come back by another way: node, address and port that
    its rules translate → by which door connections come into the Service's chains there."""
    found: dict[tuple[str, IPAddress, int | None], set[str]] = {}
    for way in world.ways:
        if way.standing != "broken" or way.path.reply is None:
            continue
        for hop in way.path.hops:
            chain = first_chain(hop) if hop.netns.node else ""
            if chain:
                asked = hop.steps[0].before
                tie = entered(way.path.front_door, chain)
                found.setdefault((hop.netns.node, asked.dst, asked.dport), set()).add(tie)
    return found


def _way_back(other: Sight, entry: ConntrackEntry) -> Iterator[Evidence]:
    """The route that the answer takes."""
    from gketrace.simulate.fib.decision import RouteKind

    for decision in other.fib.output(entry.reply.dst):
        if decision.kind is RouteKind.FORWARD and decision.route is not None:
            yield evidence(Source.ROUTE, decision.route.text, node=other.node)


@dataclass(frozen=True, slots=True)
class _Target:
    address: IPAddress
    port: int | None


def unreplied(world: World) -> Iterator[Finding]:
    """GKT-210: several SYNs to one place, none answered."""
    for sight in world.sights.values():
        if isinstance(sight.entries, Unavailable):
            continue
        waiting: dict[_Target, list[ConntrackEntry]] = {}
        fine: set[_Target] = set()
        for entry in sight.entries:
            if entry.orig.protocol != Protocol.TCP:
                continue
            target = _Target(entry.reply.src, entry.reply.sport)
            if entry.status & CtStatus.SEEN_REPLY:
                fine.add(target)
            elif entry.tcp_state == "SYN_SENT":
                waiting.setdefault(target, []).append(entry)
        for target, entries in waiting.items():
            if len(entries) < _UNREPLIED or target in fine:
                continue
            yield _silent(world, sight, target, entries)


def _silent(world: World, sight: Sight, target: _Target, entries: list[ConntrackEntry]) -> Finding:
    pod = world.pod_by_address.get(target.address)
    node = world.node_by_address.get(target.address)
    who = f"pod {pod.key}" if pod else f"node {node.name}" if node else "outside the cluster"
    where = f"{target.address}:{target.port}"
    inside = pod is not None or node is not None
    remedy = (
        "trace it: the way there or back is broken"
        if inside
        else "look at Cloud NAT's ports and at firewalls: the node sent the packets out"
    )
    return finding(
        "GKT-210",
        f"{len(entries)} connections through node {sight.node} to {where} ({who}) are not answered",
        [_cite(sight, entry) for entry in entries],
        remedy=remedy,
        command=f"gketrace trace {entries[0].orig.src} {where}",
        subjects=[who if inside else f"address {target.address}", f"node {sight.node}"],
        nodes=[sight.node],
        cause=f"unreplied {where}",
        confidence=Confidence.LIKELY,
    )
