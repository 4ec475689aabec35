"""Scenarios of the family Path."""

from __future__ import annotations

from typing import Final

from e2e.scenarios.model import Scenario
from e2e.scenarios.stage import Stage

__all__ = ["SCENARIOS"]

_WEB1: Final = "10.40.1.10"
_CLIENT: Final = "203.0.113.10"


def _to_web1(stage: Stage) -> bool:
    """From a pod of another node."""
    return not stage.reaches("pod/web-0", _WEB1, 8080)


def _forwarding_off(stage: Stage) -> None:
    stage.sysctl("m69d", "net.ipv4.ip_forward", "0")


def _policy_drop(stage: Stage) -> None:
    tool = stage.iptables
    stage.do("node/m69d", f"{tool} -P FORWARD DROP", f"{tool} -P FORWARD ACCEPT")


def _rule_drops(stage: Stage) -> None:
    stage.rule("m69d", "filter", "FORWARD", f"-d {_WEB1}/32 -p tcp --dport 8080 -j DROP")


def _dummy(stage: Stage, node: str, name: str) -> None:
    """A device that leads nowhere (this kernel has no dummy): both ends of a veth pair."""
    add = f"ip link add {name} type veth peer name {name}p"
    stage.do(
        f"node/{node}",
        f"{add} && ip link set {name} up && ip link set {name}p up",
        f"ip link del {name}",
    )


def _rp_filter(stage: Stage) -> None:
    _dummy(stage, "m69d", "gkscn0")
    stage.run("node/m69d", "ip addr add 192.0.2.201/32 dev gkscn0")
    stage.run("node/m69d", "ip route add 203.0.113.0/24 dev gkscn0")
    stage.sysctl("m69d", "net.ipv4.conf.eth0.rp_filter", "1")


def _node_port_m69d(stage: Stage) -> bool:
    return not stage.reaches(f"client/{_CLIENT}", stage.node_ip("m69d"), 30080)


def _route_missing(stage: Stage) -> None:
    if stage.bridge:
        route = "10.40.1.0/24 dev cbr0"
        back = f"ip route add {route} proto kernel scope link src 10.40.1.1"
    else:
        route = f"{_WEB1}/32"
        text = stage.run("node/m69d", f"ip route show {route}").strip()
        back = f"ip route add {text}"
    stage.do("node/m69d", f"ip route del {route}", back)


def _blackhole(stage: Stage) -> None:
    route = "blackhole 10.40.1.0/25"
    stage.do("node/2jdh", f"ip route add {route}", f"ip route del {route}")


def _policy_route(stage: Stage) -> None:
    stage.do(
        "node/2jdh",
        f"ip route add blackhole default table 77 && ip rule add to {_WEB1} lookup 77 priority 100",
        f"ip rule del to {_WEB1} lookup 77 priority 100; ip route flush table 77",
    )


def _stale_route(stage: Stage) -> None:
    _dummy(stage, "m69d", "gkscn1")
    route = f"{_WEB1}/32 dev gkscn1 metric 0"
    if stage.bridge:
        stage.do("node/m69d", f"ip route add {route}", f"ip route del {route}")
    else:
        text = stage.run("node/m69d", f"ip route show {_WEB1}/32").strip()
        stage.do("node/m69d", f"ip route replace {_WEB1}/32 dev gkscn1", f"ip route replace {text}")


def _local_route(stage: Stage) -> None:
    route = "local 10.40.1.0/25 dev eth0 proto 66 table local"
    stage.do("node/m69d", f"ip route add {route}", f"ip route del {route}")


def _duplicate(stage: Stage) -> None:
    stage.do("pod/edge-0", f"ip addr add {_WEB1}/32 dev eth0", f"ip addr del {_WEB1}/32 dev eth0")


def _neighbour(stage: Stage) -> None:
    device = stage.pod_device("web-1")
    stage.do("pod/web-1", "ip link set eth0 arp off", "ip link set eth0 arp on")
    stage.run("node/m69d", f"ip neigh flush dev {device}", check=False)
    stage.run("node/m69d", f"ip neigh replace {_WEB1} dev {device} nud failed", check=False)
    stage.later(lambda: stage.run("node/m69d", f"ip neigh flush dev {device}", check=False))
    stage.reaches("pod/web-0", _WEB1, 8080)


def _link_down(stage: Stage) -> None:
    """Addresses and routes of the link go with it, and are put back with it."""
    veth = stage.veth("web-1")
    back = [f"ip link set {veth} up"]
    for line in stage.run("node/m69d", f"ip -6 -o addr show dev {veth} scope global").splitlines():
        back.append(f"ip -6 addr add {line.split()[3]} dev {veth} nodad")
    for family in ("-4", "-6"):
        for line in stage.run("node/m69d", f"ip {family} route show dev {veth}").splitlines():
            if "proto kernel" not in line:
                back.append(f"ip {family} route replace {line.strip()} dev {veth}")
    # What was asked for meanwhile, and did not answer, would be known as FAILED for a while.
    back.append(f"ip neigh flush dev {veth}")
    stage.do("node/m69d", f"ip link set {veth} down", "; ".join(back))


