"""Paths over the three nodes of a real world, there and back."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from gketrace.conntrack import ConntrackEntry, CtStatus
from gketrace.packet import Packet
from gketrace.stitch import Inquiry, NodeQuery, stitch
from gketrace.topology import NodeFacts, OwnerKind, Topology
from gketrace.trace import (
    Branch,
    Disposition,
    Ingress,
    NetnsRef,
    Outcome,
    Path,
    StepKind,
    Walk,
)
from tests.core.clusters import HELLO, NODES, Cluster
from tests.core.simulate.nodes import Table, tcp

D = Disposition
WORLD = "kube-proxy-1.36-iptables-nft"
CLIENT = "203.0.113.10"


def cluster(topology: str = "bridge", world: str = WORLD) -> Cluster:
    made = Cluster(world, topology=topology)
    made.pod("2jdh", "hello", "10.40.0.6", 8080)
    made.pod("2jdh", "near", "10.40.0.9")
    made.pod("m69d", "far", "10.40.1.9")
    return made


def ask(packet: Packet, *, node: str = "", pod: str = "", entry: str = "") -> Inquiry:
    return Inquiry(
        front_door="Address",
        source=f"pod/{pod}" if pod else f"node/{node}" if node else f"client {packet.src}",
        target=f"{packet.dst}:{packet.dport}/tcp",
        packet=packet,
        node=node,
        pod=pod,
        entry=entry,
    )


def only(made: Cluster, inquiry: Inquiry) -> Path:
    ((path,),) = made.paths(inquiry)
    return path


def visits(path: Path) -> list[str]:
    """``network``, ``2jdh host``, ``2jdh pod default/hello`` …"""
    return [f"{h.netns.node} {h.netns}" if h.netns.node else "network" for h in path.hops]


def rewrites(path: Path) -> list[str]:
    return [str(s.after) for h in path.hops for s in h.steps if s.kind is StepKind.NAT]


@pytest.mark.parametrize("topology", ["bridge", "ptp"])
def test_node_port_on_the_endpoints_own_node(topology: str) -> None:
    path = only(cluster(topology), ask(tcp(CLIENT, "10.142.0.8:31830", 4000)))
    assert path.outcome.disposition is D.DELIVERED
    assert path.endpoint == "pod/default/hello 10.40.0.6:8080"
    assert path.source_seen == "10.40.0.1"
    assert visits(path) == ["network", "2jdh host", "2jdh pod default/hello"]
    assert path.reply is not None
    assert path.reply.outcome.disposition is D.TRANSMITTED
    assert str(path.reply.outcome.packet) == f"10.142.0.8:31830 → {CLIENT}:4000 tcp"
    assert visits(path.reply) == ["2jdh pod default/hello", "2jdh host", "network"]


@pytest.mark.parametrize("topology", ["bridge", "ptp"])
def test_node_port_on_a_node_without_the_endpoint_crosses_two_nodes(topology: str) -> None:
    path = only(cluster(topology), ask(tcp(CLIENT, "10.142.0.6:31830", 4000)))
    assert visits(path) == [
        "network",
        "m69d host",
        "network",
        "2jdh host",
        "2jdh pod default/hello",
    ]
    assert rewrites(path) == [
        f"{CLIENT}:4000 → 10.40.0.6:8080 tcp",
        "10.142.0.6:* → 10.40.0.6:8080 tcp",
    ]
    assert path.source_seen == "10.142.0.6"
    assert path.chance == 1
    assert path.reply is not None
    assert visits(path.reply) == [
        "2jdh pod default/hello",
        "2jdh host",
        "network",
        "m69d host",
        "network",
    ]
    assert str(path.reply.outcome.packet) == f"10.142.0.6:31830 → {CLIENT}:4000 tcp"


@pytest.mark.parametrize("topology", ["bridge", "ptp"])
@pytest.mark.parametrize(("node", "pod"), [("2jdh", "near"), ("m69d", "far")])
def test_cluster_ip_from_a_pod(topology: str, node: str, pod: str) -> None:
    inquiry = ask(tcp("0.0.0.0", f"{HELLO}:80"), node=node, pod=f"default/{pod}")
    path = only(cluster(topology), inquiry)
    assert path.endpoint == "pod/default/hello 10.40.0.6:8080"
    assert path.reply is not None
    assert path.reply.outcome.disposition is D.DELIVERED
    assert path.reply.outcome.packet.src == ip_address(HELLO)
    assert path.reply.endpoint.startswith(f"pod/default/{pod} ")


def test_cluster_ip_from_a_node() -> None:
    path = only(cluster(), ask(tcp("0.0.0.0", f"{HELLO}:80"), node="m69d"))
    assert path.endpoint == "pod/default/hello 10.40.0.6:8080"
    assert path.reply is not None
    assert path.reply.endpoint.startswith("node/m69d ")


def test_hairpin_on_ptp() -> None:
    inquiry = ask(tcp("0.0.0.0", f"{HELLO}:80"), node="2jdh", pod="default/hello")
    path = only(cluster("ptp"), inquiry)
    assert path.source_seen == "10.40.0.1"
    assert path.reply is not None
    assert path.reply.outcome.disposition is D.DELIVERED


def test_load_balancer_picks_any_node_or_the_one_that_was_asked_for() -> None:
    made = cluster()
    ((*paths,),) = made.paths(ask(tcp(CLIENT, "35.231.121.11:80", 4000)))
    assert [p.because for p in paths] == [
        (f"if the load balancer picks node {name}",) for name in NODES
    ]
    assert all(p.chance is None for p in paths)
    path = only(made, ask(tcp(CLIENT, "35.231.121.11:80", 4000), entry="m69d"))
    assert path.chance == 1
    assert path.endpoint == "pod/default/hello 10.40.0.6:8080"
    assert path.reply is not None
    assert str(path.reply.outcome.packet) == f"35.231.121.11:80 → {CLIENT}:4000 tcp"


def test_external_traffic_policy_local_drops_on_a_node_without_the_endpoint() -> None:
    path = only(cluster(), ask(tcp(CLIENT, "10.142.0.8:30081", 4000)))
    assert path.outcome.disposition is D.DROPPED
    assert path.outcome.citation is not None
    assert "has no local endpoints" in path.outcome.citation.text
    assert path.reply is None


def test_a_cluster_ip_is_not_routable_from_outside() -> None:
    path = only(cluster(), ask(tcp(CLIENT, f"{HELLO}:80")))
    assert path.outcome.disposition is D.UNREACHABLE
    assert path.outcome.citation is not None
    assert path.outcome.citation.text == f"Service default/hello-server: spec.clusterIPs {HELLO}"


def test_nothing_listens_on_the_pods_port() -> None:
    inquiry = ask(tcp("0.0.0.0", "10.40.0.6:81"), node="m69d", pod="default/far")
    path = only(cluster(), inquiry)
    assert path.outcome.disposition is D.REFUSED
    assert (path.endpoint, path.reply) == ("", None)


def test_a_node_that_does_not_answer_is_unknown_and_missing() -> None:
    made = cluster()
    made.down["2jdh"] = "no agent"
    path = only(made, ask(tcp(CLIENT, "10.142.0.6:31830", 4000)))
    assert path.outcome.disposition is D.UNKNOWN
    assert [(m.what, m.node, m.why) for m in path.missing] == [("agent", "2jdh", "no agent")]
    assert visits(path) == ["network", "m69d host", "network", "2jdh host"]


def test_a_reply_that_bypasses_translation_is_refused_by_the_sender() -> None:
    made = cluster()
    made.nodes["2jdh"].host.sysctls["net.bridge.bridge-nf-call-iptables"] = "0"
    inquiry = ask(tcp("0.0.0.0", f"{HELLO}:80", 4000), node="2jdh", pod="default/near")
    path = only(made, inquiry)
    assert path.outcome.disposition is D.DELIVERED
    assert path.reply is not None
    assert path.reply.outcome.disposition is D.REFUSED
    assert path.reply.outcome.detail == (
        "the sender expects 10.43.246.223:80 → 10.40.0.9:4000 tcp; the answer is "
        "10.40.0.6:8080 → 10.40.0.9:4000 tcp and belongs to no connection"
    )


def test_an_answer_that_leaves_by_another_node_is_refused_by_the_client() -> None:
    made = cluster("ptp")
    m69d = made.nodes["m69d"].host
    ruleset = m69d.rulesets[0]
    unmasked = ruleset.text.decode().replace("-j MASQUERADE --random-fully", "-j ACCEPT")
    m69d.rulesets.pop(0)
    m69d.iptables(unmasked)
    path = only(made, ask(tcp(CLIENT, "10.142.0.6:31830", 4000)))
    assert path.source_seen == CLIENT
    crossing = [s.note for h in path.hops for s in h.steps if s.kind is StepKind.NETWORK]
    assert "none of node m69d's" in crossing[1]
    assert path.reply is not None
    assert visits(path.reply) == ["2jdh pod default/hello", "2jdh host", "network"]
    assert path.reply.outcome.disposition is D.REFUSED
    assert "the answer is 10.40.0.6:8080" in path.reply.outcome.detail


def test_the_1_20_era_gives_the_same_ends() -> None:
    made = cluster(world="kube-proxy-1.20-iptables-legacy")
    path = only(made, ask(tcp(CLIENT, "10.142.0.6:31830", 4000)))
    assert path.endpoint == "pod/default/hello 10.40.0.6:8080"
    assert path.source_seen == "10.142.0.6"


def test_batches_ask_the_same_walk_once_and_all_ways_back_at_once() -> None:
    made = cluster()
    inquiry = ask(tcp(CLIENT, "10.142.0.8:31830", 4000))
    first, second = made.paths(inquiry, replace(inquiry, front_door="NodePort"))
    assert [len(batch) for batch in made.batches] == [1, 1]
    assert first[0].reply is not None
    assert second[0].reply is not None
    assert first[0].reply.hops == second[0].reply.hops


def test_the_driver_must_answer_every_query() -> None:
    run = stitch(cluster().topology, [ask(tcp(CLIENT, "10.142.0.8:31830"))])
    next(run)
    with pytest.raises(ValueError, match="1 walks were asked, 0 answered"):
        run.send([])


@pytest.mark.parametrize(
    ("nodes", "end", "why"),
    [
        (3, D.LOOPED, "it came to node n0 before, with the same header"),
        (20, D.UNKNOWN, "it came to 8 nodes already, and is not followed to node n8"),
    ],
)
def test_nodes_that_hand_it_round(nodes: int, end: Disposition, why: str) -> None:
    """Only a packet that came back as it was is known to loop."""
    addresses = [ip_address(f"10.142.0.{number + 1}") for number in range(nodes)]
    topology = Topology(
        nodes=tuple(
            NodeFacts(name=f"n{number}", addresses=(address,))
            for number, address in enumerate(addresses)
        )
    )

    def onward(query: NodeQuery) -> Walk:
        number = int(query.node.removeprefix("n"))
        netns = NetnsRef(node=query.node)
        outcome = Outcome(
            disposition=D.TRANSMITTED,
            packet=query.packet,
            netns=netns,
            interface="eth0",
            next_hop=addresses[(number + 1) % nodes],
        )
        ingress = Ingress(netns=netns)
        return Walk(branches=(Branch(parent=None, ingress=ingress, enters=True, outcome=outcome),))

    run = stitch(topology, [ask(tcp(CLIENT, "192.0.2.1:80", 4000), entry="n0")])
    batch, found = next(run), None
    while found is None:
        try:
            batch = run.send([onward(query) for query in batch])
        except StopIteration as done:
            found = done.value
    ((path,),) = found
    assert (path.outcome.disposition, path.outcome.detail) == (end, why)


def test_owners() -> None:
    topology = Topology(
        nodes=(
            NodeFacts(
                name="a",
                addresses=(ip_address("10.0.0.1"),),
                external=(ip_address("198.51.100.1"),),
                pod_cidrs=(ip_network("10.1.0.0/16"),),
            ),
            NodeFacts(name="b", pod_cidrs=(ip_network("10.1.2.0/24"),)),
        )
    )
    owners = {
        text: topology.owner(ip_address(text))
        for text in ("10.0.0.1", "198.51.100.1", "10.1.1.1", "10.1.2.1", "192.0.2.1")
    }
    assert [(o.kind, o.node) for o in owners.values()] == [
        (OwnerKind.NODE, "a"),
        (OwnerKind.EXTERNAL, "a"),
        (OwnerKind.PODS, "a"),
        (OwnerKind.PODS, "b"),
        (OwnerKind.OUTSIDE, ""),
    ]
    assert owners["198.51.100.1"].internal == ip_address("10.0.0.1")
    assert topology.has_source("a", ip_address("10.1.1.1"))
    assert not topology.has_source("b", ip_address("10.1.1.1"))


def test_an_existing_flow_is_followed_and_new_connections_are_told() -> None:
    made = cluster()
    packet = tcp(CLIENT, "10.142.0.8:31830", 4000)
    orig = packet.tuple5
    back = replace(orig.inverted(), src=ip_address("10.40.0.9"), sport=8080)
    made.nodes["2jdh"].pods["near"].listen("0.0.0.0", 8080)
    made.nodes["2jdh"].host.conntrack = Table(
        ConntrackEntry(
            orig=orig,
            reply=back,
            status=CtStatus.DST_NAT | CtStatus.CONFIRMED | CtStatus.SEEN_REPLY,
        )
    )
    path = only(made, ask(packet))
    assert path.endpoint == "pod/default/near 10.40.0.9:8080"
    assert path.pinned_by is not None
    assert path.pinned_by.entry.reply == back
    assert [fresh.endpoint for fresh in path.fresh] == ["pod/default/hello 10.40.0.6:8080"]
    assert all(fresh.pinned_by is None for fresh in path.fresh)
    other = only(made, ask(tcp(CLIENT, "10.142.0.8:31830", 4001)))
    assert other.pinned_by is None
    assert other.fresh == ()
