"""Real packets through the lab's real rules, against what Kubernetes promises for each Service.

What they promise is worked out by `e2e.netlab.expect`, without a look at the rules.
"""

from __future__ import annotations

import json

import pytest

from e2e.answers import connect_all
from e2e.conftest import LabFactory
from e2e.netlab import Lab, Probe, Result
from e2e.netlab.expect import doors, judge, sources
from e2e.netlab.network import CLIENTS

KINDS = [
    ("bridge", "1.36", "nft"),
    ("ptp", "1.36", "nft"),
    ("bridge", "1.36", "legacy"),
    ("bridge", "1.36", "nftables"),
    ("ptp", "1.36", "nftables"),
    ("bridge", "1.30", "nft"),
    ("bridge", "1.20", "legacy"),
    ("ptp", "1.20", "legacy"),
]


@pytest.mark.parametrize(("topology", "era", "backend"), KINDS)
def test_every_front_door_from_everywhere(
    labs: LabFactory, topology: str, era: str, backend: str
) -> None:
    lab = labs(topology, era, backend)
    world = lab.world
    front_doors = doors(world, lab.state["lb_targets"])
    pairs = [(source, door) for source in sources(world) for door in front_doors]
    probes = [
        Probe(source=s.title, address=d.address, port=d.port, protocol=d.protocol) for s, d in pairs
    ]

    def judged(number: int, result: Result) -> str:
        return judge(world, topology, *pairs[number], result) or ""

    results = connect_all(lab, probes, judged)
    assert len(results) > 400
    differences = list(filter(None, map(judged, range(len(results)), results)))
    assert not differences, "\n".join(differences)


@pytest.mark.parametrize("topology", ["bridge", "ptp"])
def test_pod_addresses_from_everywhere(labs: LabFactory, topology: str) -> None:
    """Each pod's own ports: pods keep their address, nodes show the address nearest to the pod."""
    lab = labs(topology)
    world = lab.world
    cases = [
        (source, pod, protocol, port)
        for source in sources(world)
        for pod in world.pods
        for protocol, port in pod.ports
    ]
    probes = [
        Probe(source=source.title, address=pod.ip, port=port, protocol=protocol)
        for source, pod, protocol, port in cases
    ]
    results = connect_all(lab, probes, lambda _, one: "" if one.kind == "delivered" else one.kind)
    for (source, pod, protocol, port), result in zip(cases, results, strict=True):
        title = f"{source.title} -> {pod.key} {port}/{protocol}: {result}"
        assert (result.kind, result.pod, result.local) == ("delivered", pod.key, (pod.ip, port)), (
            title
        )
        wanted = source.ip
        if source.node == pod.node and source.pod is None and not pod.host_network:
            wanted = world.node(pod.node).gateway
        assert result.peer_seen is not None
        assert result.peer_seen[0] == wanted, title


@pytest.mark.parametrize(("topology", "backend"), [("bridge", "nft"), ("ptp", "nftables")])
def test_ipv6(labs: LabFactory, topology: str, backend: str) -> None:
    """The dual-stack service by ClusterIP, by node port on each node, and the pods themselves."""
    lab = labs(topology, "1.36", backend)
    world = lab.world
    web = {pod.key: pod for pod in world.pods if pod.ip6}
    assert len(web) == 3
    for pod in web.values():
        result = lab.connect("client/203.0.113.10", str(pod.ip6), 8080)
        assert (result.kind, result.pod) == ("delivered", pod.key)
        assert result.peer_seen is not None
        assert result.peer_seen[0] == CLIENTS["203.0.113.10"]
    for key in web:
        result = lab.connect(f"pod/{key}", "fd00:43::21", 80)
        assert result.kind == "delivered"
        assert result.pod in web
        assert result.peer_seen is not None
        own = world.node(web[key].node).gateway6 if result.pod == key else web[key].ip6
        assert result.peer_seen[0] == own
    for node in world.nodes:
        result = lab.connect("client", node.ip6, 30084)
        assert (result.kind, result.pod in web) == ("delivered", True)
        assert result.peer_seen is not None
        local = web[str(result.pod)].node == node.name
        assert result.peer_seen[0] == (node.gateway6 if local else node.ip6)


