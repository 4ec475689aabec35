"""A world for the tests of findings: a real cluster's objects and rules, nodes that can be changed.

`Bench` is put together, changed by a test, and read: what is healthy in it stays so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gketrace.conntrack import ConntrackEntry
from gketrace.findings.detect import find
from gketrace.findings.model import Finding
from gketrace.findings.world import Sight, TableState, World
from gketrace.objects import Endpoint, Node, Pod, Service
from gketrace_cli.checking.whole import trace_world
from gketrace_cli.object_json import (
    parse_endpointslice,
    parse_node,
    parse_pod,
    parse_service,
)
from tests.core.clusters import Cluster
from tests.core.simulate.nodes import Space

WORLDS = Path(__file__).parents[2] / "data/worlds"
PREFIX = "gke-lab-cluster-default-pool-9e4ce61e-"
WORLD = "kube-proxy-1.36-iptables-nft"
BASELINE = {
    ("GKT-101", "service default/kubernetes"),
    ("GKT-101", "service default/nobody"),
    ("GKT-102", "service default/sick"),
    ("GKT-103", "service default/web-lb-local"),
    ("GKT-104", "service default/web-internal-local"),
    ("GKT-108", "service default/web-lb-sources"),
    ("GKT-325", "service default/hostnet"),
}
"""(code, first subject) of what the untouched world has."""


class Bench:
    """One world that is being put together."""

    def __init__(self, topology: str = "ptp", world: str = WORLD) -> None:
        self.cluster = Cluster(world, topology=topology)
        read = {
            name: json.loads((WORLDS / world / f"{name}.json").read_text().replace(PREFIX, ""))[
                "items"
            ]
            for name in ("nodes", "pods", "services", "endpointslices")
        }
        self.nodes: list[Node] = [parse_node(item) for item in read["nodes"]]
        self.pods: list[Pod] = [parse_pod(item) for item in read["pods"]]
        self.services: list[Service] = [parse_service(item) for item in read["services"]]
        self.endpoints: list[Endpoint] = [
            end for item in read["endpointslices"] for end in parse_endpointslice(item)
        ]
        self.entries: dict[str, list[ConntrackEntry]] = {n.name: [] for n in self.nodes}
        self.tables: dict[str, tuple[TableState, TableState]] = {}
        self.planes: dict[str, str] = {}
        self.handlers: dict[str, dict[str, str]] = {}
        ports = {8080, 9090, *(e.port for e in self.endpoints)} - {5353, 3868, 9100}
        for pod in self.pods:
            if pod.host_network:
                continue
            self.cluster.pod(pod.node, pod.name, pod.pod_ips[0])
            space = self.pod(pod.name)
            for port in sorted(ports):
                space.listen("0.0.0.0", port)
                space.listen("::", port)
            space.listen("0.0.0.0", 5353, "udp")
            space.listen("0.0.0.0", 3868, "sctp")
            space.sysctls["net.sctp.max_burst"] = "4"
            if topology == "bridge":
                self._port(pod, hairpin=True)
        for node in self.nodes:
            host = self.host(node.name)
            host.listen("0.0.0.0", 9100)
            for port in (10256, *(s.health_check_node_port for s in self.services)):
                if port:
                    host.listen("0.0.0.0", port)
            host.sysctls["net.bridge.bridge-nf-call-iptables"] = "1"
            self.rules(node.name, lambda text: text.replace(
                "*mangle\n", "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\n"
            ))  # fmt: skip

    def _port(self, pod: Pod, *, hairpin: bool) -> None:
        host = self.host(pod.node)
        name = f"veth-{pod.name}"
        link = next(one for one in host.links if one.name == name)
        assert link.port is not None
        host.set_link(name, port=replace(link.port, hairpin=hairpin))

    def host(self, node: str) -> Space:
        return self.cluster.nodes[node].host

    def pod(self, name: str) -> Space:
        for node in self.cluster.nodes.values():
            if name in node.pods:
                return node.pods[name]
        raise KeyError(name)

    def rules(self, node: str, change: Callable[[str], str]) -> None:
        """Changes the text of the node's IPv4 rules."""
        host = self.host(node)
        old = next(r for r in host.rulesets if r.family == 4)
        host.rulesets = [r for r in host.rulesets if r is not old]
        host.iptables(change(old.text.decode()))

    def service(self, name: str, **changes: Any) -> None:
        """A Service of the world, changed."""
        self.services = [replace(s, **changes) if s.name == name else s for s in self.services]

    def world(self, *, trace: bool = True) -> World:
        """Read, with its ways traced, which takes a second."""
        sights = {}
        for name, node in self.cluster.nodes.items():
            table, later = self.tables.get(name, (TableState(entries=1, limit=262144),) * 2)
            sights[name] = Sight(
                node=name,
                host=node.host.snapshot(),
                pods={f"default/{pod}": space.snapshot() for pod, space in node.pods.items()},
                handlers=self.handlers.get(name, {}),
                plane=self.planes.get(name, "iptables"),
                table=table,
                table_later=later,
                entries=tuple(self.entries[name]),
            )
        world = World(
            nodes=tuple(self.nodes),
            pods=tuple(self.pods),
            services=tuple(self.services),
            endpoints=tuple(self.endpoints),
            sights=sights,
        )
        if not trace:
            return world
        traced, _ = trace_world(world, {})
        return traced

    def found(self, *, trace: bool = False) -> tuple[Finding, ...]:
        """What is found beyond the world's own."""
        return beyond(find(self.world(trace=trace)))


def beyond(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    return tuple(one for one in findings if (one.code, one.subjects[0]) not in BASELINE)
