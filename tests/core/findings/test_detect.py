"""Each code: one fault put into a healthy world, and its finding comes first, with its evidence."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from gketrace.conntrack import ConntrackEntry, CtStatus
from gketrace.findings import ways
from gketrace.findings.detect import find
from gketrace.findings.registry import CODES
from gketrace.findings.world import TableState
from gketrace.kubenames import ChainRole, ServicePort, endpoint_chain, service_chain
from gketrace.objects import Container, ContainerPort, Service
from gketrace.packet import Tuple5
from gketrace.snapshot import (
    BridgePort,
    Neighbour,
    NextHop,
    PolicyRule,
    RecentEntry,
    Route,
    RouteType,
    Socket,
    Unavailable,
)
from tests.core.findings.worlds import Bench

_WEB1 = "10.40.1.10"
_REPLIED = CtStatus.SEEN_REPLY | CtStatus.ASSURED | CtStatus.CONFIRMED
Fault = Callable[[Bench], None]


def _tuple(src: str, sport: int, dst: str, dport: int, protocol: int = 6) -> Tuple5:
    return Tuple5(
        src=ip_address(src), dst=ip_address(dst), protocol=protocol, sport=sport, dport=dport
    )


def _entry(orig: Tuple5, reply: Tuple5, status: int, state: str = "") -> ConntrackEntry:
    if reply.src != orig.dst:
        status |= CtStatus.DST_NAT
    if reply.dst != orig.src:
        status |= CtStatus.SRC_NAT
    return ConntrackEntry(orig=orig, reply=reply, status=status, tcp_state=state)


def _route(bench: Bench, node: str, text: str, **fields: object) -> None:
    known = {"family": 4, "table": 254, "text": text, **fields}
    bench.host(node).routes.append(Route(**known))  # type: ignore[arg-type]


def no_endpoints(bench: Bench) -> None:
    bench.endpoints = [e for e in bench.endpoints if e.service != "web-nodeport"]
    _without_rules(bench, "web-nodeport")


def _without_rules(bench: Bench, name: str) -> None:
    """Rules of a Service are gone, as kube-proxy does when it has no endpoint."""
    for node in bench.nodes:
        bench.rules(
            node.name,
            lambda text: "".join(
                line for line in text.splitlines(keepends=True) if f"default/{name}:" not in line
            ),
        )


def none_ready(bench: Bench) -> None:
    bench.endpoints = [
        replace(e, ready=False, serving=False) if e.service == "web-nodeport" else e
        for e in bench.endpoints
    ]
    _without_rules(bench, "web-nodeport")


def local_outside(bench: Bench) -> None:
    bench.service("hello-server", external_traffic_policy="Local")


def local_inside(bench: Bench) -> None:
    bench.service("hello-server", internal_traffic_policy="Local")


def nobody_listens(bench: Bench) -> None:
    space = bench.pod("edge-0")
    assert isinstance(space.sockets, list)
    space.sockets = [s for s in space.sockets if s.port != 8080]


def on_loopback(bench: Bench) -> None:
    nobody_listens(bench)
    bench.pod("edge-0").listen("127.0.0.1", 8080)


def misnamed(bench: Bench) -> None:
    service = next(s for s in bench.services if s.name == "web-nodeport")
    bench.service("web-nodeport", ports=(replace(service.ports[0], target_port="nope"),))


def ranges(bench: Bench) -> None:
    bench.service("hello-server", source_ranges=("198.51.100.0/24",))


def clash(bench: Bench) -> None:
    more = Container(name="more", ports=(ContainerPort(port=80, host_port=30080),))
    bench.pods = [
        replace(p, containers=(*p.containers, more)) if p.name == "edge-0" else p
        for p in bench.pods
    ]


def behind(bench: Bench) -> None:
    bench.rules("m69d", lambda text: "".join(
        line for line in text.splitlines(keepends=True)
        if "default/web-nodeport:http ->" not in line
    ))  # fmt: skip


def stale_rules(bench: Bench) -> None:
    bench.endpoints = [
        e for e in bench.endpoints if not (e.service == "web-nodeport" and e.node == "33fg")
    ]


def rules_gone(bench: Bench) -> None:
    bench.rules("m69d", lambda text: "*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n")


def canary_gone(bench: Bench) -> None:
    bench.rules("m69d", lambda text: text.replace(":KUBE-PROXY-CANARY - [0:0]\n", "", 1))


def kubelet_canary_gone(bench: Bench) -> None:
    bench.rules("m69d", lambda text: text.replace(":KUBE-KUBELET-CANARY - [0:0]\n", ""))


def _deaf(bench: Bench, port: int) -> None:
    host = bench.host("m69d")
    assert isinstance(host.sockets, list)
    host.sockets = [s for s in host.sockets if s.port != port]


def no_health_port(bench: Bench) -> None:
    _deaf(bench, 10256)


def both_backends(bench: Bench) -> None:
    from gketrace.ruleset.iptables_save import parse_iptables_save

    text = b"*filter\n:FORWARD ACCEPT [0:0]\n[0:0] -A FORWARD -s 192.0.2.1/32 -j ACCEPT\nCOMMIT\n"
    bench.host("m69d").rulesets.append(
        parse_iptables_save(text, source="iptables-legacy-save", backend="iptables-legacy")
    )


def no_health_check(bench: Bench) -> None:
    port = next(s.health_check_node_port for s in bench.services if s.name == "web-lb-local")
    _deaf(bench, port)


def pinned(bench: Bench) -> None:
    end = "10.40.2.10:8080"
    bench.endpoints = [
        e for e in bench.endpoints if not (e.service == "web-affinity" and e.node == "33fg")
    ]
    name = endpoint_chain(
        ServicePort(namespace="default", service="web-affinity", port="http"), end
    )
    shot = bench.host("m69d").snapshot
    entry = RecentEntry(address=ip_address("10.40.1.20"), ages=(3.0,), text="src=10.40.1.20")
    bench.host("m69d").snapshot = lambda: replace(  # type: ignore[method-assign]
        shot(), recent={name: (entry,)}
    )


def stale_udp(bench: Bench) -> None:
    orig = _tuple("10.40.0.10", 45353, "10.43.240.17", 53, 17)
    reply = _tuple("10.40.0.99", 5353, "10.40.0.10", 45353, 17)
    bench.entries["2jdh"].append(_entry(orig, reply, _REPLIED))


def stale_tcp(bench: Bench) -> None:
    orig = _tuple("10.40.0.10", 45354, "10.43.240.12", 80)
    reply = _tuple("10.40.1.99", 8080, "10.40.0.10", 45354)
    bench.entries["2jdh"].append(_entry(orig, reply, _REPLIED, "ESTABLISHED"))


def older(bench: Bench) -> None:
    orig = _tuple("10.40.0.10", 45355, "8.8.8.8", 53, 17)
    bench.entries["2jdh"].append(_entry(orig, orig.inverted(), _REPLIED))
    _masquerade(bench, "-d 8.8.8.8/32")


def _masquerade(bench: Bench, match: str, node: str = "2jdh") -> None:
    rule = f"-A POSTROUTING {match} -j MASQUERADE\n"
    bench.rules(
        node, lambda text: text.replace("-A POSTROUTING ", f"{rule}-A POSTROUTING ", 1)
        if "[0:0] -A POSTROUTING" not in text
        else text.replace("[0:0] -A POSTROUTING ", f"[0:0] {rule}[0:0] -A POSTROUTING ", 1),
    )  # fmt: skip


def nearly_full(bench: Bench) -> None:
    bench.tables["m69d"] = (TableState(entries=95, limit=100),) * 2


def full(bench: Bench) -> None:
    bench.tables["m69d"] = (TableState(entries=100, limit=100, counters={"drop": 9}),) * 2


def losing(bench: Bench) -> None:
    bench.tables["m69d"] = (
        TableState(entries=1, limit=100, counters={"insert_failed": 40}),
        TableState(entries=1, limit=100, counters={"insert_failed": 43}),
    )


def few_ports(bench: Bench) -> None:
    _masquerade(bench, "-p tcp -m tcp --dport 9090")
    bench.rules(
        "2jdh",
        lambda text: text.replace(
            "--dport 9090 -j MASQUERADE", "--dport 9090 -j MASQUERADE --to-ports 50000-50009"
        ),
    )
    for number in range(9):
        orig = _tuple("10.40.0.10", 40000 + number, "198.18.0.1", 9090)
        reply = _tuple("198.18.0.1", 9090, "10.142.0.8", 50000 + number)
        bench.entries["2jdh"].append(_entry(orig, reply, _REPLIED, "ESTABLISHED"))


def one_sided(bench: Bench) -> None:
    orig = _tuple("203.0.113.10", 40000, "10.142.0.8", 30080)
    beyond = _tuple("203.0.113.10", 40000, _WEB1, 8080)
    bench.entries["2jdh"].append(_entry(orig, beyond.inverted(), CtStatus.CONFIRMED, "SYN_SENT"))
    bench.entries["m69d"].append(_entry(beyond, beyond.inverted(), _REPLIED, "SYN_RECV"))


def invalid(bench: Bench) -> None:
    lines = []

    def counted(text: str) -> str:
        for line in text.splitlines(keepends=True):
            if "-A KUBE-FORWARD" in line and "INVALID" in line:
                line = "[250:13000] " + line.partition("-A ")[1] + line.partition("-A ")[2]
            lines.append(line)
        return "".join(lines)

    bench.rules("m69d", counted)


def unreplied(bench: Bench) -> None:
    for number in range(6):
        orig = _tuple("10.40.0.10", 40000 + number, "198.18.0.1", 443)
        bench.entries["2jdh"].append(_entry(orig, orig.inverted(), CtStatus.CONFIRMED, "SYN_SENT"))


def forwarding_off(bench: Bench) -> None:
    host = bench.host("m69d")
    host.sysctls["net.ipv4.ip_forward"] = "0"
    for name in list(host.sysctls):
        if name.startswith("net.ipv4.conf.") and name.endswith(".forwarding"):
            host.sysctls[name] = "0"


def policy_drop(bench: Bench) -> None:
    bench.rules("m69d", lambda text: text.replace(":FORWARD ACCEPT", ":FORWARD DROP"))


def _forward(bench: Bench, rules: str) -> None:
    def change(text: str) -> str:
        start = text.index("*filter")
        first = text.index("-A FORWARD", start)
        first = text.rindex("\n", 0, first) + 1
        return text[:first] + rules + text[first:]

    bench.rules("m69d", change)


def rule_drops(bench: Bench) -> None:
    _forward(bench, f"-A FORWARD -d {_WEB1}/32 -p tcp -m tcp --dport 8080 -j DROP\n")


def taken(bench: Bench) -> None:
    """A rule before kube-proxy's, as agents of nodes make them, on whichever node is asked."""
    rule = "-A OUTPUT -d 10.43.240.12/32 -p tcp -j DNAT --to-destination 10.40.0.6:8080"
    for node in ("2jdh", "m69d", "33fg"):
        bench.rules(
            node,
            lambda text: re.sub(
                r"(?m)^((?:\[\d+:\d+\] )?-A OUTPUT .*-j KUBE-SERVICES)$", rf"{rule}\n\1", text
            ),
        )


