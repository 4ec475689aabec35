"""The walk over small namespaces and over a real node's rules: exact steps."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from ipaddress import ip_address

import pytest

from gketrace.snapshot import LinkPeer, Neighbour, PolicyRule, Unavailable
from gketrace.trace import Disposition, NetnsKind, NetnsRef
from tests.core.simulate.nodes import Node, lines, one, tcp, world_node
from tests.core.simulate.small_nodes import DNAT, no_policies, plain, ptp

D = Disposition


# A real node.


def test_node_port_to_local_pod_of_kube_proxy_1_36() -> None:
    node = world_node("kube-proxy-1.36-iptables-nft", "2jdh")
    node.pod("hello", "10.40.0.6").listen("0.0.0.0", 8080)
    node.bridge("hello")
    leaf = one(node.walk(tcp("10.142.0.6:40000", "10.142.0.8:31830"), into="eth0"))
    assert no_policies(lines(leaf)) == [
        "-- host",
        "receive continue eth0",
        "rule jump nat PREROUTING 1",
        "rule jump nat KUBE-SERVICES 21",
        "rule jump nat KUBE-NODEPORTS 12",
        "rule jump nat KUBE-EXT-7D6H5YV7GTUSLGXR 1",
        "rule mark nat KUBE-MARK-MASQ 1 10.142.0.6:40000 → 10.142.0.8:31830 tcp",
        "rule jump nat KUBE-EXT-7D6H5YV7GTUSLGXR 2",
        "rule jump nat KUBE-SVC-7D6H5YV7GTUSLGXR 2",
        "rule accept nat KUBE-SEP-GNGNYGTEG254KWMX 2",
        "nat rewrite nat KUBE-SEP-GNGNYGTEG254KWMX 2 10.142.0.6:40000 → 10.40.0.6:8080 tcp",
        "route forward cbr0",
        "check continue",
        "rule jump filter FORWARD 1",
        "rule jump filter FORWARD 2",
        "rule accept filter KUBE-FORWARD 2",
        "rule jump nat POSTROUTING 1",
        "rule mark nat KUBE-POSTROUTING 2 10.142.0.6:40000 → 10.40.0.6:8080 tcp",
        "rule accept nat KUBE-POSTROUTING 3",
        "nat rewrite nat KUBE-POSTROUTING 3 10.40.0.1:* → 10.40.0.6:8080 tcp",
        "bridge forward veth-hello",
        "transmit forward veth-hello",
        "-- pod default/hello",
        "receive continue eth0",
        "route deliver eth0",
        "socket deliver",
    ]
    assert leaf.outcome.disposition is D.DELIVERED
    (flow,) = leaf.flows
    assert (
        str(flow.entry) == "tcp SYN_SENT src=10.142.0.6 dst=10.142.0.8 sport=40000 dport=31830 "
        "[UNREPLIED] src=10.40.0.6 dst=10.40.0.1 sport=8080 dport=*"
    )
    assert flow.assumed
    assert flow.entry.dst_nat
    assert flow.entry.src_nat


def test_service_without_endpoints_is_rejected() -> None:
    node = world_node("kube-proxy-1.36-iptables-nft", "2jdh")
    text = node.host.rulesets[0].text.decode()
    rules = [r for r in text.splitlines() if "-A KUBE-SERVICES" in r and "no endpoints" in r]
    rule = next(r for r in rules if " -p tcp " in r)
    words = rule.split()
    address = words[words.index("-d") + 1].removesuffix("/32")
    port = words[words.index("--dport") + 1]
    leaf = one(node.walk(tcp("0.0.0.0", f"{address}:{port}", 40000)))
    assert leaf.outcome.disposition is D.REJECTED
    assert leaf.outcome.reject_with == "icmp-port-unreachable"
    assert leaf.outcome.citation is not None
    assert "has no endpoints" in leaf.outcome.citation.text


# Forwarding, NAT, local delivery.


def test_dnat_into_a_ptp_pod() -> None:
    node = ptp()
    node.host.iptables(DNAT)
    leaf = one(node.walk(tcp("10.142.0.9:40000", "10.43.0.1:80"), into="eth0"))
    assert no_policies(lines(leaf)) == [
        "-- host",
        "receive continue eth0",
        "rule accept nat PREROUTING 1",
        "nat rewrite nat PREROUTING 1 10.142.0.9:40000 → 10.40.0.6:8080 tcp",
        "route forward veth-web",
        "check continue",
        "transmit forward veth-web",
        "-- pod default/web",
        "receive continue eth0",
        "route deliver eth0",
        "socket deliver",
    ]


def test_local_process_to_service_is_routed_again_after_dnat() -> None:
    node = ptp()
    node.host.iptables(DNAT)
    leaf = one(node.walk(tcp("0.0.0.0", "10.43.0.1:80", 40000)))
    assert no_policies(lines(leaf)) == [
        "-- host",
        "send continue",
        "route forward eth0",
        "rule accept nat OUTPUT 1",
        "nat rewrite nat OUTPUT 1 10.142.0.8:40000 → 10.40.0.6:8080 tcp",
        "route forward veth-web",
        "transmit forward veth-web",
        "-- pod default/web",
        "receive continue eth0",
        "route deliver eth0",
        "socket deliver",
    ]
    assert leaf.outcome.packet.src == ip_address("10.142.0.8")


def test_dnat_on_output_to_an_address_of_this_node_goes_over_the_loopback() -> None:
    node = plain()
    node.host.listen("10.142.0.8", 9100)
    node.host.iptables(DNAT.replace("10.40.0.6:8080", "10.142.0.8:9100"))
    leaf = one(node.walk(tcp("0.0.0.0", "10.43.0.1:80", 40000)))
    assert no_policies(lines(leaf)) == [
        "-- host",
        "send continue",
        "route forward eth0",
        "rule accept nat OUTPUT 1",
        "nat rewrite nat OUTPUT 1 10.142.0.8:40000 → 10.142.0.8:9100 tcp",
        "route deliver lo",
        "transmit forward lo",
        "socket deliver",
    ]
    assert len(leaf.flows) == 1


def test_dnat_to_host_network_endpoint_ends_in_input() -> None:
    node = plain()
    node.host.listen("0.0.0.0", 9100)
    node.host.iptables(DNAT.replace("10.40.0.6:8080", "10.142.0.8:9100"))
    leaf = one(node.walk(tcp("10.142.0.9:40000", "10.43.0.1:80"), into="eth0"))
    assert leaf.outcome.disposition is D.DELIVERED
    assert str(leaf.outcome.packet) == "10.142.0.9:40000 → 10.142.0.8:9100 tcp"


def test_nothing_listens() -> None:
    node = plain()
    node.host.listen("127.0.0.1", 81)
    leaf = one(node.walk(tcp("10.142.0.9:40000", "10.142.0.8:81"), into="eth0"))
    assert leaf.outcome.disposition is D.REFUSED
    assert leaf.outcome.citation is not None
    assert "bound are 127.0.0.1:81" in leaf.outcome.citation.text


def test_sockets_that_could_not_be_read_are_missing_and_not_refused() -> None:
    node = plain()
    node.host.sockets = Unavailable(reason="gVisor keeps them to itself")
    walked = node.walk(tcp("10.142.0.9:40000", "10.142.0.8:81"), into="eth0")
    assert one(walked).outcome.disposition is D.DELIVERED
    assert [m.what for m in walked.missing] == ["sockets"]


def test_input_drop_and_reject() -> None:
    node = plain()
    node.host.iptables(
        "*filter\n:INPUT DROP [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n"
        "-A INPUT -p tcp -m tcp --dport 81 -j REJECT --reject-with tcp-reset\nCOMMIT\n"
    )
    reset = one(node.walk(tcp("10.142.0.9:40000", "10.142.0.8:81"), into="eth0")).outcome
    assert (reset.disposition, reset.reject_with) == (D.REJECTED, "tcp-reset")
    dropped = one(node.walk(tcp("10.142.0.9:40000", "10.142.0.8:82"), into="eth0")).outcome
    assert dropped.disposition is D.DROPPED
    assert dropped.citation is not None
    assert dropped.citation.source.value == "policy"


def test_forwarding_off_and_no_route() -> None:
    node = ptp()
    node.host.sysctls["net.ipv4.conf.eth0.forwarding"] = "0"
    leaf = one(node.walk(tcp("10.142.0.9:40000", "10.40.0.6:8080"), into="eth0"))
    assert leaf.outcome.disposition is D.UNREACHABLE
    assert leaf.outcome.citation is not None
    assert "forwarding = 0" in leaf.outcome.citation.text
    node.host.routes = [r for r in node.host.routes if r.dst.prefixlen != 0]
    lost = one(node.walk(tcp("0.0.0.0", "198.51.100.1:80", 40000)))
    assert lost.outcome.disposition is D.UNREACHABLE


@pytest.mark.parametrize(
    ("state", "end"),
    [("INCOMPLETE", D.UNKNOWN), ("FAILED", D.NO_NEIGHBOUR), ("STALE", D.TRANSMITTED)],
)
def test_a_neighbour_that_was_asked_and_has_not_answered(state: str, end: Disposition) -> None:
    """Not "delivered": it is FAILED after three seconds without an answer."""
    node = plain()
    asked = Neighbour(
        ifindex=node.host.index("eth0"), address=ip_address("10.142.0.1"), state=state
    )
    node.host.neighbours = [asked]
    outcome = one(node.walk(tcp("0.0.0.0", "198.51.100.1:80", 40000))).outcome
    assert outcome.disposition is end
    if end is D.UNKNOWN:
        assert outcome.detail == "10.142.0.1 was asked for on eth0 and has not answered yet"
        assert outcome.citation is not None


def test_leaves_the_node() -> None:
    leaf = one(plain().walk(tcp("0.0.0.0", "198.51.100.1:80", 40000)))
    outcome = leaf.outcome
    assert outcome.disposition is D.TRANSMITTED
    assert (outcome.interface, outcome.next_hop) == ("eth0", ip_address("10.142.0.1"))


def test_ttl_is_counted_down_once_a_forwarding_namespace() -> None:
    node = ptp()
    packet = replace(tcp("10.142.0.9:40000", "10.40.0.6:8080"), ttl=9)
    assert one(node.walk(packet, into="eth0")).outcome.packet.ttl == 8


# Draws and unknowns.

TWO = """*nat
:PREROUTING ACCEPT [0:0]
:SVC - [0:0]
-A PREROUTING -d 10.43.0.1/32 -j SVC
-A SVC -m statistic --mode random --probability 0.50000000000 -p tcp -j DNAT --to-destination 10.40.0.6:8080
-A SVC -p tcp -j DNAT --to-destination 10.40.0.7:8080
COMMIT
"""  # noqa: E501


def test_statistic_branches_and_chances_sum_to_one() -> None:
    node = ptp()
    node.host.iptables(TWO)
    leaves = list(node.walk(tcp("10.142.0.9:4000", "10.43.0.1:80"), into="eth0").leaves())
    assert [leaf.chance for leaf in leaves] == [Fraction(1, 2), Fraction(1, 2)]
    assert [str(leaf.outcome.packet.dst) for leaf in leaves] == ["10.40.0.6", "10.40.0.7"]
    assert leaves[0].outcome.disposition is D.DELIVERED


def test_unknown_rule_leaves_both_ways_open() -> None:
    node = ptp()
    node.host.iptables(
        "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -m newfangled --foo bar -j DROP\nCOMMIT\n"
    )
    leaves = list(node.walk(tcp("10.142.0.9:4000", "10.40.0.6:8080"), into="eth0").leaves())
    assert {leaf.outcome.disposition for leaf in leaves} == {D.DROPPED, D.DELIVERED}
    assert all(leaf.chance is None for leaf in leaves)
    assert all("newfangled" in " ".join(leaf.because) for leaf in leaves)


def test_unknown_target_ends_in_unknown_and_quotes_the_rule() -> None:
    node = ptp()
    node.host.iptables("*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -j NEWFANGLED\nCOMMIT\n")
    leaves = list(node.walk(tcp("10.142.0.9:4000", "10.40.0.6:8080"), into="eth0").leaves())
    ends = [leaf.outcome for leaf in leaves if leaf.outcome.disposition is D.UNKNOWN]
    assert ends
    assert all(e.citation is not None and "NEWFANGLED" in e.citation.text for e in ends)


def test_rules_that_could_not_be_read_are_never_no_rules() -> None:
    node = ptp()
    node.host.rulesets = [Unavailable(reason="iptables-nft-save died")]
    walked = node.walk(tcp("10.142.0.9:4000", "10.40.0.6:8080"), into="eth0")
    through, stuck = walked.leaves()
    assert through.outcome.disposition is D.DELIVERED
    assert through.chance is None
    assert stuck.outcome.disposition is D.UNKNOWN
    assert {m.what for m in walked.missing} == {"rules"}


def test_a_namespace_that_cannot_be_read_is_unknown() -> None:
    node = ptp()
    gone = NetnsRef(node="n1", kind=NetnsKind.POD, inode=999, pod="default/gone")
    node.host.set_link("veth-web", peer=LinkPeer(ifindex=2, name="eth0", netns=gone))
    walked = node.walk(tcp("10.142.0.9:4000", "10.40.0.6:8080"), into="eth0")
    assert one(walked).outcome.disposition is D.UNKNOWN
    assert [m.what for m in walked.missing] == ["netns"]


# Policy routing and marks.


def marked(table: str, hook: str) -> Node:
    node = plain()
    node.host.link("eth1", kind="", address="10.9.0.8/24")
    node.host.route("default", dev="eth1", via="10.9.0.1", table=100)
    node.host.rules.append(
        PolicyRule(family=4, priority=50, fwmark=7, table=100, text="50: from all fwmark 0x7 …")
    )
    node.host.iptables(
        f"*{table}\n:{hook} ACCEPT [0:0]\n"
        f"-A {hook} -d 198.51.100.0/24 -j MARK --set-xmark 0x7/0xffffffff\nCOMMIT\n"
    )
    return node


def test_a_mark_of_prerouting_selects_the_table() -> None:
    leaf = one(
        marked("mangle", "PREROUTING").walk(tcp("10.142.0.9:4000", "198.51.100.1:80"), into="eth0")
    )
    assert leaf.outcome.interface == "eth1"
    assert leaf.outcome.next_hop == ip_address("10.9.0.1")
    cited = [s.citation.source.value for h in leaf.hops() for s in h.steps if s.citation]
    assert "ip-rule" in cited


def test_a_mark_of_mangle_output_routes_again_and_that_of_filter_output_does_not() -> None:
    packet = tcp("0.0.0.0", "198.51.100.1:80", 4000)
    assert one(marked("mangle", "OUTPUT").walk(packet)).outcome.interface == "eth1"
    assert one(marked("filter", "OUTPUT").walk(packet)).outcome.interface == "eth0"


def test_a_forwarding_loop_is_found() -> None:
    node = ptp()
    node.pods["web"].sysctls["net.ipv4.conf.eth0.forwarding"] = "1"
    node.host.route("198.51.100.0/24", dev="veth-web", via="10.40.0.6")
    leaf = one(node.walk(tcp("10.142.0.9:4000", "198.51.100.1:80"), into="eth0"))
    assert leaf.outcome.disposition is D.LOOPED


# Data planes that are not visible here.


def test_cilium_and_ipvs_are_unknown_and_never_no_rules() -> None:
    node = ptp()
    node.host.link("cilium_host", address="10.40.0.2/32", connected=False)
    for walked in (
        node.walk(tcp("10.142.0.9:40000", "10.40.0.6:8080"), into="eth0"),
        node.walk(tcp("0.0.0.0", "10.40.0.6:8080", 40000)),
    ):
        assert one(walked).outcome.disposition is D.UNKNOWN
        assert [m.what for m in walked.missing] == ["dataplane"]
    node = plain()
    node.host.link("kube-ipvs0", kind="dummy", address="10.43.0.1/32", connected=False)
    walked = node.walk(tcp("10.142.0.9:40000", "10.43.0.1:80"), into="eth0")
    assert one(walked).outcome.disposition is D.UNKNOWN
    assert [m.what for m in walked.missing] == ["ipvs"]


def test_a_queued_packet_may_pass_or_not() -> None:
    node = ptp()
    node.host.iptables(
        "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -j NFQUEUE --queue-num 3\nCOMMIT\n"
    )
    leaves = list(node.walk(tcp("10.142.0.9:4000", "10.40.0.6:8080"), into="eth0").leaves())
    assert [leaf.outcome.disposition for leaf in leaves] == [D.DELIVERED, D.UNKNOWN]
    assert [leaf.chance for leaf in leaves] == [None, None]
