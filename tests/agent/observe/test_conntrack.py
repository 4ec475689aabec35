from __future__ import annotations

import socket
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from gketrace.conntrack import ConntrackEntry, CtStatus
from gketrace.packet import Protocol, Tuple5, protocol_number
from gketrace.snapshot import Unavailable
from gketrace_agent.kernel.conntrack_dump import TableReading
from gketrace_agent.kernel.netns import run_in_netns
from gketrace_agent.observe.conntrack import Conntrack
from gketrace_agent.observe.conntrack_filter import ConntrackFilter, ConntrackFilters
from gketrace_agent.observe.conntrack_table import open_conntrack
from gketrace_agent.observe.snapshot import Observer
from tests.agent.observe.bed import PATHS, Bed, Netns, veth, wait_until


@contextmanager
def conntrack(netns: Netns) -> Iterator[Conntrack]:
    with Observer().observe(netns.namespace()) as observation:
        view = observation.conntrack
        assert isinstance(view, Conntrack)
        assert observation.snapshot.conntrack is view
        yield view


def read(
    netns: Netns, wanted: ConntrackFilter | None = None
) -> tuple[list[ConntrackEntry], TableReading]:
    """The whole table, or what a filter takes of it."""
    with open_conntrack(netns.handle, PATHS) as table:
        reading = table.read(ConntrackFilters((wanted or ConntrackFilter(),)))
        found = [entry for batch in reading.batches() for entry in batch.entries()]
    assert reading.consistent
    return found, reading


def parse(entry: ElementTree.Element) -> ConntrackEntry:
    """One <flow> of ``conntrack -L -o xml``."""
    halves: dict[str, Any] = {}
    for meta in entry.findall("meta"):
        direction = meta.get("direction")
        if direction in ("original", "reply"):
            three, four = meta.find("layer3"), meta.find("layer4")
            assert three is not None
            assert four is not None
            ports = {child.tag: int(child.text or "0") for child in four}
            addresses = {child.tag: ip_address(child.text or "") for child in three}
            protocol = protocol_number(four.get("protoname") or "")
            icmp = protocol in (Protocol.ICMP, Protocol.ICMPV6)
            halves[direction] = Tuple5(
                src=addresses["src"],
                dst=addresses["dst"],
                protocol=protocol,
                sport=ports.get("id") if icmp else ports.get("sport"),
                dport=ports.get("dport"),
                icmp_type=ports.get("type"),
                icmp_code=ports.get("code"),
            )
    independent = next(m for m in entry.findall("meta") if m.get("direction") == "independent")
    values = {child.tag: child.text or "" for child in independent}
    return ConntrackEntry(
        orig=halves["original"],
        reply=halves["reply"],
        tcp_state=values.get("state", ""),
        mark=int(values.get("mark", 0)),
        zone=int(values.get("zone", 0)),
        id=int(values["id"]),
    )


def listed(netns: Netns, *options: str) -> dict[int, ConntrackEntry]:
    """What conntrack(8) lists, by id."""
    found: dict[int, ConntrackEntry] = {}
    for family in ("ipv4", "ipv6"):
        text = netns.run("conntrack", "-L", "-f", family, "-o", "xml,id", *options)
        for flow in ElementTree.fromstring(text).findall("flow") if text.strip() else ():
            entry = parse(flow)
            assert entry.id is not None
            found[entry.id] = entry
    return found


@pytest.fixture(scope="module")
def busy() -> Iterator[tuple[Netns, list[Tuple5]]]:
    """A node that tracks TCP, UDP and ICMP of both families; and the tuples that were sent."""
    bed = Bed()
    try:
        yield from converse(bed)
    finally:
        bed.close()