def calico(bench: Bench) -> None:
    bench.rules(
        "m69d",
        lambda text: text.replace(
            "*filter\n", "*filter\n:cali-FORWARD - [0:0]\n:cali-tw-veth1 - [0:0]\n"
        ),
    )
    _forward(
        bench,
        f"-A FORWARD -j cali-FORWARD\n-A cali-FORWARD -d {_WEB1}/32 -j cali-tw-veth1\n"
        "-A cali-tw-veth1 -j DROP\n",
    )


def strict(bench: Bench) -> None:
    host = bench.host("m69d")
    host.link("gk0", kind="dummy", address="192.0.2.201/32")
    host.route("203.0.113.0/24", dev="gk0")
    host.sysctls["net.ipv4.conf.eth0.rp_filter"] = "1"


def route_missing(bench: Bench) -> None:
    host = bench.host("m69d")
    host.routes = [r for r in host.routes if str(r.dst) != f"{_WEB1}/32"]


def blackhole(bench: Bench) -> None:
    _route(
        bench, "2jdh", "blackhole 10.40.1.0/25",
        dst=ip_network("10.40.1.0/25"), type=RouteType.BLACKHOLE,
    )  # fmt: skip


def policy_route(bench: Bench) -> None:
    _route(
        bench, "2jdh", "blackhole default table 77",
        dst=ip_network("0.0.0.0/0"), type=RouteType.BLACKHOLE, table=77,
    )  # fmt: skip
    bench.host("2jdh").rules.insert(
        1,
        PolicyRule(
            family=4, priority=100, table=77, dst=ip_network(f"{_WEB1}/32"),
            text=f"100: from all to {_WEB1} lookup 77",
        ),
    )  # fmt: skip


