"""Kubernetes objects from the API's JSON.

Defaults are the API's own (k8s.io/api/core/v1, k8s.io/api/discovery/v1): an absent `ready` of an
endpoint means ready, an absent protocol TCP.  Every `parse_*` raises ParseError with the object's
name when the JSON has another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ipaddress import ip_address, ip_network
from typing import Any, TypeVar

from gketrace.errors import ParseError
from gketrace.objects import (
    Container,
    ContainerPort,
    Endpoint,
    LoadBalancerIngress,
    Node,
    Pod,
    Service,
    ServicePort,
)

__all__ = [
    "parse_endpoints",
    "parse_endpointslice",
    "parse_node",
    "parse_pod",
    "parse_service",
]

Json = Mapping[str, Any]
T = TypeVar("T")


def _read(what: str, obj: Any, read: Callable[[Json], T]) -> T:
    """`read(obj)`, with every shape it does not expect turned into ParseError."""
    try:
        return read(obj)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        name = ""
        if isinstance(obj, dict) and isinstance(obj.get("metadata"), dict):
            metadata = obj["metadata"]
            name = f" {metadata.get('namespace', '')}/{metadata.get('name', '')}"
        detail = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ParseError(
            f"not a {what}: {detail}",
            source=f"API server,{name or ' unnamed object'}",
            line=0,
            text=str(obj)[:200],
        ) from error


def _strings(value: Any) -> tuple[str, ...]:
    """A list of strings; absent is empty.  Raises: TypeError."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{value!r:.60} is not a list of strings")
    return tuple(value)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is not a string")
    return value


def _address(value: Any) -> str:
    """An IP address.  Raises: ValueError, TypeError."""
    text = _text(value)
    ip_address(text)
    return text


def _networks(value: Any) -> tuple[str, ...]:
    """A list of prefixes; the API allows blanks around them.  Raises: ValueError, TypeError."""
    found = tuple(text.strip() for text in _strings(value))
    for text in found:
        ip_network(text, strict=False)
    return found


def _number(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r:.60} is not a number")
    return value


def _port(value: Any) -> int:
    """0: absent.  Raises: ValueError, TypeError."""
    number = _number(value)
    if not 0 <= number <= 65535:
        raise ValueError(f"{number} is no port")
    return number


def _flag(value: Any, *, absent: bool) -> bool:
    if value is None:
        return absent
    if not isinstance(value, bool):
        raise TypeError(f"{value!r:.60} is not true or false")
    return value


def _mapping(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.60} is not a map of strings")
    return {key: _text(item) for key, item in value.items()}


def _name(obj: Json) -> tuple[str, str, str]:
    metadata = obj["metadata"]
    if not metadata["name"]:
        raise ValueError("it has no name")
    return _text(metadata.get("namespace")), _text(metadata["name"]), _text(metadata.get("uid"))


def _condition(status: Json, kind: str) -> str:
    for condition in status.get("conditions") or []:
        if condition.get("type") == kind:
            return _text(condition.get("status"))
    return ""


def _container(spec: Json, status: Json, *, init: bool) -> Container:
    runtime, _, identifier = _text(status.get("containerID")).rpartition("://")
    return Container(
        name=_text(spec["name"]),
        id=identifier,
        runtime=runtime,
        init=init,
        ready=_flag(status.get("ready"), absent=False),
        running="running" in (status.get("state") or {}),
        ports=tuple(
            ContainerPort(
                port=_port(port["containerPort"]),
                name=_text(port.get("name")),
                protocol=_text(port.get("protocol")) or "TCP",
                host_port=_port(port.get("hostPort")),
                host_ip=_text(port.get("hostIP")),
            )
            for port in spec.get("ports") or []
        ),
    )


def _containers(spec: Json, status: Json) -> tuple[Container, ...]:
    found: list[Container] = []
    for listed, stated, init in (
        ("initContainers", "initContainerStatuses", True),
        ("containers", "containerStatuses", False),
        ("ephemeralContainers", "ephemeralContainerStatuses", False),
    ):
        statuses = {entry["name"]: entry for entry in status.get(stated) or []}
        found += [
            _container(entry, statuses.get(entry["name"], {}), init=init)
            for entry in spec.get(listed) or []
        ]
    return tuple(found)


