"""Each target: what it does to the packet, and what it asks of NAT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gketrace.conntrack import CtState
from gketrace.packet import Packet, parse_address
from gketrace.ruleset.iptables_save import parse_rule
from gketrace.simulate.state import CtInfo, NatRequest, PacketState, VerdictKind
from gketrace.simulate.targets import TARGETS, Effect, UnknownTarget
from gketrace.trace import Hook, StepAction
from tests.core.simulate.environment import FixedEnvironment

TCP = Packet(
    src=parse_address("10.0.0.9"), dst=parse_address("10.0.0.1"), protocol=6, sport=40000, dport=80
)
TRACKED = CtInfo(state=CtState.NEW, orig=TCP.tuple5, reply=TCP.tuple5.inverted(), mark=0xF0)


def apply(target: str, family: int = 4, **fields: Any) -> Effect:
    parsed = parse_rule(f"-A X -j {target}", family=family).target
    assert parsed is not None
    assert not isinstance(parsed, UnknownTarget), parsed.reason
    base: dict[str, Any] = {"packet": TCP, "hook": Hook.PREROUTING, "ct": TRACKED}
    return parsed.apply(PacketState(**{**base, **fields}), FixedEnvironment())


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ("--set-xmark 0x4000/0x4000", 0x1, 0x4001),
        ("--set-xmark 0x4000/0x0", 0x4001, 0x1),
        ("--set-xmark 0x1/0xff", 0xFFFF, 0xFF01),
        ("--set-xmark 0x3/0x1", 0x2, 0x1),
        ("--set-xmark 0x5", 0xFFFF, 0x5),
        ("--set-mark 0x5", 0xFFFF, 0x5),
        ("--set-mark 0x10/0xf0", 0xFF, 0x1F),
        ("--set-mark 0x3/0x1", 0x2, 0x3),
        ("--and-mark 0xff", 0x1234, 0x34),
        ("--or-mark 0x4000", 0x1, 0x4001),
        ("--xor-mark 0x4001", 0x4000, 0x1),
        ("--set-xmark 0x0/0xffffffff", 0xFFFFFFFF, 0),
    ],
)
def test_mark(options: str, before: int, after: int) -> None:
    effect = apply(f"MARK {options}", packet=replace(TCP, mark=before))
    assert effect.state.packet.mark == after
    assert (effect.action, effect.verdict) == (StepAction.MARK, None)


@pytest.mark.parametrize(
    ("options", "packet_mark", "ct_mark"),
    [
        ("--set-xmark 0x1/0xff", 0xAB, 0x1),
        ("--set-mark 0x5", 0xAB, 0x5),
        ("--and-mark 0x30", 0xAB, 0x30),
        ("--or-mark 0xf", 0xAB, 0xFF),
        ("--xor-mark 0xff", 0xAB, 0x0F),
        ("--save-mark", 0xAB, 0xAB),
        ("--save-mark --nfmask 0xf --ctmask 0xf", 0xAB, 0xFB),
        ("--save-mark --nfmask 0x0b --ctmask 0x0", 0xAB, 0xFB),
        ("--save-mark --mask 0xf", 0xAB, 0xFB),
        ("--restore-mark", 0xF0, 0xF0),
        ("--restore-mark --nfmask 0xf --ctmask 0x10", 0xB0, 0xF0),
        ("--restore-mark --mask 0x10", 0xBB, 0xF0),
    ],
)
def test_connmark(options: str, packet_mark: int, ct_mark: int) -> None:
    effect = apply(f"CONNMARK {options}", packet=replace(TCP, mark=0xAB))
    assert effect.state.packet.mark == packet_mark
    assert effect.state.ct is not None
    assert effect.state.ct.mark == ct_mark


@pytest.mark.parametrize("ct", [None, CtInfo(state=CtState.INVALID)])
def test_connmark_without_a_connection_does_nothing(ct: CtInfo | None) -> None:
    effect = apply("CONNMARK --restore-mark", ct=ct)
    assert effect.action is StepAction.CONTINUE
    assert effect.state.ct == ct


def net(first: str, last: str = "") -> Any:
    return parse_address(first), parse_address(last or first)


@pytest.mark.parametrize(
    ("target", "family", "request_"),
    [
        (
            "DNAT --to-destination 10.1.0.1:8080",
            4,
            NatRequest(source=False, addresses=net("10.1.0.1"), ports=(8080, 8080)),
        ),
        (
            "DNAT --to-destination 10.1.0.1-10.1.0.9 --random --persistent",
            4,
            NatRequest(
                source=False, addresses=net("10.1.0.1", "10.1.0.9"), random=True, persistent=True
            ),
        ),
        ("DNAT --to-destination :8080-8090", 4, NatRequest(source=False, ports=(8080, 8090))),
        (
            "DNAT --to-destination 10.1.0.1:2000-2010/1000",
            4,
            NatRequest(source=False, addresses=net("10.1.0.1"), ports=(2000, 2010), base_port=1000),
        ),
        (
            "DNAT --to-destination [fd00::1]:80",
            6,
            NatRequest(source=False, addresses=net("fd00::1"), ports=(80, 80)),
        ),
        (
            "DNAT --to-destination fd00::1-fd00::5",
            6,
            NatRequest(source=False, addresses=net("fd00::1", "fd00::5")),
        ),
        (
            "SNAT --to-source 1.1.1.1:1-9 --random-fully",
            4,
            NatRequest(source=True, addresses=net("1.1.1.1"), ports=(1, 9), random_fully=True),
        ),
        (
            "SNAT --to-source [fd00::1-fd00::9]:1-9",
            6,
            NatRequest(source=True, addresses=net("fd00::1", "fd00::9"), ports=(1, 9)),
        ),
        ("MASQUERADE", 4, NatRequest(source=True, masquerade=True)),
        (
            "MASQUERADE --to-ports 1024-2048 --random",
            4,
            NatRequest(source=True, masquerade=True, ports=(1024, 2048), random=True),
        ),
        (
            "MASQUERADE --random-fully",
            4,
            NatRequest(source=True, masquerade=True, random_fully=True),
        ),
        (
            "REDIRECT --to-ports 8080",
            4,
            NatRequest(source=False, redirect=True, ports=(8080, 8080)),
        ),
        ("REDIRECT", 4, NatRequest(source=False, redirect=True)),
        (
            "NETMAP --to 10.1.1.0/24",
            4,
            NatRequest(source=False, netmap=True, addresses=net("10.1.1.0"), prefixlen=24),
        ),
    ],
)
def test_nat(target: str, family: int, request_: NatRequest) -> None:
    effect = apply(target, family)
    assert effect.nat == request_
    assert effect.verdict is VerdictKind.ACCEPT
    assert effect.state.packet == TCP


def test_netmap_changes_the_source_behind_routing() -> None:
    effect = apply("NETMAP --to 10.1.1.0/24", hook=Hook.POSTROUTING)
    assert effect.nat is not None
    assert effect.nat.source


@pytest.mark.parametrize("target", ["NOTRACK", "CT --notrack"])
def test_notrack(target: str) -> None:
    assert apply(target, ct=None).state.notrack
    assert not apply(target).state.notrack


def test_ct_zone() -> None:
    assert apply("CT --zone 5", ct=None).state.zone == 5
    marked = replace(TCP, mark=0x10007)
    # Which mark counts is decided when tracking looks.
    assert apply("CT --zone mark", ct=None, packet=marked).state.zone == -1
    assert apply("CT --zone 5").state.zone is None
    assert apply("CT --helper ftp", ct=None).state.zone == 0


def test_what_is_attached_first_stays() -> None:
    template = apply("CT --helper ftp", ct=None).state.ct
    assert template is not None
    assert (template.template, template.state) == (True, CtState.NEW)
    assert not apply("NOTRACK", ct=template).state.notrack
    assert apply("CT --zone 5", ct=template).state.zone is None
    assert apply("CT --zone 5", ct=None, notrack=True).state.zone is None


def test_a_templates_mark_is_that_of_earlier_packets() -> None:
    template = apply("CT --zone 5", ct=None).state.ct
    restored = apply("CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff", ct=template)
    assert restored.verdict is VerdictKind.UNKNOWN
    assert apply("CONNMARK --set-xmark 0x1/0xff", ct=template).state.ct == template


@pytest.mark.parametrize(
    ("target", "family", "changes"),
    [
        ("DSCP --set-dscp 0x0a", 4, {"dscp": 10}),
        ("DSCP --set-dscp-class EF", 4, {"dscp": 46}),
        ("TOS --set-tos 0x10/0x3f", 4, {"dscp": 4}),
        ("TOS --set-tos 0xff", 4, {"dscp": 63, "ecn": 3}),
        ("TOS --or-tos 0x3", 4, {"ecn": 3}),
        ("TTL --ttl-set 64", 4, {"ttl": 64}),
        ("TTL --ttl-inc 250", 4, {"ttl": 255}),
        ("TTL --ttl-dec 1", 4, {"ttl": 9}),
        ("ECN --ecn-tcp-remove", 4, {"tcp_flags": 0x02}),
        ("HL --hl-dec 20", 6, {"ttl": 0}),
    ],
)
def test_fields(target: str, family: int, changes: dict[str, int]) -> None:
    packet = replace(TCP, ttl=10, tcp_flags=0xC2)
    effect = apply(target, family, packet=packet)
    assert effect.state.packet == replace(packet, **changes)
    assert effect.action is StepAction.REWRITE


@pytest.mark.parametrize(
    ("options", "length", "after"),
    [
        ((2, 4), 44, ((2, 4), 44)),
        ((4,), 44, ((2, 4), 48)),
        ((), 40, ((2,), 44)),
        (None, 40, (None, None)),
    ],
)
def test_tcpmss_adds_the_option_where_there_is_none(
    options: tuple[int, ...] | None, length: int, after: tuple[Any, Any]
) -> None:
    packet = replace(TCP, tcp_options=options, length=length)
    changed = apply("TCPMSS --set-mss 1300", packet=packet).state.packet
    assert (changed.tcp_options, changed.length) == after


def test_an_unknown_ttl_stays_unknown() -> None:
    assert apply("TTL --ttl-dec 1").state.packet.ttl is None


@pytest.mark.parametrize(
    "target",
    [
        "LOG --log-prefix x",
        "NFLOG --nflog-group 1",
        "TCPMSS --clamp-mss-to-pmtu",
        "TRACE",
        "AUDIT --type accept",
        "CHECKSUM --checksum-fill",
        "CLASSIFY --set-class 1:1",
        "TEE --gateway 10.0.0.1",
    ],
)
def test_targets_that_go_on_say_what_they_do(target: str) -> None:
    effect = apply(target)
    assert (effect.action, effect.verdict) == (StepAction.CONTINUE, None)
    assert effect.state.packet == TCP
    assert effect.note.startswith(target.split()[0])


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("QUEUE", VerdictKind.QUEUE),
        ("NFQUEUE --queue-num 1 --queue-bypass", VerdictKind.QUEUE),
        ("SYNPROXY --mss 1460", VerdictKind.STOLEN),
        ("HMARK --hmark-tuple src --hmark-mod 2", VerdictKind.UNKNOWN),
        ("DNPT --src-pfx fd00::/64 --dst-pfx fd01::/64", VerdictKind.UNKNOWN),
        ("SET --map-set S src --map-mark", VerdictKind.UNKNOWN),
    ],
)
def test_targets_after_which_nothing_is_known(target: str, kind: VerdictKind) -> None:
    effect = apply(target)
    assert (effect.action, effect.verdict) == (StepAction.UNKNOWN, kind)
    assert effect.note


def test_names_are_registered_once() -> None:
    names = [cls.name for cls in TARGETS]
    assert len(names) == len(set(names))