def stale_route(bench: Bench) -> None:
    host = bench.host("m69d")
    index = host.index("veth-edge-0")
    host.routes = [
        replace(r, next_hops=(NextHop(oif=index),), text=f"{_WEB1} dev veth-edge-0")
        if str(r.dst) == f"{_WEB1}/32"
        else r
        for r in host.routes
    ]


def local_route(bench: Bench) -> None:
    route_missing(bench)
    _route(
        bench, "m69d", "local 10.40.1.0/25 dev eth0 proto 66",
        dst=ip_network("10.40.1.0/25"), type=RouteType.LOCAL, table=255, protocol=66,
        next_hops=(NextHop(oif=bench.host("m69d").index("eth0")),),
    )  # fmt: skip


def duplicate(bench: Bench) -> None:
    bench.pod("edge-0").address("eth0", f"{_WEB1}/32", connected=False)


def failed_neighbour(bench: Bench) -> None:
    host = bench.host("m69d")
    host.neighbours.append(
        Neighbour(ifindex=host.index("veth-web-1"), address=ip_address(_WEB1), state="FAILED")
    )


def link_down(bench: Bench) -> None:
    bench.host("m69d").set_link("veth-web-1", flags=("BROADCAST", "MULTICAST"), operstate="DOWN")


def bridge_nf(bench: Bench) -> None:
    for name in ("2jdh",):
        host = bench.host(name)
        host.sysctls["net.bridge.bridge-nf-call-iptables"] = "0"
        host.set_link("cbr0", bridge_nf_call_iptables=False)


