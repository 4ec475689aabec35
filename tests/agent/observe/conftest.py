"""A bed for each test, and a node with two pods for those that only read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.agent.observe.bed import Bed, Netns, veth, wait_until


@pytest.fixture
def bed() -> Iterator[Bed]:
    made = Bed()
    try:
        yield made
    finally:
        made.close()


@dataclass
class World:
    """A node with a bridge pod and a ptp pod."""

    node: Netns
    bridged: Netns
    ptp: Netns


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    bed = Bed()
    try:
        node, bridged, ptp = bed.netns("node"), bed.netns("bridged"), bed.netns("ptp")
        node.batch(
            "link add cbr0 type bridge nf_call_iptables 1 ageing_time 100",
            "link set cbr0 address 02:00:00:00:00:01 up",
            "addr add 10.40.0.1/24 dev cbr0",
            "link add eth0 mtu 1460 type veth peer name wire",
            "link set wire up",
            "link set eth0 up alias 'the uplink'",
            "addr add 10.142.0.8/32 dev eth0",
            "addr add 10.142.0.9/24 brd + dev eth0",
            "addr add 10.142.0.10/24 dev eth0",
            "addr add fd00:142::8/64 dev eth0 nodad",
            "addr add 192.0.2.1 peer 192.0.2.2/32 dev eth0",
            "link add eth0.100 type veth peer name far.100",
            "link set eth0.100 up",
            "link add veth-a type veth peer name veth-b",
        )
        veth(node, "vethbridged", bridged, "eth0")
        node.ip("link", "set", "vethbridged", "master", "cbr0")
        node.run("bridge", "link", "set", "dev", "vethbridged", "hairpin", "on", "isolated", "on")
        bridged.ip("addr", "add", "10.40.0.6/24", "dev", "eth0")
        bridged.ip("route", "add", "default", "via", "10.40.0.1")
        veth(node, "vethptp", ptp, "eth0")
        node.ip("addr", "add", "10.40.0.1/32", "dev", "vethptp")
        node.ip("route", "add", "10.40.0.7/32", "dev", "vethptp", "scope", "host")
        ptp.ip("addr", "add", "10.40.0.7/24", "dev", "eth0")
        # Addresses stay tentative, and links without an operational state, for a moment.
        for netns in (node, bridged, ptp):
            wait_until(lambda netns=netns: "tentative" not in netns.ip("-6", "addr"))
        wait_until(lambda: "forwarding" in node.ip("-d", "link", "show", "vethbridged"))
        yield World(node, bridged, ptp)
    finally:
        bed.close()