def _bridge_nf(stage: Stage) -> None:
    stage.sysctl("2jdh", "net.bridge.bridge-nf-call-iptables", "0")


def _same_node_service(stage: Stage) -> bool:
    """hello-server through its Service, from a pod of its own node."""
    return not stage.reaches("pod/web-0", "10.43.246.223", 80)


def _hairpin(stage: Stage) -> None:
    veth = stage.veth("hello-server-579859fb5b-szrwh")
    stage.do(
        "node/2jdh", f"bridge link set dev {veth} hairpin off",
        f"bridge link set dev {veth} hairpin on",
    )  # fmt: skip


def _self_service(stage: Stage) -> bool:
    return not stage.reaches("pod/hello-server-579859fb5b-szrwh", "10.43.246.223", 80)


def _small_mtu(stage: Stage) -> None:
    stage.do("node/m69d", "ip link set eth0 mtu 1400", "ip link set eth0 mtu 1500")


_BIG: Final = """
import errno, socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
s.connect(("203.0.113.10", 9))
told = "silence"
for _ in range(4):
    try:
        s.send(b"x" * 1440)
    except OSError as error:
        told = "told" if error.errno == errno.EMSGSIZE else "other"
    time.sleep(0.1)
print(told)
"""


def _big_datagram(stage: Stage) -> str:
    """Whether a pod that sends 1468 bytes with DF is told that they do not fit."""
    stage.run("pod/web-1", "ip route flush cache", check=False)
    done = stage.lab.exec("pod/web-1", ["/usr/bin/python3", "-c", _BIG])
    return done.stdout.strip()


def _told_of_mtu(stage: Stage) -> bool:
    return _big_datagram(stage) == "told"


def _black_hole(stage: Stage) -> None:
    _small_mtu(stage)
    stage.rule("m69d", "filter", "OUTPUT", "-p icmp -m icmp --icmp-type 3/4 -j DROP")


def _no_masquerade(stage: Stage) -> None:
    stage.saved("2jdh")
    tool = stage.iptables
    rule = stage.run("node/2jdh", f"{tool} -t nat -S KUBE-POSTROUTING | grep MASQUERADE").strip()
    stage.run("node/2jdh", f"{tool} -t nat {rule.replace('-A', '-D', 1)}")


def _node_port_2jdh(stage: Stage) -> bool:
    """web-lb-sources' neighbour: a NodePort whose endpoints are on other nodes, too."""
    results = [stage.reaches(f"client/{_CLIENT}", stage.node_ip("2jdh"), 30080) for _ in range(8)]
    return not all(results)


def _wide_masquerade(stage: Stage) -> None:
    stage.rule("2jdh", "nat", "POSTROUTING", "-s 10.40.0.0/24 -d 10.40.0.0/14 -j MASQUERADE")


def _hidden_source(stage: Stage) -> bool:
    result = stage.lab.connect("pod/web-0", _WEB1, 8080, timeout=0.7)
    return result.peer_seen is not None and str(result.peer_seen[0]) == stage.node_ip("2jdh")


def _dns_cache_gone(stage: Stage) -> None:
    _dummy(stage, "2jdh", "nodelocaldns")
    stage.run("node/2jdh", "ip addr add 169.254.20.10/32 dev nodelocaldns")


def _dns_unanswered(stage: Stage) -> bool:
    return not stage.reaches("pod/web-0", "169.254.20.10", 53, "UDP")


def _calico(stage: Stage) -> None:
    """Chains as Calico's agent names them; the agent itself is not here."""
    tool, veth = stage.iptables, stage.veth("web-1")
    comment = '-m comment --comment "cali:_wjq-Yrma8Ly1Svo Drop if no profiles matched"'
    stage.do(
        "node/m69d",
        f"{tool} -N cali-FORWARD && {tool} -N cali-tw-{veth[:8]} && "
        f"{tool} -A cali-FORWARD -d {_WEB1}/32 -j cali-tw-{veth[:8]} && "
        f"{tool} -A cali-tw-{veth[:8]} {comment} -j DROP && "
        f"{tool} -I FORWARD -j cali-FORWARD",
        f"{tool} -D FORWARD -j cali-FORWARD; {tool} -F cali-FORWARD; "
        f"{tool} -F cali-tw-{veth[:8]}; {tool} -X cali-FORWARD; {tool} -X cali-tw-{veth[:8]}",
    )


def _rules_in_pod(stage: Stage) -> None:
    stage.rule("", "filter", "INPUT", "-p tcp --dport 8080 -j DROP", where="pod/web-1")


_DOWN: Final = frozenset({"GKT-312", "GKT-210", "GKT-208"})
"""What a pod that cannot be reached leaves behind: neighbours without an answer, SYNs."""