def no_hairpin(bench: Bench) -> None:
    bench.host("2jdh").set_link("veth-web-0", port=BridgePort(state="forwarding"))


def small_mtu(bench: Bench) -> None:
    bench.host("m69d").set_link("eth0", mtu=1400)


def black_hole(bench: Bench) -> None:
    small_mtu(bench)
    _forward(bench, "-A FORWARD -p icmp -m icmp --icmp-type 3/4 -j DROP\n")


def no_masquerade(bench: Bench) -> None:
    bench.rules("m69d", lambda text: "".join(
        line for line in text.splitlines(keepends=True)
        if not ("-A KUBE-POSTROUTING" in line and "MASQUERADE" in line)
    ))  # fmt: skip


def wide_masquerade(bench: Bench) -> None:
    _masquerade(bench, "-s 10.40.0.0/24 -d 10.40.0.0/14")


def dns_cache_gone(bench: Bench) -> None:
    bench.host("2jdh").link("nodelocaldns", kind="dummy", address="169.254.20.10/32")


def rules_in_pod(bench: Bench) -> None:
    bench.pod("web-1").iptables(
        "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp -m tcp --dport 9999 -j DROP\nCOMMIT\n"
    )


def dataplane(bench: Bench) -> None:
    bench.planes["m69d"] = "dataplane-v2"


def gvisor(bench: Bench) -> None:
    bench.handlers["m69d"] = {"default/web-1": "gvisor"}
    bench.pod("web-1").sockets = Unavailable(reason="the pod runs in gVisor")


def host_network(bench: Bench) -> None:
    end = next(e for e in bench.endpoints if e.service == "hostnet")
    other: Service = next(s for s in bench.services if s.name == "hostnet")
    bench.services.append(replace(other, name="onhost", cluster_ips=("10.43.240.99",)))
    bench.endpoints.append(replace(end, service="onhost"))
    port = ServicePort(namespace="default", service="onhost", port="http")
    chain = service_chain(ChainRole.SERVICE, port)
    target = f"{end.address}:{end.port}"
    sep = endpoint_chain(port, target)
    rules = (
        f":{chain} - [0:0]\n:{sep} - [0:0]\n"
        f"-A KUBE-SERVICES -d 10.43.240.99/32 -p tcp -m tcp --dport 9100 -j {chain}\n"
        f"-A {chain} -j {sep}\n-A {sep} -p tcp -j DNAT --to-destination {target}\n"
    )
    for node in bench.nodes:
        bench.rules(node.name, lambda text: text.replace("*nat\n", f"*nat\n{rules}", 1))


