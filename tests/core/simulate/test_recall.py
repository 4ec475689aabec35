"""What is recalled of one packet for another is what the rules would have said of that other."""

from __future__ import annotations

import random
from dataclasses import replace
from ipaddress import IPv4Address, ip_address, ip_network

import pytest

from gketrace.conntrack import CtState, CtStatus
from gketrace.packet import Packet, Protocol
from gketrace.ruleset import BaseChain, Ruleset
from gketrace.ruleset.iptables_save import parse_iptables_save
from gketrace.ruleset.nft_json import parse_nft_json
from gketrace.simulate.evolve import evolve
from gketrace.simulate.namespace import Namespace
from gketrace.simulate.recall import Recall
from gketrace.simulate.routing import Fib
from gketrace.simulate.state import CtInfo, PacketState
from gketrace.simulate.traversal import traverse
from gketrace.simulate.watched import Reads, Rebase, watch
from gketrace.snapshot import PolicyRule, RouteType
from gketrace.trace import Hook
from tests.core.simulate.networks import LINKS, ROUTES, RULES, network, packet, route
from tests.core.simulate.nodes import WORLDS

SOURCES = ("10.142.0.77", "10.40.1.9", "203.0.113.9")
DESTINATIONS = ("10.43.246.223", "10.40.0.6", "10.40.2.7", "10.142.0.8", "127.0.0.1", "8.8.8.8")
PORTS = (80, 8080, 31830, 53, 443)


def _rulesets() -> list[Ruleset]:
    found: list[Ruleset] = []
    for world in sorted(WORLDS.iterdir()):
        node = world / "node-2jdh"
        for name in ("iptables-save.txt", "nft.json"):
            file = node / name
            if not file.exists():
                continue
            text = file.read_bytes()
            if name.endswith(".txt"):
                found.append(parse_iptables_save(text, source=str(file), empty_ok=True))
            else:
                found += parse_nft_json(text, source=str(file), taken_at=0.0).rulesets
    return found


def _random_state(draw: random.Random, hook: Hook) -> PacketState:
    it = Packet(
        src=ip_address(draw.choice(SOURCES)),
        dst=ip_address(draw.choice(DESTINATIONS)),
        protocol=draw.choice((Protocol.TCP, Protocol.TCP, Protocol.UDP)),
        sport=40000,
        dport=draw.choice(PORTS),
        mark=draw.choice((0, 0, 0x4000, 0x8000)),
    )
    ct = None
    if draw.random() < 0.8:
        tuple5 = it.tuple5
        ct = CtInfo(
            state=draw.choice((CtState.NEW, CtState.NEW, CtState.ESTABLISHED)),
            orig=tuple5,
            reply=tuple5.inverted(),
            status=draw.choice((0, int(CtStatus.DST_NAT))),
        )
    return PacketState(
        packet=it,
        hook=hook,
        ct=ct,
        in_iface=draw.choice(("eth0", "cbr0", "")),
        out_iface=draw.choice(("", "eth0", "cbr0")),
    )


@pytest.mark.parametrize("seed", range(2))
def test_every_chain_of_the_worlds(seed: int) -> None:
    draw = random.Random(seed)
    space = Namespace(network())
    recalled = 0
    rulesets = _rulesets()
    assert {ruleset.backend for ruleset in rulesets} >= {"iptables-legacy", "nftables"}
    for ruleset in rulesets:
        for hook in Hook:
            for base in ruleset.base_chains(hook):
                recalled += _compare(draw, space, ruleset, base)
    assert recalled > 100


def _compare(draw: random.Random, space: Namespace, ruleset: Ruleset, base: BaseChain) -> int:
    """How often the rules were not asked."""
    recall, ran = Recall(), 0

    def run(state: PacketState) -> tuple[object, ...]:
        nonlocal ran
        ran += 1
        return traverse(ruleset, base, state, space, recall)

    for _ in range(12):
        state = _random_state(draw, base.hook)
        assert recall.chain(base, state, run) == traverse(ruleset, base, state, space)  # type: ignore[arg-type]
    return 12 - ran


def test_a_field_that_was_read_counts_and_others_do_not() -> None:
    state = PacketState(packet=packet("10.0.0.1", "10.0.0.2", mark=1), hook=Hook.FORWARD, ct=None)
    watched, log = watch(state)
    assert watched.packet.mark == 1
    changed = evolve(watched, packet=evolve(watched.packet, mark=2, dscp=3))
    assert changed.packet.mark == 2
    reads = Reads(state, log)
    assert reads.names == {"packet.mark"}
    other = evolve(state, packet=evolve(state.packet, dst=IPv4Address("10.0.0.3")))
    assert reads.agree(other)
    assert not reads.agree(evolve(state, packet=evolve(state.packet, mark=4)))
    moved = Rebase(other).state(changed)
    assert moved == evolve(other, packet=evolve(other.packet, mark=2, dscp=3))
    assert type(moved) is PacketState
    assert Rebase(other).state(watched) is other


def test_what_looks_at_the_whole_packet_reads_all_of_it() -> None:
    state = PacketState(packet=packet("10.0.0.1", "10.0.0.2"), hook=Hook.FORWARD, ct=None)
    watched, log = watch(state)
    assert type(replace(watched.packet, mark=1)) is Packet
    assert {"packet.src", "packet.dst", "packet.src_mac"} <= set(log)


def test_a_tracked_packet_is_not_an_untracked_one() -> None:
    state = PacketState(packet=packet("10.0.0.1", "10.0.0.2"), hook=Hook.FORWARD, ct=None)
    watched, log = watch(state)
    assert watched.ct is None
    assert not Reads(state, log).agree(evolve(state, ct=CtInfo(state=CtState.NEW)))


@pytest.mark.parametrize("seed", range(20))
def test_destinations_of_one_segment_are_routed_alike(seed: int) -> None:
    """A look-up that may recall agrees with one that cannot."""
    draw = random.Random(seed)
    routes = [*ROUTES]
    for _ in range(draw.randrange(12)):
        net = ip_network((draw.randrange(1 << 32), draw.randrange(33)), strict=False)
        kind = draw.choice((RouteType.UNICAST,) * 4 + (RouteType.BLACKHOLE, RouteType.LOCAL))
        table = draw.choice((254, 254, 255, 100))
        oif = None if kind is RouteType.BLACKHOLE else draw.choice((2, 3))
        routes.append(route(str(net), oif, table=table, kind=kind))
    rules = [*RULES]
    if draw.random() < 0.5:
        net = ip_network((draw.randrange(1 << 32), draw.randrange(1, 9)), strict=False)
        which = {draw.choice(("src", "dst")): net}
        rules.append(PolicyRule(family=4, priority=100, table=100, **which))  # type: ignore[arg-type]
    snapshot = network(links=LINKS, routes=tuple(routes), rules=tuple(rules))
    fib = Fib(snapshot)
    for _ in range(30):
        base = int(draw.choice(routes).dst.network_address) if draw.random() < 0.7 else 0
        dst = (base + draw.randrange(-2, 3)) & 0xFFFFFFFF if base else draw.randrange(1 << 32)
        it = packet("203.0.113.9", str(IPv4Address(dst)), ttl=draw.choice((1, 64)))
        assert fib.input(it, "eth0") == Fib(snapshot).input(it, "eth0")
