"""What findings rest on: the objects, what each node's agent read, and the ways that were traced.

Built by whoever read it: live by the CLI, or from a bundle.  What was not read is `Unavailable`, or
absent from `World.sights`, and named in `World.missing`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from gketrace.conntrack import ConntrackEntry
from gketrace.findings.expected import Expected, expected
from gketrace.kubenames import ServicePort as PortName
from gketrace.objects import Endpoint, Node, Pod, Service
from gketrace.packet import IPAddress
from gketrace.snapshot import Maybe, NetnsSnapshot, Unavailable
from gketrace.trace import Missing, NetnsKind, NetnsRef, Path

if TYPE_CHECKING:
    from gketrace.findings.programme import Programme
    from gketrace.simulate.routing import Fib

__all__ = ["Sight", "TableState", "Way", "World", "fib_of"]


_NOT_READ: Final = Unavailable(reason="not read")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableState:
    """Connection tracking of a node's own namespace, as a whole."""

    entries: int
    limit: int
    counters: Mapping[str, int] = field(default_factory=dict)
    """The kernel's per-CPU statistics, added up."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What one node's agent read."""

    node: str
    host: NetnsSnapshot
    pods: Mapping[str, Maybe[NetnsSnapshot]] = field(default_factory=dict)
    """``namespace/name`` → its namespace.  Pods of the host's network are not in it."""
    handlers: Mapping[str, str] = field(default_factory=dict)
    """Pod → runtime handler, where it is not the usual one."""
    plane: str = ""
    """``iptables``, ``nftables``, ``ipvs``, ``dataplane-v2``; empty: not known."""
    plane_reason: str = ""
    table: Maybe[TableState] = _NOT_READ
    table_later: Maybe[TableState] = _NOT_READ
    """The same at the end of the reading: what rose in between is rising."""
    entries: Maybe[tuple[ConntrackEntry, ...]] = _NOT_READ
    """Connections, up to the reader's bound."""

    @cached_property
    def programme(self) -> Programme:
        from gketrace.findings.programme import read_programme

        return read_programme(self.host)

    @cached_property
    def fib(self) -> Fib:
        return fib_of(self.host)

    @property
    def by_rules(self) -> bool:
        """False: kernel rules do not decide about Services here, or may not."""
        return self.plane not in ("dataplane-v2", "ipvs")

    def snapshot(self, netns: NetnsRef) -> Maybe[NetnsSnapshot]:
        """Implements `gketrace.snapshot.NodeView`, so that walks go over what was read."""
        if netns.kind is NetnsKind.HOST:
            return self.host
        if netns.kind is NetnsKind.POD:
            found = self.pods.get(netns.pod)
            return found if found is not None else Unavailable(reason=f"{netns} was not read")
        return Unavailable(reason=f"{netns} belongs to no pod that was read")

    @property
    def is_blind(self) -> bool:
        """Nothing of the node was read but, at most, its connections."""
        host = self.host
        read = (
            *(host.links, host.addresses, host.routes, host.rules, host.neighbours, host.fdb),
            *(host.sysctls, host.sockets, *host.rulesets, self.table, self.table_later),
        )
        told = self.pods or self.handlers or self.plane or self.plane_reason
        return not told and all(isinstance(one, Unavailable) for one in read)

    def seen_pods(self) -> Iterator[tuple[str, NetnsSnapshot]]:
        """The pods whose namespaces were read."""
        for key, shot in self.pods.items():
            if not isinstance(shot, Unavailable):
                yield key, shot


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One traced path, and what was asked."""

    path: Path
    standing: str
    """``fine``, ``configured``, ``broken`` or ``unknown``."""
    service: str = ""
    """``namespace/name`` of the Service whose front door it is; empty: none."""
    port: str = ""
    """The Service port's name."""
    sender_pod: str = ""
    """Who asks, when it is a pod."""
    sender_node: str = ""
    configured: str = ""
    """Why the Service's configuration drops it; empty: it does not."""
    asked: bool = False
    """True: just this way was asked for, so that a drop by configuration matters."""
    astray: bool = False
    """True: it arrives at somebody who is no endpoint of the Service, or fails where a rule that
    leads to none has sent it."""
    meant: str = ""
    """The pod that should have got it, when another one has: astray."""
    stands_for: str = ""
    """A load balancer's health check: the range that its source stands for; else empty."""


@dataclass(frozen=True, kw_only=True)
class World:
    """All that was read."""

    nodes: tuple[Node, ...] = ()
    pods: tuple[Pod, ...] = ()
    services: tuple[Service, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    sights: Mapping[str, Sight] = field(default_factory=dict)
    """Node → what was read there; a node that is absent was not read."""
    ways: tuple[Way, ...] = ()
    missing: tuple[Missing, ...] = ()
    all_pods: bool = True
    """False: `pods` are some of the cluster's, so that nothing is said of addresses of no pod."""

    @cached_property
    def expected(self) -> Mapping[PortName, Expected]:
        """Each Service port that kube-proxy has to programme, and its endpoints."""
        return expected(self.services, self.endpoints)

    @cached_property
    def pod_by_key(self) -> Mapping[str, Pod]:
        return {pod.key: pod for pod in self.pods}

    @cached_property
    def pod_by_address(self) -> Mapping[IPAddress, Pod]:
        """Running pods that have addresses of their own."""
        return {
            ip_address(ip): pod
            for pod in self.pods
            if not pod.host_network and pod.phase not in ("Succeeded", "Failed")
            for ip in pod.pod_ips
        }

    @cached_property
    def node_by_address(self) -> Mapping[IPAddress, Node]:
        return {
            ip_address(ip): node
            for node in self.nodes
            for ip in (*node.internal_ips, *node.external_ips)
        }

    @cached_property
    def services_by_key(self) -> Mapping[str, Service]:
        return {service.key: service for service in self.services}


def fib_of(space: NetnsSnapshot) -> Fib:
    """The routing of one namespace."""
    # Here, as it takes a while to load: many answers look up no route.
    from gketrace.simulate.routing import Fib

    return Fib(space)
