"""Snapshot: a node's namespaces one after the other, over a real server."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from gketrace_agent.config import Config, Limits, Listen
from gketrace_agent.server import AgentServer
from gketrace_proto.codec import snapshot_from_proto
from gketrace_proto.v1alpha1 import agent_pb2, agent_pb2_grpc
from tests.agent.pods import container_id, fake_pod, netns_inode

WEB = container_id()


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[agent_pb2_grpc.AgentStub]:
    path = tmp_path / "agent.sock"
    server = AgentServer(
        Config(
            node="node-a",
            listen=(Listen(path=path),),
            runtime_sockets=(),
            limits=Limits(concurrent_calls=4, request_bytes=64 << 10),
        )
    )
    server.start()
    with grpc.insecure_channel(f"unix:{path}") as channel:
        yield agent_pb2_grpc.AgentStub(channel)
    server.stop(0)


def test_the_node_comes_first_then_its_pods(stub: agent_pb2_grpc.AgentStub) -> None:
    with fake_pod() as pod:
        pid = pod.add(WEB, own_netns=True)
        rules = b"*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -s 192.0.2.7/32 -j DROP\nCOMMIT\n"
        argv = ["nsenter", "-t", str(pid), "-n", "iptables-nft-restore"]
        subprocess.run(argv, input=rules, check=True)
        inode = netns_inode(pid)
        ref = agent_pb2.PodRef(namespace="default", name="web", uid=pod.uid)
        gone = agent_pb2.PodRef(
            namespace="default", name="gone", uid="00000000-0000-4000-8000-000000000001"
        )
        replies = list(stub.Snapshot(agent_pb2.SnapshotRequest(pods=[ref, gone]), timeout=30))
    assert not replies[0].HasField("pod")
    assert replies[0].conntrack.limit > 0
    host = snapshot_from_proto(replies[0].snapshot)
    assert host.netns.node == "node-a"
    begins = [n for n, reply in enumerate(replies) if reply.HasField("snapshot")]
    mine = replies[begins[1]]
    assert (mine.pod.namespace, mine.pod.name) == ("default", "web")
    assert snapshot_from_proto(mine.snapshot).netns.inode == inode
    text = b"".join(r.rules.text for r in replies[begins[1] :] if r.HasField("rules"))
    assert b"-A INPUT -s 192.0.2.7/32 -j DROP" in text
    absent = [reply for reply in replies if reply.unavailable]
    assert [reply.pod.name for reply in absent] == ["gone"]


def test_rules_may_be_left_out(stub: agent_pb2_grpc.AgentStub) -> None:
    replies = list(stub.Snapshot(agent_pb2.SnapshotRequest(without_rules=True), timeout=30))
    assert [reply.HasField("snapshot") for reply in replies] == [True]


def test_lists_and_sets_travel_with_a_snapshot() -> None:
    from ipaddress import ip_address

    from gketrace.snapshot import IpSet, IpSetEntry, NetnsSnapshot, RecentEntry, Unavailable
    from gketrace.trace import NetnsRef
    from gketrace_proto.codec import snapshot_to_proto

    none = Unavailable(reason="not here")
    shot = NetnsSnapshot(
        netns=NetnsRef(node="n1"),
        links=none,
        addresses=none,
        routes=none,
        rules=none,
        neighbours=none,
        fdb=none,
        sysctls=none,
        sockets=none,
        rulesets=(),
        conntrack=none,
        recent={"KUBE-SEP-X": (RecentEntry(address=ip_address("10.0.0.1"), ages=(1.5, 7.0)),)},
        ipsets={
            "cali40s": IpSet(
                name="cali40s",
                type="hash:net",
                family=4,
                entries=(IpSetEntry(parts=("10.0.0.0/8",), timeout=5),),
                header={"maxelem": "1048576"},
            )
        },
    )
    back = snapshot_from_proto(snapshot_to_proto(shot))
    assert back.recent == shot.recent
    assert back.ipsets == shot.ipsets