_CONFIG_HASH = "kubernetes.io/config.hash"


def parse_pod(obj: Json) -> Pod:
    def read(obj: Json) -> Pod:
        namespace, name, uid = _name(obj)
        spec, status = obj["spec"], obj.get("status") or {}
        ips = tuple(_address(entry["ip"]) for entry in status.get("podIPs") or [])
        if not ips and status.get("podIP"):
            ips = (_address(status["podIP"]),)
        return Pod(
            namespace=namespace,
            name=name,
            uid=uid,
            node=_text(spec.get("nodeName")),
            phase=_text(status.get("phase")),
            ready=_condition(status, "Ready") == "True",
            host_network=_flag(spec.get("hostNetwork"), absent=False),
            pod_ips=ips,
            host_ip=_address(status["hostIP"]) if status.get("hostIP") else "",
            containers=_containers(spec, status),
            labels=_mapping(obj["metadata"].get("labels")),
            deletion_timestamp=_text(obj["metadata"].get("deletionTimestamp")),
            reason=_text(status.get("reason")),
            config_hash=_mapping(obj["metadata"].get("annotations")).get(_CONFIG_HASH, ""),
        )

    return _read("Pod", obj, read)


def _service_port(port: Json) -> ServicePort:
    target = port.get("targetPort", port["port"])
    if not isinstance(target, str):
        target = _port(target)
    return ServicePort(
        port=_port(port["port"]),
        name=_text(port.get("name")),
        protocol=_text(port.get("protocol")) or "TCP",
        target_port=target,
        node_port=_port(port.get("nodePort")),
    )


def parse_service(obj: Json) -> Service:
    def read(obj: Json) -> Service:
        namespace, name, uid = _name(obj)
        spec = obj["spec"]
        balancer = (obj.get("status") or {}).get("loadBalancer") or {}
        ips = _strings(spec.get("clusterIPs"))
        if not ips and spec.get("clusterIP"):
            ips = (_text(spec["clusterIP"]),)
        affinity = _text(spec.get("sessionAffinity")) or "None"
        client_ip = (spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}
        seconds = _number(client_ip.get("timeoutSeconds")) or 10800
        return Service(
            namespace=namespace,
            name=name,
            uid=uid,
            type=_text(spec.get("type")) or "ClusterIP",
            cluster_ips=tuple(_address(ip) for ip in ips if ip != "None"),
            headless="None" in ips,
            external_ips=tuple(map(_address, _strings(spec.get("externalIPs")))),
            external_name=_text(spec.get("externalName")),
            ingress=tuple(
                LoadBalancerIngress(
                    ip=_address(entry["ip"]) if entry.get("ip") else "",
                    hostname=_text(entry.get("hostname")),
                    ip_mode=_text(entry.get("ipMode")) or "VIP",
                )
                for entry in balancer.get("ingress") or []
            ),
            source_ranges=_networks(spec.get("loadBalancerSourceRanges")),
            ports=tuple(_service_port(port) for port in spec.get("ports") or []),
            selector=_mapping(spec.get("selector")),
            external_traffic_policy=_text(spec.get("externalTrafficPolicy")) or "Cluster",
            internal_traffic_policy=_text(spec.get("internalTrafficPolicy")) or "Cluster",
            session_affinity=affinity,
            affinity_seconds=seconds if affinity == "ClientIP" else 0,
            health_check_node_port=_port(spec.get("healthCheckNodePort")),
            load_balancer_class=_text(spec.get("loadBalancerClass")),
            annotations=_mapping(obj["metadata"].get("annotations")),
        )

    return _read("Service", obj, read)


_ALL_PORTS: tuple[Json, ...] = ({},)
_SERVICE_LABEL = "kubernetes.io/service-name"


def _target_pod(reference: Json | None) -> tuple[str, str]:
    """(name, namespace)."""
    reference = reference or {}
    if reference.get("kind") != "Pod":
        return "", ""
    return _text(reference.get("name")), _text(reference.get("namespace"))


