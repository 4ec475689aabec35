"""The walk over small namespaces and over a real node's rules: exact steps."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from ipaddress import ip_address

from gketrace.conntrack import ConntrackEntry, CtStatus
from gketrace.packet import Packet, Protocol, TcpFlags
from gketrace.snapshot import FdbEntry, LinkPeer, Neighbour, PolicyRule, Unavailable
from gketrace.trace import Disposition, NetnsKind, NetnsRef, StepKind
from tests.core.simulate.nodes import Node, Table, lines, one, tcp, udp, world_node

D = Disposition


def plain() -> Node:
    """One node with an uplink and nothing else."""
    node = Node()
    node.host.link("eth0", kind="", address="10.142.0.8/24")
    node.host.route("default", dev="eth0", via="10.142.0.1")
    return node


def ptp() -> Node:
    """... and the pod ``web`` (10.40.0.6:8080) on a ptp veth."""
    node = plain()
    node.pod("web", "10.40.0.6").listen("0.0.0.0", 8080)
    node.ptp("web", "10.40.0.1")
    return node


def bridged(*, hairpin: bool = False) -> Node:
    """... or the pods ``web`` and ``near`` on a bridge, which iptables sees."""
    node = plain()
    node.host.link("cbr0", kind="bridge", address="10.40.0.1/24")
    node.host.sysctls["net.bridge.bridge-nf-call-iptables"] = "1"
    node.pod("web", "10.40.0.6").listen("0.0.0.0", 8080)
    node.bridge("web", hairpin=hairpin)
    node.pod("near", "10.40.0.9")
    node.bridge("near")
    return node


DNAT = """*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
-A PREROUTING -d 10.43.0.1/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.40.0.6:8080
-A OUTPUT -d 10.43.0.1/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.40.0.6:8080
-A POSTROUTING -s 10.40.0.6/32 -d 10.40.0.6/32 -j MASQUERADE
COMMIT
"""


def no_policies(shown: list[str]) -> list[str]:
    return [line for line in shown if not line.startswith("policy accept")]


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


# Connection tracking.


def test_existing_entry_decides_and_nat_rules_are_not_asked() -> None:
    node = ptp()
    node.host.iptables(DNAT.replace("10.40.0.6:8080", "10.40.0.99:8080"))
    orig = tcp("10.142.0.9:40000", "10.43.0.1:80").tuple5
    reply = tcp("10.40.0.6:8080", "10.142.0.9:40000").tuple5
    entry = ConntrackEntry(
        orig=orig,
        reply=reply,
        status=CtStatus.DST_NAT | CtStatus.SEEN_REPLY | CtStatus.CONFIRMED,
        tcp_state="ESTABLISHED",
    )
    node.host.conntrack = Table(entry)
    packet = tcp("10.142.0.9:40000", "10.43.0.1:80")
    pinned = one(node.walk(packet, into="eth0"))
    shown = no_policies(lines(pinned))
    assert shown[1:4] == [
        "receive continue eth0",
        "conntrack continue",
        "nat rewrite 10.142.0.9:40000 → 10.40.0.6:8080 tcp",
    ]
    assert [flow.assumed for flow in pinned.flows] == [False]
    fresh = one(node.walk(packet, into="eth0", use_conntrack=False))
    assert str(fresh.outcome.packet.dst) == "10.40.0.99"


def test_a_syn_reopens_a_closed_connection() -> None:
    node = ptp()
    node.host.iptables(DNAT)
    orig = tcp("10.142.0.9:40000", "10.43.0.1:80").tuple5
    reply = tcp("10.40.0.99:8080", "10.142.0.9:40000").tuple5
    node.host.conntrack = Table(
        ConntrackEntry(orig=orig, reply=reply, status=0x32, tcp_state="TIME_WAIT")
    )
    leaf = one(node.walk(tcp("10.142.0.9:40000", "10.43.0.1:80"), into="eth0"))
    assert str(leaf.outcome.packet.dst) == "10.40.0.6"


def test_the_answer_is_translated_back_and_taken_by_its_opener() -> None:
    node = ptp()
    node.pod("near", "10.40.0.9")
    node.ptp("near", "10.40.0.1")
    node.host.iptables(DNAT)
    there = one(node.walk(tcp("0.0.0.0", "10.43.0.1:80", 40000), pod="near"))
    assert str(there.outcome.packet) == "10.40.0.9:40000 → 10.40.0.6:8080 tcp"
    back = one(node.walk(there.outcome.packet.reply(), pod="web", flows=there.flows))
    assert no_policies(lines(back)) == [
        "-- pod default/web",
        "send continue",
        "route forward eth0",
        "transmit forward eth0",
        "-- host",
        "receive continue veth-web",
        "conntrack continue",
        "route forward veth-near",
        "check continue",
        "nat rewrite 10.43.0.1:80 → 10.40.0.9:40000 tcp",
        "transmit forward veth-near",
        "-- pod default/near",
        "receive continue eth0",
        "route deliver eth0",
        "socket deliver",
    ]
    assert back.outcome.disposition is D.DELIVERED


def test_notrack_keeps_nat_away() -> None:
    node = plain()
    node.host.listen("0.0.0.0", 53, "udp")
    node.host.iptables(
        "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p udp -m udp --dport 53 -j CT --notrack\n"
        "COMMIT\n*nat\n:PREROUTING ACCEPT [0:0]\n"
        "-A PREROUTING -p udp -m udp --dport 53 -j DNAT --to-destination 10.40.0.99\nCOMMIT\n"
        "*filter\n:INPUT DROP [0:0]\n-A INPUT -m conntrack --ctstate UNTRACKED -j ACCEPT\nCOMMIT\n"
    )
    leaf = one(node.walk(udp("10.142.0.9:40000", "10.142.0.8:53"), into="eth0"))
    assert leaf.outcome.disposition is D.DELIVERED
    assert leaf.flows == ()


def test_invalid_answer_is_dropped_where_a_rule_says_so() -> None:
    node = ptp()
    node.host.iptables(
        "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -m conntrack --ctstate INVALID -j DROP\n"
        "COMMIT\n"
    )
    packet = replace(
        tcp("10.142.0.9:40000", "10.40.0.6:8080"), tcp_flags=TcpFlags.SYN | TcpFlags.ACK
    )
    leaf = one(node.walk(packet, into="eth0"))
    assert leaf.outcome.disposition is D.DROPPED
    (said,) = (s for h in leaf.hops() for s in h.steps if s.kind is StepKind.CONNTRACK)
    assert said.note == "INVALID: a SYN+ACK of no known connection"


def test_a_namespace_without_such_rules_does_not_track() -> None:
    node = plain()
    node.host.iptables("*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp -j ACCEPT\nCOMMIT\n")
    leaf = one(node.walk(tcp("10.142.0.9:40000", "10.142.0.8:81"), into="eth0"))
    assert leaf.flows == ()


def test_icmp_echo_is_answered_unless_a_sysctl_forbids_it() -> None:
    node = plain()
    echo = Packet(
        src=ip_address("10.142.0.9"),
        dst=ip_address("10.142.0.8"),
        protocol=Protocol.ICMP,
        icmp_type=8,
        icmp_id=1,
    )
    node.host.sysctls["net.ipv4.icmp_echo_ignore_all"] = "0"
    assert one(node.walk(echo, into="eth0")).outcome.disposition is D.DELIVERED
    node.host.sysctls["net.ipv4.icmp_echo_ignore_all"] = "1"
    ignored = one(node.walk(echo, into="eth0")).outcome
    assert ignored.disposition is D.DROPPED
    assert ignored.citation is not None
    assert ignored.citation.text == "net.ipv4.icmp_echo_ignore_all = 1"


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


# Bridges.


def test_pod_to_pod_on_a_bridge_passes_forward_if_iptables_sees_bridged_frames() -> None:
    node = bridged()
    node.host.iptables(
        "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -i cbr0 -o cbr0 -m physdev "
        "--physdev-is-bridged -j DROP\nCOMMIT\n"
    )
    packet = tcp("0.0.0.0", "10.40.0.6:8080", 40000)
    assert one(node.walk(packet, pod="near")).outcome.disposition is D.DROPPED
    node.host.sysctls["net.bridge.bridge-nf-call-iptables"] = "0"
    leaf = one(node.walk(packet, pod="near"))
    assert lines(leaf) == [
        "-- pod default/near",
        "send continue",
        "route forward eth0",
        "transmit forward eth0",
        "-- host",
        "receive continue veth-near",
        "bridge forward veth-web",
        "transmit forward veth-web",
        "-- pod default/web",
        "receive continue eth0",
        "route deliver eth0",
        "socket deliver",
    ]


def test_the_flag_of_a_bridge_counts_only_where_br_netfilter_is_loaded() -> None:
    node = bridged()
    node.host.iptables(
        "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -i cbr0 -o cbr0 -j DROP\nCOMMIT\n"
    )
    node.host.set_link("cbr0", bridge_nf_call_iptables=True)
    packet = tcp("0.0.0.0", "10.40.0.6:8080", 40000)
    node.host.sysctls["net.bridge.bridge-nf-call-iptables"] = "0"
    assert one(node.walk(packet, pod="near")).outcome.disposition is D.DROPPED
    del node.host.sysctls["net.bridge.bridge-nf-call-iptables"]
    assert one(node.walk(packet, pod="near")).outcome.disposition is D.DELIVERED


def test_what_the_bridge_has_learned() -> None:
    node = bridged()
    host, mac = node.host, "0a:58:0a:28:00:06"
    bridge, web, near = (host.index(name) for name in ("cbr0", "veth-web", "veth-near"))
    host.neighbours.append(
        Neighbour(ifindex=bridge, address=ip_address("10.40.0.6"), mac=mac, state="STALE")
    )
    learned = FdbEntry(mac=mac, ifindex=web, master=bridge, updated=12.0)
    packet = tcp("10.142.0.9:40000", "10.40.0.6:8080")
    # A port's own address is not a station behind it.
    host.fdb[:] = [FdbEntry(mac=mac, ifindex=near, master=bridge, flags=("permanent",)), learned]
    leaf = one(node.walk(packet, into="eth0"))
    (step,) = (s for hop in leaf.hops() for s in hop.steps if s.kind is StepKind.BRIDGE)
    assert step.citation is not None
    assert step.citation.text == f"{mac} dev veth-web, seen 12 s ago"
    host.fdb[:] = [learned, FdbEntry(mac=mac, ifindex=near, master=bridge, vlan=3)]
    leaf = one(node.walk(packet, into="eth0"))
    assert leaf.outcome.disposition is D.UNKNOWN
    assert leaf.outcome.detail == f"{mac} is on several ports of cbr0, by VLAN"


def test_service_on_the_same_bridge_is_translated_and_stays_on_the_bridge() -> None:
    node = bridged()
    node.host.iptables(DNAT)
    leaf = one(node.walk(tcp("0.0.0.0", "10.43.0.1:80", 40000), pod="near"))
    assert no_policies(lines(leaf))[5:] == [
        "receive continue veth-near",
        "rule accept nat PREROUTING 1",
        "nat rewrite nat PREROUTING 1 10.40.0.9:40000 → 10.40.0.6:8080 tcp",
        "route forward cbr0",
        "check continue",
        "bridge forward veth-web",
        "transmit forward veth-web",
        "-- pod default/web",
        "receive continue eth0",
        "route deliver eth0",
        "socket deliver",
    ]


def test_answer_bypasses_iptables_when_bridged_frames_are_not_seen() -> None:
    node = bridged()
    node.host.iptables(DNAT)
    node.host.sysctls["net.bridge.bridge-nf-call-iptables"] = "0"
    there = one(node.walk(tcp("0.0.0.0", "10.43.0.1:80", 40000), pod="near"))
    assert there.outcome.disposition is D.DELIVERED
    back = one(node.walk(there.outcome.packet.reply(), pod="web", flows=there.flows))
    assert back.outcome.disposition is D.UNKNOWN
    assert str(back.outcome.packet) == "10.40.0.6:8080 → 10.40.0.9:40000 tcp"


def test_hairpin() -> None:
    refused = bridged()
    refused.host.iptables(DNAT)
    packet = tcp("0.0.0.0", "10.43.0.1:80", 40000)
    stuck = one(refused.walk(packet, pod="web"))
    assert stuck.outcome.disposition is D.UNREACHABLE
    assert "hairpin is off" in stuck.outcome.detail
    allowed = bridged(hairpin=True)
    allowed.host.iptables(DNAT)
    through = one(allowed.walk(packet, pod="web"))
    assert through.outcome.disposition is D.DELIVERED
    assert through.outcome.packet.src == ip_address("10.40.0.1")
    routed = ptp()
    routed.host.iptables(DNAT)
    around = one(routed.walk(packet, pod="web"))
    assert around.outcome.disposition is D.DELIVERED
    assert around.outcome.packet.src == ip_address("10.40.0.1")


def test_a_pod_that_nobody_has() -> None:
    node = bridged()
    leaf = one(node.walk(tcp("10.142.0.9:40000", "10.40.0.77:8080"), into="eth0"))
    assert leaf.outcome.disposition is D.NO_NEIGHBOUR
    assert leaf.outcome.detail == "no port of cbr0 has 10.40.0.77 behind it"


def test_a_link_that_is_down() -> None:
    node = ptp()
    node.host.set_link("veth-web", flags=("BROADCAST", "MULTICAST"), operstate="DOWN")
    leaf = one(node.walk(tcp("10.142.0.9:40000", "10.40.0.6:8080"), into="eth0"))
    assert leaf.outcome.disposition in (D.NO_NEIGHBOUR, D.UNREACHABLE)


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


def test_a_zone_has_its_own_connections() -> None:
    node = ptp()
    node.host.iptables(
        "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -i eth0 -j CT --zone 3\nCOMMIT\n" + DNAT
    )
    walked = node.walk(tcp("10.142.0.9:40000", "10.43.0.1:80"), into="eth0")
    leaf = one(walked)
    assert [flow.entry.zone for flow in leaf.flows] == [3]
    assert walked.missing == ()
    # The kernel's entry of that zone decides; one of another zone does not.
    packet = tcp("10.142.0.9:40000", "10.43.0.1:80")
    there = packet.tuple5
    back = replace(there.inverted(), src=ip_address("10.40.0.7"), sport=9090)
    for zone, pinned in ((3, True), (0, False), (4, False)):
        status = int(CtStatus.DST_NAT | CtStatus.DST_NAT_DONE | CtStatus.CONFIRMED)
        entry = ConntrackEntry(orig=there, reply=back, zone=zone, status=status)
        node.host.conntrack = Table(entry)
        leaf = one(node.walk(packet, into="eth0"))
        assert (leaf.outcome.packet.dst == back.src) is pinned


def test_a_queued_packet_may_pass_or_not() -> None:
    node = ptp()
    node.host.iptables(
        "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -j NFQUEUE --queue-num 3\nCOMMIT\n"
    )
    leaves = list(node.walk(tcp("10.142.0.9:4000", "10.40.0.6:8080"), into="eth0").leaves())
    assert [leaf.outcome.disposition for leaf in leaves] == [D.DELIVERED, D.UNKNOWN]
    assert [leaf.chance for leaf in leaves] == [None, None]
