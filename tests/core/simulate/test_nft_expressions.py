"""Each expression and statement of nftables on the smallest rule that shows it."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from gketrace.conntrack import CtState, CtStatus
from gketrace.packet import Packet, Protocol, TcpFlags, parse_address
from gketrace.simulate.state import CtInfo, VerdictKind
from gketrace.trace import Hook
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
DROP = {"drop": None}
UDP = replace(PACKET, protocol=Protocol.UDP)
ICMP = Packet(src=PACKET.src, dst=PACKET.dst, protocol=1, icmp_type=8, icmp_code=0, icmp_id=7)
SIX = Packet(
    src=parse_address("fd00::2"), dst=parse_address("fd00::1"), protocol=6, sport=4000, dport=80
)


def match(left: Json, right: Json, op: str = "==") -> Json:
    return {"match": {"op": op, "left": left, "right": right}}


def payload(protocol: str, field: str) -> Json:
    return {"payload": {"protocol": protocol, "field": field}}


def meta(key: str) -> Json:
    return {"meta": {"key": key}}


def ct(key: str, **more: str) -> Json:
    return {"ct": {"key": key, **more}}


def port_map(key: Json, elements: Json) -> Json:
    return {"map": {"key": key, "data": {"set": elements}}}


SADDR, DADDR = payload("ip", "saddr"), payload("ip", "daddr")
DPORT, TH = payload("tcp", "dport"), payload("th", "dport")
YES, NO, EITHER = ["DROP"], ["ACCEPT"], ["DROP", "ACCEPT"]


@pytest.mark.parametrize(
    ("condition", "packet", "expected"),
    [
        (match(SADDR, "10.142.0.2"), PACKET, YES),
        (match(SADDR, "10.142.0.2", "!="), PACKET, NO),
        (match(SADDR, {"prefix": {"addr": "10.142.0.0", "len": 24}}), PACKET, YES),
        (match(SADDR, {"range": ["10.142.0.3", "10.142.0.9"]}), PACKET, NO),
        (match(SADDR, {"range": ["10.142.0.3", "10.142.0.9"]}, "!="), PACKET, YES),
        (match(SADDR, {"set": ["1.1.1.1", "10.142.0.2"]}), PACKET, YES),
        (match(SADDR, {"set": ["1.1.1.1", "10.142.0.2"]}, "!="), PACKET, NO),
        (match({"&": [SADDR, "255.0.0.255"]}, "10.0.0.2"), PACKET, YES),
        (match(SADDR, "10.142.0.2"), SIX, NO),
        (match(SADDR, "10.142.0.2", "!="), SIX, NO),
        (match(payload("ip6", "daddr"), {"prefix": {"addr": "fd00::", "len": 16}}), SIX, YES),
        (match(DPORT, 80), PACKET, YES),
        (match(DPORT, 80), UDP, NO),
        (match(DPORT, 80, "!="), UDP, NO),
        (match(DPORT, {"set": [{"range": [70, 90]}, 443]}), PACKET, YES),
        (match(DPORT, 79, ">"), PACKET, YES),
        (match(DPORT, 80, "<"), PACKET, NO),
        (match(DPORT, 80), replace(PACKET, dport=None), EITHER),
        (match(DPORT, 80), replace(PACKET, fragment=True), NO),
        (match(TH, 80), UDP, YES),
        (match(TH, 80), ICMP, EITHER),
        (match({"payload": {"base": "th", "offset": 16, "len": 16}}, 80), PACKET, YES),
        (match({"payload": {"base": "nh", "offset": 8, "len": 8}}, 80), PACKET, EITHER),
        (match(payload("icmp", "type"), "echo-request"), ICMP, YES),
        (match(payload("icmp", "type"), "echo-request"), PACKET, NO),
        (match(payload("icmp", "id"), 7), ICMP, YES),
        (match(payload("tcp", "flags"), "syn", "in"), PACKET, YES),
        (match(payload("tcp", "flags"), ["ack", "rst"], "in"), PACKET, NO),
        (match(payload("tcp", "flags"), "ack", "!"), PACKET, YES),
        (match({"&": [payload("tcp", "flags"), ["syn", "ack"]]}, "syn"), PACKET, YES),
        (match(payload("ip", "dscp"), {"set": [4, "ef"]}), replace(PACKET, dscp=46), YES),
        (match(payload("ip", "ttl"), 64), PACKET, EITHER),
        (match(payload("ip", "ttl"), 64), replace(PACKET, ttl=64), YES),
        (match(payload("ether", "saddr"), "02:00:00:00:00:09"), PACKET, EITHER),
        (match({"tcp option": {"name": "maxseg"}}, True), PACKET, EITHER),
        (match({"tcp option": {"name": "maxseg"}}, False), UDP, YES),
        (match({"exthdr": {"name": "frag"}}, False), SIX, YES),
        (match(meta("l4proto"), {"set": ["udp", "tcp"]}), PACKET, YES),
        (match(meta("nfproto"), "ipv6"), SIX, YES),
        (match(meta("protocol"), "ip"), PACKET, YES),
        (match(meta("iifname"), "eth0"), PACKET, YES),
        (match(meta("iifname"), "eth*"), PACKET, YES),
        (match(meta("iifname"), {"set": ["lo", "cbr0"]}, "!="), PACKET, YES),
        (match(meta("oifname"), "eth0", "!="), PACKET, YES),
        (match(meta("iif"), "eth0"), PACKET, YES),
        (match(meta("oif"), 0), PACKET, YES),
        (match(meta("iiftype"), "ether"), PACKET, YES),
        (match(meta("oiftype"), "ether", "!="), PACKET, NO),
        (match(meta("skuid"), 0, "!="), PACKET, NO),
        (match(meta("length"), {"range": [40, 60]}), replace(PACKET, length=44), YES),
        (match(meta("cgroup"), 5), PACKET, EITHER),
        (match({"&": [meta("mark"), 0x4000]}, 0, "!="), replace(PACKET, mark=0x4001), YES),
        (match(meta("mark"), 5, ">="), replace(PACKET, mark=4), NO),
        (match(ct("state"), "new", "in"), PACKET, YES),
        (match(ct("state"), ["established", "related"], "in"), PACKET, NO),
        (match(ct("state"), {"|": ["established", "related"]}, "!="), PACKET, YES),
        (match(ct("state"), {"set": ["new", "untracked"]}), PACKET, YES),
        (match(ct("direction"), "original"), PACKET, YES),
        (match(ct("ip saddr", dir="original"), "10.142.0.2"), PACKET, YES),
        (match(ct("proto-dst", dir="reply"), 40000), PACKET, YES),
        (match(ct("status"), "dnat", "in"), PACKET, NO),
        (match(ct("expiration"), 10, "<"), PACKET, EITHER),
        (match({"fib": {"result": "type", "flags": ["daddr"]}}, "local"), SIX, YES),
        (match({"fib": {"result": "type", "flags": ["saddr"]}}, "local"), PACKET, NO),
        (match({"fib": {"result": "oif", "flags": ["saddr", "iif"]}}, False), PACKET, EITHER),
        (match({"socket": {"key": "transparent"}}, 1), PACKET, EITHER),
        (match({"concat": [SADDR, DPORT]}, {"set": [{"concat": ["10.142.0.2", 80]}]}), PACKET, YES),
        (
            match(
                {"concat": [meta("l4proto"), TH]},
                {"set": [{"concat": ["tcp", {"range": [70, 90]}]}]},
            ),
            PACKET,
            YES,
        ),
        (match({"concat": [meta("l4proto"), TH]}, {"set": [{"concat": ["tcp", 1]}]}), ICMP, NO),
        (match({"<<": [meta("mark"), 2]}, 16), replace(PACKET, mark=4), YES),
        (match({"numgen": {"mode": "inc", "mod": 2, "offset": 0}}, 1), PACKET, EITHER),
        ({"limit": {"rate": 10, "per": "second", "burst": 5}}, PACKET, EITHER),
        ({"quota": {"val": 25, "val_unit": "mbytes", "inv": True}}, PACKET, EITHER),
        ({"ct count": {"val": 10, "inv": True}}, PACKET, EITHER),
        ({"counter": {"packets": 1, "bytes": 2}}, PACKET, YES),
        ({"log": None}, PACKET, YES),
    ],
    ids=str,
)
def test_a_condition_before_a_drop(condition: Json, packet: Packet, expected: list[str]) -> None:
    ruleset = table([condition, DROP], family="inet")
    assert sorted(kinds(go(ruleset, state_of(packet)))) == sorted(expected)


def test_reverse_path_by_fib() -> None:
    condition = match({"fib": {"result": "oif", "flags": ["saddr", "iif"]}}, False)
    ruleset = table([condition, DROP])
    assert kinds(go(ruleset, env=Surroundings(reverse=True))) == NO
    assert kinds(go(ruleset, env=Surroundings(reverse=False))) == YES


def test_untracked_packets_have_a_state_and_nothing_else() -> None:
    state = state_of(ct=CtInfo(state=CtState.UNTRACKED))
    assert kinds(go(table([match(ct("state"), "untracked", "in"), DROP]), state)) == YES
    assert kinds(go(table([match(ct("mark"), 0), DROP]), state)) == NO


def test_status_bits() -> None:
    known = state_of().ct
    assert known is not None
    state = state_of(ct=replace(known, status=int(CtStatus.DST_NAT)))
    assert kinds(go(table([match(ct("status"), ["snat", "dnat"], "in"), DROP]), state)) == YES


@pytest.mark.parametrize(
    ("value", "mark"),
    [
        (0x4000, 0x4000),
        ({"|": [meta("mark"), 0x4000]}, 0x4003),
        ({"^": [meta("mark"), 0x1]}, 0x2),
        ({"|": [{"&": [meta("mark"), 0xFFFFFFF2]}, 0x12]}, 0x12),
        (ct("mark"), 9),
        ({"map": {"key": DPORT, "data": {"set": [[80, 5], [81, 6]]}}}, 5),
    ],
    ids=str,
)
def test_mark_arithmetic(value: Json, mark: int) -> None:
    known = state_of().ct
    assert known is not None
    state = state_of(replace(PACKET, mark=3), ct=replace(known, mark=9))
    (only,) = go(table([{"mangle": {"key": meta("mark"), "value": value}}]), state)
    assert only.state.packet.mark == mark


def test_a_map_without_the_key_ends_the_rule() -> None:
    value = {"map": {"key": DPORT, "data": {"set": [[81, 6]]}}}
    (only,) = go(table([{"mangle": {"key": meta("mark"), "value": value}}, DROP]))
    assert only.verdict.kind is VerdictKind.ACCEPT
    assert rules_hit(only) == []


def test_what_a_broken_rule_changed_stays_changed() -> None:
    mark = {"mangle": {"key": meta("mark"), "value": 7}}
    (only,) = go(table([mark, match(DPORT, 81), DROP]))
    assert (only.state.packet.mark, rules_hit(only)) == (7, [])


def test_header_fields_are_written() -> None:
    dscp = {"mangle": {"key": payload("ip", "dscp"), "value": "ef"}}
    ttl = {"mangle": {"key": payload("ip", "ttl"), "value": 5}}
    mark = {"mangle": {"key": ct("mark"), "value": meta("mark")}}
    (only,) = go(table([dscp, ttl, mark]), state_of(replace(PACKET, mark=6)))
    assert (only.state.packet.dscp, only.state.packet.ttl) == (46, 5)
    assert only.state.ct is not None
    assert only.state.ct.mark == 6


def test_notrack_before_tracking() -> None:
    (only,) = go(table([{"notrack": None}]), state_of(ct=None))
    assert only.state.notrack


@pytest.mark.parametrize(
    ("body", "packet", "answer"),
    [
        ({"type": "icmp", "expr": "port-unreachable"}, PACKET, "icmp-port-unreachable"),
        ({"type": "icmpx", "expr": "port-unreachable"}, SIX, "icmp6-port-unreachable"),
        ({"type": "icmpx", "expr": "host-unreachable"}, SIX, "icmp6-addr-unreachable"),
        ({"type": "tcp reset"}, PACKET, "tcp-reset"),
        (None, PACKET, "icmp-port-unreachable"),
        ({"type": "icmpv6", "expr": "no-route"}, SIX, "icmp6-no-route"),
    ],
)
def test_reject(body: Json, packet: Packet, answer: str) -> None:
    (only,) = go(table([{"reject": body}], family="inet"), state_of(packet))
    assert (only.verdict.kind, only.verdict.reject_with) == (VerdictKind.REJECT, answer)


def test_reject_of_another_family_or_protocol_does_not_match() -> None:
    ruleset = table(
        [{"reject": {"type": "icmpv6", "expr": "no-route"}}],
        [{"reject": {"type": "tcp reset"}}],
        family="inet",
    )
    assert kinds(go(ruleset, state_of(UDP))) == NO


@pytest.mark.parametrize(
    ("statement", "addresses", "ports"),
    [
        ({"dnat": {"addr": "10.40.0.6", "port": 8080}}, ("10.40.0.6",) * 2, (8080, 8080)),
        ({"dnat": {"addr": {"range": ["1.1.1.1", "1.1.1.9"]}}}, ("1.1.1.1", "1.1.1.9"), None),
        (
            {"dnat": {"addr": {"map": {"key": DADDR, "data": "@backends"}}}},
            ("10.40.0.9",) * 2,
            (9090, 9090),
        ),
        (
            {"dnat": {"addr": "1.1.1.1", "port": port_map(DPORT, [[80, 8]])}},
            ("1.1.1.1",) * 2,
            (8, 8),
        ),
        ({"redirect": {"port": 8080}}, None, (8080, 8080)),
    ],
    ids=str,
)  # fmt: skip
def test_destination_nat(
    statement: Json, addresses: tuple[str, str] | None, ports: tuple[int, int] | None
) -> None:
    backends = {
        "map": {
            "name": "backends",
            "type": "ipv4_addr",
            "map": "ipv4_addr . inet_service",
            "elem": [["10.43.240.7", {"concat": ["10.40.0.9", 9090]}]],
        }
    }
    (only,) = go(table([statement], objects=(backends,), kind="nat"))
    request = only.verdict.nat
    assert request is not None
    found = request.addresses and tuple(map(str, request.addresses))
    assert (found, request.ports, request.source) == (addresses, ports, False)


def test_nat_of_the_other_family_does_nothing() -> None:
    ruleset = table([{"dnat": {"family": "ip6", "addr": "fd00::9"}}, DROP], family="inet")
    assert kinds(go(ruleset)) == YES


def test_source_nat_and_flags() -> None:
    state = state_of(hook=Hook.POSTROUTING, in_iface="", out_iface="eth0")
    masquerade = {"masquerade": {"flags": "fully-random"}}
    (only,) = go(table([masquerade], hook="postrouting", kind="nat"), state)
    request = only.verdict.nat
    assert request is not None
    assert (request.masquerade, request.random_fully, request.source) == (True, True, True)
    flags = {"snat": {"addr": "1.1.1.1", "flags": ["random", "persistent"]}}
    (only,) = go(table([flags], hook="postrouting", kind="nat"), state)
    request = only.verdict.nat
    assert request is not None
    assert (request.random, request.persistent) == (True, True)
    prefix = {
        "snat": {
            "addr": {"prefix": {"addr": "5.6.7.0", "len": 24}},
            "flags": "netmap",
            "type_flags": "prefix",
        }
    }
    (only,) = go(table([prefix], hook="postrouting", kind="nat"), state)
    request = only.verdict.nat
    assert request is not None
    assert request.netmap
    assert request.addresses == (parse_address("5.6.7.0"), parse_address("5.6.7.255"))


@pytest.mark.parametrize(
    "strange",
    [
        {"xt": {"type": "match", "name": "string"}},
        {"xt": None},
        {"frobnicate": {"a": 1}},
        match({"frob": {}}, 1),
        match(meta("l4proto"), "no-such-protocol"),
        match(SADDR, {"what": 1}),
        {"vmap": {"key": DPORT, "data": "@none"}},
        {"match": {"op": "=="}},
        "text",
        None,
    ],
    ids=str,
)
def test_what_is_not_understood_is_unknown_and_quoted(strange: Json) -> None:
    found = go(table([strange, DROP], [{"accept": None}]))
    assert len(found) > 1
    assert all(a.chance is None for a in found)
    assert {"DROP", "ACCEPT"} <= set(kinds(found))
    assert all("not known" in a.because for a in found)


def test_a_draw_has_exact_chances() -> None:
    key = {"numgen": {"mode": "random", "mod": 3, "offset": 0}}
    ruleset = table([match(key, 2, "<"), DROP])
    assert {a.verdict.kind.value: a.chance for a in go(ruleset)} == {
        "DROP": Fraction(2, 3),
        "ACCEPT": Fraction(1, 3),
    }


def test_flags_of_the_tcp_header_are_those_of_the_packet() -> None:
    state = state_of(replace(PACKET, tcp_flags=TcpFlags.SYN | TcpFlags.ACK))
    assert kinds(go(table([match(payload("tcp", "flags"), "syn"), DROP]), state)) == NO
