"""Ways through chains of nftables: verdict maps, draws, sets that the packet itself changes."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from gketrace.packet import Packet, parse_address
from gketrace.ruleset.nft import NftRuleset, TableText
from gketrace.ruleset.nft_json import parse_nft_json
from gketrace.simulate.nft.run import traverse
from gketrace.simulate.nft.statements import run_rule
from gketrace.simulate.state import VerdictKind
from gketrace.trace import Hook, Source, StepAction, StepKind
from tests.core.simulate.nft_tables import (
    PACKET,
    Surroundings,
    go,
    kinds,
    rules_hit,
    state_of,
    table,
)

Json = Any
WORLD = Path(__file__).resolve().parents[2] / "data" / "worlds" / "kube-proxy-1.36-nftables"
SADDR = {"payload": {"protocol": "ip", "field": "saddr"}}
KEY = {
    "concat": [
        {"payload": {"protocol": "ip", "field": "daddr"}},
        {"meta": {"key": "l4proto"}},
        {"payload": {"protocol": "th", "field": "dport"}},
    ]
}
DROP, ACCEPT = {"drop": None}, {"accept": None}


def goto(name: str) -> Json:
    return {"goto": {"target": name}}


def jump(name: str) -> Json:
    return {"jump": {"target": name}}


def services(*elements: Json) -> Json:
    return {
        "map": {
            "name": "service-ips",
            "type": ["ipv4_addr", "inet_proto", "inet_service"],
            "map": "verdict",
            "elem": list(elements),
        }
    }


def numgen(modulus: int) -> Json:
    return {"numgen": {"mode": "random", "mod": modulus, "offset": 0}}


def test_a_verdict_map_leads_to_the_service_and_cites_its_element() -> None:
    elements = ([{"concat": ["10.43.240.7", "tcp", 80]}, goto("svc")],
                [{"concat": ["10.43.240.8", "tcp", 80]}, DROP])  # fmt: skip
    dnat = {"dnat": {"addr": "10.40.0.6", "port": 8080}}
    ruleset = table(
        [{"vmap": {"key": KEY, "data": "@service-ips"}}],
        [DROP],
        chains={"svc": [[dnat]]},
        objects=(services(*elements),),
        kind="nat",
    )
    (only,) = go(ruleset)
    assert rules_hit(only) == ["base:1", "svc:1"]
    first = only.steps[0]
    assert (first.kind, first.action) == (StepKind.RULE, StepAction.GOTO)
    assert first.note == "element 10.43.240.7 . tcp . 80 : goto svc of map service-ips"
    assert first.citation is not None
    assert first.citation.source is Source.RULE
    assert (first.citation.backend, first.citation.table) == ("nftables", "ip t")
    assert first.citation.handle == 11
    assert first.citation.text == ("ip daddr . meta l4proto . th dport vmap @service-ips")
    assert only.verdict.nat is not None


def test_a_key_with_an_unknown_field_that_no_element_has_is_no_match() -> None:
    ping = Packet(src=PACKET.src, dst=PACKET.dst, protocol=1, icmp_type=8, icmp_code=0, icmp_id=1)
    elements = ([{"concat": ["10.43.240.7", "tcp", 80]}, DROP],)
    ruleset = table(
        [{"vmap": {"key": KEY, "data": "@service-ips"}}], objects=(services(*elements),)
    )
    (only,) = go(ruleset, state_of(ping))
    assert (only.verdict.kind, only.chance) == (VerdictKind.ACCEPT, 1)


def test_a_draw_leads_to_each_endpoint_with_its_chance() -> None:
    elements = [[i, {"concat": [f"10.40.0.{i}", 8080]}] for i in range(3)]
    to = {"map": {"key": numgen(3), "data": {"set": elements}}}
    found = go(table([{"dnat": {"family": "ip", "addr": to}}], kind="nat"))
    assert [a.chance for a in found] == [Fraction(1, 3)] * 3
    assert [str(a.verdict.nat.addresses[0]) for a in found if a.verdict.nat] == [  # type: ignore[index]
        "10.40.0.0", "10.40.0.1", "10.40.0.2",
    ]  # fmt: skip
    assert "numgen random mod 3 drew 1" in found[1].because


def test_a_drawn_verdict_map_runs_several_chains_and_comes_back() -> None:
    data = {"set": [[0, jump("a")], [1, goto("b")], [2, {"continue": None}]]}
    ruleset = table(
        [{"vmap": {"key": numgen(4), "data": data}}],
        [DROP],
        chains={"a": [[{"counter": None}]], "b": [[{"counter": None}]]},
    )
    found = {tuple(rules_hit(a)): (a.verdict.kind.value, a.chance) for a in go(ruleset)}
    quarter = Fraction(1, 4)
    assert found == {
        ("base:1", "a:1", "base:2"): ("DROP", quarter),
        ("base:1", "b:1"): ("ACCEPT", quarter),
        ("base:1", "base:2"): ("DROP", quarter),
        ("base:2",): ("DROP", quarter),
    }


def test_return_and_the_policy() -> None:
    ruleset = table([jump("a")], chains={"a": [[{"return": None}], [ACCEPT]]}, policy="drop")
    (only,) = go(ruleset)
    assert rules_hit(only) == ["base:1", "a:1"]
    assert only.verdict.kind is VerdictKind.DROP
    assert only.verdict.citation.text == ("type filter hook prerouting priority 0; policy drop;")


def affinity(*elements: Json) -> Json:
    return {
        "set": {
            "name": "affinity",
            "type": "ipv4_addr",
            "flags": ["timeout"],
            "timeout": 600,
            "elem": list(elements),
        }
    }


STUCK = [{"match": {"op": "==", "left": SADDR, "right": "@affinity"}}, DROP]


def test_affinity_is_read_from_the_set_and_expires() -> None:
    held = affinity({"elem": {"val": "10.142.0.2", "expires": 30}})
    assert kinds(go(table(STUCK, objects=(held,)))) == ["DROP"]
    assert kinds(go(table(STUCK, objects=(held,)), env=Surroundings(now=1031.0))) == ["ACCEPT"]
    assert kinds(go(table(STUCK, objects=(affinity(),)))) == ["ACCEPT"]


def test_a_packet_sees_what_it_added_itself() -> None:
    add = [{"set": {"op": "update", "elem": SADDR, "set": "@affinity"}}]
    remove = [{"set": {"op": "delete", "elem": SADDR, "set": "@affinity"}}]
    assert kinds(go(table(add, STUCK, objects=(affinity(),)))) == ["DROP"]
    assert kinds(go(table(add, remove, STUCK, objects=(affinity("10.142.0.2"),)))) == ["ACCEPT"]


def test_an_unknown_condition_that_changes_nothing_is_one_way() -> None:
    limit = {"limit": {"rate": 1, "per": "second", "burst": 5}}
    rules = [[limit, {"counter": None}] for _ in range(20)]
    (only,) = go(table(*rules))
    assert only.chance == 1
    assert all(step.action is StepAction.UNKNOWN for step in only.steps[:-1])


def test_a_map_of_30000_elements_is_not_searched() -> None:
    elements = [
        [{"concat": [f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}", "tcp", 80]}, goto("svc")]
        for i in range(30_000)
    ]
    ruleset = table(
        [{"vmap": {"key": KEY, "data": "@service-ips"}}],
        chains={"svc": [[DROP]]},
        objects=(services(*elements),),
    )
    packet = Packet(src=PACKET.src, dst=parse_address("10.0.100.9"), protocol=6, sport=1, dport=80)
    (only,) = go(ruleset, state_of(packet))
    assert rules_hit(only) == ["base:1", "svc:1"]


def test_conntrack_is_needed_by_expressions_not_by_nat_chains() -> None:
    assert not table([{"notrack": None}], kind="nat").needs_conntrack(4)
    assert table([{"masquerade": None}]).needs_conntrack(4)
    assert not table([{"masquerade": None}]).needs_conntrack(6)
    inet = table([{"dnat": {"family": "ip", "addr": "1.1.1.1"}}], family="inet")
    assert (inet.needs_conntrack(4), inet.needs_conntrack(6)) == (True, False)
    state = {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "new"}}
    assert table([state], family="inet").needs_conntrack(6)


@pytest.mark.parametrize("node", ["2jdh", "33fg", "m69d"])
def test_all_rules_of_the_dumps_are_understood(node: str) -> None:
    text = (WORLD / f"node-{node}" / "nft.json").read_bytes()
    tables = parse_nft_json(text, source="nft.json", taken_at=1000.0)
    assert tables.unmodelled == ()
    four, six = tables.rulesets
    sources = {4: ("203.0.113.10", "10.40.0.10"), 6: ("2001:db8::1", "fd00:40::10")}
    sent = {4: ("10.43.246.223", "10.43.240.11", "10.142.0.8"), 6: ("fd00:43::21", "fd00:1::1")}
    count = 0
    for ruleset in (four, six):
        for src, dst in itertools.product(sources[ruleset.family], sent[ruleset.family]):
            packet = Packet(
                src=parse_address(src), dst=parse_address(dst), protocol=6, sport=4000, dport=80
            )
            for name in ruleset.chain_names:
                for rule in ruleset.chain(name) or ():
                    ways = run_rule(rule, state_of(packet), Surroundings(), ruleset)
                    count += 1
                    assert sum(way.chance or 0 for way in ways) == 1, rule.text
                    assert not any(way.unknown for way in ways), rule.text
    assert count > 500


def test_each_base_chain_of_the_dumps_ends_in_a_verdict() -> None:
    text = (WORLD / "node-2jdh" / "nft.json").read_bytes()
    four, _ = parse_nft_json(text, source="nft.json", taken_at=1000.0).rulesets
    names = [base.chain for hook in Hook for base in four.base_chains(hook)]
    assert len(names) == 8
    found = json.loads(text)["nftables"]
    assert len(found) > 100


def test_a_rule_that_cannot_be_read_ends_in_unknown_with_its_text() -> None:
    whole = table([DROP])
    index = TableText(
        family="ip", name="t", chains={"base": (0, 1)}, rules={"base": ((2, 9),)}, sets={}
    )
    broken = NftRuleset(text=b"x {" + b"rubbish", index=index, source="test", taken_at=0)
    (base,) = whole.base_chains(Hook.PREROUTING)
    (only,) = traverse(broken, base, state_of(), Surroundings())
    assert only.verdict.kind is VerdictKind.UNKNOWN
    assert "rubbis" in only.verdict.citation.text
