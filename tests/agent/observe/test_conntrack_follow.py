"""Following a table: the kernel's events, losses, polls."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from gketrace.conntrack_records import entry_from_record, records_from_bytes
from gketrace_agent.conntracks import list_entries
from gketrace_agent.kernel.conntrack_events import EventKind
from gketrace_agent.observe.conntrack_filter import ConntrackFilter, ConntrackFilters
from gketrace_agent.observe.conntrack_follow import EXISTING, Changes, Follower
from gketrace_agent.observe.conntrack_lines import render_batch
from gketrace_agent.observe.conntrack_table import open_conntrack
from tests.agent.observe.bed import PATHS, Bed, Netns, wait_until
from tests.kernel.conntrack_made import Made, make

ALL = frozenset(EventKind)
ONE = Made(src="10.1.0.1", dst="10.1.0.2", sport=1, dport=80, timeout=1000)


class Watch:
    """Reads a follower in a thread of its own."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower
        self.seen: list[tuple[int, str, int | None, bool]] = []
        self.lines: list[str] = []
        self.rounds = 0
        self.go = threading.Event()
        self.go.set()
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        wait_until(lambda: self.rounds > 0)

    def run(self) -> None:
        try:
            for one in self.follower.changes():
                self.go.wait(20)
                if self.stop.is_set():
                    return
                if one is None:
                    self.rounds += 1
                elif isinstance(one, Changes):
                    text = render_batch(one.batch, now=time.time(), kinds=one.kinds)
                    self.lines += text.decode().splitlines()
                    for place, entry in one.batch.placed():
                        kind = int(one.kinds[place])
                        self.seen.append((kind, str(entry.orig.src), entry.orig.sport, False))
                else:
                    for record in records_from_bytes(one.records.tobytes()):
                        entry = entry_from_record(record)
                        self.seen.append((one.kind, str(entry.orig.src), entry.orig.sport, True))
        except BaseException as error:  # noqa: BLE001 - shown by the test's own thread
            self.errors.append(error)

    def wait(self, ready: Callable[[], bool]) -> None:
        wait_until(lambda: bool(self.errors) or ready(), 60)
        assert not self.errors, self.errors


@contextmanager
def follow(
    netns: Netns,
    wanted: ConntrackFilter | None = None,
    kinds: frozenset[EventKind] = ALL,
    *,
    existing: bool = False,
) -> Iterator[Watch]:
    filters = ConntrackFilters((wanted or ConntrackFilter(),))
    with (
        open_conntrack(netns.handle, PATHS) as table,
        closing(table.follow(filters, kinds, existing=existing, poll_seconds=0.2)) as follower,
    ):
        watch = Watch(follower)
        try:
            yield watch
        finally:
            watch.stop.set()
            watch.go.set()
            watch.thread.join(10)


def change(netns: Netns, made: Made) -> None:
    netns.inside(lambda: make([replace(made, mark=9)], update=True))


def test_events_in_the_order_in_which_they_happened(bed: Bed) -> None:
    netns = bed.netns("events")
    with follow(netns) as watch:
        netns.inside(lambda: make([ONE]))
        change(netns, ONE)
        netns.inside(lambda: make([ONE], delete=True))
        netns.inside(lambda: make([ONE]))
        watch.wait(lambda: len(watch.seen) >= 4)
        assert watch.follower.lost == watch.follower.overruns == 0
    assert [kind for kind, *_ in watch.seen] == [1, 2, 3, 1]


def test_lines_are_those_of_conntrack(bed: Bed) -> None:
    netns = bed.netns("lines")
    argv = ["ip", "netns", "exec", netns.name, "stdbuf", "-oL", "conntrack", "-E"]
    theirs = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        with follow(netns) as watch:
            wait_until(lambda: listeners(netns) >= 2)
            some = [replace(ONE, sport=n, protocol=p) for n in range(1, 4) for p in (6, 17, 132)]
            netns.inside(lambda: make(some))
            change(netns, some[0])
            netns.inside(lambda: make(some, delete=True))
            watch.wait(lambda: len(watch.lines) >= 19)
        theirs.terminate()
        listed = theirs.communicate(timeout=10)[0].splitlines()
    finally:
        theirs.kill()
        theirs.wait(10)
    # It adds which program asked the kernel for a change, where one did.
    ticking = re.compile(r"(?<=\] )(\S+ +\d+ )\d+ | \[USERSPACE\].*")
    assert [ticking.sub(r"\1", line) for line in watch.lines] == [
        ticking.sub(r"\1", line) for line in listed
    ]


def listeners(netns: Netns) -> int:
    """Sockets that listen to netfilter's groups."""
    rows = [line.split() for line in netns.run("cat", "/proc/net/netlink").splitlines()[1:]]
    return sum(1 for row in rows if row[1] == "12" and int(row[3], 16))


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (ConntrackFilter(orig_src=ip_network("10.1.0.1")), {("10.1.0.1", 1), ("10.1.0.1", 9)}),
        (ConntrackFilter(family=4, protocol=17), {("10.1.0.1", 9)}),
        (ConntrackFilter(orig_dst=ip_network("fd00::2")), {("fd00::1", 1)}),
        (ConntrackFilter(orig_src=ip_network("10.0.0.0/8"), orig_sport=1), {("10.1.0.1", 1)}),
        (ConntrackFilter(protocol=6, orig_dport=80, family=6), {("fd00::1", 1)}),
        (ConntrackFilter(address=ip_network("10.1.0.7")), {("10.1.0.7", 7)}),
    ],
)
def test_filters(bed: Bed, wanted: ConntrackFilter, expected: set[tuple[str, int]]) -> None:
    netns = bed.netns("filters")
    everything = [
        ONE,
        replace(ONE, src="fd00::1", dst="fd00::2"),
        replace(ONE, src="10.1.0.7", sport=7, protocol=132),
        replace(ONE, sport=9, protocol=17, dport=53),
    ]
    with follow(netns, wanted, frozenset({EventKind.NEW})) as watch:
        netns.inside(lambda: make(everything))
        netns.inside(lambda: make(everything, delete=True))
        watch.wait(lambda: len(watch.seen) >= len(expected))
    assert {(src, sport) for _, src, sport, _ in watch.seen} == expected
    assert {kind for kind, *_ in watch.seen} == {EventKind.NEW}


