"""The link address of a next hop."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from gketrace.simulate.neighbour import NeighbourKind, find_neighbour
from gketrace.snapshot import Neighbour, Unavailable
from tests.core.simulate.networks import LINKS, network

HOP = ip_address("10.142.0.1")
MAC = "42:01:0a:8e:00:01"


def entry(state: str, mac: str = MAC) -> tuple[Neighbour, ...]:
    return (Neighbour(ifindex=2, address=HOP, mac=mac, state=state),)


@pytest.mark.parametrize("state", ["REACHABLE", "STALE", "PERMANENT"])
def test_resolved(state: str) -> None:
    decision = find_neighbour(network(neighbours=entry(state)), "eth0", HOP)
    assert (decision.kind, decision.mac) == (NeighbourKind.RESOLVED, MAC)
    assert decision.citations[0].text == f"{HOP} dev eth0 lladdr {MAC} {state}"


@pytest.mark.parametrize("state", ["FAILED", "INCOMPLETE"])
def test_nobody_answers(state: str) -> None:
    decision = find_neighbour(network(neighbours=entry(state, "")), "eth0", HOP)
    assert decision.kind is NeighbourKind.FAILED
    assert "does not answer ARP" in decision.detail


def test_no_entry_is_no_error() -> None:
    decision = find_neighbour(network(), "eth0", HOP)
    assert decision.kind is NeighbourKind.UNRESOLVED
    elsewhere = entry("REACHABLE")
    assert find_neighbour(network(neighbours=elsewhere), "veth1", HOP).kind is (
        NeighbourKind.UNRESOLVED
    )


def test_links_without_addresses() -> None:
    assert find_neighbour(network(), "lo", HOP).kind is NeighbourKind.NOT_NEEDED
    noarp = (*LINKS[:2], replace(LINKS[2], flags=("UP", "NOARP")))
    assert find_neighbour(network(links=noarp), "veth1", HOP).kind is NeighbourKind.NOT_NEEDED


def test_group_addresses_are_mapped() -> None:
    for text, mac in (
        ("255.255.255.255", "ff:ff:ff:ff:ff:ff"),
        ("224.129.2.3", "01:00:5e:01:02:03"),
        ("ff02::1:ff00:12", "33:33:ff:00:00:12"),
    ):
        assert find_neighbour(network(), "eth0", ip_address(text)).mac == mac


def test_what_is_not_known() -> None:
    unread = network(neighbours=Unavailable(reason="EPERM"))
    assert find_neighbour(unread, "eth0", HOP).kind is NeighbourKind.UNKNOWN
    assert find_neighbour(network(), "gone", HOP).kind is NeighbourKind.UNKNOWN