SCENARIOS: Final = (
    Scenario(
        code="GKT-301",
        title="net.ipv4.ip_forward=0 on one node",
        fault=_forwarding_off,
        proof=("net.ipv4.ip_forward = 0",),
        symptom=_to_web1,
        also=_DOWN,
    ),
    Scenario(
        code="GKT-302",
        title="FORWARD policy DROP on one node",
        fault=_policy_drop,
        proof=("FORWARD",),
        symptom=_to_web1,
        also=_DOWN,
    ),
    Scenario(
        code="GKT-303",
        title="a rule drops what goes to one pod",
        fault=_rule_drops,
        proof=("-d 10.40.1.10/32", "-j DROP"),
        symptom=_to_web1,
        also=_DOWN,
    ),
    Scenario(
        code="GKT-304",
        title="strict rp_filter, and the route back is elsewhere",
        fault=_rp_filter,
        proof=("rp_filter = 1",),
        symptom=_node_port_m69d,
        also=_DOWN,
    ),
    Scenario(
        code="GKT-305",
        title="the route to a pod (ptp) or to all pods (bridge) is gone",
        fault=_route_missing,
        proof=("default",),
        symptom=_to_web1,
        also=_DOWN,
    ),
    Scenario(
        code="GKT-306",
        title="a blackhole route shadows another node's pods",
        fault=_blackhole,
        proof=("blackhole 10.40.1.0/25",),
        symptom=_to_web1,
        also=_DOWN,
    ),
    Scenario(
        code="GKT-308",
        title="a policy rule sends a pod's packets to another table",
        fault=_policy_route,
        proof=("lookup 77",),
        symptom=_to_web1,
        also=_DOWN,
    ),
    Scenario(
        code="GKT-309",
        title="a /32 of a pod leads to another device",
        fault=_stale_route,
        proof=("10.40.1.10 dev gkscn1",),
        symptom=_to_web1,
        also=_DOWN,
    ),
    Scenario(
        code="GKT-310",
        title="a local route of the guest agent covers the pod range",
        fault=_local_route,
        proof=("local 10.40.1.0/25",),
        topologies=("bridge",),  # a pod's own /32 wins over it
        symptom=_to_web1,
        also=_DOWN | {"GKT-110", "GKT-105"},
    ),
    Scenario(
        code="GKT-311",
        title="two pods with one address",
        fault=_duplicate,
        proof=("10.40.1.10/32 dev eth0", "10.40.1.10/24 dev eth0"),
        topologies=("bridge",),
    ),
    Scenario(
        code="GKT-312",
        title="a pod does not answer ARP",
        fault=_neighbour,
        proof=(_WEB1,),
        symptom=_to_web1,
        also=_DOWN,
    ),
    Scenario(
        code="GKT-313",
        title="the node's end of a pod's veth is down",
        fault=_link_down,
        proof=("veth",),
        symptom=_to_web1,
        also=_DOWN | {"GKT-305"},
    ),
    Scenario(
        code="GKT-314",
        title="bridge-nf-call-iptables=0 on a bridge node",
        fault=_bridge_nf,
        proof=("net.bridge.bridge-nf-call-iptables = 0",),
        symptom=_same_node_service,
        topologies=("bridge",),
        also=_DOWN,
    ),
    Scenario(
        code="GKT-315",
        title="hairpin off on a pod's bridge port",
        fault=_hairpin,
        proof=("hairpin off",),
        symptom=_self_service,
        topologies=("bridge",),
        also=_DOWN,
    ),
    Scenario(
        code="GKT-316",
        title="a node's uplink has MTU 1400, its pods 1500",
        fault=_small_mtu,
        proof=("MTU 1400", "MTU 1500"),
        symptom=_told_of_mtu,
    ),
    Scenario(
        code="GKT-317",
        title="the same, and a rule drops the ICMP errors",
        fault=_black_hole,
        proof=("--icmp-type 3/4", "MTU 1400"),
        symptom=None,
        also=frozenset({"GKT-316"}),
    ),
    Scenario(
        code="GKT-318",
        title="the MASQUERADE rule of KUBE-POSTROUTING is gone",
        fault=_no_masquerade,
        proof=("KUBE-POSTROUTING has no MASQUERADE rule",),
        symptom=_node_port_2jdh,
        also=_DOWN,
    ),
    Scenario(
        code="GKT-319",
        title="pods are masqueraded towards pods",
        fault=_wide_masquerade,
        proof=("-j MASQUERADE",),
        symptom=_hidden_source,
        also=frozenset({"GKT-203"}),
    ),
    Scenario(
        code="GKT-320",
        own=True,
        title="NodeLocal DNS: the address is there, the cache is not",
        fault=_dns_cache_gone,
        proof=("169.254.20.10",),
        symptom=_dns_unanswered,
    ),
    Scenario(
        code="GKT-321",
        title="a NetworkPolicy's chain drops",
        fault=_calico,
        proof=("cali-tw-", "-j DROP"),
        symptom=_to_web1,
        also=_DOWN,
    ),
    Scenario(
        code="GKT-322",
        title="a rule inside a pod drops",
        fault=_rules_in_pod,
        proof=("--dport 8080 -j DROP",),
        symptom=_to_web1,
        also=_DOWN,
    ),
)