def converse(bed: Bed) -> Iterator[tuple[Netns, list[Tuple5]]]:
    node, client = bed.netns("node"), bed.netns("client")
    veth(node, "eth0", client, "eth0")
    for netns, number in ((node, 1), (client, 2)):
        netns.ip("addr", "add", f"10.9.0.{number}/24", "dev", "eth0")
        netns.ip("addr", "add", f"fd09::{number}/64", "dev", "eth0", "nodad")
    client.ip("route", "add", "10.43.0.0/16", "via", "10.9.0.1")
    node.run("sysctl", "-q", "net.netfilter.nf_conntrack_acct=1")
    for kind in ("udp", "icmp"):  # half a minute is soon over on a busy machine
        node.run("sysctl", "-q", f"net.netfilter.nf_conntrack_{kind}_timeout=600")
    for rule in (
        "-t nat -A PREROUTING -d 10.43.0.10 -p tcp --dport 80"
        " -j DNAT --to-destination 10.9.0.1:8080",
        "-t mangle -A PREROUTING -p udp -j CONNMARK --set-mark 0x4000",
        "-t raw -A PREROUTING -p udp --dport 5354 -j CT --zone 7",
    ):
        node.run("iptables-nft", *rule.split())
    node.run("ip6tables-nft", "-A", "INPUT", "-m", "conntrack", "--ctstate", "NEW", "-j", "ACCEPT")
    sent: list[Tuple5] = []
    server = run_in_netns(node.handle, lambda: socket.create_server(("10.9.0.1", 8080)))

    def send() -> socket.socket:
        stream = socket.create_connection(("10.43.0.10", 80), timeout=5)
        sent.append(tuple_of(stream, Protocol.TCP))
        for family, target in (
            (socket.AF_INET, ("10.9.0.1", 5353)),
            (socket.AF_INET, ("10.9.0.1", 5354)),
            (socket.AF_INET6, ("fd09::1", 5353)),
        ):
            with socket.socket(family, socket.SOCK_DGRAM) as datagram:
                datagram.connect(target)
                datagram.send(b"x")
                sent.append(tuple_of(datagram, Protocol.UDP))
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
            echo = struct.pack("!BBHHH", 8, 0, 0, 4242, 1)
            checksum = 0xFFFF - sum(struct.unpack("!4H", echo)) % 0xFFFF
            raw.sendto(echo[:2] + struct.pack("!H", checksum) + echo[4:], ("10.9.0.1", 0))
            sent.append(
                Tuple5(
                    src=ip_address("10.9.0.2"),
                    dst=ip_address("10.9.0.1"),
                    protocol=Protocol.ICMP,
                    sport=4242,
                    icmp_type=8,
                    icmp_code=0,
                )
            )
        return stream

    stream = client.inside(send)
    try:
        wait_until(
            lambda: {e.orig for e in listed(node).values()} >= {without_icmp(t) for t in sent}
        )
        yield node, sent
    finally:
        stream.close()
        server.close()


def tuple_of(sock: socket.socket, protocol: Protocol) -> Tuple5:
    here, there = sock.getsockname(), sock.getpeername()
    return Tuple5(
        src=ip_address(here[0]),
        dst=ip_address(there[0]),
        protocol=protocol,
        sport=here[1],
        dport=there[1],
    )


def without_icmp(tuple5: Tuple5) -> Tuple5:
    """conntrack's XML leaves the type, code and identifier of ICMP out."""
    if tuple5.protocol not in (Protocol.ICMP, Protocol.ICMPV6):
        return tuple5
    return replace(tuple5, sport=None, icmp_type=None, icmp_code=None)


def same(mine: ConntrackEntry, theirs: ConntrackEntry) -> None:
    assert without_icmp(mine.orig) == theirs.orig
    assert without_icmp(mine.reply) == theirs.reply
    for name in ("tcp_state", "mark", "zone"):
        assert getattr(mine, name) == getattr(theirs, name), name


def test_entries_are_those_of_conntrack(busy: tuple[Netns, list[Tuple5]]) -> None:
    node, sent = busy
    with conntrack(node) as view:
        assert view.tracked
    found, reading = read(node)
    assert (reading.readings, reading.duplicates, reading.read) == (1, 0, len(found))
    theirs = listed(node)
    mine = {entry.id: entry for entry in found}
    assert mine.keys() == theirs.keys()
    for number, entry in theirs.items():
        same(mine[number], entry)
    assert {entry.orig for entry in found} >= set(sent)
    (icmp,) = (entry for entry in found if entry.orig.protocol == Protocol.ICMP)
    printed = node.run("conntrack", "-L", "-p", "icmp").split()
    for words, half in ((printed[5:8], icmp.orig), (printed[12:15], icmp.reply)):
        assert words == [
            f"type={half.icmp_type}",
            f"code={half.icmp_code}",
            f"id={half.sport}",
        ], printed


def test_lookup_finds_an_entry_from_both_sides(busy: tuple[Netns, list[Tuple5]]) -> None:
    node, sent = busy
    theirs = {entry.orig: entry for entry in listed(node).values()}
    with conntrack(node) as view:
        for tuple5 in sent:
            zone = 7 if tuple5.dport == 5354 else 0
            found = view.lookup(tuple5, zone)
            assert isinstance(found, ConntrackEntry), tuple5
            same(found, theirs[without_icmp(tuple5)])
            assert view.lookup(found.reply, zone) is not None
            back = view.lookup(found.reply, zone)
            assert isinstance(back, ConntrackEntry)
            assert back.id == found.id
        tcp = view.lookup(sent[0])
        assert isinstance(tcp, ConntrackEntry)
        assert tcp.tcp_state == "ESTABLISHED"
        assert tcp.dst_nat
        assert not tcp.src_nat
        assert tcp.status & CtStatus.ASSURED
        assert str(tcp.reply.src) == "10.9.0.1"
        assert tcp.reply.sport == 8080
        assert tcp.orig_packets is not None
        assert tcp.orig_packets >= 2
        assert tcp.orig_bytes is not None
        assert tcp.orig_bytes > 80
        assert tcp.timeout is not None
        assert tcp.timeout > 1000
        udp = view.lookup(sent[1])
        assert isinstance(udp, ConntrackEntry)
        assert udp.mark == 0x4000


