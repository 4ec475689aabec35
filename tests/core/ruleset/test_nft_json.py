"""nft's JSON read lazily, refused with its text, and printed as nft prints it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gketrace.errors import ParseError
from gketrace.packet import parse_address
from gketrace.ruleset.nft import NftRuleset
from gketrace.ruleset.nft_json import parse_nft_json
from gketrace.trace import Hook
from tests.core.simulate.nft_tables import PACKET, go, rules_hit, state_of

WORLD = Path(__file__).resolve().parents[2] / "data" / "worlds" / "kube-proxy-1.36-nftables"
NAMESPACE = f"gknft-ruleset-{os.getpid()}"


def dump(node: str) -> bytes:
    return (WORLD / f"node-{node}" / "nft.json").read_bytes()


def tables(text: bytes) -> tuple[NftRuleset, ...]:
    return parse_nft_json(text, source="nft -j list ruleset", taken_at=5.0).rulesets


def printed_rules(text: str) -> dict[tuple[str, str], list[str]]:
    """(table, chain) → rules as ``nft list ruleset`` prints them."""
    found: dict[tuple[str, str], list[str]] = {}
    of_table, chain = "", ""
    for line in text.splitlines():
        if opened := re.match(r"table (\S+ \S+) \{", line):
            of_table = opened[1]
        elif opened := re.match(r"\tchain (\S+) \{", line):
            chain = opened[1]
            found[of_table, chain] = []
        elif line == "\t}":
            chain = ""
        elif chain and not line.strip().startswith(("type ", "comment ")):
            found[of_table, chain].append(line.strip())
    return found


@pytest.mark.parametrize("node", ["2jdh", "33fg", "m69d"])
def test_rules_are_printed_as_nft_prints_them(node: str) -> None:
    wanted = printed_rules((WORLD / f"node-{node}" / "nft.txt").read_text())
    for ruleset in tables(dump(node)):
        for name in ruleset.chain_names:
            rules = ruleset.chain(name)
            assert rules is not None
            assert [rule.text for rule in rules] == wanted[ruleset.table, name]


def test_base_chains_by_hook_and_priority() -> None:
    four, six = tables(dump("2jdh"))
    assert (four.table, four.family, six.table, six.family) == (
        "ip kube-proxy", 4, "ip6 kube-proxy", 6,
    )  # fmt: skip
    assert [(b.chain, b.priority, b.type.value) for b in four.base_chains(Hook.PREROUTING)] == [
        ("filter-prerouting-pre-dnat", -110, "filter"),
        ("nat-prerouting", -100, "nat"),
    ]
    assert four.base_chains(Hook.PREROUTING)[0].table == "ip kube-proxy"


def test_chains_of_one_priority_are_asked_in_reverse() -> None:
    items = [{"table": {"family": "ip", "name": "t", "handle": 1}}]
    items += [
        {"chain": {"family": "ip", "table": "t", "name": name, "type": "filter", "hook": "input",
                   "prio": prio, "policy": "accept"}}
        for name, prio in (("a", 0), ("b", 0), ("c", -1))
    ]  # fmt: skip
    (only,) = tables(json.dumps({"nftables": items}).encode())
    assert [base.chain for base in only.base_chains(Hook.INPUT)] == ["c", "b", "a"]


def test_sets_and_counters() -> None:
    four, _ = tables(dump("2jdh"))
    found = four.set("service-ips")
    assert found is not None
    assert found.types == ("ipv4_addr", "inet_proto", "inet_service")
    assert found.data == ("verdict",)
    assert len(found.elements) == 20
    assert four.set("nothing") is None
    assert four.chain("nothing") is None
    assert four.written_by_packets


def test_another_layout_is_read_too() -> None:
    text = json.dumps(json.loads(dump("2jdh")), indent=2).encode()
    for one, other in zip(tables(dump("2jdh")), tables(text), strict=True):
        assert one.chain_names == other.chain_names
        for name in one.chain_names:
            first, second = one.chain(name), other.chain(name)
            assert first is not None
            assert second is not None
            assert [r.text for r in first] == [r.text for r in second]


def test_tables_of_other_families_are_said() -> None:
    chain = {"family": "bridge", "table": "b", "name": "c", "type": "filter", "hook": "forward",
             "prio": 0, "policy": "accept"}  # fmt: skip
    rule = {"family": "bridge", "table": "b", "chain": "c", "handle": 3, "expr": [{"drop": None}]}
    items = [{"table": {"family": "bridge", "name": "b", "handle": 1}}, {"chain": chain}]
    found = parse_nft_json(json.dumps({"nftables": items}).encode(), source="x", taken_at=0)
    assert (found.rulesets, found.unmodelled) == ((), ())
    items.append({"rule": rule})
    found = parse_nft_json(json.dumps({"nftables": items}).encode(), source="x", taken_at=0)
    assert found.unmodelled == ("table bridge b: tables of family bridge are not modelled",)


@pytest.mark.parametrize(
    "text",
    [b"", b"  ", b"{", b"[]", b'{"nftables": 5}', b'{"nftables": [5]}',
     b'{"nftables": [{"rule": 1}]}',
     b'{"nftables": [{"chain": {"family": "ip", "table": "t", "name": "c", "hook": "input", '
     b'"type": "filter"}}]}',
     b'{"nftables": [{"table": {"name": "t"}}]}', b"\xff\xfe"],
)  # fmt: skip
def test_what_is_wrong_is_quoted(text: bytes) -> None:
    with pytest.raises(ParseError) as caught:
        parse_nft_json(text, source="nft -j list table ip t", taken_at=0)
    assert caught.value.source == "nft -j list table ip t"


def test_a_broken_rule_is_refused_when_it_is_read() -> None:
    text = dump("2jdh").replace(
        b'{"jump": {"target": "services"}}', b'{"jump": {"target" services"}}'
    )
    four = tables(text)[0]
    chain = four.chain("nat-prerouting")
    assert chain is not None
    with pytest.raises(ParseError, match="nft -j list ruleset"):
        list(chain)


@settings(deadline=None)
@given(st.binary(max_size=400), st.integers(0, 40_000), st.integers(0, 200))
def test_damaged_text_is_read_or_refused(noise: bytes, at: int, cut: int) -> None:
    whole = dump("2jdh")
    text = whole[:at] + noise + whole[at + cut :]
    sources = {"damaged"}
    try:
        for ruleset in parse_nft_json(text, source="damaged", taken_at=0).rulesets:
            for name in ruleset.chain_names:
                list(ruleset.chain(name) or ())
    except ParseError as error:
        sources.add(error.source)
    assert sources == {"damaged"}


OLD = """
table ip kube-proxy {
    set cluster-ips { type ipv4_addr; elements = { 10.43.246.223 } }
    map service-ips {
        type ipv4_addr . inet_proto . inet_service : verdict
        elements = { 10.43.246.223 . tcp . 80 : goto service-X }
    }
    chain mark-for-masquerade {
        meta mark set meta mark | 0x00004000
    }
    chain masquerading {
        meta mark & 0x00004000 == 0x00000000 return
        meta mark set meta mark ^ 0x00004000
        masquerade fully-random
    }
    chain endpoint-A {
        ip saddr 10.40.0.6 jump mark-for-masquerade
        meta l4proto tcp dnat to 10.40.0.6:8080
    }
    chain endpoint-B {
        ip saddr 10.40.0.7 jump mark-for-masquerade
        meta l4proto tcp dnat to 10.40.0.7:8080
    }
    chain service-X {
        ip daddr 10.43.246.223 tcp dport 80 ip saddr != 10.40.0.0/14 jump mark-for-masquerade
        numgen random mod 2 vmap { 0 : goto endpoint-A, 1 : goto endpoint-B }
    }
    chain services {
        ip daddr . meta l4proto . th dport vmap @service-ips
    }
    chain nat-prerouting {
        type nat hook prerouting priority dstnat; policy accept;
        jump services
    }
    chain nat-postrouting {
        type nat hook postrouting priority srcnat; policy accept;
        jump masquerading
    }
}
"""


@pytest.fixture
def old_rules() -> Iterator[tuple[bytes, str]]:
    """Rules as kube-proxy 1.30 shapes them, loaded and read back: JSON and text."""
    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True)
    inside = ["ip", "netns", "exec", NAMESPACE, "nft"]
    try:
        subprocess.run([*inside, "-f", "-"], check=True, input=OLD.encode())
        ruleset = subprocess.run(
            [*inside, "-j", "list", "ruleset"], check=True, capture_output=True
        )
        text = subprocess.run([*inside, "list", "ruleset"], check=True, capture_output=True)
        yield ruleset.stdout, text.stdout.decode()
    finally:
        subprocess.run(["ip", "netns", "del", NAMESPACE], check=True)


def test_rules_of_1_30_come_back_from_the_kernel(old_rules: tuple[bytes, str]) -> None:
    (ruleset,) = tables(old_rules[0])
    wanted = printed_rules(old_rules[1])
    for name in ruleset.chain_names:
        chain = ruleset.chain(name)
        assert chain is not None
        assert [rule.text for rule in chain] == wanted["ip kube-proxy", name]
    packet = replace(PACKET, dst=parse_address("10.43.246.223"))
    found = go(ruleset, state_of(packet))
    assert [a.chance for a in found] == [Fraction(1, 2)] * 2
    assert [a.state.packet.mark for a in found] == [0x4000] * 2
    assert rules_hit(found[0]) == [
        "nat-prerouting:1", "services:1", "service-X:1", "mark-for-masquerade:1", "service-X:2",
        "endpoint-A:2",
    ]  # fmt: skip
    state = state_of(replace(packet, mark=0x4000), hook=Hook.POSTROUTING, out_iface="eth0")
    (only,) = go(ruleset, state)
    assert rules_hit(only) == ["nat-postrouting:1", "masquerading:2", "masquerading:3"]
    assert (only.state.packet.mark, only.verdict.nat is not None) == (0, True)
    (only,) = go(ruleset, state_of(packet, hook=Hook.POSTROUTING, out_iface="eth0"))
    assert rules_hit(only) == ["nat-postrouting:1", "masquerading:1"]
    assert only.verdict.nat is None
