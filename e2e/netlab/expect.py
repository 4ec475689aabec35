"""What Kubernetes promises for a connection to a Service, worked out from the Service alone (type,
policies, ranges, endpoints) and never from the rules: kube-proxy's documented behaviour (dataplane
1.3 to 1.5, 2, 4.7). Tests compare it with real packets.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any

from e2e.netlab.network import CLIENTS, ROUTER_IP
from e2e.netlab.probes import Result
from e2e.netlab.world import Node, Pod, World

__all__ = ["Door", "Expected", "Source", "doors", "expect", "judge", "peer", "sources"]

CLUSTER = ipaddress.ip_network("10.40.0.0/14")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a connection starts: `title` for exec, its address, and its node if it has one."""

    title: str
    ip: str
    node: str | None
    pod: Pod | None = None


@dataclass(frozen=True, slots=True)
class Door:
    """A front door of a service port; `entry` is the node whose rules decide for outsiders."""

    kind: str
    service: str
    address: str
    port: int
    protocol: str
    entry: str | None = None


@dataclass(frozen=True, slots=True)
class Expected:
    """`masquerade_on` is the node that hides the source, `hairpin_on` the one that does so for a
    pod that reaches itself."""

    kind: str
    pods: frozenset[str] = frozenset()
    masquerade_on: str | None = None
    hairpin_on: str | None = None
    may_time_out: bool = False
    why: str = ""


def sources(world: World) -> list[Source]:
    found = [Source("client", ROUTER_IP, None)]
    found += [Source(f"client/{ip}", ip, None) for ip in CLIENTS]
    found += [Source(f"node/{node.short}", node.ip, node.name) for node in world.nodes]
    found += [
        Source(f"pod/{pod.key}", pod.ip, pod.node, pod)
        for pod in world.pods
        if not pod.host_network
    ]
    return found


def doors(world: World, lb_targets: dict[str, str]) -> list[Door]:
    found = []
    for service in world.services:
        spec, key = (
            service["spec"],
            service["metadata"]["namespace"] + "/" + service["metadata"]["name"],
        )
        for port in spec["ports"]:
            protocol = port["protocol"]
            if spec["clusterIP"] != "None":
                found.append(Door("clusterip", key, spec["clusterIP"], port["port"], protocol))
            if port.get("nodePort"):
                found += [
                    Door("nodeport", key, node.ip, port["nodePort"], protocol, node.name)
                    for node in world.nodes
                ]
            for item in service["status"].get("loadBalancer", {}).get("ingress", ()):
                entry = lb_targets[item["ip"]]
                found.append(Door("loadbalancer", key, item["ip"], port["port"], protocol, entry))
            for ip in spec.get("externalIPs", ()):
                entry = lb_targets[ip]
                found.append(Door("externalip", key, ip, port["port"], protocol, entry))
    return found


def endpoints(world: World, service: str) -> list[dict[str, Any]]:
    """Ready IPv4 endpoints of a service: {"node", "pod", "hints"}."""
    namespace, name = service.split("/")
    pods = {pod.ip: pod.key for pod in world.pods if not pod.synthetic}
    found = []
    for item in world.slices:
        labels = item["metadata"]["labels"]
        if (item["metadata"]["namespace"], labels.get("kubernetes.io/service-name")) != (
            namespace,
            name,
        ) or item["addressType"] != "IPv4":
            continue
        for endpoint in item["endpoints"] or ():
            if endpoint["conditions"]["ready"]:
                ip = endpoint["addresses"][0]
                hints = (endpoint.get("hints") or {}).get("forNodes") or []
                found.append(
                    {
                        "node": endpoint["nodeName"],
                        "pod": pods[ip],
                        "hints": [hint["name"] for hint in hints],
                    }
                )
    return found