TABLE: tuple[tuple[str, Fault, str, str], ...] = (
    ("GKT-101", no_endpoints, "ptp", "no EndpointSlice of default/web-nodeport"),
    ("GKT-102", none_ready, "ptp", "ready false"),
    ("GKT-103", local_outside, "ptp", "spec.externalTrafficPolicy Local"),
    ("GKT-104", local_inside, "ptp", "spec.internalTrafficPolicy Local"),
    ("GKT-105", nobody_listens, "ptp", "no tcp socket is bound to 10.40.1.20:8080"),
    ("GKT-106", on_loopback, "ptp", "127.0.0.1:8080"),
    ("GKT-107", misnamed, "ptp", "targetPort nope/TCP"),
    ("GKT-108", ranges, "ptp", "198.51.100.0/24"),
    ("GKT-109", clash, "ptp", "hostPort 30080/TCP"),
    ("GKT-110", behind, "ptp", "the rules lack 10.40.0.10:8080"),
    ("GKT-111", stale_rules, "ptp", "--to-destination 10.40.2.10:8080"),
    ("GKT-112", rules_gone, "ptp", "no chain KUBE-SERVICES"),
    ("GKT-113", canary_gone, "ptp", "no chain KUBE-PROXY-CANARY in mangle"),
    ("GKT-114", no_health_port, "ptp", "10256"),
    ("GKT-115", both_backends, "ptp", "iptables-legacy-save"),
    ("GKT-116", no_health_check, "ptp", "spec.healthCheckNodePort"),
    ("GKT-117", pinned, "ptp", "src=10.40.1.20"),
    ("GKT-118", kubelet_canary_gone, "ptp", "KUBE-KUBELET-CANARY"),
    ("GKT-119", taken, "ptp", "--to-destination 10.40.0.6:8080"),
    ("GKT-201", stale_udp, "ptp", "src=10.40.0.99"),
    ("GKT-202", stale_tcp, "ptp", "src=10.40.1.99"),
    ("GKT-203", older, "ptp", "-d 8.8.8.8/32 -j MASQUERADE"),
    ("GKT-204", nearly_full, "ptp", "nf_conntrack_count = 95"),
    ("GKT-205", full, "ptp", "drop 9"),
    ("GKT-206", losing, "ptp", "insert_failed 40"),
    ("GKT-207", few_ports, "ptp", "--to-ports 50000-50009"),
    ("GKT-208", one_sided, "ptp", "SYN_RECV"),
    ("GKT-209", invalid, "ptp", "INVALID"),
    ("GKT-210", unreplied, "ptp", "dst=198.18.0.1"),
    ("GKT-301", forwarding_off, "ptp", "net.ipv4.ip_forward = 0"),
    ("GKT-302", policy_drop, "ptp", "FORWARD"),
    ("GKT-303", rule_drops, "ptp", "-j DROP"),
    ("GKT-304", strict, "ptp", "rp_filter = 1"),
    ("GKT-305", route_missing, "ptp", "fits 10.40.1.10"),
    ("GKT-306", blackhole, "ptp", "blackhole 10.40.1.0/25"),
    ("GKT-308", policy_route, "ptp", "lookup 77"),
    ("GKT-309", stale_route, "ptp", "dev veth-edge-0"),
    ("GKT-310", local_route, "ptp", "proto 66"),
    ("GKT-311", duplicate, "ptp", "10.40.1.10/32 dev eth0"),
    ("GKT-312", failed_neighbour, "ptp", "FAILED"),
    ("GKT-313", link_down, "ptp", "veth-web-1"),
    ("GKT-314", bridge_nf, "bridge", "bridge-nf-call-iptables = 0"),
    ("GKT-315", no_hairpin, "bridge", "veth-web-0"),
    ("GKT-316", small_mtu, "ptp", "eth0"),
    ("GKT-317", black_hole, "ptp", "--icmp-type 3/4 -j DROP"),
    ("GKT-318", no_masquerade, "ptp", "KUBE-POSTROUTING has no MASQUERADE rule"),
    ("GKT-319", wide_masquerade, "ptp", "-d 10.40.0.0/14 -j MASQUERADE"),
    ("GKT-320", dns_cache_gone, "ptp", "169.254.20.10"),
    ("GKT-321", calico, "ptp", "cali-tw-veth1"),
    ("GKT-322", rules_in_pod, "ptp", "--dport 9999 -j DROP"),
    ("GKT-323", dataplane, "ptp", "cilium_host"),
    ("GKT-324", gvisor, "ptp", "gvisor"),
    ("GKT-325", host_network, "ptp", "spec.hostNetwork true"),
)
TRACED = {"GKT-119", "GKT-301", "GKT-302", "GKT-303", "GKT-304", "GKT-319", "GKT-321"}
"""What a walk tells; the others are found without one."""


