"""Paths → taps and filters; the filters are for libpcap to judge."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from gketrace.capture.filters import Term, filter_of
from gketrace.capture.packets import Direction
from gketrace.capture.plan import Plan, Spot, Wanted, make_plan
from gketrace.packet import IPAddress, Packet, Protocol, parse_address
from gketrace.stitch import Inquiry
from tests.core.capture import frames
from tests.core.clusters import HELLO, NODES, Cluster

ip = parse_address
WORLD = "kube-proxy-1.36-iptables-nft"


@pytest.fixture(scope="module", params=["bridge", "ptp"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    made = Cluster(WORLD, topology=request.param)
    made.pod("2jdh", "hello-server-579859fb5b-szrwh", "10.40.0.6", 8080)
    made.pod("m69d", "web-1", "10.40.1.10", 8080)
    return made


def node_port(cluster: Cluster, entry: str) -> Inquiry:
    packet = Packet(
        src=ip("203.0.113.10"), dst=ip(NODES[entry]), protocol=Protocol.TCP, dport=31830
    )
    return Inquiry(
        front_door="NodePort",
        source="client 203.0.113.10",
        target=f"{NODES[entry]}:31830/tcp",
        packet=packet,
        entry=entry,
    )


def plan_of(cluster: Cluster, *inquiries: Inquiry, any_client: bool = False) -> Plan:
    return make_plan(
        [
            Wanted(path=path, any_client=any_client)
            for paths in cluster.paths(*inquiries)
            for path in paths
        ]
    )


def filters(plan: Plan) -> dict[str, str]:
    return {str(tap.spot): tap.filter.partition(") or (")[0].lstrip("(") for tap in plan.taps}


POD = "default/hello-server-579859fb5b-szrwh"


def test_node_port_over_another_node(cluster: Cluster) -> None:
    plan = plan_of(cluster, node_port(cluster, "33fg"))
    found = filters(plan)
    veth = next(tap.spot.interface for tap in plan.taps if tap.spot.interface.startswith("v"))
    behind = "tcp and host 10.142.0.7 and host 10.40.0.6 and port 8080"
    expected = {
        "33fg eth0": "tcp and ((host 203.0.113.10 and host 10.142.0.7 and port 31830",
        "2jdh eth0": behind,
        "2jdh cbr0": behind,
        f"2jdh {veth}": behind,
        f"2jdh {POD}:eth0": behind,
    }
    if cluster.wiring == "ptp":
        del expected["2jdh cbr0"]
    assert found == expected
    assert "or (host 10.142.0.7 and host 10.40.0.6 and port 8080)" in plan.taps[0].filter
    (route,) = plan.routes
    assert route.endpoint.startswith(f"pod/{POD} ")
    out = next(c for c in route.there if c.spot.node == "33fg" and c.direction is Direction.OUT)
    assert [(r.kind, r.by) for r in out.rewrites] == [
        ("DNAT", "KUBE-SEP-GNGNYGTEG254KWMX:2"),
        ("SNAT", "KUBE-POSTROUTING:3"),
    ]
    assert [c.hop for c in route.there][:3] == [2, 2, 4]
    back = [(c.spot.interface, c.direction) for c in route.back]
    assert back[0] == ("eth0", Direction.OUT)
    assert back[-2:] == [("eth0", Direction.IN), ("eth0", Direction.OUT)]


def test_any_client_and_all_nodes_are_a_union(cluster: Cluster) -> None:
    inquiries = [node_port(cluster, entry) for entry in NODES]
    plan = plan_of(cluster, *inquiries, any_client=True)
    pod = next(tap for tap in plan.taps if tap.spot == Spot(node="2jdh", pod=POD, interface="eth0"))
    assert len({crossing.path for crossing in pod.crossings}) == 3
    assert pod.filter == (
        "(tcp and host 10.40.0.6 and port 8080) or (icmp and (icmp[0] == 3 or icmp[0] == 11 or "
        "icmp[0] == 12) and (icmp[24:4] == 0x0a280006 or icmp[20:4] == 0x0a280006))"
    )
    for tap in plan.taps:
        compiles(tap.filter)


def test_a_pod_asks_for_a_cluster_ip(cluster: Cluster) -> None:
    packet = Packet(src=ip("10.40.1.10"), dst=ip(HELLO), protocol=Protocol.TCP, dport=80)
    inquiry = Inquiry(
        front_door="ClusterIP",
        source="pod/default/web-1",
        target=f"{HELLO}:80/tcp",
        packet=packet,
        node="m69d",
        pod="default/web-1",
    )
    plan = plan_of(cluster, inquiry)
    found = filters(plan)
    before = f"tcp and host 10.40.1.10 and host {HELLO} and port 80"
    after = "tcp and host 10.40.1.10 and host 10.40.0.6 and port 8080"
    assert found["m69d default/web-1:eth0"] == before
    assert found["m69d eth0"] == found["2jdh eth0"] == after
    if cluster.wiring == "bridge":
        # br_netfilter may have translated it before the bridge's own device sees it.
        bridge = next(tap for tap in plan.taps if str(tap.spot) == "m69d cbr0")
        assert f"host {HELLO} and port 80" in bridge.filter
        assert "host 10.40.0.6 and port 8080" in bridge.filter
    assert str(plan.taps[0].spot) == "m69d default/web-1:eth0"


def test_a_drop_ends_the_plan_where_it_is(cluster: Cluster) -> None:
    cluster.down["2jdh"] = "no agent"
    try:
        plan = plan_of(cluster, node_port(cluster, "33fg"))
    finally:
        cluster.down.clear()
    assert [str(tap.spot) for tap in plan.taps] == ["33fg eth0"]
    assert plan.notes == ("node 2jdh: no agent",)


def compiles(text: str) -> None:
    done = subprocess.run(["tcpdump", "-d", "-y", "EN10MB", text], capture_output=True, text=True)
    assert done.returncode == 0, (text, done.stderr)


def take(text: str, packets: list[bytes], folder: Path) -> int:
    """How many of the packets pass, by tcpdump."""
    file = folder / "file.pcap"
    file.write_bytes(frames.pcap([(n, frames.ethernet(p)) for n, p in enumerate(packets)]))
    argv = ["tcpdump", "-nr", str(file), "--count", text]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def _term(protocol: int, client: IPAddress, server: IPAddress, **ports: int | None) -> Term:
    return Term(family=client.version, protocol=protocol, client=client, server=server, **ports)


@pytest.mark.parametrize(
    ("a", "b", "c"), [("10.0.0.1", "10.0.0.2", "10.0.0.3"), ("fd00::1", "fd00::2", "fd00::3")]
)
def test_filters_take_both_ways_and_errors_and_nothing_else(
    tmp_path: Path, a: str, b: str, c: str
) -> None:
    term = _term(Protocol.TCP, ip(a), ip(b), server_port=80)
    asked, answer = frames.tcp(a, 5, b, 80, flags=2), frames.tcp(b, 80, a, 5, flags=18)
    six = ":" in a
    kind, code = (1, 4) if six else (3, 3)
    error = frames.icmp(c, a, kind, code, 0, asked)
    others = [
        frames.tcp(a, 5, b, 81, flags=2),
        frames.tcp(c, 5, b, 80, flags=2),
        frames.udp(a, 5, b, 80, b"x"),
        frames.icmp(a, b, 128 if six else 8, 0, 1, b"x" * 64),
    ]
    if not six:
        others.append(frames.icmp(c, a, 3, 3, 0, frames.udp(c, 1, a, 2, b"x")))
    text = filter_of([term])
    assert take(text, [asked, answer, error], tmp_path) == 3
    assert take(text, others, tmp_path) == 0
    wider = replace(term, client=None)
    assert filter_of([term, wider]) == filter_of([wider])
    assert take(filter_of([wider]), [asked, others[1]], tmp_path) == 2


def test_later_fragments_have_no_ports(tmp_path: Path) -> None:
    text = filter_of([_term(Protocol.UDP, ip("10.0.0.1"), ip("10.0.0.2"), server_port=53)])
    later = frames.ip("10.0.0.2", "10.0.0.1", 17, b"x" * 64, flags=0, offset=1480)
    other = frames.ip("10.0.0.3", "10.0.0.1", 17, b"x" * 64, flags=0, offset=1480)
    assert take(text, [later], tmp_path) == 1
    assert take(text, [other], tmp_path) == 0


@pytest.mark.parametrize("protocol", [1, 6, 17, 47, 132])
@pytest.mark.parametrize("family", [4, 6])
def test_all_protocols_compile(protocol: int, family: int) -> None:
    if protocol == 1 and family == 6:
        protocol = 58
    client, server = (ip("10.0.0.1"), ip("10.0.0.2")) if family == 4 else (ip("::1"), ip("::2"))
    term = _term(protocol, client, server)
    for one in (term, replace(term, client=None), replace(term, client=None, server=None)):
        compiles(filter_of([one]))
    compiles(filter_of([term, _term(6, ip("10.0.0.3"), ip("10.0.0.2"), server_port=7)]))
    assert filter_of([]) == ""
