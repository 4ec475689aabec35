"""A Service → the questions to ask: through which front door, from whom, into which node.

Pure.  A question carries what the Service's own configuration says must become of it
(`configured_drop`), so that a drop that was asked for is told from one that was not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Final

from gketrace.errors import NotFoundError, UnsupportedError, UsageError
from gketrace.objects import (
    Endpoint,
    LoadBalancerIngress,
    Node,
    Pod,
    Service,
    ServicePort,
)
from gketrace.packet import IPAddress, protocol_number
from gketrace_cli.astray import known_ends, known_takers

__all__ = [
    "CLIENTS",
    "Door",
    "Question",
    "Selection",
    "Sender",
    "endpoint_nodes",
    "questions",
    "ready_endpoints",
    "select_ports",
]

CLIENTS: Final[Mapping[int, IPAddress]] = {
    4: ip_address("203.0.113.10"),
    6: ip_address("2001:db8::10"),
}
"""The client outside the cluster that is assumed without ``--from``, by address family: from the
documentation ranges (RFC 5737, RFC 3849), so that it is nobody's."""

NODES_AT_MOST: Final = 16
"""Without ``--node``, so many nodes are asked: all of a small cluster, some of a large one."""


class Door(str, Enum):
    """The ways into a Service."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    LOAD_BALANCER = "LoadBalancer"
    EXTERNAL_IP = "ExternalIP"
    POD = "Pod"
    """A headless Service's endpoints, by their own addresses."""
    ADDRESS = "Address"
    """`gketrace trace`: any address."""
    HEALTH_CHECK = "HealthCheck"
    """`gketrace check`: a load balancer's probe, to a node or a pod."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """Who makes the packet."""

    node: str = ""
    """The node that it is on; empty: outside the cluster."""
    pod: Pod | None = None
    """None: the node itself, or a client outside."""
    address: IPAddress | None = None
    """None: the kernel of the node or pod selects it."""
    port: int | None = None
    assumed: bool = False
    """True: nobody asked for this one."""

    @property
    def outside(self) -> bool:
        return not self.node

    @property
    def text(self) -> str:
        """``client 203.0.113.10``, ``node/NAME``, ``pod/NS/NAME``."""
        if self.pod is not None:
            return f"pod/{self.pod.key}"
        return f"node/{self.node}" if self.node else f"client {self.address}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What was asked for; empty: all there is."""

    senders: tuple[Sender, ...] = ()
    door: Door | None = None
    node: str = ""
    """Full name of the node that the packet comes into the Service on."""
    port: str = ""
    """Name or number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One packet to follow."""

    door: Door
    sender: Sender
    address: IPAddress
    """The destination."""
    port: int | None
    protocol: int
    port_name: str = ""
    entry: str = ""
    """Node on which a packet from outside arrives; empty: the sender's, or not known."""
    via: str = ""
    """Node whose address is the destination (NodePort)."""
    has_endpoint: bool | None = None
    """Whether the node where the Service's rules are met has an endpoint of its own."""
    configured_drop: str = ""
    """Why the Service's configuration drops it; empty: it does not."""
    asked: bool = False
    """True: the drop's cause was picked on the command line, so it counts as broken."""
    notes: tuple[str, ...] = field(default=())
    """What was assumed."""
    use_conntrack: bool = True
    """False: as if the connection did not exist yet."""
    ends: frozenset[tuple[IPAddress, int]] | None = None
    """The addresses and ports of the Service's EndpointSlices, port 0 for all, ready or not:
    whoever else takes the packet is no endpoint.  None: not for a Service, or not known."""
    takers: frozenset[tuple[IPAddress, str]] = frozenset()
    """The addresses of its endpoints that are pods, and the pods, ``namespace/name``."""
    pod: str = ""
    """The one pod that was asked for."""


def select_ports(service: Service, wanted: str) -> tuple[ServicePort, ...]:
    """The Service's ports, or the one named or numbered `wanted`.  Raises `NotFoundError`."""
    if not wanted:
        return service.ports
    found = tuple(
        p for p in service.ports if wanted in (p.name, str(p.port)) or wanted == str(p.node_port)
    )
    if not found:
        known = ", ".join(
            f"{p.port}{f' ({p.name})' if p.name else ''}/{p.protocol.lower()}"
            for p in service.ports
        )
        raise NotFoundError(
            f"service {service.key} has no port {wanted!r}", hint=f"it has {known or 'none'}"
        )
    return found


