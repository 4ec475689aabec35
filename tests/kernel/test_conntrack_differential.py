"""Our lines against conntrack(8)'s, entry by entry; tables that change while they are read."""

from __future__ import annotations

import ctypes
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gketrace.conntrack_records import entry_from_record, record_of, records_from_bytes
from gketrace.conntrack_text import render_entry, render_event
from gketrace_agent.kernel.conntrack_columns import Batch, Layouts, frame
from gketrace_agent.kernel.conntrack_layout import entry_of, layout_of
from gketrace_agent.kernel.netlink import attribute, nested
from gketrace_agent.observe.conntrack_filter import ConntrackFilters
from gketrace_agent.observe.conntrack_lines import render_batch
from gketrace_agent.observe.conntrack_records import pack_batch
from gketrace_agent.observe.conntrack_table import open_conntrack
from tests.agent.observe.bed import PATHS, Bed, Netns, veth, wait_until
from tests.kernel.conntrack_made import Made, body, flows, make

LIBRARY = ctypes.CDLL("libnetfilter_conntrack.so.3")
LIBRARY.nfct_new.restype = ctypes.c_void_p
LIBRARY.nfct_destroy.argtypes = [ctypes.c_void_p]
LIBRARY.nfct_nlmsg_parse.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
LIBRARY.nfct_snprintf.argtypes = [ctypes.c_char_p, ctypes.c_uint, ctypes.c_void_p] + [
    ctypes.c_uint
] * 3
SEQUENCE = 0x7E5A1D00
EVENTS = {"NEW": 1, "UPDATE": 2, "DESTROY": 4}
TICKS = re.compile(rb"^(\S+ +\d+ )(\d+)( .*?)(?:(?<= delta-time=)(\d+)( .*))?$")


def library_line(message: bytes, event: str = "") -> str:
    """What conntrack(8)'s library makes of one message."""
    entry = LIBRARY.nfct_new()
    try:
        assert LIBRARY.nfct_nlmsg_parse(message, entry) == 0
        text = ctypes.create_string_buffer(4096)
        LIBRARY.nfct_snprintf(text, len(text), entry, EVENTS.get(event, 0), 0, 0)
        return text.value.decode()
    finally:
        LIBRARY.nfct_destroy(entry)


def message_of(parts: bytes, sequence: int = SEQUENCE) -> bytes:
    return struct.pack("=IHHII", 16 + len(parts), 0x100, 2, sequence, 0) + parts


def batch_of(messages: list[bytes]) -> Batch:
    words = np.frombuffer(b"".join(messages), np.uint32)
    starts = frame(words, SEQUENCE)
    assert starts is not None
    return Layouts().batch(words, starts)


