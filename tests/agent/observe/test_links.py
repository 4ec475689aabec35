from __future__ import annotations

import pytest

from gketrace.snapshot import LinkPeer
from gketrace_agent.observe.links import KnownNetns, link_flags, observe_links
from tests.agent.observe.conftest import World


def known(world: World) -> tuple[KnownNetns, ...]:
    pods = (("default/bridged", world.bridged), ("default/ptp", world.ptp))
    return (
        KnownNetns(ref=world.node.ref(), fd=world.node.handle.fd),
        *(KnownNetns(ref=pod.pod(name).ref, fd=pod.handle.fd) for name, pod in pods),
    )


@pytest.mark.parametrize("who", ["node", "bridged", "ptp"])
def test_links_are_those_of_ip(world: World, who: str) -> None:
    netns = getattr(world, who)
    table = netns.read(lambda reader: observe_links(reader, netns.ref()))
    theirs = {link["ifindex"]: link for link in netns.json("ip", "-j", "-d", "link")}
    names = {index: link["ifname"] for index, link in theirs.items()}
    assert [link.ifindex for link in table.links] == list(theirs)
    for link in table.links:
        other = theirs[link.ifindex]
        assert link.name == other["ifname"]
        assert link.mtu == other["mtu"]
        assert link.mac == other["address"]
        # M-DOWN is not a flag of this link: ip adds it when the one that IFLA_LINK names is down.
        assert list(link.flags) == [flag for flag in other["flags"] if flag != "M-DOWN"]
        assert link.operstate == other["operstate"]
        assert link.kind == other.get("linkinfo", {}).get("info_kind", "")
        assert names.get(link.master) == other.get("master")
        assert link.alias == other.get("ifalias", "")
        assert link.group == 0
        port = other.get("linkinfo", {}).get("info_slave_data", {})
        if link.port is not None:
            assert link.port.state == port["state"]
            assert link.port.hairpin is port["hairpin"] is True
            assert link.port.isolated is port["isolated"] is True
            assert link.port.learning is port["learning"]
            assert link.port.unicast_flood is port["flood"]
        bridge = other.get("linkinfo", {}).get("info_data", {})
        if link.kind == "bridge":
            assert link.bridge_nf_call_iptables is bool(bridge["nf_call_iptables"]) is True
            assert link.bridge_nf_call_ip6tables is bool(bridge["nf_call_ip6tables"]) is False
        else:
            assert link.bridge_nf_call_iptables is None


def test_peers_are_named_across_namespaces(world: World) -> None:
    table = world.node.read(lambda reader: observe_links(reader, world.node.ref(), known(world)))
    links = {link.name: link for link in table.links}
    eth0 = {
        pod: next(link["ifindex"] for link in netns.json("ip", "-j", "link", "show", "eth0"))
        for pod, netns in (("bridged", world.bridged), ("ptp", world.ptp))
    }
    for pod in ("bridged", "ptp"):
        netns = getattr(world, pod)
        assert links[f"veth{pod}"].peer == LinkPeer(
            ifindex=eth0[pod], name="eth0", netns=netns.pod(f"default/{pod}").ref
        )
    assert links["veth-a"].peer == LinkPeer(
        ifindex=links["veth-b"].ifindex, name="veth-b", netns=world.node.ref()
    )


def test_a_pod_sees_the_host_end(world: World) -> None:
    table = world.ptp.read(
        lambda reader: observe_links(reader, world.ptp.pod("default/ptp").ref, known(world))
    )
    (peer,) = (link.peer for link in table.links if link.name == "eth0")
    assert peer is not None
    assert (peer.name, peer.netns) == ("vethptp", world.node.ref())


def test_a_peer_in_an_unknown_namespace_has_a_name_and_no_namespace(world: World) -> None:
    table = world.node.read(lambda reader: observe_links(reader, world.node.ref()))
    (peer,) = (link.peer for link in table.links if link.name == "vethptp")
    assert peer is not None
    assert (peer.name, peer.netns) == ("eth0", None)


@pytest.mark.parametrize("who", ["node", "bridged"])
def test_sysctls_of_interfaces_are_those_of_the_files(world: World, who: str) -> None:
    netns = getattr(world, who)
    netns.run("sysctl", "-q", "net.ipv4.conf.eth0.rp_filter=2")
    netns.run("sysctl", "-q", "net.ipv4.conf.eth0.route_localnet=1")
    netns.run("sysctl", "-q", "net.ipv6.conf.eth0.forwarding=1")
    table = netns.read(lambda reader: observe_links(reader, netns.ref()))
    names = sorted(table.sysctls)
    files = [
        # A dot in an interface's name is a slash to sysctl(8).
        name.replace("eth0.100", "eth0/100").replace("far.100", "far/100")
        for name in names
    ]
    values = netns.run("sysctl", "-n", *files).splitlines()
    assert dict(zip(names, values, strict=True)) == dict(table.sysctls)
    assert table.sysctls["net.ipv4.conf.eth0.rp_filter"] == "2"
    assert table.sysctls["net.ipv6.conf.eth0.forwarding"] == "1"


def test_a_link_that_is_up_without_carrier_says_so() -> None:
    assert link_flags(0x1 | 0x1000) == ("NO-CARRIER", "MULTICAST", "UP")
    assert link_flags(0x1 | 0x40 | 0x10000) == ("UP", "LOWER_UP")