def ready_endpoints(endpoints: Iterable[Endpoint], port: ServicePort) -> tuple[Endpoint, ...]:
    """Those that kube-proxy uses for a port: the ready ones; when there are none, those that are
    serving while terminating (kube-proxy pkg/proxy/topology.go, CategorizeEndpoints)."""
    of_port = [e for e in endpoints if e.port_name == port.name and e.protocol == port.protocol]
    ready = tuple(e for e in of_port if e.ready)
    return ready or tuple(e for e in of_port if e.serving and e.terminating)


def endpoint_nodes(endpoints: Iterable[Endpoint]) -> frozenset[str]:
    return frozenset(e.node for e in endpoints if e.node)


def questions(
    service: Service,
    endpoints: Sequence[Endpoint],
    nodes: Sequence[Node],
    selection: Selection,
) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    """All packets to follow, in the order to show them, and what was left out and why.

    Raises: `NotFoundError`, `UsageError`, `UnsupportedError` when there is nothing to follow.
    """
    if service.type == "ExternalName":
        raise UnsupportedError(
            f"service {service.key} is of type ExternalName: a DNS name for "
            f"{service.external_name}, with no address and no rules on any node",
            hint=f"gketrace trace SOURCE to an address of {service.external_name}",
        )
    ports = select_ports(service, selection.port)
    found: list[Question] = []
    skipped = [
        f"Load balancer {entry.ip or entry.hostname} is a proxy ({_proxy(entry)}): nodes have no "
        "rules for it, so that way is not traced."
        for entry in service.ingress
        if not entry.ip or entry.ip_mode != "VIP"
    ]
    for port in ports:
        maker = _Maker(service, port, endpoints, nodes, selection, skipped)
        for door in Door:
            if selection.door in (None, door):
                found += maker.through(door)
        if leaving := _leaving(endpoints, port):
            skipped.append(leaving)
    strangers = _strangers(service, selection.senders)
    if found:
        skipped += [f"Nothing is traced from {text}." for text in strangers]
        return tuple(found), tuple(dict.fromkeys(skipped))
    if strangers and len(strangers) == len(selection.senders):
        raise UsageError(strangers[0], hint="--from an address of the Service's family")
    doors = ", ".join(_doors_of(service)) or "none"
    if selection.door is not None:
        raise NotFoundError(
            f"service {service.key} has no {selection.door.value}", hint=f"its doors: {doors}"
        )
    if service.headless:
        raise NotFoundError(f"service {service.key} is headless and has no endpoint to trace to")
    raise UsageError(f"there is nothing to trace for service {service.key}", hint=f"doors: {doors}")


def _leaving(endpoints: Iterable[Endpoint], port: ServicePort) -> str:
    """That only endpoints on their way out are left; empty: there are others, or none."""
    used = ready_endpoints(endpoints, port)
    if not used or any(end.ready for end in used):
        return ""
    pods = ", ".join(sorted({end.pod or end.address for end in used}))
    name = f" ({port.name})" if port.name else ""
    return (
        f"No endpoint of port {port.port}{name} is ready: kube-proxy uses what is terminating and "
        f"still serves: {pods}."
    )


def _proxy(entry: LoadBalancerIngress) -> str:
    return "ipMode Proxy" if entry.ip else "known by a host name only"


def _doors_of(service: Service) -> list[str]:
    doors = []
    if service.cluster_ips:
        doors.append(Door.CLUSTER_IP.value)
    if any(port.node_port for port in service.ports):
        doors.append(Door.NODE_PORT.value)
    if any(entry.ip and entry.ip_mode == "VIP" for entry in service.ingress):
        doors.append(Door.LOAD_BALANCER.value)
    if service.external_ips:
        doors.append(Door.EXTERNAL_IP.value)
    if service.headless:
        doors.append(Door.POD.value)
    return doors


