"""A cluster for the CLI to ask: a real API server with a world's objects, and one gRPC agent per
node, in this process, that walks packets over that world's real rules.

The nodes are called ``2jdh``, ``m69d`` and ``33fg``: their names are shortened in the objects.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import grpc

from e2e.kubeapi.harness import KubeApi, running_server
from gketrace.conntrack import ConntrackEntry
from gketrace.packet import Packet
from gketrace.snapshot import NetnsSnapshot, Unavailable
from gketrace.stitch import NodeQuery
from gketrace.trace import Flow
from gketrace_agent.messages import conntrack_filters
from gketrace_agent.rulesets import cut_iptables
from gketrace_proto.codec import decode, encode, snapshot_to_proto
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1 import snapshot_pb2
from gketrace_proto.v1alpha1.agent_pb2_grpc import AgentServicer, add_AgentServicer_to_server
from tests.core.clusters import Cluster
from tests.core.simulate.nodes import Space

__all__ = ["Stage", "WorldAgent", "stage"]

WORLDS = Path(__file__).parents[1] / "data/worlds"
PREFIX = "gke-lab-cluster-default-pool-9e4ce61e-"
PODS = {
    "hello-server-579859fb5b-szrwh": ("2jdh", "10.40.0.6", (8080,)),
    "web-0": ("2jdh", "10.40.0.10", (8080, 9090)),
    "web-1": ("m69d", "10.40.1.10", (8080, 9090)),
    "web-2": ("33fg", "10.40.2.10", (8080, 9090)),
    "edge-0": ("m69d", "10.40.1.20", (8080,)),
}


class WorldAgent(AgentServicer):
    """One node's agent.  The attributes make it fail."""

    def __init__(self, cluster: Cluster, node: str) -> None:
        self.cluster = cluster
        self.node = node
        self.says = node
        """The node that it says it is."""
        self.fails: dict[str, tuple[grpc.StatusCode, str]] = {}
        """Method → status and message."""
        self.sleeps = 0.0
        self.entries: list[ConntrackEntry] = []
        """What the node's own namespace tracks; walks do not look here."""

    def _begin(self, method: str, context: grpc.ServicerContext) -> None:
        if self.sleeps:
            time.sleep(self.sleeps)
        if method in self.fails:
            _abort(context, *self.fails[method])

    def GetInfo(self, request: pb.GetInfoRequest, context: grpc.ServicerContext) -> pb.GetInfoReply:
        self._begin("GetInfo", context)
        return pb.GetInfoReply(node=self.says, version="0", api_version="gketrace.dev/v1alpha1")

    def GetNetns(
        self, request: pb.GetNetnsRequest, context: grpc.ServicerContext
    ) -> pb.GetNetnsReply:
        self._begin("GetNetns", context)
        node = self.cluster.nodes[self.node]
        host = request.target.WhichOneof("target") == "host"
        space = node.host if host else node.pods[request.target.pod.name]
        shot = space.snapshot()
        assert isinstance(shot, NetnsSnapshot)
        message = snapshot_to_proto(shot)
        message.rulesets.append(
            snapshot_pb2.RulesetSummary(backend="iptables-nft", family=4, rules=0)
        )
        if host:
            return pb.GetNetnsReply(snapshot=message)
        resolved = pb.ResolvedPod(
            namespace="default",
            name=request.target.pod.name,
            uid=request.target.pod.uid,
            netns=message.netns,
            sandbox_id="5a" * 32,
            sandbox_pid=4000,
            containers=[
                pb.Container(
                    id=request.target.pod.container_ids[0],
                    name="app",
                    pid=4001,
                    state="running",
                    command="/app --serve",
                )
            ],
            method="cri",
            steps=[pb.ResolveStep(step="ListPodSandbox", ok=True, detail="one READY sandbox")],
        )
        return pb.GetNetnsReply(snapshot=message, pod=resolved)

    def Snapshot(
        self, request: pb.SnapshotRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.SnapshotReply]:
        self._begin("Snapshot", context)
        node = self.cluster.nodes[self.node]
        stats = pb.GetConntrackStatsReply(entries=len(self.entries), limit=262144, tracked=True)
        first = pb.SnapshotReply(snapshot=snapshot_to_proto(_shot(node.host)), conntrack=stats)
        yield first
        for ruleset in node.host.rulesets:
            for start in range(0, max(len(ruleset.text), 1), 1 << 16):
                yield pb.SnapshotReply(
                    rules=pb.GetRulesReply(
                        backend=ruleset.backend,
                        family=ruleset.family,
                        source=ruleset.source,
                        text=ruleset.text[start : start + (1 << 16)],
                    )
                )
        for pod in request.pods:
            if pod.name in node.pods:
                shot = snapshot_to_proto(_shot(node.pods[pod.name]))
                yield pb.SnapshotReply(pod=pod, snapshot=shot)
            else:
                yield pb.SnapshotReply(pod=pod, unavailable="no process of it was found")

    def GetConntrackStats(
        self, request: pb.GetConntrackStatsRequest, context: grpc.ServicerContext
    ) -> pb.GetConntrackStatsReply:
        self._begin("GetConntrackStats", context)
        return pb.GetConntrackStatsReply(entries=len(self.entries), limit=262144, tracked=True)

    def GetRules(
        self, request: pb.GetRulesRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GetRulesReply]:
        self._begin("GetRules", context)
        node = self.cluster.nodes[self.node]
        host = request.target.WhichOneof("target") == "host"
        space = node.host if host else node.pods[request.target.pod.name]
        for ruleset in space.rulesets:
            if isinstance(ruleset, Unavailable):
                yield pb.GetRulesReply(backend="iptables-legacy", unavailable=ruleset.reason)
                continue
            head = pb.GetRulesReply(
                backend=ruleset.backend,
                family=ruleset.family,
                taken_at=ruleset.taken_at,
                source=ruleset.source,
            )
            head.text = cut_iptables(ruleset.text, request.table, request.chain)
            yield head

    def ListConntrack(
        self, request: pb.ListConntrackRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ListConntrackReply]:
        self._begin("ListConntrack", context)
        wanted = conntrack_filters(request)
        host = request.target.WhichOneof("target") == "host"
        found = [entry for entry in self.entries if host and wanted.takes(entry)]
        yield pb.ListConntrackReply(entries=[encode(entry) for entry in found])
        yield pb.ListConntrackReply(
            summary=pb.ConntrackSummary(sent=len(found), consistent=True, tracked=host)
        )

    def Walk(self, request: pb.WalkRequest, context: grpc.ServicerContext) -> pb.WalkReply:
        self._begin("Walk", context)
        pod = request.target.pod
        named = {f"{p.namespace}/{p.name}" for p in request.pods}
        key = f"{pod.namespace}/{pod.name}" if pod.name else ""
        assert not key or key in named
        walked = self.cluster.ask(
            NodeQuery(
                node=self.node,
                pod=key,
                arrives=request.arrives,
                packet=decode(Packet, request.packet),
                flows=tuple(decode(Flow, flow) for flow in request.flows),
                use_conntrack=request.use_conntrack,
            )
        )
        assert not isinstance(walked, Unavailable)
        return pb.WalkReply(walk=encode(walked))


