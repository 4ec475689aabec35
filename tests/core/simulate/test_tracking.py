"""What connection tracking makes of a packet."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from gketrace.conntrack import ConntrackEntry, CtState, CtStatus
from gketrace.packet import Packet, Protocol, TcpFlags
from gketrace.simulate.state import Direction
from gketrace.simulate.tracking import (
    Tracking,
    complete_tuple,
    new_flow,
    opened_here,
    opening,
    track,
    tuple_taken,
)
from gketrace.snapshot import Unavailable
from gketrace.trace import Flow, NetnsKind, NetnsRef
from tests.core.simulate.nodes import Table, tcp, udp

HOST = NetnsRef(node="n1", inode=1)
POD = NetnsRef(node="n1", kind=NetnsKind.POD, inode=2, pod="default/web")
SYN = tcp("10.0.0.1:4000", "10.0.0.2:80")


def seen(packet: Packet, *entries: ConntrackEntry, flows: tuple[Flow, ...] = ()) -> Tracking:
    (only,) = track(packet, netns=HOST, flows=flows, conntrack=Table(*entries))
    return only


def entry(packet: Packet = SYN, status: int = CtStatus.CONFIRMED, **more: str) -> ConntrackEntry:
    tuple5 = packet.tuple5
    return ConntrackEntry(orig=tuple5, reply=tuple5.inverted(), status=status, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "state"),
    [
        (TcpFlags.SYN, CtState.NEW),
        (TcpFlags.ACK, CtState.NEW),
        (TcpFlags.SYN | TcpFlags.ACK, CtState.INVALID),
        (TcpFlags.RST, CtState.INVALID),
        (TcpFlags.FIN | TcpFlags.ACK, CtState.INVALID),
        (TcpFlags.SYN | TcpFlags.FIN, CtState.INVALID),
        (0, CtState.INVALID),
    ],
)
def test_tcp_without_an_entry(flags: int, state: CtState) -> None:
    assert seen(replace(SYN, tcp_flags=flags)).ct.state is state


def test_mid_stream_needs_tcp_loose() -> None:
    packet = replace(SYN, tcp_flags=TcpFlags.ACK)
    (strict,) = track(packet, netns=HOST, flows=(), conntrack=None, tcp_loose=False)
    assert strict.ct.state is CtState.INVALID
    assert "nf_conntrack_tcp_loose = 0" in strict.note


def test_directions_and_states_of_an_entry() -> None:
    again = seen(SYN, entry())
    assert (again.ct.state, again.ct.direction) == (CtState.NEW, Direction.ORIGINAL)
    assert again.ct.existing
    answer = seen(SYN.reply(), entry())
    assert (answer.ct.state, answer.ct.direction) == (CtState.ESTABLISHED, Direction.REPLY)
    later = seen(SYN, entry(status=CtStatus.CONFIRMED | CtStatus.SEEN_REPLY))
    assert later.ct.state is CtState.ESTABLISHED


def test_a_closed_connection_is_opened_again_by_a_syn_only() -> None:
    closed = entry(tcp_state="TIME_WAIT")
    assert seen(SYN, closed).flow is None
    assert seen(replace(SYN, tcp_flags=TcpFlags.ACK), closed).flow is not None


@pytest.mark.parametrize(
    ("flags", "state", "answer", "valid"),
    [
        (TcpFlags.ACK, "SYN_SENT", False, False),
        (TcpFlags.ACK, "SYN_SENT", True, True),
        (TcpFlags.ACK, "SYN_RECV", False, True),
        (TcpFlags.SYN | TcpFlags.ACK, "SYN_SENT", True, True),
        (TcpFlags.SYN | TcpFlags.ACK, "ESTABLISHED", False, False),
        (TcpFlags.FIN | TcpFlags.ACK, "SYN_SENT", False, False),
        (TcpFlags.FIN | TcpFlags.ACK, "ESTABLISHED", True, True),
        (TcpFlags.SYN, "ESTABLISHED", True, False),
        (TcpFlags.RST, "SYN_SENT", True, True),
    ],
)
def test_tcp_out_of_turn_is_invalid(flags: int, state: str, answer: bool, valid: bool) -> None:
    packet = replace(SYN.reply() if answer else SYN, tcp_flags=flags)
    found = seen(packet, entry(tcp_state=state))
    assert (found.ct.state is not CtState.INVALID) is valid
    assert valid or state in found.note


def test_the_kernel_is_not_asked_for_what_is_not_known_in_full() -> None:
    assert seen(tcp("10.0.0.1", "10.0.0.2:80"), entry()).flow is None
    assert not complete_tuple(tcp("10.0.0.1", "10.0.0.2:80").tuple5)
    assert not complete_tuple(udp("0.0.0.0:53", "10.0.0.2:80").tuple5)
    gre = Packet(src=SYN.src, dst=SYN.dst, protocol=Protocol.GRE)
    assert complete_tuple(gre.tuple5)


def test_an_assumed_flow_comes_before_the_kernels() -> None:
    ct = seen(SYN).ct
    flow = new_flow(ct, HOST)
    assert seen(SYN, entry(), flows=(flow,)).flow is flow
    assert seen(SYN, flows=(replace(flow, netns=POD),)).flow is None


def test_unavailable_matters_only_where_the_kernel_would_have_been_asked() -> None:
    gone = Unavailable(reason="no permission")
    (asked,) = track(SYN, netns=HOST, flows=(), conntrack=gone)
    assert asked.unavailable == "no permission"
    (spared,) = track(tcp("10.0.0.1", "10.0.0.2:80"), netns=HOST, flows=(), conntrack=gone)
    assert spared.unavailable == ""


@pytest.mark.parametrize(
    ("family", "kind", "states"),
    [
        (4, 8, {CtState.NEW}),
        (4, 0, {CtState.INVALID}),
        (4, 3, {CtState.RELATED, CtState.INVALID}),
        (4, 9, {CtState.INVALID}),
        (6, 128, {CtState.NEW}),
        (6, 129, {CtState.INVALID}),
        (6, 135, {CtState.UNTRACKED}),
        (6, 1, {CtState.RELATED, CtState.INVALID}),
    ],
)
def test_icmp(family: int, kind: int, states: set[CtState]) -> None:
    one, two = ("10.0.0.1", "10.0.0.2") if family == 4 else ("fd00::1", "fd00::2")
    packet = Packet(
        src=ip_address(one),
        dst=ip_address(two),
        protocol=Protocol.ICMP if family == 4 else Protocol.ICMPV6,
        icmp_type=kind,
        icmp_id=1,
    )
    ways = track(packet, netns=HOST, flows=(), conntrack=None)
    assert {way.ct.state for way in ways} == states


def test_who_waits_for_an_answer() -> None:
    flow = opening(SYN, POD)
    assert opened_here(SYN.reply(), POD, (flow,)) is flow
    assert opened_here(SYN.reply(), HOST, (flow,)) is None
    assert opened_here(SYN, POD, (flow,)) is None
    assert seen(SYN, flows=(replace(flow, netns=HOST),)).flow is None


def test_a_tuple_is_taken_when_its_answer_belongs_to_somebody() -> None:
    table = Table(entry())
    assert tuple_taken(SYN.tuple5, HOST, (), table)
    assert not tuple_taken(tcp("10.0.0.1:4001", "10.0.0.2:80").tuple5, HOST, (), table)
    assert not tuple_taken(SYN.tuple5, HOST, (), None)