ADDRESSES = {
    4: st.ip_addresses(v=4).map(str),
    6: st.one_of(
        st.ip_addresses(v=6),
        st.ip_addresses(v=6, network="::/90"),
        st.ip_addresses(v=6, network="::ffff:0:0/96"),
        st.ip_addresses(v=6, network="fd00::/112"),
    ).map(str),
}
PROTOCOLS = st.one_of(st.sampled_from((1, 6, 17, 33, 47, 58, 132, 136)), st.integers(0, 255))
U64 = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 100_000))


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A message as the kernel could send it."""
    version = draw(st.sampled_from((4, 6)))
    ports = st.integers(0, 65535)
    made = Made(
        src=draw(ADDRESSES[version]),
        dst=draw(ADDRESSES[version]),
        protocol=draw(PROTOCOLS),
        sport=draw(ports),
        dport=draw(st.integers(0, 255)),
        reply_src=draw(ADDRESSES[version]),
        reply_dst=draw(ADDRESSES[version]),
        reply_sport=draw(ports),
        reply_dport=draw(ports),
        state=draw(st.integers(0, 14)),
        status=draw(st.integers(0, 0xFFFF)),
        timeout=draw(st.integers(0, 2**32 - 1)),
        mark=draw(st.integers(0, 2**32 - 1)),
        zone=draw(st.integers(0, 65535)),
    )
    parts = body(made)
    if draw(st.booleans()):
        for kind in (9, 10):
            pair = [struct.pack("!Q", draw(U64)) for _ in range(2)]
            parts += nested(kind, attribute(1, pair[0]), attribute(2, pair[1]))
    if draw(st.booleans()):
        seconds = int(time.time()) - draw(st.integers(0, 10**6))
        parts += nested(20, attribute(1, struct.pack("!Q", seconds * 10**9 + 5)))
    if draw(st.integers(0, 9)) == 0:
        parts += nested(5, attribute(1, b"ftp\0"))
    if draw(st.integers(0, 9)) == 0:
        parts += nested(19, attribute(1, b"system_u:object_r:x:s0\0"))
    if draw(st.integers(0, 9)) > 0:
        parts += attribute(11, struct.pack("!I", draw(st.integers(0, 2**31))))
    parts += attribute(12, struct.pack("!I", draw(st.integers(0, 2**32 - 1))))
    return message_of(parts)


def in_one_second(work: Callable[[float], Any]) -> Any:
    """The result of `work`, all of whose looks at the clock fell into one second.

    time(3) reads a clock that is some milliseconds late.
    """
    while True:
        now = time.time()
        result = work(now)
        if now % 1 > 0.02 and int(time.time()) == int(now):
            return result


@settings(max_examples=300, deadline=None)
@given(st.lists(messages(), min_size=1, max_size=12))
def test_what_the_library_prints(given_messages: list[bytes]) -> None:
    def both(now: float) -> tuple[list[str], list[str], str]:
        theirs = [library_line(message) for message in given_messages]
        mine = [render_entry(entry_of(m, layout_of(m)), now=now) for m in given_messages]
        return theirs, mine, render_batch(batch_of(given_messages), now=now).decode()

    theirs, mine, together = in_one_second(both)
    assert mine == theirs
    assert together.splitlines() == theirs


@settings(max_examples=100, deadline=None)
@given(messages(), st.sampled_from(tuple(EVENTS)))
def test_events_as_the_library_prints_them(message: bytes, kind: str) -> None:
    def both(now: float) -> tuple[str, str]:
        entry = entry_of(message, layout_of(message))
        return library_line(message, kind), render_event(kind, entry, now=now)

    theirs, mine = in_one_second(both)
    assert mine == theirs


@settings(max_examples=200, deadline=None)
@given(st.lists(messages(), min_size=1, max_size=8))
def test_records_hold_what_the_messages_say(given_messages: list[bytes]) -> None:
    entries = [entry_of(message, layout_of(message)) for message in given_messages]
    records, others = pack_batch(batch_of(given_messages))
    back = [entry_from_record(record) for record in records_from_bytes(records)]
    assert sorted(map(repr, back + others)) == sorted(map(repr, entries))
    for entry in entries:
        record = record_of(entry)
        if record is None:
            assert entry in others
        else:
            assert entry_from_record(record) == entry


def ticks_of(line: bytes) -> tuple[bytes, int, int]:
    """A line without what ticks; the timeout; the age, or 0."""
    found = TICKS.match(line)
    assert found is not None, line
    name, timeout, rest, age, end = found.groups()
    return name + rest + (end or b""), int(timeout), int(age or 0)


@pytest.fixture(scope="module")
def varied() -> Iterator[Netns]:
    bed = Bed()
    try:
        node, client = bed.netns("node"), bed.netns("client")
        veth(node, "eth0", client, "eth0")
        for netns, number in ((node, 1), (client, 2)):
            netns.ip("addr", "add", f"10.9.0.{number}/24", "dev", "eth0")
            netns.ip("addr", "add", f"fd09::{number}/64", "dev", "eth0", "nodad")
        client.ip("route", "add", "10.43.0.0/16", "via", "10.9.0.1")
        for name in ("acct", "timestamp"):
            node.run("sysctl", "-q", f"net.netfilter.nf_conntrack_{name}=1")
        node.inside(lambda: make(entries()))
        by_tool(node)
        yield from by_traffic(node, client)
    finally:
        bed.close()


def entries() -> Iterator[Made]:
    one = Made(src="10.1.0.1", dst="10.1.0.2", timeout=86_400)
    for state in range(9):
        yield replace(one, sport=state + 1, dport=80, state=state, status=(0, 2, 6)[state % 3])
    for state in range(1, 8):
        yield replace(one, protocol=132, sport=state + 1, dport=38412, state=state)
    for protocol in (17, 136, 47, 50, 2, 99, 254):
        yield replace(one, protocol=protocol, sport=5, dport=7, mark=0x4000, status=2)
        yield replace(one, protocol=protocol, sport=5, dport=7, zone=9, src="255.255.255.254")
    yield replace(one, protocol=1, sport=77, dport=8)
    for source in ("fd00::1", "::ffff:10.0.0.1", "::10.0.0.1", "1:0:0:2::", "2001:db8::a:0:0:b"):
        v6 = replace(one, src=source, dst="fd00::", sport=1, dport=443)
        for protocol in (6, 17, 132, 99):
            yield replace(v6, protocol=protocol, mark=2**32 - 1, status=6)
        yield replace(v6, protocol=58, sport=9, dport=128, zone=65535)
    yield replace(one, sport=9999, dport=1, reply_src="10.2.0.9", reply_sport=8080, timeout=10**9)


def by_tool(node: Netns) -> None:
    """What only conntrack(8) asks the kernel for: NAT, zones of one direction, GRE's keys."""
    one = "-I -p tcp -s 10.3.0.1 -d 10.3.0.2 --sport 1 -t 3000 --state ESTABLISHED"
    for number, options in enumerate(
        (
            "--dst-nat 10.4.0.1:8080 -u SEEN_REPLY,ASSURED",
            "--src-nat 10.4.0.2 -u SEEN_REPLY",
            "--src-nat 10.4.0.3 --dst-nat 10.4.0.4",
            "--orig-zone 5",
            "--reply-zone 6",
            "--zone 7 -m 77",
        )
    ):
        node.run("conntrack", *f"{one} --dport {number + 1} {options}".split())
    gre = "-I -p gre -s 10.3.0.1 -d 10.3.0.2 --srckey 0x1234 --dstkey 0xff -t 3000"
    node.run("conntrack", *gre.split())