def test_each_code_is_here() -> None:
    assert [code for code, *_ in TABLE] == [code.code for code in CODES]


@pytest.mark.parametrize(
    ("code", "fault", "topology", "proof"), TABLE, ids=[row[0] for row in TABLE]
)
def test_the_fault_is_named_first(code: str, fault: Fault, topology: str, proof: str) -> None:
    bench = Bench(topology)
    fault(bench)
    found = bench.found(trace=code in TRACED)
    assert found, "nothing was found"
    assert found[0].code == code, [(one.code, one.text) for one in found]
    said = " | ".join(f"{p.note} {p.citation.text} {p.citation.chain}" for p in found[0].evidence)
    assert proof in said
    assert found[0].remedy
    assert found[0].command
    assert found[0].subjects


@pytest.mark.parametrize("topology", ["bridge", "ptp"])
def test_a_healthy_world_has_none_but_its_own(topology: str) -> None:
    assert Bench(topology).found(trace=True) == ()


def test_one_dead_node_explains_its_endpoints() -> None:
    bench = Bench("ptp")
    forwarding_off(bench)
    found = bench.found(trace=True)
    assert [one.code for one in found] == ["GKT-301"]
    assert len(found[0].subjects) > 5
    assert found[0].nodes == ("m69d",)


def test_a_route_that_many_pods_share_is_one_finding() -> None:
    bench = Bench("bridge")
    host = bench.host("2jdh")
    host.routes = [r for r in host.routes if str(r.dst) != "10.40.0.0/24"]
    (found,) = bench.found()
    assert found.code == "GKT-305"
    assert re.fullmatch(r"Node 2jdh has no route to any of its own \d+ pods", found.text)
    assert {"node 2jdh", "pod default/web-0"} < set(found.subjects)


def test_a_link_that_is_up_is_not_called_down() -> None:
    """Other nodes' pods are not behind this node's bridge: the route is wrong, and no link."""
    bench = Bench("bridge")
    bench.host("m69d").route("10.40.0.0/24", dev="cbr0")
    found = bench.found(trace=True)
    assert {one.code for one in found} == {"GKT-306"}
    assert "it leads out of cbr0, and the pod is on node 2jdh" in found[0].text
    assert found[0].command.startswith("ip route del 10.40.0.0/24 dev cbr0")
    assert len({proof.citation.text for proof in found[0].evidence}) == len(found[0].evidence)


def test_the_reverse_path_filter_is_loosened_where_it_drops() -> None:
    bench = Bench("ptp")
    strict(bench)
    (found,) = (one for one in bench.found(trace=True) if one.code == "GKT-304")
    # What decides stands first: the interface's 1, not the 0 of "all".
    assert found.evidence[0].citation.text == "net.ipv4.conf.eth0.rp_filter = 1"
    assert found.command == "sysctl -w net.ipv4.conf.eth0.rp_filter=2  # on node m69d"


def test_a_door_without_rules_is_no_matter_of_listeners() -> None:
    """As `gketrace service` sees it, which reads no sockets of its own."""
    bench = Bench("ptp")
    bench.rules("m69d", lambda text: re.sub(r"(?m)^.*-A KUBE-NODEPORTS .*\n", "", text))
    world = bench.world()
    found = list(ways.failing_ways(replace(world, sights={})))
    assert {one.code for one in found} == {"GKT-110"}
    assert "the node takes it for itself" in found[0].text


