"""Filters of events in the kernel, against what the filters themselves take."""

from __future__ import annotations

from ipaddress import ip_network

from gketrace_agent.kernel.conntrack_bpf import events_program
from gketrace_agent.kernel.conntrack_events import EventKind, EventSocket
from gketrace_agent.kernel.netns import run_in_netns
from gketrace_agent.observe.conntrack_filter import ConntrackFilter, ConntrackFilters
from tests.agent.observe.bed import Bed
from tests.kernel.conntrack_made import Made, make

DOOR = ConntrackFilter(protocol=6, orig_dst=ip_network("10.1.0.2/32"), orig_dport=80)
UDP_DOOR = ConntrackFilter(protocol=17, orig_dst=ip_network("10.1.0.2/32"), orig_dport=53)
ENDPOINT = ConntrackFilter(protocol=6, reply_src=ip_network("10.40.0.6/32"), reply_sport=8080)
SIX = ConntrackFilter(protocol=6, orig_dst=ip_network("fd00::2/128"), orig_dport=80)
SIX_ENDPOINT = ConntrackFilter(protocol=6, reply_src=ip_network("fd00:40::6/128"), reply_sport=8080)
POD = ConntrackFilter(address=ip_network("10.40.0.6/32"))
ENTRIES = (
    Made(src="10.1.0.1", dst="10.1.0.2", sport=1, dport=80),
    Made(src="10.1.0.1", dst="10.1.0.2", sport=2, dport=81),
    Made(src="10.1.0.1", dst="10.1.0.3", sport=3, dport=80),
    Made(src="10.1.0.1", dst="10.1.0.2", sport=4, dport=53, protocol=17),
    Made(src="10.1.0.1", dst="10.1.0.2", sport=5, dport=80, protocol=17),
    Made(src="10.1.0.1", dst="10.40.0.6", sport=6, dport=8080),
    Made(src="10.1.0.1", dst="10.40.0.6", sport=7, dport=8081),
    Made(src="10.1.0.1", dst="10.9.0.1", sport=8, dport=9, reply_src="10.40.0.6", reply_sport=8080),
    Made(src="10.40.0.6", dst="10.9.0.1", sport=9, dport=9),
    Made(src="10.1.0.1", dst="10.40.0.6", sport=10, dport=8, protocol=1),
    Made(src="fd00::1", dst="fd00::2", sport=11, dport=80),
    Made(src="fd00::1", dst="fd00::3", sport=12, dport=80),
    Made(src="fd00::1", dst="fd00:40::6", sport=13, dport=8080),
    Made(src="fd00::1", dst="fd00:40::6", sport=14, dport=8081),
)


def came(bed: Bed, name: str, *filters: ConntrackFilter) -> tuple[set[int], set[int]]:
    """The ports of what the kernel lets through, and of what is wanted of it."""
    netns = bed.netns(name)
    wanted = ConntrackFilters(filters)
    events = run_in_netns(
        netns.handle, lambda: EventSocket(frozenset({EventKind.NEW}), wanted.kernel())
    )
    try:
        netns.inside(lambda: make(ENTRIES))
        entries = []
        while (read := events.read(0.3)[0]) is not None:
            entries += list(read.batch.entries())
    finally:
        events.close()
    all_of_them = {one.orig.sport or 0 for one in entries}
    return all_of_them, {one.orig.sport or 0 for one in entries if wanted.takes(one)}


def test_several_filters_are_a_union(bed: Bed) -> None:
    let_through, wanted = came(bed, "bpfu", DOOR, UDP_DOOR, ENDPOINT, SIX, SIX_ENDPOINT)
    assert wanted == {1, 4, 6, 8, 11, 13}
    assert let_through == wanted


def test_an_address_anywhere(bed: Bed) -> None:
    let_through, wanted = came(bed, "bpfp", POD)
    assert wanted == {6, 7, 8, 9, 10}
    assert let_through == wanted


def test_ranges_are_left_to_the_filters(bed: Bed) -> None:
    let_through, wanted = came(bed, "bpfr", ConntrackFilter(orig_dst=ip_network("10.1.0.0/24")))
    assert wanted == {1, 2, 3, 4, 5}
    assert let_through >= wanted
    assert 11 not in let_through


def test_too_many_filters_are_no_program() -> None:
    many = [
        ConntrackFilter(protocol=6, orig_dst=ip_network(f"10.{n >> 8}.{n & 255}.1/32"))
        for n in range(1000)
    ]
    assert events_program(ConntrackFilters(many).kernel()) == b""
    assert events_program(ConntrackFilters(many[:100]).kernel())
    assert events_program(ConntrackFilters((DOOR, ConntrackFilter())).kernel()) == b""