@pytest.mark.parametrize("topology", ["bridge", "ptp"])
def test_host_port(labs: LabFactory, topology: str) -> None:
    """The synthetic pod behind portmap's chains: from outside unchanged, from its node masked."""
    lab = labs(topology)
    node = lab.world.nodes[1]
    assert node.short == "33fg"
    outside = lab.connect("client/192.0.2.10", node.ip, 8088)
    assert (outside.kind, outside.pod) == ("delivered", "default/hostport-0")
    assert outside.peer_seen is not None
    assert outside.peer_seen[0] == "192.0.2.10"
    neighbour = lab.connect("pod/web-2", node.ip, 8088)
    assert neighbour.peer_seen is not None
    assert neighbour.peer_seen[0] == node.gateway
    assert lab.connect("client", "10.142.0.8", 8088).kind == "refused"


def test_node_port_on_loopback(labs: LabFactory) -> None:
    """iptables mode serves 127.0.0.1 (route_localnet), nftables mode does not."""
    assert labs(backend="nft").connect("node/2jdh", "127.0.0.1", 31830).pod is not None
    assert labs(backend="nftables").connect("node/2jdh", "127.0.0.1", 31830).kind == "refused"


def test_masquerade_for_the_internet(lab: Lab) -> None:
    """IP-MASQ: a pod keeps its address towards reserved ranges and loses it elsewhere."""
    before = lab.exec("node/2jdh", ["iptables-nft-save", "-c", "-t", "nat"]).stdout
    assert lab.connect("pod/web-0", "8.8.8.8", 53, "UDP").kind == "timeout"
    after = lab.exec("node/2jdh", ["iptables-nft-save", "-c", "-t", "nat"]).stdout
    rule = "outbound traffic is subject to MASQUERADE"
    counts = [
        int(line.split("[")[1].split(":")[0])
        for text in (before, after)
        for line in text.splitlines()
        if rule in line
    ]
    assert counts[1] == counts[0] + 1


def test_health_ports(lab: Lab) -> None:
    """kube-proxy's 10256, and a Local service's health check with and without endpoints."""
    for node, status, count in (("m69d", "200 OK", 1), ("2jdh", "503 Service Unavailable", 0)):
        ip = lab.node(node)["ip"]
        healthy = lab.exec("client", ["curl", "-si", f"http://{ip}:10256/healthz"]).stdout
        assert healthy.startswith("HTTP/1.1 200 OK")
        checked = lab.exec("client", ["curl", "-si", f"http://{ip}:32000/"]).stdout
        assert checked.startswith(f"HTTP/1.1 {status}")
        assert f"X-Load-Balancing-Endpoint-Weight: {count}" in checked
        assert json.loads(checked.split("\n\n")[1]) == {
            "service": {"namespace": "default", "name": "web-lb-local"},
            "localEndpoints": count,
            "serviceProxyHealthy": True,
        }


def test_load_balancer_target(lab: Lab) -> None:
    """Moving the address moves the traffic: on a node without the endpoint the source is lost."""
    assert lab.state["lb_targets"]["35.231.121.11"].endswith("2jdh")
    lab.set_lb_target("35.231.121.11", "33fg")
    try:
        result = lab.connect("client/192.0.2.10", "35.231.121.11", 80)
        assert result.peer_seen is not None
        assert result.peer_seen[0] == "10.142.0.7"
    finally:
        lab.set_lb_target("35.231.121.11", "2jdh")


def test_the_tutorials_answer(lab: Lab) -> None:
    said = lab.exec("client", ["curl", "-s", "http://10.142.0.8:31830/"]).stdout
    assert said == "Hello, world!\nVersion: 1.0.0\nHostname: hello-server-579859fb5b-szrwh\n"


def test_a_held_connection_is_in_conntrack(lab: Lab) -> None:
    """The pod's view, the socket's, and both nodes' connection tracking are of one connection."""
    with lab.hold("client", "10.142.0.6", 31830) as hold:
        assert hold.alive()
        source, seen = hold.result.source, hold.result.peer_seen
        assert source is not None
        assert seen is not None
        entry = ["conntrack", "-L", "-p", "tcp", "--orig-port-src", str(source[1])]
        text = lab.exec("node/m69d", entry).stdout
        assert f"src=10.142.0.2 dst=10.142.0.6 sport={source[1]} dport=31830" in text
        assert f"src=10.40.0.6 dst=10.142.0.6 sport=8080 dport={seen[1]}" in text
        entry[-1] = str(seen[1])
        text = lab.exec("node/2jdh", entry).stdout
        assert f"src=10.142.0.6 dst=10.40.0.6 sport={seen[1]} dport=8080" in text
        assert lab.peers("hello")[-1]["peer"] == list(seen)
