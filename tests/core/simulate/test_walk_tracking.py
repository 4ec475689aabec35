"""What connection tracking decides in a walk."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from gketrace.conntrack import ConntrackEntry, CtStatus
from gketrace.packet import Packet, Protocol, TcpFlags
from gketrace.trace import Disposition, StepKind
from tests.core.simulate.nodes import Table, lines, one, tcp, udp
from tests.core.simulate.small_nodes import DNAT, no_policies, plain, ptp

D = Disposition


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
