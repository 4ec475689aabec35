"""Walks over a real node: a PID and network namespace with an agent, a pod, and a dump's rules."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path

import grpc
import pytest

from gketrace.errors import UnsupportedError
from gketrace.packet import Packet
from gketrace.simulate.arrival import find_arrival
from gketrace.snapshot import (
    Link,
    LinkPeer,
    NetnsSnapshot,
    NextHop,
    PolicyRule,
    Route,
    RouteType,
    Unavailable,
)
from gketrace.trace import Disposition, NetnsKind, NetnsRef, Source, Walk
from gketrace_proto import codec
from gketrace_proto.v1alpha1 import agent_pb2, agent_pb2_grpc
from tests.agent.pods import FakePod, container_id, fake_pod, wait_until
from tests.agent.test_process import AGENT

WORLD = Path(__file__).parents[1] / "data/worlds/kube-proxy-1.36-iptables-nft/node-2jdh"
SANDBOX = container_id()
WEB = container_id()
HOST = agent_pb2.Target(host=True)


@dataclass
class Node:
    pid: int
    stub: agent_pb2_grpc.AgentStub
    pod: FakePod
    ref: agent_pb2.PodRef

    def walk(self, packet: Packet, **more) -> tuple[Walk, agent_pb2.WalkReply]:
        request = agent_pb2.WalkRequest(
            **{"target": HOST, "pods": [self.ref], "use_conntrack": True, **more},
            packet=codec.encode(packet),
        )
        reply = self.stub.Walk(request, timeout=30)
        return codec.decode(Walk, reply.walk), reply


def _run(*argv: str, pid: int, stdin: str | None = None) -> str:
    return subprocess.run(
        ["nsenter", f"--net=/proc/{pid}/ns/net", *argv],
        check=True,
        input=stdin,
        capture_output=True,
        text=True,
    ).stdout


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    path = tmp_path_factory.mktemp("agent") / "a.sock"
    network = subprocess.Popen(["unshare", "--net", "sleep", "inf"])
    machine = subprocess.Popen(
        ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sleep", "inf"]
    )
    children = Path(f"/proc/{machine.pid}/task/{machine.pid}/children")
    wait_until(lambda: bool(children.read_text().split()))
    pid = int(children.read_text())
    for started in (pid, network.pid):
        wait_until(lambda started=started: _comm(started) == "sleep")
    agent = None
    try:
        with fake_pod("systemd") as pod:
            enter = ("nsenter", f"--target={pid}", "--net", "--pid", "--mount")
            pause = pod.add(SANDBOX, command="pause", own_netns=True, enter=enter)
            _wire(pid, pause, network.pid)
            agent = subprocess.Popen(
                [*enter, AGENT, "serve", "--node-name", "node-a", "--listen", f"unix://{path}"],
                stderr=subprocess.DEVNULL,
            )
            wait_until(path.exists, seconds=20)
            ref = agent_pb2.PodRef(namespace="default", name="hello", uid=pod.uid)
            with grpc.insecure_channel(f"unix:{path}") as channel:
                yield Node(pid, agent_pb2_grpc.AgentStub(channel), pod, ref)
    finally:
        for process in (agent, machine, network):
            if process is not None:
                process.kill()
                process.wait()


def _comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _wire(node: int, pod: int, network: int) -> None:
    """eth0 to the network, which the agent does not know; a ptp veth to the pod; rules."""
    for line in (
        "link set lo up",
        f"link add eth0 type veth peer name wire netns {network}",
        "link set eth0 up",
        "addr add 10.142.0.8/32 dev eth0",
        "route add 10.142.0.1 dev eth0",
        "route add default via 10.142.0.1 dev eth0 onlink",
        f"link add vethpod type veth peer name eth0 netns {pod}",
        "link set vethpod up",
        "addr add 10.40.0.1/32 dev vethpod",
        "route add 10.40.0.6 dev vethpod scope host",
        "neigh add 10.40.0.6 lladdr 0a:58:0a:28:00:06 dev vethpod",
    ):
        _run("ip", *line.split(), pid=node)
    for line in (
        "link set eth0 address 0a:58:0a:28:00:06",
        "link set eth0 up",
        "addr add 10.40.0.6/24 dev eth0",
        "route add default via 10.40.0.1",
    ):
        _run("ip", *line.split(), pid=pod)
    _run("ip", "link", "set", "wire", "up", pid=network)
    _run("sysctl", "-qw", "net.ipv4.ip_forward=1", pid=node)
    rules = (WORLD / "iptables-save.txt").read_text()
    # The accounting objects that these rules name are the node's, and not part of the dump.
    for name in ("localhost_nps_accepted_pkts", "ct_state_invalid_dropped_pkts"):
        _run("nfacct", "add", name, pid=node)
    _run("iptables-nft-restore", pid=node, stdin=rules)


NODE_PORT = Packet(
    src=ip_address("203.0.113.10"),
    dst=ip_address("10.142.0.8"),
    protocol=6,
    sport=40000,
    dport=31830,
)


def test_node_port_into_the_pod(node: Node) -> None:
    walk, reply = node.walk(NODE_PORT, arrives=True)
    (leaf,) = walk.leaves()
    assert reply.arrival.startswith("eth0: the route to 203.0.113.10 goes out of it (default via")
    assert walk.branches[0].ingress.interface == "eth0"
    assert leaf.outcome.disposition is Disposition.REFUSED  # nobody listens in this pod
    assert str(leaf.outcome.packet.dst) == "10.40.0.6"
    assert leaf.outcome.netns.pod == "default/hello"
    rules = [
        step.citation.chain
        for hop in leaf.hops()
        for step in hop.steps
        if step.citation is not None and step.citation.source is Source.RULE
    ]
    assert "KUBE-EXT-7D6H5YV7GTUSLGXR" in rules
    assert "KUBE-SEP-GNGNYGTEG254KWMX" in rules
    assert [hop.netns.kind for hop in leaf.hops()] == [NetnsKind.HOST, NetnsKind.POD]
    assert walk.missing == ()
    assert reply.timings.observe > 0


def test_from_the_pod(node: Node) -> None:
    packet = Packet(
        src=ip_address("10.40.0.6"),
        dst=ip_address("198.51.100.7"),
        protocol=6,
        sport=40000,
        dport=443,
    )
    walk, _ = node.walk(packet, target=agent_pb2.Target(pod=node.ref))
    (leaf,) = walk.leaves()
    assert [hop.netns.kind for hop in leaf.hops()] == [NetnsKind.POD, NetnsKind.HOST]
    assert leaf.hops()[1].ingress.interface == "vethpod"


def test_a_pod_that_was_not_named_is_not_entered(node: Node) -> None:
    walk, _ = node.walk(NODE_PORT, arrives=True, pods=[])
    (leaf,) = walk.leaves()
    assert leaf.outcome.disposition is Disposition.TRANSMITTED
    assert leaf.outcome.interface == "vethpod"


def test_why_a_named_pod_could_not_be_entered(node: Node) -> None:
    ghost = agent_pb2.PodRef(namespace="a", name="b", uid="11111111-2222-3333-4444-555555555555")
    ghost.pod_ips.append("10.40.0.6")
    walk, _ = node.walk(NODE_PORT, arrives=True, pods=[ghost])
    (missing,) = walk.missing
    assert missing.what == "pod"
    assert missing.why.startswith("pod a/b is not on node node-a: cgroup scan: no process")


def test_pods_that_it_does_not_meet_are_not_missed(node: Node) -> None:
    ghost = agent_pb2.PodRef(namespace="a", name="c", uid="11111111-2222-3333-4444-666666666666")
    ghost.pod_ips.append("10.40.0.99")
    walk, _ = node.walk(NODE_PORT, arrives=True, pods=[ghost, node.ref])
    assert walk.missing == ()


def test_rules_come_with_counters(node: Node) -> None:
    request = agent_pb2.GetRulesRequest(target=HOST, table="nat", chain="KUBE-NODEPORTS")
    (v4,) = [r for r in node.stub.GetRules(request, timeout=30) if r.family == 4]
    assert v4.backend == "iptables-nft"
    assert v4.source.endswith("iptables-nft-save -c")
    assert b"--dport 31830 -j KUBE-EXT-7D6H5YV7GTUSLGXR" in v4.text
    assert v4.text.startswith(b"*nat\n:KUBE-NODEPORTS - [0:0]\n[0:0] -A KUBE-NODEPORTS")


def test_info_names_the_data_plane(node: Node) -> None:
    info = node.stub.GetInfo(agent_pb2.GetInfoRequest(), timeout=30)
    assert (info.data_plane, info.iptables_backend) == ("iptables", "iptables-nft")
    assert "KUBE-SVC chains" in info.data_plane_reason


def test_the_peer_of_the_pods_veth(node: Node) -> None:
    request = agent_pb2.GetNetnsRequest(target=HOST, pods=[node.ref])
    links = {link.name: link for link in node.stub.GetNetns(request, timeout=30).snapshot.links}
    assert links["vethpod"].peer.name == "eth0"
    assert links["vethpod"].peer.netns.pod == "default/hello"


# --- by which interface a packet comes in ----------------------------------------------------


def _host(*routes: tuple[str, str], links: tuple[Link, ...] = ()) -> NetnsSnapshot:
    absent = Unavailable(reason="not here")
    named = links or (Link(ifindex=1, name="eth0", flags=("UP", "LOWER_UP")),)
    indexes = {link.name: link.ifindex for link in named}
    return NetnsSnapshot(
        netns=NetnsRef(node="n"),
        links=named,
        addresses=(),
        routes=tuple(
            Route(
                family=4,
                table=254,
                dst=ip_network(dst),
                type=RouteType.UNICAST if dev else RouteType.UNREACHABLE,
                next_hops=(NextHop(oif=indexes[dev]),) if dev else (),
                scope="link",
                text=f"{dst} dev {dev}",
            )
            for dst, dev in routes
        ),
        rules=(PolicyRule(family=4, priority=32766, table=254),),
        neighbours=(),
        fdb=(),
        sysctls={},
        sockets=(),
        rulesets=(),
        conntrack=absent,
    )


def _link(index: int, name: str, *, kind: str = "", pod: str = "") -> Link:
    netns = NetnsRef(node="n", kind=NetnsKind.POD, pod=pod)
    return Link(
        ifindex=index,
        name=name,
        kind=kind,
        flags=("UP", "LOWER_UP"),
        peer=LinkPeer(ifindex=2, netns=netns) if pod else None,
    )


def test_arrival_by_the_route_back() -> None:
    links = (_link(1, "eth0"), _link(2, "eth1"))
    host = _host(("0.0.0.0/0", "eth0"), ("203.0.113.0/24", "eth1"), links=links)
    found = find_arrival(host, NODE_PORT)
    assert found.interface == "eth1"
    assert "203.0.113.0/24 dev eth1" in found.because


@pytest.mark.parametrize(
    "inner", [_link(2, "cbr0", kind="bridge"), _link(2, "veth1", kind="veth", pod="a/b")]
)
def test_arrival_of_a_pods_address_from_outside(inner: Link) -> None:
    links = (_link(1, "eth0"), inner)
    host = _host(("0.0.0.0/0", "eth0"), ("203.0.113.0/24", inner.name), links=links)
    found = find_arrival(host, NODE_PORT)
    assert found.interface == "eth0"
    assert "default route" in found.because


def test_arrival_without_a_route_is_not_guessed() -> None:
    with pytest.raises(UnsupportedError, match="cannot tell by which interface"):
        find_arrival(_host(("10.0.0.0/8", "eth0")), NODE_PORT)