def test_lookup_of_what_is_not_there_or_not_known(busy: tuple[Netns, list[Tuple5]]) -> None:
    node, sent = busy
    with conntrack(node) as view:
        other = Tuple5(src=sent[0].src, dst=sent[0].dst, protocol=Protocol.TCP, sport=1, dport=80)
        assert view.lookup(other) is None
        assert view.lookup(sent[2]) is None, "that one is in zone 7"
        unknown = Tuple5(src=sent[0].src, dst=sent[0].dst, protocol=Protocol.TCP, dport=80)
        answer = view.lookup(unknown)
        assert isinstance(answer, Unavailable)
        assert "unknown port" in answer.reason
        gre = Tuple5(src=sent[0].src, dst=sent[0].dst, protocol=Protocol.GRE)
        assert not isinstance(view.lookup(gre), ConntrackEntry)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (ConntrackFilter(family=4, protocol=Protocol.TCP), [0]),
        (ConntrackFilter(family=6, protocol=Protocol.UDP), [3]),
        (ConntrackFilter(protocol=Protocol.ICMP), [4]),
        (ConntrackFilter(orig_dst=ip_network("10.43.0.10")), [0]),
        (ConntrackFilter(orig_dst=ip_network("10.43.0.0/16")), [0]),
        (ConntrackFilter(reply_src=ip_network("10.9.0.1"), protocol=6), [0]),
        (ConntrackFilter(protocol=Protocol.UDP, orig_dport=5353), [1, 3]),
        (ConntrackFilter(family=4, protocol=Protocol.UDP, orig_dport=5353), [1]),
        (ConntrackFilter(orig_dport=5353), [1, 3]),
        (ConntrackFilter(reply_sport=8080), [0]),
        (ConntrackFilter(mark=0x4000), [1, 2]),
        (ConntrackFilter(mark=0x4000, mark_mask=0xF000, zone=0), [1]),
        (ConntrackFilter(zone=7), [2]),
        (ConntrackFilter(address=ip_network("10.43.0.10/32")), [0]),
        (ConntrackFilter(orig_src=ip_network("10.1.0.0/16")), []),
        (ConntrackFilter(tcp_state="ESTABLISHED"), [0]),
        (ConntrackFilter(status=CtStatus.DST_NAT, status_mask=CtStatus.DST_NAT), [0]),
        (ConntrackFilter(status=0, status_mask=CtStatus.SEEN_REPLY), [1, 2, 3]),
        (ConntrackFilter(address=ip_network("fd09::1")), [3]),
        (ConntrackFilter(orig_dst=ip_network("fd09::1"), protocol=17, orig_dport=5353), [3]),
        (ConntrackFilter(orig_src=ip_network("fd09::/57")), [3]),
        (ConntrackFilter(orig_src=ip_network("10.8.0.0/15"), protocol=17), [1, 2]),
        (ConntrackFilter(reply_dst=ip_network("10.9.0.2"), reply_dport=1), []),
    ],
    ids=lambda value: "" if isinstance(value, list) else None,
)
def test_filters(
    busy: tuple[Netns, list[Tuple5]], wanted: ConntrackFilter, expected: list[int]
) -> None:
    node, sent = busy
    found, _ = read(node, wanted)
    mine = [entry.orig for entry in found if entry.orig in sent]
    assert set(mine) == {sent[number] for number in expected}
    assert len(mine) == len(expected)
    everything, _ = read(node)
    taken = {entry.id for entry in everything if wanted.takes(entry)}
    assert {entry.id for entry in found} == taken, "an entry and a column must be judged alike"


def test_nothing_tracks_where_no_rule_asks(bed: Bed) -> None:
    netns = bed.netns("idle")
    with conntrack(netns) as view:
        assert not view.tracked
    assert read(netns)[0] == []
    netns.run("iptables-nft", "-A", "INPUT", "-p", "tcp", "-j", "ACCEPT")
    with conntrack(netns) as view:
        assert not view.tracked
    netns.run("iptables-nft", "-A", "INPUT", "-m", "conntrack", "--ctstate", "NEW")
    with conntrack(netns) as view:
        assert view.tracked


def test_after_close_it_says_so(bed: Bed) -> None:
    netns = bed.netns("closed")
    with conntrack(netns) as view:
        pass
    tuple5 = Tuple5(
        src=ip_address("10.0.0.1"), dst=ip_address("10.0.0.2"), protocol=6, sport=1, dport=2
    )
    assert isinstance(view.lookup(tuple5), Unavailable)
