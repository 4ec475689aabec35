"""Between the nodes: who gets a packet, by the cluster's objects, and the way that it has come.

A packet that leaves a node goes to the node that has its next hop or its destination.  What a
path is made of while it is still being followed is a `Trail`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Final, TypeVar

from gketrace.packet import Packet, Protocol, Tuple5
from gketrace.topology import Owner, OwnerKind, Topology, cite_object
from gketrace.trace import (
    Citation,
    Disposition,
    Flow,
    Hop,
    Ingress,
    Missing,
    NetnsKind,
    NetnsRef,
    Outcome,
    Step,
    StepAction,
    StepKind,
)

__all__ = ["ASSUMED_PORT", "Inquiry", "NodeQuery", "Trail", "begin", "beyond", "flows_of", "union"]

T = TypeVar("T")
MAX_NODES: Final = 8
"""Visits to nodes in one direction of one path."""
ASSUMED_PORT: Final = 61234
"""Source port (or echo identifier) of an inquiry that names none.  A rule may ask for the port, so
one is needed for an exact answer.  It is outside Linux's own range for clients (32768-60999) and
that of NodePorts, so it is nobody's connection."""
NETWORK: Final = NetnsRef(node="")
"""Between the nodes, and outside the cluster."""
_FIREWALL: Final = "the network's own firewall rules and routes are not observable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inquiry:
    """One packet to follow, from its sender to its end and back."""

    front_door: str
    """As `Path.front_door`."""
    source: str
    """As `Path.source`."""
    target: str
    """As `Path.target`."""
    packet: Packet
    """An unspecified source address is selected by the sender's kernel; an unknown source port is
    taken to be `ASSUMED_PORT`."""
    node: str = ""
    """The sender's node; empty: it is outside the cluster."""
    pod: str = ""
    """The sender's pod, ``namespace/name``, unless it is hostNetwork; empty: the node itself."""
    entry: str = ""
    """Outside senders: the node that the network hands the packet to; empty: who has the
    destination."""
    entry_because: str = ""
    """What `entry` rests on, one clause; empty: it was asked for."""
    use_conntrack: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeQuery:
    """A walk that one node is to do."""

    node: str
    pod: str = ""
    """Start in this pod's namespace; empty: in the node's own."""
    arrives: bool = False
    """The packet comes from the network, through whichever interface brings it; else a local
    process sends it."""
    packet: Packet
    flows: tuple[Flow, ...] = ()
    """Entries that this trace has made on that node."""
    use_conntrack: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Trail:
    """One way so far, in one direction."""

    inquiry: int
    order: tuple[int, ...] = ()
    """Which leaf of each walk it took: paths are shown in the order of the rules."""
    query: NodeQuery | None = None
    """What to ask next; None: it has ended."""
    outcome: Outcome | None = None
    hops: tuple[Hop, ...] = ()
    chance: Fraction | None = Fraction(1)
    because: tuple[str, ...] = ()
    flows: tuple[Flow, ...] = ()
    missing: tuple[Missing, ...] = ()
    visited: tuple[tuple[str, Packet], ...] = ()
    forward: int | None = None
    """Set on the way back: which of the ways there it answers."""
    expected: Tuple5 | None = None
    """The answer that the sender waits for, as the sender's namespace or the client sees it."""


def complete(packet: Packet) -> Packet:
    """The packet with the source port or echo identifier that is assumed."""
    if packet.has_ports and packet.sport is None:
        return replace(packet, sport=ASSUMED_PORT)
    if packet.protocol in (Protocol.ICMP, Protocol.ICMPV6) and packet.icmp_id is None:
        return replace(packet, icmp_id=ASSUMED_PORT)
    return packet


def begin(topology: Topology, number: int, inquiry: Inquiry) -> list[Trail]:
    """Where the packet is at first."""
    inquiry = replace(inquiry, packet=complete(inquiry.packet))
    if inquiry.node:
        query = NodeQuery(
            node=inquiry.node,
            pod=inquiry.pod,
            packet=inquiry.packet,
            use_conntrack=inquiry.use_conntrack,
        )
        return [Trail(inquiry=number, query=query)]
    start = Trail(inquiry=number)
    if inquiry.entry:
        why = inquiry.entry_because or "as asked"
        citation = cite_object(f"Node {inquiry.entry}")
        note = f"{inquiry.source} sends it; the network hands it to node {inquiry.entry} ({why})"
        return [_onto(start, inquiry, inquiry.packet, inquiry.entry, citation, note)]
    return _into(topology, start, inquiry, inquiry.packet, inquiry.source)


def _into(
    topology: Topology, trail: Trail, inquiry: Inquiry, packet: Packet, sender: str
) -> list[Trail]:
    """The packet is on the network: which node gets it, by its destination."""
    owner = topology.owner(packet.dst)
    if owner.kind in (OwnerKind.NODE, OwnerKind.PODS):
        note = f"{sender} sends it; node {owner.node} has {packet.dst}"
        return [_onto(trail, inquiry, packet, owner.node, owner.citation, note)]
    if owner.kind is OwnerKind.EXTERNAL:
        if owner.internal is None:
            return [_stop(trail, packet, Disposition.UNKNOWN, owner, "it has no internal address")]
        inside = replace(packet, dst=owner.internal)
        note = f"the cloud translates {packet.dst} to {owner.internal} of node {owner.node}"
        return [_onto(trail, inquiry, packet, owner.node, owner.citation, note, inside)]
    if owner.kind is OwnerKind.BALANCER:
        candidates = [inquiry.entry] if inquiry.entry else [n.name for n in topology.nodes]
        trails = []
        for name in candidates:
            note = f"a load balancer hands {packet.dst} to some node; here {name}"
            way = _onto(trail, inquiry, packet, name, owner.citation, note)
            if len(candidates) > 1:
                because = (*way.because, f"if the load balancer picks node {name}")
                way = replace(way, chance=None, because=because)
            trails.append(way)
        return trails
    if owner.kind is OwnerKind.CLUSTER_IP:
        why = (
            f"{packet.dst} is a ClusterIP: only nodes' own rules know it, "
            "so nothing outside the nodes reaches it"
        )
        return [_stop(trail, packet, Disposition.UNREACHABLE, owner, why)]
    if trail.hops:
        why = f"left the cluster towards {packet.dst}; what comes after is not observable"
        return [_stop(trail, packet, Disposition.TRANSMITTED, owner, why)]
    why = f"nothing in the cluster has {packet.dst}, so no agent sees the packet"
    return [_stop(trail, packet, Disposition.UNKNOWN, owner, why)]