def by_traffic(node: Netns, client: Netns) -> Iterator[Netns]:
    """Connections that were opened, answered, translated, and one with a helper."""
    for rule in (
        "-t nat -A PREROUTING -d 10.43.0.10 -p tcp --dport 80"
        " -j DNAT --to-destination 10.9.0.1:8080",
        "-t mangle -A PREROUTING -p udp -j CONNMARK --set-mark 0x4000",
        "-t raw -A PREROUTING -p tcp --dport 2121 -j CT --helper ftp",
    ):
        node.run("iptables-nft", *rule.split())
    node.run("ip6tables-nft", "-A", "INPUT", "-m", "conntrack", "--ctstate", "NEW", "-j", "ACCEPT")
    servers = node.inside(
        lambda: [
            socket.create_server(("10.9.0.1", 8080)),
            socket.create_server(("10.9.0.1", 2121)),
            socket.create_server(("fd09::1", 8080), family=socket.AF_INET6),
        ]
    )

    def connect() -> list[socket.socket]:
        made = [
            socket.create_connection(target, timeout=5)
            for target in (("10.43.0.10", 80), ("10.9.0.1", 2121), ("fd09::1", 8080))
        ]
        for family, target in (
            (socket.AF_INET, ("10.9.0.1", 5353)),
            (socket.AF_INET6, ("fd09::1", 5353)),
        ):
            with socket.socket(family, socket.SOCK_DGRAM) as datagram:
                datagram.sendto(b"x" * 100, target)
        return made

    streams: list[socket.socket] = []
    try:
        streams = client.inside(connect)
        send_echo(client)
        wait_until(lambda: node.run("conntrack", "-L").count("ESTABLISHED src=10.9.0.2") == 2)
        # Neighbour discovery comes and goes with the neighbours' states.
        yield node
    finally:
        for one in (*streams, *servers):
            one.close()


