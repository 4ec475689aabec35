"""What Kubernetes objects say about addresses: which node, pod range or Service has which.

This is all that a trace knows of the network between nodes; nothing of it was seen on a wire.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from gketrace.packet import IPAddress
from gketrace.snapshot import IPNetwork
from gketrace.trace import Citation, Source

__all__ = [
    "NodeFacts",
    "Owner",
    "OwnerKind",
    "PodFacts",
    "SeenAddress",
    "ServiceFacts",
    "Topology",
    "cite_object",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenAddress:
    """An address that a node's agent saw on an interface of the node itself."""

    address: IPAddress
    interface: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """A Node object."""

    name: str
    addresses: tuple[IPAddress, ...] = ()
    """status.addresses, type InternalIP."""
    external: tuple[IPAddress, ...] = ()
    """status.addresses, type ExternalIP: the cloud translates them to the internal one."""
    pod_cidrs: tuple[IPNetwork, ...] = ()
    """spec.podCIDRs."""
    seen: tuple[SeenAddress, ...] = ()
    """What its agent saw; counts where no object says whose an address is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodFacts:
    """A Pod object that runs."""

    key: str
    """``namespace/name``."""
    node: str
    addresses: tuple[IPAddress, ...] = ()
    host_network: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceFacts:
    """A Service's addresses."""

    key: str
    cluster_ips: tuple[IPAddress, ...] = ()
    load_balancer_ips: tuple[IPAddress, ...] = ()
    external_ips: tuple[IPAddress, ...] = ()


class OwnerKind(Enum):
    """What an address is, to the network between the nodes."""

    NODE = "node"
    """A node's own address."""
    EXTERNAL = "external"
    """A node's external address, which the cloud translates to its internal one."""
    PODS = "pods"
    """In a node's pod range, or a pod's own address."""
    BALANCER = "load balancer"
    """A Service's load-balancer or external IP: some node gets it."""
    CLUSTER_IP = "ClusterIP"
    """Exists in the nodes' rules only."""
    OUTSIDE = "outside"
    """Nothing in the cluster has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who has an address."""

    kind: OwnerKind
    citation: Citation
    node: str = ""
    """For NODE, EXTERNAL and PODS."""
    internal: IPAddress | None = None
    """For EXTERNAL: what the node sees instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The cluster's addresses."""

    nodes: tuple[NodeFacts, ...]
    pods: tuple[PodFacts, ...] = ()
    services: tuple[ServiceFacts, ...] = ()
    _index: dict[IPAddress, Owner] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", dict(_owned(self)))

    def owner(self, address: IPAddress) -> Owner:
        """Who has `address`; exact addresses before ranges, longer ranges first."""
        known = self._index.get(address)
        if known is not None:
            return known
        best: tuple[int, NodeFacts, IPNetwork] | None = None
        for node in self.nodes:
            for cidr in node.pod_cidrs:
                if address in cidr and (best is None or cidr.prefixlen > best[0]):
                    best = (cidr.prefixlen, node, cidr)
        if best is not None:
            _, node, cidr = best
            cited = cite_object(f"Node {node.name}: spec.podCIDRs {cidr}")
            return Owner(kind=OwnerKind.PODS, node=node.name, citation=cited)
        none = cite_object(f"no Node, Pod or Service has {address}")
        return Owner(kind=OwnerKind.OUTSIDE, citation=none)

    def node(self, name: str) -> NodeFacts | None:
        return next((node for node in self.nodes if node.name == name), None)

    def has_source(self, node: str, address: IPAddress) -> bool:
        """Whether the network expects `address` as the source of what `node` sends."""
        owner = self.owner(address)
        if owner.kind in (OwnerKind.NODE, OwnerKind.EXTERNAL, OwnerKind.PODS):
            return owner.node == node
        return owner.kind is OwnerKind.BALANCER


def cite_object(text: str) -> Citation:
    """A field of a Kubernetes object."""
    return Citation(source=Source.OBJECT, text=text)


def _owned(topology: Topology) -> Iterable[tuple[IPAddress, Owner]]:
    """Later ones win: a node's own address over all else."""
    yield from _seen(topology)
    for service in topology.services:
        kinds = (
            ("spec.clusterIPs", service.cluster_ips, OwnerKind.CLUSTER_IP),
            ("spec.externalIPs", service.external_ips, OwnerKind.BALANCER),
            ("status.loadBalancer.ingress", service.load_balancer_ips, OwnerKind.BALANCER),
        )
        for name, addresses, kind in kinds:
            for address in addresses:
                cited = cite_object(f"Service {service.key}: {name} {address}")
                yield address, Owner(kind=kind, citation=cited)
    for pod in topology.pods:
        if pod.host_network:
            continue
        for address in pod.addresses:
            cited = cite_object(f"Pod {pod.key}: status.podIPs {address}, spec.nodeName {pod.node}")
            yield address, Owner(kind=OwnerKind.PODS, node=pod.node, citation=cited)
    for node in topology.nodes:
        for address in node.external:
            same = [a for a in node.addresses if a.version == address.version]
            cited = cite_object(f"Node {node.name}: status.addresses ExternalIP {address}")
            yield (
                address,
                Owner(
                    kind=OwnerKind.EXTERNAL,
                    node=node.name,
                    citation=cited,
                    internal=same[0] if same else None,
                ),
            )
        for address in node.addresses:
            cited = cite_object(f"Node {node.name}: status.addresses InternalIP {address}")
            yield address, Owner(kind=OwnerKind.NODE, node=node.name, citation=cited)


def _seen(topology: Topology) -> Iterable[tuple[IPAddress, Owner]]:
    """What agents saw on the interfaces that have their nodes' InternalIPs.

    A Node object often lists IPv4 only, while the node has IPv6 beside it.  Other interfaces are
    left aside: a bridge of a container engine has one address on every node.
    """
    claims: dict[IPAddress, list[Owner]] = {}
    for node in topology.nodes:
        known = {
            one.interface: one.address
            for one in reversed(node.seen)
            if one.address in node.addresses
        }
        for one in node.seen:
            if one.interface not in known or one.address.is_link_local:
                continue
            beside = known[one.interface]
            text = f"{one.address} is on {one.interface} of node {node.name}, beside {beside}"
            cited = Citation(source=Source.ADDRESS, text=text)
            owner = Owner(kind=OwnerKind.NODE, node=node.name, citation=cited)
            claims.setdefault(one.address, []).append(owner)
    for address, owners in claims.items():
        if len(owners) == 1:
            yield address, owners[0]
