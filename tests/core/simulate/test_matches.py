"""Each match against packets: YES, NO, and UNKNOWN where the packet does not say."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from gketrace.conntrack import CtState, CtStatus
from gketrace.packet import Packet, parse_address
from gketrace.ruleset.iptables_save import parse_rule
from gketrace.simulate.matches import HEADER, MATCHES, UnknownMatch
from gketrace.simulate.matches.base import every
from gketrace.simulate.matches.undecided import UNDECIDED
from gketrace.simulate.state import CtInfo, Direction, PacketState, Ternary
from gketrace.snapshot import RecentEntry
from gketrace.trace import Hook
from tests.core.simulate.environment import FixedEnvironment

Y, N, U = Ternary.YES, Ternary.NO, Ternary.UNKNOWN

TCP = Packet(
    src=parse_address("10.0.0.9"), dst=parse_address("10.0.0.1"), protocol=6, sport=40000, dport=80
)
UDP = replace(TCP, protocol=17)
SCTP = replace(TCP, protocol=132)
ICMP = replace(TCP, protocol=1, sport=None, dport=None, icmp_type=8, icmp_code=0)
TCP6 = replace(TCP, src=parse_address("fd00::9"), dst=parse_address("fd00::1"))
ICMP6 = replace(TCP6, protocol=58, sport=None, dport=None, icmp_type=135, icmp_code=0)
PIECE = replace(TCP, fragment=True, sport=None, dport=None)
BLIND = replace(TCP, sport=None, dport=None)


def new(packet: Packet, **fields: Any) -> CtInfo:
    base = CtInfo(state=CtState.NEW, orig=packet.tuple5, reply=packet.tuple5.inverted())
    return replace(base, **fields)


def ask(rule: str, packet: Packet = TCP, env: FixedEnvironment | None = None, **at: Any) -> Ternary:
    parsed = parse_rule(f"-A X {rule}", family=packet.family)
    assert not any(isinstance(m, UnknownMatch) for m in parsed.matches), rule
    fields: dict[str, Any] = {"hook": Hook.PREROUTING, "ct": new(packet), "in_iface": "eth0"}
    state = PacketState(packet=packet, **{**fields, **at})
    world = env or FixedEnvironment()
    return every(match.evaluate(state, world) for match in parsed.matches).kind


@pytest.mark.parametrize(
    ("rule", "packet", "answer"),
    [
        ("-s 10.0.0.0/8", TCP, Y),
        ("! -s 10.0.0.0/8", TCP, N),
        ("-s 10.0.0.0/255.0.0.255", TCP, N),
        ("-s 10.0.0.9/255.0.0.255", TCP, Y),
        ("-d 10.0.0.2/32", TCP, N),
        ("-d 10.0.0.1", TCP, Y),
        ("-d 0.0.0.0/0", TCP, Y),
        ("-s fd00::/16", TCP6, Y),
        ("! -d fd00::1/128", TCP6, N),
        ("-p tcp", TCP, Y),
        ("! -p tcp", TCP, N),
        ("-p 6", TCP, Y),
        ("-p all", UDP, Y),
        ("-p udp", TCP, N),
        ("-p ipv6-icmp", ICMP6, Y),
        ("-f", TCP, N),
        ("-f", PIECE, Y),
        ("! -f", PIECE, N),
        ("! -f", TCP, Y),
        ("-i eth0", TCP, Y),
        ("-i eth+", TCP, Y),
        ("-i +", TCP, Y),
        ("! -i eth+", TCP, N),
        ("-i eth", TCP, N),
        ("-o eth0", TCP, N),
        ("! -o eth0", TCP, Y),
        ("-o +", TCP, Y),
    ],
)
def test_header(rule: str, packet: Packet, answer: Ternary) -> None:
    assert ask(rule, packet) is answer


def test_interfaces_of_a_packet_that_is_made_here() -> None:
    at = {"hook": Hook.OUTPUT, "in_iface": "", "out_iface": "cali1"}
    assert ask("-i eth0", **at) is N
    assert ask("! -i eth0", **at) is Y
    assert ask("-o cali+", **at) is Y


@pytest.mark.parametrize(
    ("rule", "packet", "answer"),
    [
        ("-p tcp -m tcp --dport 80", TCP, Y),
        ("-p tcp -m tcp ! --dport 80", TCP, N),
        ("-p tcp -m tcp --dport 79:81", TCP, Y),
        ("-p tcp -m tcp --dport :79", TCP, N),
        ("-p tcp -m tcp --dport 80:", TCP, Y),
        ("-p tcp -m tcp --sport 1:1023", TCP, N),
        ("-p tcp -m tcp --sport 1:1023 --dport 80", BLIND, U),
        ("-p tcp -m tcp --sport 0:65535 --dport 0:65535", BLIND, Y),
        ("-p tcp -m tcp ! --sport 0:65535", BLIND, N),
        ("-p tcp -m tcp ! --sport 5", BLIND, U),
        ("-p tcp -m tcp --dport 80", PIECE, N),
        ("-p tcp -m tcp ! --dport 80", PIECE, N),
        ("-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", TCP, Y),
        ("-p tcp -m tcp --syn", TCP, Y),
        ("-p tcp -m tcp ! --syn", TCP, N),
        ("-p tcp -m tcp --tcp-flags ALL NONE", TCP, N),
        ("-p tcp -m tcp --tcp-flags ACK ACK", TCP, N),
        ("-p tcp -m tcp --tcp-flags SYN,ACK SYN,ACK", replace(TCP, tcp_flags=0x12), Y),
        ("-p tcp -m tcp --tcp-option 8", TCP, U),
        ("-p tcp -m tcp --tcp-option 8", replace(TCP, tcp_options=(2, 8)), Y),
        ("-p tcp -m tcp ! --tcp-option 8", replace(TCP, tcp_options=(2,)), Y),
        ("-p udp -m udp --dport 80", UDP, Y),
        ("-p udp -m udp --dport 81", UDP, N),
        ("-p udplite -m udplite --dport 80", replace(TCP, protocol=136), Y),
        ("-p sctp -m sctp --dport 80", SCTP, Y),
        ("-p sctp -m sctp --dport 80 --chunk-types any INIT", SCTP, U),
        ("-p sctp -m sctp --dport 81 --chunk-types any INIT", SCTP, N),
        ("-p dccp -m dccp --dport 80", replace(TCP, protocol=33), Y),
        ("-p tcp -m multiport --dports 22,80", TCP, Y),
        ("-p tcp -m multiport --dports 22,70:90", TCP, Y),
        ("-p tcp -m multiport ! --dports 22,80", TCP, N),
        ("-p tcp -m multiport --sports 80", TCP, N),
        ("-p tcp -m multiport --ports 40000", TCP, Y),
        ("-p tcp -m multiport --ports 80", BLIND, U),
        ("-p tcp -m multiport --ports 80", replace(TCP, sport=None), Y),
        ("-p tcp -m multiport --ports 81", replace(TCP, sport=None), U),
        ("-p tcp -m multiport ! --dports 81", PIECE, N),
    ],
)
def test_ports(rule: str, packet: Packet, answer: Ternary) -> None:
    assert ask(rule, packet) is answer


@pytest.mark.parametrize(
    ("rule", "packet", "answer"),
    [
        ("-p icmp -m icmp --icmp-type 8", ICMP, Y),
        ("-p icmp -m icmp --icmp-type echo-request", ICMP, Y),
        ("-p icmp -m icmp ! --icmp-type 8", ICMP, N),
        ("-p icmp -m icmp --icmp-type 8/1", ICMP, N),
        ("-p icmp -m icmp --icmp-type 8/0", replace(ICMP, icmp_code=None), U),
        ("-p icmp -m icmp --icmp-type any", replace(ICMP, icmp_type=None), Y),
        ("-p icmp -m icmp ! --icmp-type any", ICMP, N),
        ("-p icmp -m icmp --icmp-type 8", replace(ICMP, icmp_type=None), U),
        ("-p icmp -m icmp --icmp-type 8", replace(ICMP, fragment=True), N),
        ("-p ipv6-icmp -m icmp6 --icmpv6-type 135", ICMP6, Y),
        ("-p ipv6-icmp -m icmp6 --icmpv6-type neighbour-solicitation", ICMP6, Y),
        ("-p ipv6-icmp -m icmp6 --icmpv6-type 136", ICMP6, N),
    ],
)
def test_icmp(rule: str, packet: Packet, answer: Ternary) -> None:
    assert ask(rule, packet) is answer


ESTABLISHED = new(
    TCP,
    state=CtState.ESTABLISHED,
    direction=Direction.REPLY,
    status=int(CtStatus.DST_NAT | CtStatus.SEEN_REPLY | CtStatus.CONFIRMED),
    mark=0x12,
)
INVALID = CtInfo(state=CtState.INVALID)
UNTRACKED = CtInfo(state=CtState.UNTRACKED)


@pytest.mark.parametrize(
    ("rule", "ct", "answer"),
    [
        ("--ctstate NEW", new(TCP), Y),
        ("--ctstate NEW", ESTABLISHED, N),
        ("--ctstate RELATED,ESTABLISHED", ESTABLISHED, Y),
        ("! --ctstate RELATED,ESTABLISHED", ESTABLISHED, N),
        ("--ctstate DNAT", ESTABLISHED, Y),
        ("--ctstate SNAT", ESTABLISHED, N),
        ("--ctstate DNAT", new(TCP), N),
        ("! --ctstate RELATED,ESTABLISHED,DNAT", new(TCP, status=int(CtStatus.DST_NAT)), N),
        ("--ctstate INVALID", INVALID, Y),
        ("--ctstate INVALID", UNTRACKED, N),
        ("--ctstate UNTRACKED", UNTRACKED, Y),
        ("--ctstate NEW", UNTRACKED, N),
        ("--ctstate INVALID", None, Y),
        ("! --ctstate NEW", None, Y),
        ("--ctstate INVALID --ctdir REPLY", None, Y),
        ("--ctdir ORIGINAL", None, N),
        ("! --ctdir ORIGINAL", INVALID, N),
        ("--ctdir REPLY", ESTABLISHED, Y),
        ("! --ctdir REPLY", ESTABLISHED, N),
        ("--ctproto tcp", new(TCP), Y),
        ("! --ctproto 6", new(TCP), N),
        ("--ctorigsrc 10.0.0.0/24 --ctorigdst 10.0.0.1", new(TCP), Y),
        ("! --ctorigsrc 10.0.0.0/24", new(TCP), N),
        ("--ctreplsrc 10.0.0.1 --ctrepldst 10.0.0.9", new(TCP), Y),
        ("--ctreplsrc 10.0.0.9", new(TCP), N),
        ("--ctorigsrcport 40000 --ctorigdstport 80", new(TCP), Y),
        ("--ctreplsrcport 80 --ctrepldstport 40000", new(TCP), Y),
        ("! --ctorigdstport 1:100", new(TCP), N),
        ("--ctorigsrcport 1", new(BLIND), U),
        ("--ctorigdstport 2048", new(ICMP), Y),
        ("--ctstatus SEEN_REPLY,ASSURED", ESTABLISHED, Y),
        ("--ctstatus ASSURED", ESTABLISHED, N),
        ("--ctstatus CONFIRMED", new(TCP), N),
        ("--ctstatus NONE", new(TCP), N),
        ("! --ctstatus NONE", ESTABLISHED, Y),
        ("--ctexpire 1:100", ESTABLISHED, U),
    ],
)
def test_conntrack(rule: str, ct: CtInfo | None, answer: Ternary) -> None:
    assert ask(f"-m conntrack {rule}", ct=ct) is answer


def test_a_packet_that_raw_said_not_to_track() -> None:
    assert ask("-m conntrack --ctstate UNTRACKED", ct=None, notrack=True) is Y
    assert ask("-m state --state INVALID", ct=None, notrack=True) is N


def test_state_is_conntracks_older_name() -> None:
    assert ask("-m state --state NEW,RELATED") is Y
    assert ask("-m state ! --state NEW") is N
    assert ask("-m state --state ESTABLISHED", ct=ESTABLISHED) is Y


@pytest.mark.parametrize(
    ("rule", "answer"),
    [
        ("-m mark --mark 0x4000/0x4000", Y),
        ("-m mark ! --mark 0x4000/0x4000", N),
        ("-m mark --mark 0x4000", N),
        ("-m mark --mark 0x4001", Y),
        ("-m mark --mark 0x4002/0x4000", N),
    ],
)
def test_mark(rule: str, answer: Ternary) -> None:
    assert ask(rule, replace(TCP, mark=0x4001)) is answer


def test_connmark_never_matches_what_is_not_tracked() -> None:
    assert ask("-m connmark --mark 0x2/0xf", ct=ESTABLISHED) is Y
    assert ask("-m connmark ! --mark 0x2/0xf", ct=ESTABLISHED) is N
    assert ask("-m connmark ! --mark 0x2/0xf", ct=None) is N
    assert ask("-m connmark ! --mark 0x2/0xf", ct=INVALID) is N


@pytest.mark.parametrize(
    ("rule", "packet", "answer"),
    [
        ("--dst-type LOCAL", TCP, Y),
        ("! --dst-type LOCAL", TCP, N),
        ("--src-type LOCAL", TCP, N),
        ("--src-type UNICAST,LOCAL --dst-type LOCAL", TCP, Y),
        ("--dst-type LOCAL --limit-iface-in", TCP, N),
        ("--src-type LOCAL", replace(TCP, src=parse_address("10.99.99.99")), U),
        ("--dst-type LOCAL", TCP6, Y),
        ("--dst-type UNICAST,LOCAL", TCP6, Y),
        ("--dst-type UNICAST", TCP6, Y),
        ("--dst-type MULTICAST", TCP6, N),
        ("--dst-type MULTICAST", replace(TCP6, dst=parse_address("ff02::1")), Y),
        ("! --dst-type UNICAST", replace(TCP6, dst=parse_address("ff02::1")), Y),
    ],
)
def test_addrtype(rule: str, packet: Packet, answer: Ternary) -> None:
    assert ask(f"-m addrtype {rule}", packet) is answer


def test_addrtype_of_one_interface() -> None:
    env = FixedEnvironment(interfaces={"10.0.0.1": "eth0"})
    assert ask("-m addrtype --dst-type LOCAL --limit-iface-in", env=env) is Y


@pytest.mark.parametrize(
    ("rule", "answer"),
    [
        ("--src-range 10.0.0.1-10.0.0.9", Y),
        ("--src-range 10.0.0.1-10.0.0.8", N),
        ("! --dst-range 10.0.0.1-10.0.0.8", N),
        ("--src-range 10.0.0.9-10.0.0.9 ! --dst-range 10.0.0.2-10.0.0.8", Y),
    ],
)
def test_iprange(rule: str, answer: Ternary) -> None:
    assert ask(f"-m iprange {rule}") is answer


@pytest.mark.parametrize(
    ("text", "threshold"),
    [("0.50000000000", 1 << 30), ("0.33333333349", 715827883), ("0.33333333302", 715827882)],
)
def test_statistic_holds_the_kernels_number(text: str, threshold: int) -> None:
    (match,) = parse_rule(f"-A X -m statistic --mode random --probability {text}").matches
    state = PacketState(packet=TCP, hook=Hook.INPUT, ct=None)
    answer = match.evaluate(state, FixedEnvironment())
    assert answer.chance == Fraction(threshold, 2**31)
    assert match.render().endswith(f"--probability {text}")
    (negated,) = parse_rule(f"-A X -m statistic --mode random ! --probability {text}").matches
    other = negated.evaluate(state, FixedEnvironment())
    assert other.chance == 1 - Fraction(threshold, 2**31)


def test_statistic_nth() -> None:
    assert ask("-m statistic --mode nth --every 1 --packet 0") is Y
    assert ask("-m statistic --mode nth ! --every 1 --packet 0") is N
    assert ask("-m statistic --mode nth --every 3 --packet 0") is U


LISTS = FixedEnvironment(
    lists={
        "L": (
            RecentEntry(address=parse_address("10.0.0.9"), ages=(5.0, 50.0, 500.0), ttl=64),
            RecentEntry(address=parse_address("10.0.0.1"), ages=(1.0,)),
        ),
        "NET": (RecentEntry(address=parse_address("10.0.0.0"), ages=(1.0,)),),
        "EMPTY": (),
    }
)


@pytest.mark.parametrize(
    ("rule", "answer"),
    [
        ("--rcheck --name L", Y),
        ("! --rcheck --name L", N),
        ("--rcheck --name EMPTY", N),
        ("! --rcheck --name EMPTY", Y),
        ("--rcheck --name UNREAD", U),
        ("--set --name UNREAD", Y),
        ("! --set --name EMPTY", N),
        ("--rcheck --seconds 4 --name L", N),
        ("--rcheck --seconds 5 --name L", Y),
        ("--rcheck --seconds 60 --hitcount 2 --name L", Y),
        ("--rcheck --seconds 60 --hitcount 3 --name L", N),
        ("--rcheck --hitcount 3 --name L", Y),
        ("--update --seconds 60 --hitcount 3 --name L", N),
        ("--remove --name L", Y),
        ("--remove --name EMPTY", N),
        ("--rcheck --name L --rdest --seconds 2", Y),
        ("--rcheck --name NET --mask 255.255.255.0", Y),
        ("--rcheck --name NET", N),
        ("--rcheck --rttl --name L", U),
    ],
)
def test_recent(rule: str, answer: Ternary) -> None:
    assert ask(f"-m recent {rule}", env=LISTS) is answer


def test_recent_compares_the_ttl_as_it_came_in() -> None:
    rule = "-m recent --rcheck --rttl --name L"
    assert ask(rule, replace(TCP, ttl=64), LISTS) is Y
    assert ask(rule, replace(TCP, ttl=63), LISTS) is N
    forwarded = {"hook": Hook.FORWARD, "out_iface": "eth1"}
    assert ask(rule, replace(TCP, ttl=63), LISTS, **forwarded) is Y


BRIDGED = {"bridged": True, "physdev_in": "veth0", "physdev_out": "veth1", "hook": Hook.FORWARD}


@pytest.mark.parametrize(
    ("rule", "at", "answer"),
    [
        ("--physdev-is-in", {}, N),
        ("! --physdev-is-in", {}, Y),
        ("! --physdev-is-in --physdev-is-out", {}, N),
        ("--physdev-is-in", {"physdev_in": "veth0"}, Y),
        ("! --physdev-is-in", {"physdev_in": "veth0"}, N),
        ("--physdev-is-bridged", {"physdev_in": "veth0"}, N),
        ("--physdev-is-bridged", BRIDGED, Y),
        ("--physdev-in veth0 --physdev-out veth1", BRIDGED, Y),
        ("--physdev-in veth+ ! --physdev-out veth1", BRIDGED, N),
        ("--physdev-in veth9", BRIDGED, N),
        ("! --physdev-out veth9", {"physdev_in": "veth0"}, N),
    ],
)
def test_physdev(rule: str, at: dict[str, Any], answer: Ternary) -> None:
    assert ask(f"-m physdev {rule}", **at) is answer


def test_mac() -> None:
    rule = "-m mac --mac-source 00:11:22:AA:BB:CC"
    assert ask(rule) is U
    assert ask(rule, replace(TCP, src_mac="00:11:22:aa:bb:cc")) is Y
    assert ask(rule, replace(TCP, src_mac="00:11:22:aa:bb:cd")) is N
    assert ask(rule, in_iface="", hook=Hook.OUTPUT) is N
    assert ask("-m mac ! --mac-source 00:11:22:AA:BB:CC", in_iface="lo") is N


@pytest.mark.parametrize(
    ("rule", "at", "answer"),
    [
        ("--uid-owner 0", {"in_iface": "", "uid": 0}, Y),
        ("! --uid-owner 0-9", {"in_iface": "", "uid": 0}, N),
        ("--uid-owner 0", {"in_iface": ""}, U),
        ("--gid-owner 5", {"in_iface": "", "gid": 6}, N),
        ("--gid-owner 5 --suppl-groups", {"in_iface": "", "gid": 6}, U),
        ("--gid-owner 5 --suppl-groups", {"in_iface": "", "gid": 5}, Y),
        ("--socket-exists", {"in_iface": ""}, Y),
        ("! --socket-exists", {"in_iface": ""}, N),
        ("--uid-owner 0", {}, N),
        ("! --uid-owner 0", {}, Y),
        ("! --socket-exists", {}, Y),
        ("--socket-exists", {}, N),
    ],
)
def test_owner(rule: str, at: dict[str, Any], answer: Ternary) -> None:
    assert ask(f"-m owner {rule}", **at) is answer


def test_rpfilter() -> None:
    assert ask("-m rpfilter") is U
    assert ask("-m rpfilter", env=FixedEnvironment(reverse=True)) is Y
    assert ask("-m rpfilter --invert", env=FixedEnvironment(reverse=True)) is N
    assert ask("-m rpfilter --loose --invert", env=FixedEnvironment(reverse=False)) is Y


MARKED = replace(TCP, dscp=10, ecn=3, ttl=64, length=100, tcp_flags=0x42)


@pytest.mark.parametrize(
    ("rule", "packet", "answer"),
    [
        ("-m dscp --dscp 0x0a", MARKED, Y),
        ("-m dscp ! --dscp-class AF11", MARKED, N),
        ("-m tos --tos 0x28/0xfc", MARKED, Y),
        ("-m tos --tos 0x28", MARKED, N),
        ("-m tos ! --tos 0x28/0xff", MARKED, Y),
        ("-m ttl --ttl-eq 64", MARKED, Y),
        ("-m ttl ! --ttl-eq 64", MARKED, N),
        ("-m ttl --ttl-lt 64", MARKED, N),
        ("-m ttl --ttl-gt 63", MARKED, Y),
        ("-m ttl --ttl-gt 63", TCP, U),
        ("-m hl --hl-eq 64", replace(TCP6, ttl=64), Y),
        ("-m length --length 100", MARKED, Y),
        ("-m length ! --length 50:100", MARKED, N),
        ("-m length --length 0:65535", TCP, U),
        ("-m ecn --ecn-ip-ect 3", MARKED, Y),
        ("-m ecn ! --ecn-ip-ect 3", MARKED, N),
        ("-p tcp -m ecn --ecn-tcp-ece", MARKED, Y),
        ("-p tcp -m ecn --ecn-tcp-ece --ecn-tcp-cwr", MARKED, N),
        ("-p tcp -m ecn ! --ecn-tcp-cwr", MARKED, Y),
    ],
)
def test_fields(rule: str, packet: Packet, answer: Ternary) -> None:
    assert ask(rule, packet) is answer


@pytest.mark.parametrize("rule", ["-m comment --comment x", "-m nfacct --nfacct-name  x"])
def test_always(rule: str) -> None:
    assert ask(rule) is Y


@pytest.mark.parametrize("cls", UNDECIDED, ids=lambda c: c.module)
def test_what_cannot_be_known_is_unknown_and_says_why(cls: Any) -> None:
    answer = cls(options=()).evaluate(
        PacketState(packet=TCP, hook=Hook.INPUT, ct=None), FixedEnvironment()
    )
    assert answer.kind is U
    assert answer.reason.startswith(f"{cls.module}: ")


def test_names_are_registered_once() -> None:
    names = [cls.module for cls in MATCHES]
    assert len(names) == len(set(names))
    options = [option for cls in HEADER for option in cls.OPTIONS]
    assert len(options) == len(set(options))
