"""Bytes → layers."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gketrace.capture.dissect import (
    LINKTYPE_ETHERNET,
    LINKTYPE_LINUX_SLL,
    LINKTYPE_LINUX_SLL2,
    LINKTYPE_NULL,
    LINKTYPE_RAW,
    dissect,
    dissect_ip,
)
from gketrace.capture.layers import (
    Arp,
    Cooked,
    Ethernet,
    Icmp,
    Ip4,
    Ip6,
    Sctp,
    Tcp,
    Udp,
    address,
    tuple_of,
)
from tests.core.capture import frames

A, B = "10.0.0.1", "10.0.0.2"
A6, B6 = "fd00::1", "fd00::2"
LINKS = (0, 1, 12, 101, 108, 113, 228, 229, 276, 999)


def test_tcp_in_ethernet() -> None:
    packet = frames.tcp(A, 40000, B, 80, flags=2, seq=7, options=frames.SYN_OPTIONS, identity=9)
    found = dissect(LINKTYPE_ETHERNET, frames.ethernet(packet))
    assert isinstance(found.link, Ethernet)
    assert found.link.source == frames.MAC_A
    assert isinstance(found.network, Ip4)
    assert (found.network.id, found.network.ttl, found.network.flags) == (9, 64, 2)
    assert isinstance(found.transport, Tcp)
    assert found.transport.seq == 7
    assert [kind for kind, _ in found.transport.options] == [2, 4, 8, 1, 3]
    assert (found.payload_length, found.cut, found.length) == (0, "", 60)
    assert str(tuple_of(found)) == "10.0.0.1:40000 → 10.0.0.2:80 tcp"


def test_vlans_and_the_padding_of_short_frames() -> None:
    packet = frames.udp(A, 1, B, 2, b"hey")
    frame = frames.ethernet(packet, vlans=(0x2064, 5)) + bytes(20)
    found = dissect(LINKTYPE_ETHERNET, frame)
    assert isinstance(found.link, Ethernet)
    assert found.link.vlans == (0x2064, 5)
    assert found.payload_length == 3
    assert frame[found.payload_offset :][:3] == b"hey"


@pytest.mark.parametrize(
    ("linktype", "head"),
    [
        (LINKTYPE_LINUX_SLL, struct.pack("!HHH8sH", 4, 1, 6, frames.MAC_A, 0x86DD)),
        (LINKTYPE_LINUX_SLL2, struct.pack("!HHIHBB8s", 0x86DD, 0, 3, 1, 4, 6, frames.MAC_A)),
        (LINKTYPE_RAW, b""),
        (LINKTYPE_NULL, b"\x1e\0\0\0"),
    ],
)
def test_other_links(linktype: int, head: bytes) -> None:
    found = dissect(linktype, head + frames.tcp(A6, 1, B6, 2, flags=0x18, payload=b"x" * 10))
    assert isinstance(found.network, Ip6)
    assert isinstance(found.transport, Tcp)
    assert found.payload_length == 10
    if isinstance(found.link, Cooked):
        assert (found.link.packet_type, found.link.source) == (4, frames.MAC_A)


def test_arp() -> None:
    found = dissect(LINKTYPE_ETHERNET, frames.arp(1, A, B) + bytes(18))
    assert isinstance(found.network, Arp)
    assert (found.network.operation, str(address(found.network.target))) == (1, B)


def test_fragments() -> None:
    first = dissect_ip(frames.udp(A, 1, B, 2, b"x" * 1000, flags=1, identity=5))
    assert isinstance(first.transport, Udp)
    assert isinstance(first.network, Ip4)
    assert first.network.fragment
    later = dissect_ip(frames.ip(A, B, 17, b"x" * 100, flags=0, offset=1008, identity=5))
    assert later.transport is None
    assert isinstance(later.network, Ip4)
    assert (later.network.offset, later.network.fragment, later.cut) == (1008, True, "")
    assert later.payload_length == 100


def test_extension_headers() -> None:
    hop = bytes([44, 0, 1, 4, 0, 0, 0, 0])
    fragment = struct.pack("!BBHI", 17, 0, 1, 77)
    datagram = struct.pack("!HHHH", 1, 2, 508, 0) + bytes(500)
    found = dissect_ip(frames.ip(A6, B6, 0, datagram, extensions=hop + fragment))
    assert isinstance(found.network, Ip6)
    assert found.network.extensions == (0, 44)
    assert (found.network.id, found.network.fragment, found.network.header_length) == (77, True, 56)
    assert isinstance(found.transport, Udp)


def test_an_error_quotes_its_packet() -> None:
    sent = frames.tcp(A, 40000, B, 80, flags=2, seq=1234)
    found = dissect_ip(frames.icmp(B, A, 3, 3, 0, sent[:28]))
    assert isinstance(found.transport, Icmp)
    quoted = found.transport.quoted
    assert quoted is not None
    assert isinstance(quoted.transport, Tcp)
    assert (quoted.transport.dport, quoted.transport.seq, quoted.cut) == (80, 1234, "tcp")
    sent6 = frames.udp(A6, 1, B6, 53, b"hey")
    found = dissect_ip(frames.icmp(B6, A6, 1, 4, 0, sent6))
    assert isinstance(found.transport, Icmp)
    assert found.transport.quoted is not None
    assert str(tuple_of(found.transport.quoted)) == "[fd00::1]:1 → [fd00::2]:53 udp"


def test_sctp() -> None:
    init = struct.pack("!BBHIIHHI", 1, 0, 20, 1, 65535, 10, 10, 1)
    found = dissect_ip(frames.ip(A, B, 132, struct.pack("!HHII", 5, 6, 0, 0) + init))
    assert isinstance(found.transport, Sctp)
    assert found.transport.chunks == (((1, 0, init[4:])),)


def test_offloads_leave_no_length() -> None:
    packet = bytearray(frames.tcp(A, 1, B, 2, flags=0x10, payload=bytes(100)))
    packet[2:4] = b"\0\0"
    found = dissect(LINKTYPE_RAW, bytes(packet), 70_000)
    assert found.payload_length == 70_000 - 40


def test_what_is_cut_is_said() -> None:
    frame = frames.ethernet(frames.tcp(A, 1, B, 2, flags=2, options=frames.SYN_OPTIONS))
    said = {size: dissect(LINKTYPE_ETHERNET, frame[:size], len(frame)).cut for size in range(75)}
    assert {said[n] for n in range(14)} == {"ethernet"}
    assert {said[n] for n in range(14, 34)} == {"ip"}
    assert {said[n] for n in range(34, 74)} == {"tcp"}
    assert said[74] == ""
    options = dissect(LINKTYPE_ETHERNET, frame[:60], len(frame)).transport
    assert isinstance(options, Tcp)
    assert [kind for kind, _ in options.options] == [2, 4]


_BASES = (
    frames.ethernet(frames.tcp(A, 1, B, 2, flags=2, options=frames.SYN_OPTIONS), vlans=(1,)),
    frames.ethernet(frames.icmp(A, B, 3, 3, 0, frames.udp(B, 1, A, 2, b"hey"))),
    frames.ethernet(frames.ip(A6, B6, 0, bytes(40), extensions=bytes([44, 0, 1, 4, 0, 0, 0, 0]))),
    frames.arp(2, A, B),
    frames.ethernet(frames.ip(A, B, 132, bytes(12) + bytes([0, 3, 0, 5] * 4))),
)


@given(st.sampled_from(LINKS), st.binary(max_size=120), st.integers(0, 1 << 17))
@example(1, b"\xff" * 14, 0)
def test_garbage(linktype: int, data: bytes, length: int) -> None:
    found = dissect(linktype, data, length)
    assert found.payload_length >= 0
    assert found.length >= 0
    tuple_of(found)


@given(
    st.sampled_from(_BASES),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=6),
    st.integers(0, 150),
)
def test_garbled_frames(base: bytes, changes: list[tuple[int, int]], keep: int) -> None:
    frame = bytearray(base)
    for place, value in changes:
        frame[place % len(frame)] = value
    found = dissect(LINKTYPE_ETHERNET, bytes(frame[:keep]), len(frame))
    assert found.payload_length >= 0
    tuple_of(found)