def parse_endpointslice(obj: Json) -> tuple[Endpoint, ...]:
    """One Endpoint per address and port.

    Only the first of an endpoint's addresses counts: all are the same backend, and kube-proxy
    (pkg/proxy/endpointslicecache.go) takes the first.  A slice without ports has none; a port
    without a number is all ports.
    """

    def read(obj: Json) -> tuple[Endpoint, ...]:
        namespace, name, _ = _name(obj)
        service = (obj["metadata"].get("labels") or {}).get(_SERVICE_LABEL, "")
        found: list[Endpoint] = []
        kind = _text(obj["addressType"])
        for entry in obj.get("endpoints") or []:
            first = entry["addresses"][0]
            conditions = entry.get("conditions") or {}
            ready = _flag(conditions.get("ready"), absent=True)
            hints = entry.get("hints") or {}
            pod, pod_namespace = _target_pod(entry.get("targetRef"))
            found += [
                Endpoint(
                    namespace=namespace,
                    service=_text(service),
                    source=f"endpointslices/{name}",
                    address=_text(first) if kind == "FQDN" else _address(first),
                    address_type=kind,
                    port=_port(port.get("port")),
                    port_name=_text(port.get("name")),
                    protocol=_text(port.get("protocol")) or "TCP",
                    ready=ready,
                    serving=_flag(conditions.get("serving"), absent=ready),
                    terminating=_flag(conditions.get("terminating"), absent=False),
                    node=_text(entry.get("nodeName")),
                    zone=_text(entry.get("zone")),
                    pod=pod,
                    pod_namespace=pod_namespace,
                    hint_zones=tuple(_text(z["name"]) for z in hints.get("forZones") or []),
                    hint_nodes=tuple(_text(n["name"]) for n in hints.get("forNodes") or []),
                )
                for port in obj.get("ports") or []
            ]
        return tuple(found)

    return _read("EndpointSlice", obj, read)


def parse_endpoints(obj: Json) -> tuple[Endpoint, ...]:
    """The same from a core/v1 Endpoints object, for clusters before EndpointSlice v1 (1.21)."""

    def read(obj: Json) -> tuple[Endpoint, ...]:
        namespace, name, _ = _name(obj)
        found: list[Endpoint] = []
        for subset in obj.get("subsets") or []:
            for listed, ready in (("addresses", True), ("notReadyAddresses", False)):
                for entry in subset.get(listed) or []:
                    address = _address(entry["ip"])
                    pod, pod_namespace = _target_pod(entry.get("targetRef"))
                    found += [
                        Endpoint(
                            namespace=namespace,
                            service=name,
                            source=f"endpoints/{name}",
                            address=address,
                            address_type="IPv6" if ":" in address else "IPv4",
                            port=_port(port.get("port")),
                            port_name=_text(port.get("name")),
                            protocol=_text(port.get("protocol")) or "TCP",
                            ready=ready,
                            serving=ready,
                            terminating=False,
                            node=_text(entry.get("nodeName")),
                            zone="",
                            pod=pod,
                            pod_namespace=pod_namespace,
                        )
                        for port in subset.get("ports") or _ALL_PORTS
                    ]
        return tuple(found)

    return _read("Endpoints", obj, read)


def parse_node(obj: Json) -> Node:
    def read(obj: Json) -> Node:
        _, name, uid = _name(obj)
        spec, status = obj.get("spec") or {}, obj.get("status") or {}
        addresses: dict[str, list[str]] = {}
        for entry in status.get("addresses") or []:
            kind, address = _text(entry["type"]), _text(entry["address"])
            addresses.setdefault(kind, []).append(
                _address(address) if kind in ("InternalIP", "ExternalIP") else address
            )
        cidrs = _networks(spec.get("podCIDRs"))
        if not cidrs and spec.get("podCIDR"):
            cidrs = _networks([spec["podCIDR"]])
        return Node(
            name=name,
            uid=uid,
            internal_ips=tuple(addresses.get("InternalIP", ())),
            external_ips=tuple(addresses.get("ExternalIP", ())),
            hostname=next(iter(addresses.get("Hostname", ())), name),
            pod_cidrs=cidrs,
            ready={"True": True, "False": False}.get(_condition(status, "Ready")),
            labels=_mapping(obj["metadata"].get("labels")),
            provider_id=_text(spec.get("providerID")),
        )

    return _read("Node", obj, read)
