"""What a lab is built from: one fixture world (tests/data/worlds/NAME) as plain values.

A world is the Kubernetes objects of a small cluster, and what a real kube-proxy programmed from
them on each of three nodes. Shapes: nodes in nodes.json's order; ports as (protocol, port).
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.netlab.errors import LabError

__all__ = [
    "AGENT_NAMESPACE",
    "AGENT_PORT",
    "BACKENDS",
    "TOPOLOGIES",
    "Node",
    "Pod",
    "World",
    "agent_key",
    "agent_object",
    "default_backend",
    "load_world",
]

WORLDS = Path(__file__).resolve().parents[2] / "tests" / "data" / "worlds"
TOPOLOGIES = ("bridge", "ptp")
BACKENDS = {
    ("1.36", "nft"): "kube-proxy-1.36-iptables-nft",
    ("1.36", "legacy"): "kube-proxy-1.36-iptables-legacy",
    ("1.36", "nftables"): "kube-proxy-1.36-nftables",
    ("1.30", "nft"): "kube-proxy-1.30-iptables-nft",
    ("1.20", "legacy"): "kube-proxy-1.20-iptables-legacy",
}
AGENT_NAMESPACE = "gketrace-system"
AGENT_PORT = 9410


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node: `short` is the unique suffix of its name (2jdh), `index` is N of fd00:40:N::/64."""

    name: str
    short: str
    ip: str
    ip6: str
    pod_cidr: str
    gateway: str
    index: int
    mtu: int
    fixture: Path

    @property
    def pod_cidr6(self) -> str:
        return str(ipaddress.IPv6Network(f"fd00:40:{self.index:x}::/64"))

    @property
    def gateway6(self) -> str:
        return str(ipaddress.IPv6Address(f"fd00:40:{self.index:x}::1"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod with one container; `ports` is everything that something in the world sends to it."""

    namespace: str
    name: str
    uid: str
    node: str
    ip: str
    ip6: str | None
    host_network: bool
    container: str
    container_id: str
    ports: tuple[tuple[str, int], ...]
    synthetic: bool

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def sandbox_id(self) -> str:
        return hashlib.sha256(f"sandbox {self.uid}".encode()).hexdigest()

    @property
    def netns_name(self) -> str:
        digest = hashlib.sha256(f"netns {self.uid}".encode()).hexdigest()
        parts = (digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:32])
        return "cni-" + "-".join(parts)

    @property
    def veth(self) -> str:
        return "veth" + hashlib.sha256(f"veth {self.uid}".encode()).hexdigest()[:8]

    @property
    def cgroup(self) -> str:
        """The pod's slice as the systemd driver names it for a BestEffort pod."""
        return (
            "kubepods.slice/kubepods-besteffort.slice/"
            f"kubepods-besteffort-pod{self.uid.replace('-', '_')}.slice"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One fixture world, with the synthetic pods that the lab adds to it."""

    era: str
    backend: str
    path: Path
    nodes: tuple[Node, ...]
    pods: tuple[Pod, ...]
    extra_pod_objects: tuple[dict[str, Any], ...]
    services: tuple[dict[str, Any], ...]
    slices: tuple[dict[str, Any], ...]

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def pods_on(self, node: str) -> tuple[Pod, ...]:
        return tuple(pod for pod in self.pods if pod.node == node)

    @property
    def load_balancer_ips(self) -> tuple[str, ...]:
        """Every load balancer's address, then external IPs are `external_ips`."""
        found = [
            ingress["ip"]
            for service in self.services
            for ingress in service["status"].get("loadBalancer", {}).get("ingress", ())
        ]
        return tuple(sorted(found))

    @property
    def external_ips(self) -> tuple[str, ...]:
        return tuple(ip for s in self.services for ip in s["spec"].get("externalIPs", ()))

    def local_endpoints(self, namespace: str, service: str, node: str) -> int:
        """How many ready endpoints of the service are on the node."""
        addresses = {
            endpoint["addresses"][0]
            for item in self.slices
            if item["metadata"]["namespace"] == namespace
            and item["metadata"]["labels"].get("kubernetes.io/service-name") == service
            for endpoint in item.get("endpoints") or ()
            if endpoint.get("nodeName") == node and endpoint["conditions"].get("ready")
        }
        return len(addresses)

    def lb_target(self, address: str) -> str:
        """The node that the lab's load balancer sends `address` to: the first, in nodes.json's
        order, that its health check would call healthy. With externalTrafficPolicy Local that is
        a node with a ready endpoint."""
        for service in self.services:
            spec = service["spec"]
            ingress = service["status"].get("loadBalancer", {}).get("ingress", ())
            if address in [item["ip"] for item in ingress] and (
                spec.get("externalTrafficPolicy") == "Local"
            ):
                meta = service["metadata"]
                for node in self.nodes:
                    if self.local_endpoints(meta["namespace"], meta["name"], node.name):
                        return node.name
        return self.nodes[0].name


def default_backend(era: str) -> str:
    return "legacy" if era == "1.20" else "nft"


def load_world(era: str, backend: str) -> World:
    """Reads the world of an era and a backend; raises LabError when there is none."""
    folder = BACKENDS.get((era, backend))
    if folder is None:
        valid = ", ".join(f"--era {e} --backend {b}" for e, b in BACKENDS)
        raise LabError(f"no fixture for --era {era} --backend {backend}; there are: {valid}")
    path = WORLDS / folder
    slices = _items(path / "endpointslices.json")
    nodes = tuple(_node(item, path) for item in _items(path / "nodes.json"))
    extra = (_hostport_object(nodes),)
    pods = [_pod(item, slices, synthetic=False) for item in _items(path / "pods.json")]
    pods += [_pod(item, slices, synthetic=True) for item in extra]
    return World(
        era=era,
        backend=backend,
        path=path,
        nodes=nodes,
        pods=tuple(pods),
        extra_pod_objects=extra,
        services=_items(path / "services.json"),
        slices=slices,
    )


def _items(path: Path) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(path.read_text())["items"])


def _node(item: dict[str, Any], world: Path) -> Node:
    name = item["metadata"]["name"]
    short = name.rsplit("-", 1)[1]
    fixture = world / f"node-{short}"
    eth0 = next(
        link
        for link in json.loads((fixture / "ip-addr.json").read_text())
        if link["ifname"] == "eth0"
    )
    ip6 = next(
        a["local"] for a in eth0["addr_info"] if a["family"] == "inet6" and a["scope"] == "global"
    )
    cidr = ipaddress.IPv4Network(item["spec"]["podCIDR"])
    return Node(
        name=name,
        short=short,
        ip=next(a["address"] for a in item["status"]["addresses"] if a["type"] == "InternalIP"),
        ip6=ip6,
        pod_cidr=str(cidr),
        gateway=str(cidr.network_address + 1),
        index=cidr.network_address.packed[2],
        mtu=eth0["mtu"],
        fixture=fixture,
    )


def _pod(item: dict[str, Any], slices: tuple[dict[str, Any], ...], *, synthetic: bool) -> Pod:
    spec, status = item["spec"], item["status"]
    container = spec["containers"][0]
    ips = [str(ipaddress.ip_address(entry["ip"])) for entry in status["podIPs"]]
    ports = {(p["protocol"], p["containerPort"]) for p in container.get("ports", ())}
    for entry in slices:
        for endpoint in entry.get("endpoints") or ():
            if endpoint["addresses"][0] == ips[0]:
                ports |= {(p["protocol"], p["port"]) for p in entry.get("ports") or ()}
    return Pod(
        namespace=item["metadata"]["namespace"],
        name=item["metadata"]["name"],
        uid=item["metadata"]["uid"],
        node=spec["nodeName"],
        ip=ips[0],
        ip6=next((ip for ip in ips if ":" in ip), None),
        host_network=bool(spec.get("hostNetwork")),
        container=container["name"],
        container_id=status["containerStatuses"][0]["containerID"].split("//", 1)[1],
        ports=tuple(sorted(ports)),
        synthetic=synthetic,
    )


def _hostport_object(nodes: tuple[Node, ...]) -> dict[str, Any]:
    """The pod with a hostPort that the fixtures lack, on the last node."""
    node = max(nodes, key=lambda n: n.index)
    return pod_object(
        namespace="default",
        name="hostport-0",
        labels={"app": "hostport"},
        node=node,
        ip=node.gateway.rsplit(".", 1)[0] + ".40",
        container="hostport",
        ports=[{"name": "http", "containerPort": 8080, "hostPort": 8088, "protocol": "TCP"}],
        host_network=False,
    )


def agent_key(node: Node) -> str:
    return f"{AGENT_NAMESPACE}/gketrace-agent-{node.short}"


def agent_object(node: Node) -> dict[str, Any]:
    """The agent's pod on `node`, as its DaemonSet would make it."""
    return pod_object(
        namespace=AGENT_NAMESPACE,
        name=agent_key(node).split("/")[1],
        labels={"app.kubernetes.io/name": "gketrace-agent"},
        node=node,
        ip=node.ip,
        container="agent",
        ports=[
            {
                "name": "grpc",
                "containerPort": AGENT_PORT,
                "hostPort": AGENT_PORT,
                "protocol": "TCP",
            }
        ],
        host_network=True,
    )


def pod_object(
    *,
    namespace: str,
    name: str,
    labels: dict[str, str],
    node: Node,
    ip: str,
    container: str,
    ports: list[dict[str, Any]],
    host_network: bool,
) -> dict[str, Any]:
    """A running pod's v1 object; UID and container ID are derived from its name."""
    digest = hashlib.sha256(f"pod {namespace}/{name}".encode()).hexdigest()
    uid = f"{digest[:8]}-{digest[8:12]}-4{digest[13:16]}-a{digest[17:20]}-{digest[20:32]}"
    when = "2026-11-22T01:00:00Z"
    conditions = ("PodScheduled", "Initialized", "ContainersReady", "Ready")
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": namespace,
            "name": name,
            "uid": uid,
            "labels": labels,
            "annotations": {"gketrace.dev/lab": "synthetic: not in the captured cluster"},
            "creationTimestamp": when,
            "resourceVersion": "1",
        },
        "spec": {
            "nodeName": node.name,
            "hostNetwork": host_network,
            "hostPID": host_network,
            "restartPolicy": "Always",
            "containers": [
                {"name": container, "image": f"gketrace.dev/lab/{container}:1", "ports": ports}
            ],
        },
        "status": {
            "phase": "Running",
            "qosClass": "BestEffort",
            "hostIP": node.ip,
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "startTime": when,
            "conditions": [{"type": kind, "status": "True"} for kind in conditions],
            "containerStatuses": [
                {
                    "name": container,
                    "containerID": "containerd://"
                    + hashlib.sha256(f"container {uid}".encode()).hexdigest(),
                    "image": f"gketrace.dev/lab/{container}:1",
                    "imageID": "",
                    "ready": True,
                    "started": True,
                    "restartCount": 0,
                    "state": {"running": {"startedAt": when}},
                }
            ],
        },
    }