class _Maker:
    """The questions of one port."""

    def __init__(
        self,
        service: Service,
        port: ServicePort,
        endpoints: Sequence[Endpoint],
        nodes: Sequence[Node],
        selection: Selection,
        skipped: list[str],
    ) -> None:
        self._skipped = skipped
        self._service = service
        self._port = port
        self._protocol = protocol_number(port.protocol)
        self._ready = ready_endpoints(endpoints, port)
        self._ends = known_ends(endpoints, port)
        self._takers = known_takers(endpoints, port)
        self._on = endpoint_nodes(self._ready)
        self._selection = selection
        self._by_name = {node.name: node for node in nodes}
        without = [n for n in nodes if n.name not in self._on]
        having = [n for n in nodes if n.name in self._on]
        self._all = tuple(_alternate(having, without)[:NODES_AT_MOST])
        self._all_from_without = tuple(_alternate(without, having)[:NODES_AT_MOST])

    def through(self, door: Door) -> list[Question]:
        makers = {
            Door.CLUSTER_IP: self._cluster_ip,
            Door.NODE_PORT: self._node_port,
            Door.LOAD_BALANCER: self._load_balancer,
            Door.EXTERNAL_IP: self._external_ip,
            Door.POD: self._pods,
        }
        return makers[door]() if door in makers else []

    def _cluster_ip(self) -> list[Question]:
        return [
            self._question(Door.CLUSTER_IP, sender, ip, self._port.port, entry=self._selection.node)
            for ip in map(ip_address, self._service.cluster_ips)
            for sender in self._inside_senders(ip)
        ]

    def _pods(self) -> list[Question]:
        if not self._service.headless:
            return []
        named = self._selection.senders
        return [
            self._question(
                Door.POD, sender, ip, end.port, entry=self._selection.node or end.node, via=end.node
            )
            for end in self._ready
            if end.address_type != "FQDN"
            for ip in (ip_address(end.address),)
            for sender in (_of_family(named, ip) if named else self._inside_senders(ip))
        ]

    def _node_port(self) -> list[Question]:
        if not self._port.node_port:
            return []
        if self._selection.node:
            targets: tuple[Node, ...] = (self._by_name[self._selection.node],)
        else:
            targets = self._all
        return [
            self._question(
                Door.NODE_PORT, sender, ip, self._port.node_port, entry=node.name, via=node.name
            )
            for node in targets
            for ip in map(ip_address, node.internal_ips)
            if ip.version in self._families()
            for sender in self._outside_senders(ip)
        ]

    def _load_balancer(self) -> list[Question]:
        found = []
        for entry in self._service.ingress:
            if not entry.ip or entry.ip_mode != "VIP":
                continue
            ip = ip_address(entry.ip)
            for sender in self._outside_senders(ip, balanced=True):
                if not sender.outside:
                    found.append(self._question(Door.LOAD_BALANCER, sender, ip, self._port.port))
                    continue
                for node in self._balanced_nodes():
                    found.append(
                        self._question(Door.LOAD_BALANCER, sender, ip, self._port.port, entry=node)
                    )
        return found

    def _external_ip(self) -> list[Question]:
        found = []
        for ip in map(ip_address, self._service.external_ips):
            for sender in self._outside_senders(ip):
                nodes = [self._selection.node] if self._selection.node else []
                if sender.outside and not nodes:
                    nodes = [node.name for node in self._all]
                for node in nodes if sender.outside else [""]:
                    found.append(
                        self._question(
                            Door.EXTERNAL_IP,
                            sender,
                            ip,
                            self._port.port,
                            entry=node,
                            notes=("that the network brings the external IP to the node",)
                            if sender.outside
                            else (),
                        )
                    )
        return found

    def _balanced_nodes(self) -> list[str]:
        """The nodes that a load balancer's health check passes: with policy Local those that have
        an endpoint, else all."""
        if self._selection.node:
            return [self._selection.node]
        names = [node.name for node in self._all]
        if self._service.external_traffic_policy == "Local":
            return [name for name in names if name in self._on] or names
        return names

    def _families(self) -> set[int]:
        families: set[int] = {ip_address(ip).version for ip in self._service.cluster_ips}
        return families or {4, 6}

    def _inside_senders(self, ip: IPAddress) -> list[Sender]:
        """Who asks for an address of the cluster's own: the nodes, unless somebody is named."""
        if self._selection.senders:
            return [s for s in _of_family(self._selection.senders, ip) if self._can_ask(s, ip)]
        names = [node.name for node in self._all_from_without]
        if self._selection.node:
            names = [self._selection.node]
        return [Sender(node=name, assumed=True) for name in names]

    def _can_ask(self, sender: Sender, ip: IPAddress) -> bool:
        """False: a ClusterIP is not for senders outside, and this one was not asked for."""
        if not sender.outside or self._selection.node or self._selection.door is not None:
            return True
        if _doors_of(self._service) == [Door.CLUSTER_IP.value]:
            return True
        self._skipped.append(
            f"ClusterIP {ip} is not traced from {sender.text}, which is outside the cluster; "
            "--via clusterip does."
        )
        return False

    def _outside_senders(self, ip: IPAddress, *, balanced: bool = False) -> list[Sender]:
        if self._selection.senders:
            return _of_family(self._selection.senders, ip)
        client = CLIENTS[ip.version]
        if balanced:
            ranges = [
                r for r in map(_network, self._service.source_ranges) if r.version == ip.version
            ]
            if ranges and not any(client in r for r in ranges):
                client = ranges[0].network_address + min(1, ranges[0].num_addresses - 1)
        return [Sender(address=client, assumed=True)]

    def _question(
        self,
        door: Door,
        sender: Sender,
        ip: IPAddress,
        port: int | None,
        *,
        entry: str = "",
        via: str = "",
        notes: tuple[str, ...] = (),
    ) -> Question:
        where = sender.node or entry
        if door is Door.NODE_PORT:
            where = via
        reason, asked = self._configured(door, sender, where)
        return Question(
            door=door,
            sender=sender,
            address=ip,
            port=port,
            protocol=self._protocol,
            port_name=self._port.name,
            entry=entry if sender.outside else "",
            via=via,
            has_endpoint=(where in self._on) if where else None,
            configured_drop=reason,
            asked=asked,
            notes=notes,
            ends=self._ends,
            takers=self._takers,
        )

    def _configured(self, door: Door, sender: Sender, where: str) -> tuple[str, bool]:
        """(why the configuration drops it, whether that choice was the user's)."""
        chosen = bool(self._selection.senders)
        outside = door in (Door.NODE_PORT, Door.LOAD_BALANCER, Door.EXTERNAL_IP)
        if (
            door is Door.LOAD_BALANCER
            and self._service.source_ranges
            and sender.address is not None
            and not any(sender.address in r for r in map(_network, self._service.source_ranges))
        ):
            return f"{sender.address} is outside loadBalancerSourceRanges", chosen
        if not self._ready or not where or where in self._on:
            return "", False
        if outside and self._service.external_traffic_policy == "Local":
            local = f"externalTrafficPolicy is Local and node {where} has no endpoint"
            return local, bool(self._selection.node) or (chosen and not sender.outside)
        if door is Door.CLUSTER_IP and self._service.internal_traffic_policy == "Local":
            local = f"internalTrafficPolicy is Local and node {where} has no endpoint"
            return local, chosen or bool(self._selection.node)
        return "", False


def _network(text: str) -> IPv4Network | IPv6Network:
    return ip_network(text.strip(), strict=False)


def _alternate(first: Sequence[Node], second: Sequence[Node]) -> list[Node]:
    """One of each in turn, so that a cut keeps both kinds."""
    mixed: list[Node] = []
    for position in range(max(len(first), len(second))):
        mixed += first[position : position + 1]
        mixed += second[position : position + 1]
    return mixed


def _strangers(service: Service, senders: Iterable[Sender]) -> list[str]:
    """Senders of an address family that the Service does not have, and why they are left out."""
    families = {ip_address(ip).version for ip in service.cluster_ips}
    return [
        f"{sender.text}: it is IPv{sender.address.version} and service {service.key} is not"
        for sender in senders
        if families and sender.address is not None and sender.address.version not in families
    ]


def _of_family(senders: Iterable[Sender], ip: IPAddress) -> list[Sender]:
    return [s for s in senders if s.address is None or s.address.version == ip.version]