def send_echo(client: Netns) -> None:
    """An echo request of each family, which the kernel answers."""

    def send() -> None:
        for family, protocol, kind, target in (
            (socket.AF_INET, socket.IPPROTO_ICMP, 8, "10.9.0.1"),
            (socket.AF_INET6, socket.IPPROTO_ICMPV6, 128, "fd09::1"),
        ):
            with socket.socket(family, socket.SOCK_RAW, protocol) as raw:
                echo = struct.pack("!BBHHH", kind, 0, 0, 4242, 1)
                total = sum(struct.unpack("!4H", echo))
                check = 0 if family == socket.AF_INET6 else 0xFFFF - total % 0xFFFF
                raw.sendto(echo[:2] + struct.pack("!H", check) + echo[4:], (target, 0))

    client.inside(send)


def lines_of(node: Netns) -> list[bytes]:
    with open_conntrack(node.handle, PATHS) as table:
        reading = table.read(ConntrackFilters())
        text = b"".join(render_batch(batch, now=time.time()) for batch in reading.batches())
        assert reading.consistent
        return text.splitlines()


def test_our_list_is_conntracks_byte_for_byte(varied: Netns) -> None:
    def listed() -> list[bytes]:
        return varied.run("conntrack", "-L").encode().splitlines()

    for _ in range(20):
        before, mine, after = listed(), lines_of(varied), listed()
        first, second, third = (
            [ticks_of(line) for line in lines] for lines in (before, mine, after)
        )
        if [line for line, _, _ in first] == [line for line, _, _ in third]:
            break  # nothing came or went in between
    assert [line for line, _, _ in second] == [line for line, _, _ in first]
    for (_, timeout_1, age_1), (_, timeout, age), (_, timeout_2, age_2) in zip(
        first, second, third, strict=True
    ):
        assert timeout_1 >= timeout >= timeout_2 or timeout_1 < timeout_2  # refreshed meanwhile
        assert age_1 <= age <= age_2
    text = b"\n".join(mine)
    for sample in (
        b"tcp      6 ",
        b"udp      17 ",
        b"udplite  136 ",
        b"icmp     1 ",
        b"icmpv6   58 ",
        b"sctp     132 ",
        b"gre      47 ",
        b"unknown  99 ",
        b"srckey=0x1234 dstkey=0xff",
        b"[UNREPLIED]",
        b"[ASSURED]",
        b"mark=16384",
        b"zone=9",
        b"zone-orig=5",
        b"zone-reply=6",
        b"packets=1 ",
        b"delta-time=",
        b"helper=ftp",
        b"::ffff:10.0.0.1",
        b"dst=10.43.0.10",
    ):
        assert sample in text, sample


def test_a_table_that_changes_shows_nothing_twice_and_nothing_invented() -> None:
    """Entries come and go, at random places of the hash table, while it is being read."""
    bed = Bed()
    stop = threading.Event()
    failures: list[BaseException] = []
    try:
        node = bed.netns("churn")
        stable = list(flows(10_000))
        node.inside(lambda: make(stable))
        restless = [replace(one, dst="10.99.0.1", reply_src="10.99.0.1") for one in flows(3_000)]

        def churn() -> None:
            try:
                while not stop.is_set():
                    for start in range(0, len(restless), 200):
                        make(restless[start : start + 200])
                    for start in range(0, len(restless), 200):
                        make(restless[start : start + 200], delete=True)
            except OSError as error:
                failures.append(error)

        churning = threading.Thread(target=lambda: node.inside(churn))
        churning.start()
        wanted = {key(one) for one in stable}
        possible = wanted | {key(one) for one in restless}
        doubled = 0
        with open_conntrack(node.handle, PATHS) as table:
            for _ in range(10):
                reading = table.read(ConntrackFilters())
                found = [
                    (str(e.orig.src), str(e.orig.dst), e.orig.protocol, e.orig.sport, e.orig.dport)
                    for batch in reading.batches()
                    for e in map(entry_from_record, records_from_bytes(pack_batch(batch)[0]))
                ]
                doubled += reading.duplicates
                assert len(found) == len(set(found)), "an entry came twice"
                assert set(found) <= possible, "an entry that never was"
                assert wanted <= set(found), "an entry that was there all the time is missing"
                assert reading.consistent
        print(f"doubled by the kernel and left out: {doubled}")
    finally:
        stop.set()
        churning.join(30)
        bed.close()
    assert not failures


def key(made: Made) -> tuple[str, str, int, int, int]:
    return made.src, made.dst, made.protocol, made.sport, made.dport
