"""A whole cluster for the tests of the stitcher: a world's nodes, with the pods that they need."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from gketrace.simulate.query import WalkQuery
from gketrace.simulate.walk import walk
from gketrace.snapshot import Maybe, Unavailable
from gketrace.stitch import Inquiry, NodeQuery, stitch
from gketrace.topology import NodeFacts, PodFacts, ServiceFacts, Topology
from gketrace.trace import Ingress, Path, Walk
from tests.core.simulate.nodes import Node, world_node

NODES = {"2jdh": "10.142.0.8", "m69d": "10.142.0.6", "33fg": "10.142.0.7"}
CIDRS = {"2jdh": "10.40.0.0/24", "m69d": "10.40.1.0/24", "33fg": "10.40.2.0/24"}
HELLO = "10.43.246.223"


class Cluster:
    """Three nodes of a world."""

    def __init__(self, world: str, *, topology: str = "bridge") -> None:
        self.nodes = {name: world_node(world, name) for name in NODES}
        self.wiring = topology
        self.pods: list[PodFacts] = []
        self.batches: list[tuple[NodeQuery, ...]] = []
        self.down: dict[str, str] = {}
        if topology == "ptp":
            for node in self.nodes.values():
                _without_bridge(node)

    def pod(self, node: str, name: str, address: str, *ports: int) -> None:
        where = self.nodes[node]
        space = where.pod(name, address)
        if self.wiring == "bridge":
            where.bridge(name)
        else:
            where.ptp(name, str(next(ip_network(CIDRS[node]).hosts())))
        for port in ports:
            space.listen("0.0.0.0", port)
        self.pods.append(
            PodFacts(key=f"default/{name}", node=node, addresses=(ip_address(address),))
        )

    @property
    def topology(self) -> Topology:
        return Topology(
            nodes=tuple(
                NodeFacts(
                    name=name,
                    addresses=(ip_address(address),),
                    pod_cidrs=(ip_network(CIDRS[name]),),
                )
                for name, address in NODES.items()
            ),
            pods=tuple(self.pods),
            services=(
                ServiceFacts(
                    key="default/hello-server",
                    cluster_ips=(ip_address(HELLO),),
                    load_balancer_ips=(ip_address("35.231.121.11"),),
                ),
            ),
        )

    def ask(self, query: NodeQuery) -> Maybe[Walk]:
        if query.node in self.down:
            return Unavailable(reason=self.down[query.node])
        node = self.nodes[query.node]
        space = node.pods[query.pod.partition("/")[2]] if query.pod else node.host
        interface = "eth0" if query.arrives else ""
        return walk(
            node,
            WalkQuery(
                ingress=Ingress(netns=space.netns, interface=interface),
                packet=query.packet,
                flows=query.flows,
                use_conntrack=query.use_conntrack,
            ),
        )

    def paths(self, *inquiries: Inquiry) -> tuple[tuple[Path, ...], ...]:
        run = stitch(self.topology, inquiries)
        try:
            batch = next(run)
            while True:
                self.batches.append(batch)
                batch = run.send([self.ask(query) for query in batch])
        except StopIteration as done:
            found: tuple[tuple[Path, ...], ...] = done.value
            return found


def _without_bridge(node: Node) -> None:
    """What is left of a node's own namespace when its pods hang on ptp veths instead of cbr0."""
    host = node.host
    gone = host.index("cbr0")
    host.links = [link for link in host.links if link.ifindex != gone]
    host.addresses = [a for a in host.addresses if a.ifindex != gone]
    host.routes = [r for r in host.routes if all(hop.oif != gone for hop in r.next_hops)]