def _shot(space: Space) -> NetnsSnapshot:
    shot = space.snapshot()
    assert isinstance(shot, NetnsSnapshot)
    return shot


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, message: str) -> NoReturn:
    context.abort(code, message)
    raise AssertionError("abort raises")


@dataclass
class Stage:
    """What a test drives."""

    api: KubeApi
    cluster: Cluster
    agents: dict[str, WorldAgent]
    sockets: dict[str, str]

    def arguments(self, *words: str, without: tuple[str, ...] = ()) -> list[str]:
        """A command line that reaches this stage."""
        line = [*words, "--kubeconfig", str(self.api.kubeconfig)]
        for node, address in self.sockets.items():
            if node not in without:
                line += ["--agent", f"{node}={address}"]
        return line


@contextmanager
def stage(
    folder: Path, world: str = "kube-proxy-1.36-iptables-nft", topology: str = "bridge"
) -> Iterator[Stage]:
    """Everything running; stopped at the end."""
    objects = folder / "objects"
    objects.mkdir(parents=True)
    for source in (WORLDS / world).glob("*.json"):
        (objects / source.name).write_text(source.read_text().replace(PREFIX, ""))
    cluster = Cluster(world, topology=topology)
    for name, (node, address, ports) in PODS.items():
        cluster.pod(node, name, address, *ports)
    with ExitStack() as stack:
        api = stack.enter_context(
            running_server(
                folder / "api", name="stage", objects_dir=str(objects), users={"bob": {}}
            )
        )
        agents, sockets = {}, {}
        for node in cluster.nodes:
            agents[node] = WorldAgent(cluster, node)
            sockets[node] = f"unix://{folder / node}.sock"
            server = grpc.server(futures.ThreadPoolExecutor(4))
            add_AgentServicer_to_server(agents[node], server)
            server.add_insecure_port(f"unix:{folder / node}.sock")
            server.start()
            stack.callback(lambda s=server: s.stop(None).wait())
        yield Stage(api, cluster, agents, sockets)


def loaded(text: str) -> Any:
    return json.loads(text)
