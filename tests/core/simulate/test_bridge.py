"""Where a bridge sends a frame."""

from __future__ import annotations

from dataclasses import replace

from gketrace.simulate.bridge import BridgeKind, bridge_forward, calls_iptables
from gketrace.simulate.state import Ternary
from gketrace.snapshot import BridgePort, FdbEntry, Link, NetnsSnapshot, Unavailable
from tests.core.simulate.networks import network

CBR0 = Link(
    ifindex=5,
    name="cbr0",
    kind="bridge",
    mac="0a:58:0a:28:00:01",
    flags=("UP", "LOWER_UP"),
    bridge_nf_call_iptables=False,
)
PORTS = tuple(
    Link(
        ifindex=number,
        name=f"veth{number}",
        kind="veth",
        master=5,
        flags=("UP", "LOWER_UP"),
        port=BridgePort(state="forwarding"),
    )
    for number in (6, 7)
)
POD = "0a:58:0a:28:00:06"
FDB = (
    FdbEntry(mac=POD, ifindex=6, master=5, updated=12.0),
    FdbEntry(mac=CBR0.mac, ifindex=5, master=5, flags=("permanent",)),
)


def snapshot(*ports: Link, fdb: tuple[FdbEntry, ...] | Unavailable = FDB) -> NetnsSnapshot:
    return network(links=(CBR0, *(ports or PORTS)), fdb=fdb)


def test_a_learned_address_goes_out_of_its_port() -> None:
    decision = bridge_forward(snapshot(), "cbr0", POD, ingress="veth7")
    assert (decision.kind, decision.ports) == (BridgeKind.PORT, (PORTS[0],))
    assert decision.citations[0].text == f"{POD} dev veth6 updated 12s ago"


def test_back_out_of_the_same_port_only_with_hairpin() -> None:
    assert bridge_forward(snapshot(), "cbr0", POD, ingress="veth6").kind is BridgeKind.DROP
    hairpin = replace(PORTS[0], port=BridgePort(state="forwarding", hairpin=True))
    decision = bridge_forward(snapshot(hairpin, PORTS[1]), "cbr0", POD, ingress="veth6")
    assert decision.ports == (hairpin,)


def test_isolated_ports_do_not_talk() -> None:
    isolated = tuple(replace(p, port=BridgePort(state="forwarding", isolated=True)) for p in PORTS)
    decision = bridge_forward(snapshot(*isolated), "cbr0", POD, ingress="veth7")
    assert decision.kind is BridgeKind.DROP
    assert "isolated" in decision.detail


def test_a_port_that_is_not_forwarding() -> None:
    blocked = replace(PORTS[0], port=BridgePort(state="disabled"))
    ports = (blocked, PORTS[1])
    assert bridge_forward(snapshot(*ports), "cbr0", POD, ingress="veth7").kind is BridgeKind.DROP
    assert bridge_forward(snapshot(*ports), "cbr0", POD, ingress="veth6").kind is BridgeKind.DROP


def test_own_address_goes_up() -> None:
    assert bridge_forward(snapshot(), "cbr0", CBR0.mac, ingress="veth6").kind is BridgeKind.LOCAL


def test_unknown_addresses_and_broadcasts_are_flooded() -> None:
    stranger = bridge_forward(snapshot(), "cbr0", "02:00:00:00:00:99", ingress="veth6")
    assert (stranger.kind, stranger.ports) == (BridgeKind.FLOOD, (PORTS[1],))
    everyone = bridge_forward(snapshot(), "cbr0", "ff:ff:ff:ff:ff:ff")
    assert (everyone.kind, everyone.ports) == (BridgeKind.FLOOD, PORTS)
    quiet = replace(PORTS[1], port=BridgePort(state="forwarding", unicast_flood=False))
    decision = bridge_forward(snapshot(PORTS[0], quiet), "cbr0", "02:00:00:00:00:99")
    assert decision.ports == (PORTS[0],)


def test_what_is_not_known() -> None:
    unread = snapshot(fdb=Unavailable(reason="EPERM"))
    assert bridge_forward(unread, "cbr0", POD).kind is BridgeKind.UNKNOWN
    assert bridge_forward(snapshot(), "cbr0", "").kind is BridgeKind.UNKNOWN
    twice = (*FDB, FdbEntry(mac=POD, ifindex=7, master=5, vlan=3))
    assert bridge_forward(snapshot(fdb=twice), "cbr0", POD).kind is BridgeKind.UNKNOWN


def test_bridge_netfilter() -> None:
    name = "net.bridge.bridge-nf-call-iptables"
    links = (CBR0, *PORTS)
    assert calls_iptables(network(links=links, values={}), "cbr0", 4)[0] is Ternary.NO
    assert calls_iptables(network(links=links, values={name: "1"}), "cbr0", 4)[0] is Ternary.YES
    assert calls_iptables(network(links=links, values={name: "0"}), "cbr0", 4)[0] is Ternary.NO
    own = (replace(CBR0, bridge_nf_call_iptables=True), *PORTS)
    answer, cited = calls_iptables(network(links=own, values={name: "0"}), "cbr0", 4)
    assert answer is Ternary.YES
    assert [c.text for c in cited] == [f"{name} = 0", "cbr0: nf_call_iptables 1"]