def expect(world: World, topology: str, source: Source, door: Door) -> Expected:
    """What a connection from `source` to `door` meets."""
    service = next(
        s
        for s in world.services
        if f"{s['metadata']['namespace']}/{s['metadata']['name']}" == door.service
    )
    spec = service["spec"]
    everywhere = endpoints(world, door.service)
    if door.kind == "clusterip" and not source.node:
        return Expected("timeout", why="a ClusterIP means nothing outside the nodes")
    if not everywhere:
        return Expected("refused", why="no endpoints: REJECT")
    # The node whose rules act: the node that owns the address, for a node port; else an insider's
    # own node, whose rules know the address; for outsiders the load balancer's choice.
    decides = door.entry if door.kind == "nodeport" or not source.node else source.node
    outward = source.pod is None or topology == "bridge"
    if door.kind == "externalip" and world.era == "1.20" and source.node and outward:
        # 1.20 leaves what comes from the node itself or over its bridge to the network outside
        # (addrtype and physdev matches), after marking it to be masqueraded.
        if source.node == door.entry:
            return Expected("timeout", why="comes back with the node's own source: martian")
        return picked(everywhere, door.entry)
    assert decides is not None
    local = [e for e in everywhere if e["node"] == decides]
    from_pod = ipaddress.ip_address(source.ip) in CLUSTER
    hinted = [e for e in everywhere if decides in e["hints"]]
    cluster = hinted if world.era == "1.36" and hinted else everywhere
    if door.kind == "clusterip":
        if spec.get("internalTrafficPolicy") == "Local" and world.era != "1.20":
            if not local:
                return Expected("timeout", why="internalTrafficPolicy Local, none here: DROP")
            return picked(local, None if from_pod else decides)
        return picked(cluster, None if from_pod else decides)
    ranges = spec.get("loadBalancerSourceRanges")
    if door.kind == "loadbalancer" and ranges:
        address = ipaddress.ip_address(source.ip)
        if not any(address in ipaddress.ip_network(text) for text in ranges):
            return Expected("timeout", why="outside loadBalancerSourceRanges: DROP")
    if spec.get("externalTrafficPolicy") != "Local":
        return picked(cluster, decides)
    if from_pod:
        return short_cut(world, source, everywhere, decides)
    if source.node == decides:
        return picked(everywhere, decides)
    if not local:
        return Expected("timeout", why="externalTrafficPolicy Local, none here: DROP")
    return picked(local, None)


def short_cut(
    world: World, source: Source, everywhere: list[dict[str, Any]], decides: str
) -> Expected:
    """A pod's way to a Local service: the cluster's rules, without masquerade.

    When that happens on another node than the pod's, an endpoint on a third node answers past the
    node that rewrote the packet, and the answer is lost. Only a pod that reaches itself is
    masqueraded, which saves it: by iptables on every node, by nftables on its own.
    """
    if source.node == decides:
        return picked(everywhere, None)
    works = [
        e
        for e in everywhere
        if e["node"] == decides
        or (source.pod and e["pod"] == source.pod.key and world.backend != "nftables")
    ]
    return Expected(
        "delivered",
        frozenset(e["pod"] for e in works),
        hairpin_on=decides,
        may_time_out=len(works) < len(everywhere),
    )


def picked(found: list[dict[str, Any]], masquerade_on: str | None) -> Expected:
    return Expected("delivered", frozenset(e["pod"] for e in found), masquerade_on)


def peer(world: World, source: Source, expected: Expected, pod: Pod) -> str:
    """The source address that `pod` sees."""
    masquerades = expected.masquerade_on
    if masquerades is None and source.pod is pod:
        masquerades = expected.hairpin_on or pod.node
    if masquerades is None:
        return source.ip
    return masquerade(world.node(masquerades), world.node(pod.node), pod)


def masquerade(decides: Node, node: Node, pod: Pod) -> str:
    """The address of the interface that leads from the deciding node to the pod."""
    return decides.gateway if decides == node and not pod.host_network else decides.ip


def judge(world: World, topology: str, source: Source, door: Door, result: Result) -> str | None:
    """None when the result is as expected, else what differs."""
    expected = expect(world, topology, source, door)
    address = f"{door.address}:{door.port}/{door.protocol}"
    title = f"{source.title} -> {door.kind} {door.service} {address}"
    if expected.may_time_out and result.kind == "timeout":
        return None
    if result.kind != expected.kind:
        return f"{title}: {result.kind} {result.detail}, expected {expected.kind} {expected.why}"
    if expected.kind == "refused" and result.icmp != (3, 3):
        return f"{title}: refused by {result.icmp}, expected ICMP port unreachable"
    if expected.kind != "delivered":
        return None
    if result.pod not in expected.pods:
        return f"{title}: reached {result.pod}, expected one of {set(expected.pods)}"
    pod = next(p for p in world.pods if p.key == result.pod)
    wanted = peer(world, source, expected, pod)
    if result.peer_seen is None or result.peer_seen[0] != wanted:
        return f"{title}: {result.pod} saw {result.peer_seen}, expected {wanted}"
    return None
