"""How long the first command takes: ``python -m tests.bench.check --json``.

``gketrace check`` as a cold process, on a cluster of 1,000 Services and 10 nodes with 30 pods each.
The API server is real; the agents are simulated: each sends the snapshots of a node's and its
pods' namespaces, made beforehand, with the rules that kube-proxy would have there.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent import futures
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from e2e.kubeapi.harness import running_server
from gketrace_proto.codec import snapshot_to_proto
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1.agent_pb2_grpc import AgentServicer, add_AgentServicer_to_server
from tests.bench.report import arguments, goal, report
from tests.bench.ruleset_generate import BenchService, iptables_text, make_services
from tests.core.simulate.nodes import Node

NODES, SERVICES, ENDPOINTS, PODS = 10, 1000, 3, 30
_CHUNK = 64 << 10


def _address(node: int, pod: int) -> str:
    return f"10.40.{node}.{10 + pod}"


class Simulated(AgentServicer):
    """One node's agent, which sends what it was given."""

    def __init__(self, name: str, replies: list[pb.SnapshotReply]) -> None:
        self._name, self._replies = name, replies

    def GetInfo(self, request: Any, context: Any) -> pb.GetInfoReply:
        return pb.GetInfoReply(node=self._name, version="0", data_plane="iptables")

    def Snapshot(self, request: Any, context: Any) -> Any:
        yield from self._replies

    def ListConntrack(self, request: Any, context: Any) -> Any:
        yield pb.ListConntrackReply(summary=pb.ConntrackSummary(consistent=True, tracked=True))

    def GetConntrackStats(self, request: Any, context: Any) -> pb.GetConntrackStatsReply:
        return pb.GetConntrackStatsReply(entries=100, limit=262144, tracked=True)


def _node(number: int, rules: str) -> tuple[Node, list[pb.SnapshotReply]]:
    """A ptp node with its pods, and what its agent sends."""
    name = f"n{number}"
    node = Node(name)
    host = node.host
    host.link(
        "eth0", kind="", address=f"10.142.0.{number + 10}/24", mac=f"42:01:0a:8e:00:{number:02x}"
    )
    host.route("default", dev="eth0", via="10.142.0.1")
    host.listen("0.0.0.0", 10256)
    host.iptables(rules)
    replies = []
    for pod in range(PODS):
        space = node.pod(f"p{number}-{pod}", _address(number, pod))
        node.ptp(f"p{number}-{pod}", f"10.40.{number}.1")
        space.listen("0.0.0.0", 8080)
    stats = pb.GetConntrackStatsReply(entries=100, limit=262144, tracked=True)
    replies.append(pb.SnapshotReply(snapshot=snapshot_to_proto(host.snapshot()), conntrack=stats))
    text = rules.encode()
    for start in range(0, len(text), _CHUNK):
        chunk = pb.GetRulesReply(
            backend="iptables-nft", family=4, source="iptables-nft-save",
            text=text[start : start + _CHUNK],
        )  # fmt: skip
        replies.append(pb.SnapshotReply(rules=chunk))
    for key, space in node.pods.items():
        replies.append(
            pb.SnapshotReply(
                pod=pb.PodRef(namespace="default", name=key),
                snapshot=snapshot_to_proto(space.snapshot()),
            )
        )
    return node, replies