def _onto(
    trail: Trail,
    inquiry: Inquiry,
    packet: Packet,
    node: str,
    citation: Citation,
    note: str,
    inside: Packet | None = None,
) -> Trail:
    """The network hands the packet to `node`."""
    arriving = replace(packet if inside is None else inside, mark=0, src_mac=None)
    crossed = any(not hop.netns.node for hop in trail.hops)
    step = Step(
        kind=StepKind.NETWORK,
        action=StepAction.FORWARD if inside is None else StepAction.REWRITE,
        before=packet,
        after=arriving,
        note=note if crossed or trail.forward is not None else f"{note}; {_FIREWALL}",
        citation=citation,
    )
    hop = Hop(ingress=Ingress(netns=NETWORK), steps=(step,))
    key = (node, replace(arriving, ttl=None))
    trail = replace(trail, hops=(*trail.hops, hop))
    looped = key in trail.visited
    if looped or len(trail.visited) >= MAX_NODES:
        why = f"it came to {MAX_NODES} nodes already, and is not followed to node {node}"
        outcome = Outcome(
            disposition=Disposition.LOOPED if looped else Disposition.UNKNOWN,
            packet=arriving,
            netns=NETWORK,
            detail=f"it came to node {node} before, with the same header" if looped else why,
            citation=citation,
        )
        return replace(trail, query=None, outcome=outcome)
    query = NodeQuery(
        node=node,
        arrives=True,
        packet=arriving,
        flows=flows_of(trail.flows, node),
        use_conntrack=inquiry.use_conntrack,
    )
    expected = trail.expected
    if trail.forward is None and expected is None:
        expected = arriving.tuple5.inverted()
    return replace(trail, query=query, visited=(*trail.visited, key), expected=expected)


def _stop(trail: Trail, packet: Packet, disposition: Disposition, owner: Owner, why: str) -> Trail:
    action = StepAction.UNKNOWN if disposition is Disposition.UNKNOWN else StepAction.FAIL
    if disposition is Disposition.TRANSMITTED:
        action = StepAction.FORWARD
    step = Step(
        kind=StepKind.NETWORK,
        action=action,
        before=packet,
        after=packet,
        note=why,
        citation=owner.citation,
    )
    last = trail.outcome
    outcome = Outcome(
        disposition=disposition,
        packet=packet,
        netns=last.netns if last is not None else NETWORK,
        detail=why,
        interface=last.interface if last is not None else "",
        next_hop=last.next_hop if last is not None else None,
        citation=owner.citation,
    )
    hop = Hop(ingress=Ingress(netns=NETWORK), steps=(step,))
    return replace(trail, query=None, outcome=outcome, hops=(*trail.hops, hop))


def flows_of(flows: tuple[Flow, ...], node: str) -> tuple[Flow, ...]:
    return tuple(flow for flow in flows if flow.netns.node == node)


def beyond(topology: Topology, inquiry: Inquiry, trail: Trail, outcome: Outcome) -> list[Trail]:
    """The packet left a node through an interface: who has it now?"""
    node, packet = outcome.netns.node, outcome.packet
    if outcome.netns.kind is not NetnsKind.HOST:
        return [_lost(trail, outcome, f"where {outcome.interface} leads to is not known")]
    if outcome.next_hop is not None:
        near = topology.owner(outcome.next_hop)
        if near.kind is OwnerKind.NODE and near.node != node:
            note = f"node {node} sends it to its next hop {outcome.next_hop}, node {near.node}"
            return [_onto(trail, inquiry, packet, near.node, near.citation, note)]
    owner = topology.owner(packet.dst)
    if owner.node == node and outcome.next_hop is None:
        why = f"handed to {packet.dst} on {outcome.interface}; what is behind it was not seen"
        return [_lost(trail, outcome, why)]
    sender = f"node {node}"
    ways = _into(topology, trail, inquiry, packet, sender)
    if topology.has_source(node, packet.src) or owner.kind is OwnerKind.OUTSIDE:
        return ways
    note = f"the source {packet.src} is none of node {node}'s: a network that checks drops it"
    return [_noted(way, note) for way in ways]


def _noted(trail: Trail, note: str) -> Trail:
    hop = trail.hops[-1]
    last = hop.steps[-1]
    steps = (*hop.steps[:-1], replace(last, note=f"{last.note}; {note}"))
    return replace(trail, hops=(*trail.hops[:-1], replace(hop, steps=steps)))


def _lost(trail: Trail, outcome: Outcome, why: str) -> Trail:
    netns = outcome.netns
    missing = Missing(what="netns", why=why, node=netns.node, netns=str(netns))
    unknown = replace(outcome, disposition=Disposition.UNKNOWN, detail=why)
    return replace(trail, query=None, outcome=unknown, missing=union(trail.missing, (missing,)))


def union(first: tuple[T, ...], second: tuple[T, ...]) -> tuple[T, ...]:
    return tuple(dict.fromkeys((*first, *second)))
