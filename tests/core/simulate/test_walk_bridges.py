"""Walks over bridges."""

from __future__ import annotations

from ipaddress import ip_address

from gketrace.snapshot import FdbEntry, Neighbour
from gketrace.trace import Disposition, StepKind
from tests.core.simulate.nodes import lines, one, tcp
from tests.core.simulate.small_nodes import DNAT, bridged, no_policies, ptp

D = Disposition


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