def _objects(services: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for number in range(NODES):
        found.append({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": f"n{number}"},
            "spec": {"podCIDR": f"10.40.{number}.0/24", "podCIDRs": [f"10.40.{number}.0/24"],
                     "providerID": f"gce://bench/us-east1-b/n{number}"},
            "status": {
                "addresses": [{"type": "InternalIP", "address": f"10.142.0.{number + 10}"}],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        })  # fmt: skip
        for pod in range(PODS):
            ip = _address(number, pod)
            found.append({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": f"p{number}-{pod}", "namespace": "default",
                             "uid": f"00000000-0000-4000-8000-{number:06x}{pod:06x}",
                             "labels": {"app": "web"}},
                "spec": {"nodeName": f"n{number}", "containers": [{"name": "app", "image": "app"}]},
                "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
                           "hostIP": f"10.142.0.{number + 10}"},
            })  # fmt: skip
    for service in services:
        name, space = service.port.service, service.port.namespace
        port: dict[str, Any] = {
            "name": service.port.port, "port": 80, "protocol": "TCP", "targetPort": 8080,
        }  # fmt: skip
        # Each tenth also has a container-native load balancer, whose health checks are traced.
        native = {"cloud.google.com/neg": '{"ingress": true}'} if service.node_port else {}
        if service.node_port is not None:
            port["nodePort"] = service.node_port
        ends = []
        for ip in service.endpoints:
            node = int(ip.split(".")[2])
            pod = int(ip.split(".")[3]) - 10
            ends.append({
                "addresses": [ip], "nodeName": f"n{node}",
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "targetRef": {"kind": "Pod", "namespace": "default", "name": f"p{node}-{pod}"},
            })  # fmt: skip
        found.append({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": space, "annotations": native},
            "spec": {"type": "NodePort" if service.node_port else "ClusterIP",
                     "clusterIP": service.cluster_ip, "clusterIPs": [service.cluster_ip],
                     "ipFamilies": ["IPv4"], "ports": [port], "selector": {"app": "web"}},
            "status": {"loadBalancer": {}},
        })  # fmt: skip
        found.append({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": f"{name}-1", "namespace": space,
                         "labels": {"kubernetes.io/service-name": name}},
            "ports": [{"name": port["name"], "port": 8080, "protocol": "TCP"}],
            "endpoints": ends,
        })  # fmt: skip
    return found


def _services() -> tuple[BenchService, ...]:
    """Their endpoints are spread over the pods."""
    every = [_address(node, pod) for pod in range(PODS) for node in range(NODES)]
    return tuple(
        replace(
            service,
            endpoints=tuple(every[(number * ENDPOINTS + k) % len(every)] for k in range(ENDPOINTS)),
        )
        for number, service in enumerate(make_services(SERVICES, ENDPOINTS))
    )


def _serve(stack: ExitStack, folder: Path, rules: str) -> list[str]:
    """The agents; what to put on the command line to reach them."""
    line = []
    for number in range(NODES):
        _, replies = _node(number, rules)
        server = grpc.server(futures.ThreadPoolExecutor(4))
        add_AgentServicer_to_server(Simulated(f"n{number}", replies), server)
        path = folder / f"n{number}.sock"
        server.add_insecure_port(f"unix:{path}")
        server.start()
        stack.callback(lambda s=server: s.stop(None).wait())  # type: ignore[misc]
        line += ["--agent", f"n{number}=unix://{path}"]
    return line


def main() -> None:
    options = arguments(__doc__, runs=3)
    services = _services()
    rules = "".join(iptables_text(services))
    with tempfile.TemporaryDirectory(prefix="gketrace-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        api = stack.enter_context(
            running_server(folder / "api", name="bench", objects=_objects(services))
        )
        reach = _serve(stack, folder, rules)
        command = [str(Path(sys.executable).parent / "gketrace"), "check", "-o", "json"]
        command += ["--kubeconfig", str(api.kubeconfig), *reach]
        seconds: list[float] = []
        processor: list[float] = []
        document: dict[str, Any] = {}
        for _ in range(options.runs):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            start = time.perf_counter()
            done = subprocess.run(command, check=False, capture_output=True, env=os.environ)
            seconds.append(time.perf_counter() - start)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            if done.returncode not in (0, 1):
                raise SystemExit(
                    f"exit {done.returncode}: {done.stderr.decode()}{done.stdout.decode()[:2000]}"
                )
            document = json.loads(done.stdout)
    middle = statistics.median(seconds)
    report(
        options,
        figures={
            "check_seconds": [round(value, 2) for value in seconds],
            "check_processor_seconds": [round(value, 2) for value in processor],
            "rules_bytes_each_node": len(rules),
            "counts": document["counts"],
            "findings": [one["code"] for one in document["findings"]],
        },
        goals={"check_seconds_median": goal(round(middle, 2), at_most=10.0)},
    )


if __name__ == "__main__":
    main()