def test_a_node_that_takes_a_pod_s_packets_is_no_matter_of_listeners() -> None:
    bench = Bench("ptp")
    local_route(bench)
    found = list(ways.failing_ways(replace(bench.world(), sights={})))
    assert "GKT-310" in {one.code for one in found}
    assert not {"GKT-105", "GKT-106"} & {one.code for one in found}
    whole = [one for one in bench.found(trace=True) if one.code == "GKT-310"]
    assert len(whole) == 1


def test_what_is_not_masqueraded_is_one_finding() -> None:
    bench = Bench("bridge")
    bench.rules("2jdh", lambda text: re.sub(r"(?m)^.*-A KUBE-POSTROUTING .*MASQ.*\n", "", text))
    (found,) = bench.found(trace=True)
    assert (found.code, found.confidence.value) == ("GKT-318", "certain")
    assert found.nodes == ("2jdh",)
    assert found.text.startswith("Node 2jdh does not masquerade Service traffic")


def test_a_default_route_that_is_gone_is_one_finding() -> None:
    bench = Bench("ptp")
    host = bench.host("2jdh")
    host.routes = [r for r in host.routes if r.dst.prefixlen or r.type is not RouteType.UNICAST]
    (found,) = [one for one in bench.found() if one.code == "GKT-305"]
    assert found.text == "Node 2jdh has no route to the pods of any other node"
    assert {"pod default/web-1", "pod default/web-2"} < set(found.subjects)


def test_what_was_not_seen_is_not_judged() -> None:
    bench = Bench("ptp")
    for node in bench.cluster.nodes.values():
        for space in (node.host, *node.pods.values()):
            shot = space.snapshot()
            blind = replace(
                shot,
                **{
                    name: Unavailable(reason="no permission")
                    for name in (
                        "links", "addresses", "routes", "rules", "neighbours", "fdb", "sysctls",
                        "sockets", "conntrack", "recent", "ipsets",
                    )
                },
                rulesets=(Unavailable(reason="no permission"),),
            )  # fmt: skip
            space.snapshot = lambda blind=blind: blind  # type: ignore[method-assign]
    assert bench.found(trace=True) == ()


def test_of_pods_that_were_not_read_nothing_is_said() -> None:
    """`gketrace pod` reads one: its neighbours' routes are not stale, nor their ports absent."""
    bench = Bench("ptp")
    misnamed(bench)
    world = bench.world(trace=False)
    one = replace(world, pods=tuple(p for p in world.pods if p.name == "web-0"), all_pods=False)
    assert not {f.code for f in find(one)} & {"GKT-107", "GKT-309"}
    assert "GKT-107" in {f.code for f in find(replace(one, endpoints=()))}
    assert "GKT-309" in {f.code for f in find(replace(one, all_pods=True))}


def test_sockets_are_kept_apart_by_protocol() -> None:
    bench = Bench("ptp")
    nobody_listens(bench)
    space = bench.pod("edge-0")
    assert isinstance(space.sockets, list)
    space.sockets.append(
        Socket(family=4, protocol=17, address=ip_address("0.0.0.0"), port=8080, state="UNCONN")
    )
    assert [one.code for one in bench.found()] == ["GKT-105"]


def test_what_is_not_ready_is_not_called_absent_or_refused() -> None:
    """Rules that were not changed yet lead on: nothing is refused, and a slice has the address."""
    bench = Bench("ptp")
    bench.endpoints = [
        replace(e, ready=False, serving=False) if e.service == "hello-server" else e
        for e in bench.endpoints
    ]
    found = {one.code: one for one in bench.found()}
    assert set(found) == {"GKT-102", "GKT-111"}
    assert found["GKT-102"].text.endswith("none is ready: rules of 3 nodes still lead to some")
    assert "lead to 1 address that is no ready endpoint of Service" in found["GKT-111"].text
    assert "no EndpointSlice has as ready 10.40.0.6:8080" in found["GKT-111"].evidence[0].note


