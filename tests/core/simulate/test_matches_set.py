"""``-m set``: the order of the parts, nomatch, what cannot be compared, and the SET target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gketrace.packet import Packet, parse_address
from gketrace.ruleset.iptables_save import parse_rule
from gketrace.simulate.matches.ipset import SetMatch
from gketrace.simulate.state import PacketState, Ternary
from gketrace.snapshot import IpSet, IpSetEntry
from gketrace.trace import Hook
from tests.core.simulate.environment import FixedEnvironment

Y, N, U = Ternary.YES, Ternary.NO, Ternary.UNKNOWN

TCP = Packet(
    src=parse_address("10.0.0.9"), dst=parse_address("10.0.0.1"), protocol=6, sport=40000, dport=80
)
UDP = replace(TCP, protocol=17)
ICMP = replace(TCP, protocol=1, sport=None, dport=None, icmp_type=8, icmp_code=0)
GRE = replace(TCP, protocol=47, sport=None, dport=None)
TCP6 = replace(TCP, src=parse_address("fd00::9"), dst=parse_address("fd00::1"))


def make(kind: str, *elements: str, family: int = 4, **header: str) -> IpSet:
    entries = tuple(
        IpSetEntry(
            parts=tuple(element.split()[0].split(",")),
            nomatch="nomatch" in element.split(),
            text=f"add S {element}",
        )
        for element in elements
    )
    return IpSet(name="S", type=kind, family=family, entries=entries, header=header)


def ask(
    ipset: IpSet,
    sides: str,
    packet: Packet = TCP,
    more: dict[str, IpSet] | None = None,
    options: str = "",
    **at: Any,
) -> Ternary:
    env = FixedEnvironment(sets={"S": ipset, **(more or {})})
    rule = parse_rule(f"-A X -m set --match-set S {sides} {options}", family=packet.family)
    fields: dict[str, Any] = {"hook": Hook.FORWARD, "ct": None, "in_iface": "eth0"}
    state = PacketState(packet=packet, **{**fields, **at})
    (match,) = rule.matches
    assert isinstance(match, SetMatch)
    return match.evaluate(state, env).kind


@pytest.mark.parametrize(
    ("ipset", "sides", "packet", "answer"),
    [
        (make("hash:ip", "10.0.0.1"), "dst", TCP, Y),
        (make("hash:ip", "10.0.0.1"), "src", TCP, N),
        (make("hash:ip", "10.0.0.0", netmask="24"), "dst", TCP, Y),
        (make("hash:ip", "fd00::1", family=6), "dst", TCP6, Y),
        (make("hash:ip", "10.0.0.1"), "dst", TCP6, N),
        (make("hash:net", "10.0.0.0/24"), "src", TCP, Y),
        (make("hash:net", "10.0.0.0/24", "10.0.0.8/29 nomatch"), "src", TCP, N),
        (make("hash:net", "10.0.0.0/24", "10.0.0.8/29 nomatch"), "dst", TCP, Y),
        (make("hash:net", "10.0.0.0/24 nomatch", "10.0.0.9"), "src", TCP, Y),
        (make("hash:ip,port", "10.0.0.1,tcp:80"), "dst,dst", TCP, Y),
        (make("hash:ip,port", "10.0.0.1,tcp:80"), "dst,src", TCP, N),
        (make("hash:ip,port", "10.0.0.1,tcp:80"), "dst,dst", UDP, N),
        (make("hash:ip,port", "10.0.0.1,tcp:80"), "dst", TCP, N),
        (make("hash:ip,port", "10.0.0.1,icmp:echo-request"), "dst,dst", ICMP, Y),
        (make("hash:ip,port", "10.0.0.1,icmp:8/0"), "dst,dst", ICMP, Y),
        (make("hash:ip,port", "10.0.0.1,gre:0"), "dst,dst", GRE, Y),
        (make("hash:ip,port", "10.0.0.1,tcp:80"), "dst,dst", replace(TCP, dport=None), U),
        (make("hash:ip,port", "10.0.0.2,tcp:80"), "dst,dst", replace(TCP, dport=None), N),
        (make("hash:ip,port", "10.0.0.1,tcp:80"), "dst,dst", replace(TCP, fragment=True), N),
        (make("hash:ip,port,ip", "10.0.0.1,tcp:80,10.0.0.9"), "dst,dst,src", TCP, Y),
        (make("hash:ip,port,ip", "10.0.0.1,tcp:80,10.0.0.9"), "dst,dst,dst", TCP, N),
        (make("hash:ip,port,net", "10.0.0.1,tcp:80,10.0.0.0/24"), "dst,dst,src", TCP, Y),
        (make("hash:net,port", "10.0.0.0/8,tcp:80"), "src,dst", TCP, Y),
        (make("hash:net,net", "10.0.0.0/8,10.0.0.1"), "src,dst", TCP, Y),
        (
            make("hash:net,net", "10.0.0.0/8,10.0.0.1", "10.0.0.9,0.0.0.0/1 nomatch"),
            "src,dst",
            TCP,
            N,
        ),
        (make("hash:net,iface", "10.0.0.0/8,eth0"), "src,src", TCP, Y),
        (make("hash:net,iface", "10.0.0.0/8,eth0"), "src,dst", TCP, N),
        (make("hash:net,iface", "10.0.0.0/8,eth wildcard"), "src,src", TCP, Y),
        (make("hash:net,iface", "10.0.0.0/8,eth"), "src,src", TCP, N),
        (make("hash:net,iface", "10.0.0.0/8,physdev:eth0"), "src,src", TCP, U),
        (make("bitmap:port", "80"), "dst", TCP, Y),
        (make("bitmap:port", "80"), "dst", UDP, Y),
        (make("bitmap:port", "80"), "dst", replace(TCP, protocol=132), N),
        (make("bitmap:port", "80"), "dst", TCP6, Y),
        (make("bitmap:ip", "10.0.0.1", family=0), "dst", TCP, Y),
        (make("bitmap:ip", "10.0.0.0", family=0, netmask="24"), "dst", TCP, Y),
        (make("bitmap:ip,mac", "10.0.0.9"), "src,src", TCP, Y),
        (make("bitmap:ip,mac", "10.0.0.9,00:11:22:33:44:55"), "src,src", TCP, U),
        (make("hash:mac", "00:11:22:33:44:55"), "src", TCP, U),
        (make("hash:mac", "00:11:22:33:44:55"), "dst", TCP, N),
        (
            make("hash:mac", "00:11:22:33:44:55"),
            "src",
            replace(TCP, src_mac="00:11:22:33:44:55"),
            Y,
        ),
        (make("hash:ip,mark", "10.0.0.9,0x00000002", markmask="0x0f"), "src,src", TCP, N),
        (
            make("hash:ip,mark", "10.0.0.9,0x00000002", markmask="0x0f"),
            "src,src",
            replace(TCP, mark=0x12),
            Y,
        ),
        (make("hash:frob", "1"), "src", TCP, U),
        (make("hash:ip,port", "10.0.0.1,frob:x"), "dst,dst", TCP, U),
    ],
    ids=str,
)
def test_membership(ipset: IpSet, sides: str, packet: Packet, answer: Ternary) -> None:
    assert ask(ipset, sides, packet) is answer
    turned = {Y: N, N: Y, U: U}[answer]
    env = FixedEnvironment(sets={"S": ipset})
    rule = parse_rule(f"-A X -m set ! --match-set S {sides}", family=packet.family)
    state = PacketState(packet=packet, hook=Hook.FORWARD, ct=None, in_iface="eth0")
    assert rule.matches[0].evaluate(state, env).kind is turned


def test_return_nomatch_turns_the_elements_round() -> None:
    ipset = make("hash:net", "10.0.0.0/24", "10.0.0.8/29 nomatch")
    assert ask(ipset, "src", options="--return-nomatch") is Y
    assert ask(ipset, "dst", options="--return-nomatch") is N


def test_a_list_of_sets() -> None:
    inner = make("hash:ip", "10.0.0.1")
    outer = make("list:set", "A", "B", family=0)
    assert ask(outer, "dst", more={"A": make("hash:ip"), "B": inner}) is Y
    assert ask(outer, "src", more={"A": make("hash:ip"), "B": inner}) is N
    assert ask(outer, "src", more={"A": make("hash:ip")}) is U
    assert ask(outer, "dst", more={"B": inner}) is Y


def test_a_set_that_was_not_read_is_unknown() -> None:
    rule = parse_rule("-A X -m set --match-set OTHER src")
    state = PacketState(packet=TCP, hook=Hook.FORWARD, ct=None)
    answer = rule.matches[0].evaluate(state, FixedEnvironment())
    assert (answer.kind, answer.reason) == (U, "set OTHER: not read")


def test_counters_are_not_read() -> None:
    ipset = make("hash:ip", "10.0.0.1")
    assert ask(ipset, "dst", options="--packets-gt 5") is U
    assert ask(ipset, "src", options="--packets-gt 5") is N


def test_what_the_set_target_added_is_seen_by_later_rules() -> None:
    ipset = make("hash:ip,port")
    env = FixedEnvironment(sets={"S": ipset})
    state = PacketState(packet=TCP, hook=Hook.FORWARD, ct=None, in_iface="eth0")
    add = parse_rule("-A X -j SET --add-set S src,dst --exist").target
    assert add is not None
    after = add.apply(state, env).state
    assert ask(ipset, "src,dst", sets=after.sets) is Y
    assert ask(ipset, "dst,dst", sets=after.sets) is N
    delete = parse_rule("-A X -j SET --del-set S src,dst").target
    assert delete is not None
    gone = delete.apply(after, env).state
    assert ask(ipset, "src,dst", sets=gone.sets) is N


def test_what_the_set_target_did_to_a_set_that_is_not_modelled_is_unknown() -> None:
    ipset = make("hash:net", "10.0.0.0/24")
    env = FixedEnvironment(sets={"S": ipset})
    state = PacketState(packet=TCP, hook=Hook.FORWARD, ct=None, in_iface="eth0")
    add = parse_rule("-A X -j SET --add-set S src").target
    assert add is not None
    assert ask(ipset, "src", sets=add.apply(state, env).state.sets) is U


@pytest.mark.parametrize(("bridged", "expected"), [(False, Y), (True, N)])
def test_a_bridged_packet_has_no_input_interface_behind_forward(
    bridged: bool, expected: Ternary
) -> None:
    state = PacketState(
        packet=TCP, hook=Hook.POSTROUTING, ct=None, in_iface="eth0", bridged=bridged
    )
    match = parse_rule("-A POSTROUTING -m set --match-set S src,src").matches[0]
    sets = {"S": make("hash:net,iface", "10.0.0.0/8,eth0")}
    assert match.evaluate(state, FixedEnvironment(sets=sets)).kind is expected
