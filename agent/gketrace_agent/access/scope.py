"""What belongs to the namespaces that a caller may see: pods and Services, as the API has them.

What a request says of a pod is not believed here, and neither is what its owner can write: an
annotation that names another pod's UID, or a Service's externalIPs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final

from gketrace.errors import GketraceError
from gketrace.packet import IPAddress
from gketrace_agent.access.cache import Cache
from gketrace_proto.v1alpha1 import target_pb2

if TYPE_CHECKING:
    from gketrace_agent.access.apiserver import KubeApi

__all__ = ["NamespaceObjects", "Objects", "Scope", "addresses_of"]

_OBJECTS_SECONDS: Final = 5.0
"""A pod's address may be another's so long after its end."""
_NODES_SECONDS: Final = 60.0
_NAMESPACES: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceObjects:
    """One namespace's."""

    pods: dict[str, tuple[str, target_pb2.PodRef]]
    """Name → node and the pod as the API has it."""
    addresses: frozenset[IPAddress]
    """Of its pods and Services; not of pods in a node's own network."""
    node_ports: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What a caller may see who may not see everything."""

    namespaces: tuple[str, ...]
    own: frozenset[IPAddress]
    """Addresses of these namespaces' pods and Services."""
    common: frozenset[IPAddress]
    """Addresses that are nobody's secret: the nodes'."""
    node_ports: frozenset[int]
    pods: dict[tuple[str, str], tuple[str, target_pb2.PodRef]]

    def __str__(self) -> str:
        word = "namespace" if len(self.namespaces) == 1 else "namespaces"
        return f"{word} {', '.join(self.namespaces)}"


class Objects:
    """Reads them.  Any thread may ask."""

    def __init__(self, api: KubeApi, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._api = api
        self._spaces: Cache[str, NamespaceObjects] = Cache(_NAMESPACES, clock=clock)
        self._nodes: Cache[str, frozenset[IPAddress]] = Cache(1, clock=clock)

    def scope(self, namespaces: Iterable[str]) -> Scope:
        """Raises `UnavailableError`: without the lists nothing can be shown."""
        names = tuple(sorted(set(namespaces)))
        found = {name: self._spaces.get(name, lambda n=name: self._read(n)) for name in names}  # type: ignore[misc]
        own: frozenset[IPAddress] = frozenset().union(*(one.addresses for one in found.values()))
        return Scope(
            namespaces=names,
            own=own,
            common=self._nodes.get("", self._read_nodes),
            node_ports=frozenset().union(*(one.node_ports for one in found.values())),
            pods={(ns, name): ref for ns, one in found.items() for name, ref in one.pods.items()},
        )

    def _read(self, namespace: str) -> tuple[NamespaceObjects, float]:
        pods: dict[str, tuple[str, target_pb2.PodRef]] = {}
        addresses: set[IPAddress] = set()
        ports: set[int] = set()
        for pod in self._items(f"/api/v1/namespaces/{namespace}/pods"):
            spec, status = pod.get("spec") or {}, pod.get("status") or {}
            if status.get("phase") in ("Succeeded", "Failed"):
                continue  # its address may be another's by now
            ref = _pod_ref(pod)
            pods[ref.name] = str(spec.get("nodeName") or ""), ref
            if not ref.host_network:
                addresses |= addresses_of(ref.pod_ips)
        for service in self._items(f"/api/v1/namespaces/{namespace}/services"):
            spec, status = service.get("spec") or {}, service.get("status") or {}
            given = [*(spec.get("clusterIPs") or ()), spec.get("clusterIP")]
            for ingress in (status.get("loadBalancer") or {}).get("ingress") or ():
                given.append(ingress.get("ip"))
            addresses |= addresses_of(given)
            ports |= {int(p["nodePort"]) for p in spec.get("ports") or () if p.get("nodePort")}
        return (
            NamespaceObjects(
                pods=pods, addresses=frozenset(addresses), node_ports=frozenset(ports)
            ),
            _OBJECTS_SECONDS,
        )

    def _read_nodes(self) -> tuple[frozenset[IPAddress], float]:
        found: set[IPAddress] = set()
        for node in self._items("/api/v1/nodes"):
            listed = (node.get("status") or {}).get("addresses") or ()
            found |= addresses_of(one.get("address") for one in listed)
        return frozenset(found), _NODES_SECONDS

    def _items(self, path: str) -> list[dict[str, Any]]:
        # resourceVersion 0: from the API server's memory, not from etcd.
        document = self._api.get(path, {"resourceVersion": "0"})
        items = document.get("items") or []
        if not isinstance(items, list):
            raise GketraceError(f"the API server's answer for {path} is no list")
        return items


def _pod_ref(pod: dict[str, Any]) -> target_pb2.PodRef:
    meta, spec, status = pod["metadata"], pod.get("spec") or {}, pod.get("status") or {}
    containers = status.get("containerStatuses") or ()
    ids = [str(one.get("containerID") or "").rpartition("://")[2] for one in containers]
    listed = [str(one.get("ip") or "") for one in status.get("podIPs") or ()]
    return target_pb2.PodRef(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        container_ids=[one for one in ids if one],
        pod_ips=[one for one in listed or [str(status.get("podIP") or "")] if one],
        host_network=bool(spec.get("hostNetwork")),
    )


def addresses_of(texts: Iterable[str | None]) -> frozenset[IPAddress]:
    """Those of `texts` that are addresses."""
    found: set[IPAddress] = set()
    for text in texts:
        try:
            found.add(ip_address(text or ""))
        except ValueError:
            continue  # "None" of a headless Service, a host name of a node
    return frozenset(found)