def _one_interface(bench: Bench) -> None:
    bench.host("m69d").sysctls["net.ipv4.conf.eth0.forwarding"] = "0"


@pytest.mark.parametrize(
    ("fault", "said", "switch"),
    [
        (forwarding_off, "Forwarding is off on node m69d: nothing", "net.ipv4.ip_forward"),
        (_one_interface, "is off for eth0 of node m69d", "net.ipv4.conf.eth0.forwarding"),
    ],
    ids=["whole", "interface"],
)
def test_the_switch_that_is_off_is_the_one_to_turn_on(fault: Fault, said: str, switch: str) -> None:
    bench = Bench("ptp")
    fault(bench)
    (found,) = (one for one in bench.found(trace=True) if one.code == "GKT-301")
    assert said in found.text
    assert found.command == f"sysctl -w {switch}=1  # on node m69d"


@pytest.mark.parametrize("forwards", ["0", "1"])
def test_a_pod_without_its_address_is_that_pod_s_fault(forwards: str) -> None:
    """Pods inherit the machine's forwarding (net.core.devconf_inherit_init_net): then the packet
    goes in a circle."""
    bench = Bench("ptp")
    pod = bench.pod("web-1")
    pod.addresses = [one for one in pod.addresses if str(one.address) != _WEB1]
    pod.routes = [one for one in pod.routes if str(one.dst.network_address) != _WEB1]
    pod.sysctls |= dict.fromkeys(
        ("net.ipv4.ip_forward", "net.ipv4.conf.all.forwarding", "net.ipv4.conf.eth0.forwarding"),
        forwards,
    )
    found = bench.found(trace=True)
    assert not {one.code for one in found if "pod default/web-1" in one.text} & {"GKT-301"}
    (one,) = (one for one in found if "local route" in one.text)
    assert (one.code, one.subjects[0]) == ("GKT-305", "pod default/web-1")
    ends = [w.path.outcome.detail for w in bench.world().ways if w.standing == "broken"]
    off = "10.40.1.10 is no local address there, and IPv4 forwarding is off on eth0"
    assert (off in ends) is (forwards == "0")


def test_forwarding_of_ipv6_has_a_switch_of_its_own() -> None:
    bench = Bench("ptp")
    forwarding_off(bench)
    world = bench.world()
    stop = next(s for s in ways.stops(world.ways) if "forward" in s.citation.text)
    switch = "net.ipv6.conf.all.forwarding"
    found = ways.named(world, replace(stop, citation=replace(stop.citation, text=f"{switch} = 0")))
    assert found is not None
    assert found.text == "Forwarding of IPv6 is off on node m69d: no IPv6 packet passes it"
    assert found.command == f"sysctl -w {switch}=1  # on node m69d"


def test_a_connection_that_is_not_tracked_is_that_rule_s_doing() -> None:
    """One direction is not tracked: the other is INVALID, or nobody's."""
    bench = Bench("ptp")
    one = "-A PREROUTING -s 10.40.0.10/32 -p tcp -m tcp --{} 8080 -j NOTRACK\n"
    raw = "*raw\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n"
    rules = raw + one.format("dport") + one.format("sport") + "COMMIT\n"
    bench.rules("33fg", lambda text: text + rules)
    found = [one for one in bench.found(trace=True) if "NOTRACK" in str(one.evidence[0].citation)]
    assert {one.code for one in found} <= {"GKT-209", "GKT-303"}
    assert found
    for one_found in found:
        assert one_found.command == "gketrace rules 33fg --table raw --chain PREROUTING"


def test_a_neighbour_that_was_set_by_hand_was_not_asked() -> None:
    bench = Bench("ptp")
    failed_neighbour(bench)
    world = bench.world()
    stop = next(s for s in ways.stops(world.ways) if s.citation.text.endswith("FAILED"))
    text = stop.citation.text.replace("FAILED", "lladdr 0a:58:0a:28:00:63 PERMANENT")
    found = ways.named(world, replace(stop, citation=replace(stop.citation, text=text)))
    assert found is not None
    assert found.code == "GKT-312"
    assert "gives 10.40.1.10 a link address that nobody has" in found.text
    assert found.command.startswith("ip neigh del 10.40.1.10 dev ")
