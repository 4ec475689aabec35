"""Who has an address, by objects and by what agents saw."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from gketrace.topology import NodeFacts, OwnerKind, PodFacts, SeenAddress, Topology
from gketrace.trace import Source


def node(name: str, address: str, *seen: tuple[str, str]) -> NodeFacts:
    return NodeFacts(
        name=name,
        addresses=(ip_address(address),),
        pod_cidrs=(ip_network("fd00:40::/64"),) if name == "a" else (),
        seen=tuple(SeenAddress(address=ip_address(at), interface=dev) for at, dev in seen),
    )


def test_addresses_beside_the_internal_one_are_the_nodes() -> None:
    topology = Topology(
        nodes=(
            node("a", "10.0.0.1", ("10.0.0.1", "eth0"), ("fd00:1::1", "eth0")),
            node("b", "10.0.0.2", ("10.0.0.2", "ens4"), ("fd00:1::2", "ens4")),
        )
    )
    owner = topology.owner(ip_address("fd00:1::2"))
    assert (owner.kind, owner.node) == (OwnerKind.NODE, "b")
    assert owner.citation.source is Source.ADDRESS
    assert owner.citation.text == "fd00:1::2 is on ens4 of node b, beside 10.0.0.2"
    assert topology.owner(ip_address("10.0.0.2")).citation.source is Source.OBJECT
    assert topology.has_source("b", ip_address("fd00:1::2"))
    assert not topology.has_source("a", ip_address("fd00:1::2"))


def test_other_interfaces_and_link_local_addresses_say_nothing() -> None:
    seen = (
        ("10.0.0.1", "eth0"),
        ("fe80::1", "eth0"),
        ("172.17.0.1", "docker0"),
        ("fd00:40::1", "cbr0"),
    )
    topology = Topology(nodes=(node("a", "10.0.0.1", *seen),))
    for text in ("fe80::1", "172.17.0.1"):
        assert topology.owner(ip_address(text)).kind is OwnerKind.OUTSIDE
    assert topology.owner(ip_address("fd00:40::1")).kind is OwnerKind.PODS


def test_an_address_that_two_nodes_claim_is_nobodys() -> None:
    topology = Topology(
        nodes=(
            node("a", "10.0.0.1", ("10.0.0.1", "eth0"), ("10.0.0.9", "eth0")),
            node("b", "10.0.0.2", ("10.0.0.2", "eth0"), ("10.0.0.9", "eth0")),
        )
    )
    assert topology.owner(ip_address("10.0.0.9")).kind is OwnerKind.OUTSIDE


def test_an_object_says_more_than_an_interface() -> None:
    pod = PodFacts(key="default/web", node="b", addresses=(ip_address("10.0.0.9"),))
    seen = (("10.0.0.1", "eth0"), ("10.0.0.9", "eth0"))
    topology = Topology(nodes=(node("a", "10.0.0.1", *seen),), pods=(pod,))
    owner = topology.owner(ip_address("10.0.0.9"))
    assert (owner.kind, owner.node) == (OwnerKind.PODS, "b")