def test_entries_older_than_the_first_listener_are_polled(bed: Bed) -> None:
    netns = bed.netns("older")
    netns.run("sysctl", "-q", "net.netfilter.nf_conntrack_events=2")
    old = replace(ONE, sport=50)
    netns.inside(lambda: make([old]))
    with follow(netns, existing=True) as watch:
        watch.wait(lambda: bool(watch.seen))
        assert watch.seen == [(EXISTING, "10.1.0.1", 50, False)]
        watch.wait(lambda: watch.follower.mode == "events+poll")
        netns.inside(lambda: make([ONE]))
        netns.inside(lambda: make([old], delete=True))
        watch.wait(lambda: len(watch.seen) >= 3)
        watch.wait(lambda: watch.follower.mode == "events")
    kinds = {(kind, sport) for kind, _, sport, _ in watch.seen[1:]}
    assert kinds == {(EventKind.NEW, 1), (EventKind.DESTROY, 50)}


def test_a_kernel_that_sends_none_is_polled(bed: Bed) -> None:
    netns = bed.netns("silent")
    netns.run("sysctl", "-q", "net.netfilter.nf_conntrack_events=0")
    netns.inside(lambda: make([ONE]))
    with follow(netns) as watch:
        assert watch.follower.mode == "poll"
        assert "nf_conntrack_events is 0" in watch.follower.reason
        rounds = watch.rounds
        watch.wait(lambda: watch.rounds > rounds)
        netns.inside(lambda: make([replace(ONE, sport=2)]))
        watch.wait(lambda: len(watch.seen) >= 1)
        change(netns, replace(ONE, sport=2))
        watch.wait(lambda: len(watch.seen) >= 2)
        netns.inside(lambda: make([ONE], delete=True))
        watch.wait(lambda: len(watch.seen) >= 3)
    assert [(kind, sport, polled) for kind, _, sport, polled in watch.seen] == [
        (EventKind.NEW, 2, True),
        (EventKind.UPDATE, 2, True),
        (EventKind.DESTROY, 1, True),
    ]


def test_a_loss_is_counted_as_the_kernel_counts_it_and_the_table_is_read_again(bed: Bed) -> None:
    netns = bed.netns("loss")
    entries = [replace(ONE, src=f"10.2.{n // 250}.{n % 250}", sport=n) for n in range(2000)]
    with follow(netns) as watch:
        watch.go.clear()  # stops reading, so that the buffer overflows
        sent = 0
        while not drops(netns):
            netns.inside(lambda: make(entries))
            netns.inside(lambda: make(entries, delete=True))
            sent += 2 * len(entries)
        netns.inside(lambda: make(entries))
        sent += len(entries)
        watch.go.set()
        watch.wait(lambda: count(watch, EXISTING) == len(entries))
        assert watch.follower.resyncs == 1
        told = len(watch.seen) - len(entries)
        assert watch.follower.lost == drops(netns) > 0
        assert watch.follower.overruns >= 1
        assert told + watch.follower.lost == sent


def count(watch: Watch, kind: int) -> int:
    return sum(1 for one in watch.seen if one[0] == kind)


def drops(netns: Netns) -> int:
    """What /proc/net/netlink says of the sockets that listen."""
    rows = [line.split() for line in netns.run("cat", "/proc/net/netlink").splitlines()[1:]]
    return sum(int(row[8]) for row in rows if row[1] == "12" and int(row[3], 16))


def test_what_may_not_be_seen_is_in_no_count_and_wakes_nobody(bed: Bed) -> None:
    """A filter on others' connections says nothing of them, not even how many there are."""
    netns = bed.netns("own")
    other = replace(ONE, src="10.1.0.9")
    netns.inside(lambda: make([ONE, other]))
    filters = ConntrackFilters(
        (ConntrackFilter(orig_dst=ip_network("10.1.0.2/32")),),
        among=lambda: frozenset({ip_address("10.1.0.1"), ip_address("fd00::1")}),
    )
    with open_conntrack(netns.handle, PATHS) as table:
        (batch,) = table.read(filters).batches()
        assert [str(entry.orig.src) for entry in batch.entries()] == ["10.1.0.1"]
        replies = list(list_entries(table, filters, 0, 1))
        assert not replies[-1].summary.truncated
        assert all(reply.entries or reply.HasField("summary") for reply in replies)
        follower = table.follow(filters, ALL, existing=True, poll_seconds=0.2)
        with closing(follower):
            watch = Watch(follower)
            try:
                netns.inside(lambda: make([replace(other, sport=2), replace(ONE, sport=2)]))
                watch.wait(lambda: len(watch.seen) >= 2)
                assert {src for _, src, _, _ in watch.seen} == {"10.1.0.1"}
                assert re.match(r"$|.*: 1 entries are older", follower.reason)
            finally:
                watch.stop.set()
                watch.thread.join(10)
