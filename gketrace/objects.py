"""The Kubernetes objects that answers rest on, as values: the fields that matter to packets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "Container",
    "ContainerPort",
    "Endpoint",
    "LoadBalancerIngress",
    "Node",
    "Pod",
    "Service",
    "ServicePort",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerPort:
    port: int
    name: str = ""
    protocol: str = "TCP"
    host_port: int = 0
    """0: none."""
    host_ip: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    name: str
    id: str = ""
    """As the runtime knows it, without the `containerd://` in front; empty until it has started."""
    runtime: str = ""
    """"containerd", "cri-o", "docker"."""
    init: bool = False
    ready: bool = False
    running: bool = False
    ports: tuple[ContainerPort, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    namespace: str
    name: str
    uid: str
    node: str
    """Empty until it is scheduled."""
    phase: str
    ready: bool
    host_network: bool
    pod_ips: tuple[str, ...]
    host_ip: str
    containers: tuple[Container, ...]
    """Init containers too, first."""
    labels: Mapping[str, str]
    deletion_timestamp: str
    """RFC 3339; empty unless it is being deleted."""
    reason: str
    """`status.reason`, e.g. Evicted."""
    config_hash: str = ""
    """Annotation kubernetes.io/config.hash of a static pod's mirror: the UID that the kubelet and
    the runtime know the pod by."""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePort:
    port: int
    name: str = ""
    protocol: str = "TCP"
    target_port: int | str = 0
    """A number, or the name of a container port."""
    node_port: int = 0
    """0: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBalancerIngress:
    ip: str = ""
    hostname: str = ""
    ip_mode: str = "VIP"
    """"VIP": nodes answer for the address; "Proxy": they do not, and have no rules for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    namespace: str
    name: str
    uid: str
    type: str
    cluster_ips: tuple[str, ...]
    """Empty for headless and ExternalName services."""
    headless: bool
    external_ips: tuple[str, ...]
    external_name: str
    ingress: tuple[LoadBalancerIngress, ...]
    source_ranges: tuple[str, ...]
    ports: tuple[ServicePort, ...]
    selector: Mapping[str, str]
    external_traffic_policy: str
    """"Cluster" or "Local"."""
    internal_traffic_policy: str
    session_affinity: str
    """"None" or "ClientIP"."""
    affinity_seconds: int
    """0 without affinity."""
    health_check_node_port: int
    load_balancer_class: str
    annotations: Mapping[str, str]

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One address and port of one service."""

    namespace: str
    service: str
    source: str
    """The object that says so: `endpointslices/NAME` or `endpoints/NAME`."""
    address: str
    address_type: str
    """"IPv4", "IPv6" or "FQDN"."""
    port: int
    """0: all ports."""
    port_name: str
    protocol: str
    ready: bool
    serving: bool
    terminating: bool
    node: str
    zone: str
    pod: str
    """The target pod's name; empty when the target is none."""
    pod_namespace: str = ""
    """The target pod's namespace, which need not be the slice's; empty: the slice's."""
    hint_zones: tuple[str, ...] = ()
    hint_nodes: tuple[str, ...] = ()

    @property
    def pod_key(self) -> str:
        """``namespace/name`` of the target pod; empty when the target is none."""
        return f"{self.pod_namespace or self.namespace}/{self.pod}" if self.pod else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    name: str
    uid: str
    internal_ips: tuple[str, ...]
    external_ips: tuple[str, ...]
    hostname: str
    pod_cidrs: tuple[str, ...]
    ready: bool | None
    """None: the node's kubelet has not been heard, or no condition says."""
    labels: Mapping[str, str]
    provider_id: str
