"""Following new flows: ``python -m tests.bench.follow --json``.

UDP packets, each of a flow of its own, are sent at a steady rate in a namespace for some seconds,
with the agent's follower listening (events → lines, as FollowConntrack sends them), then with
``conntrack -E``.  A rate is sustained when every flow was told.  Then 10,000 flows a second for 30
seconds: what was told and what the kernel says it dropped must add up to what was made.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from gketrace_agent.kernel.conntrack_events import EventKind
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import open_path, run_in_netns
from gketrace_agent.observe.conntrack_filter import ConntrackFilters
from gketrace_agent.observe.conntrack_follow import Changes, Follower
from gketrace_agent.observe.conntrack_lines import render_batch
from gketrace_agent.observe.conntrack_table import open_conntrack
from tests.agent.observe.bed import Bed, Netns, wait_until
from tests.bench.report import arguments, goal, report
from tests.kernel.conntrack_made import Maker

RATES = (5_000, 10_000, 20_000, 40_000)
SHORT, LONG = 3, 30
SINK = 9
FLUSH = 100_000
"""Flows that are there at a time: the kernel bounds them."""


def packets(count: int) -> list[bytes]:
    """UDP packets to one port here, each from an address and port of its own."""
    made = []
    for number in range(count):
        source = 0x7F010000 + number // 50_000
        head = struct.pack("!BBHHHBBHII", 0x45, 0, 29, 0, 0, 64, 17, 0, source, 0x7F000001)
        made.append(head + struct.pack("!HHHH", 1024 + number % 50_000, SINK, 9, 0) + b"x")
    return made


def produce(path: str, rate: int, seconds: float) -> None:
    """Opens flows at a rate; prints how many, and how fast."""
    ready = packets(int(rate * seconds))

    def work() -> tuple[int, float]:
        made = flushed = 0
        with (
            Maker() as maker,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink,
            socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw,
        ):
            sink.bind(("127.0.0.1", SINK))  # so that nobody answers with ICMP
            begin = time.perf_counter()
            for start in range(0, len(ready), 100):
                while made > (time.perf_counter() - begin) * rate:
                    time.sleep(0.001)
                for packet in ready[start : start + 100]:
                    raw.sendto(packet, ("127.0.0.1", 0))
                made += len(ready[start : start + 100])
                if made - flushed > FLUSH:
                    maker.flush()
                    flushed = made
            return made, time.perf_counter() - begin

    with open_path(Path(path)) as handle:
        made, took = run_in_netns(handle, work)
    print(made, made / took)


def tracking(bed: Bed, name: str) -> Netns:
    """A namespace that tracks what it sends itself."""
    netns = bed.netns(name)
    rule = "-A INPUT -m conntrack --ctstate NEW -j ACCEPT"
    netns.run("iptables-nft", *rule.split())
    return netns


@contextmanager
def producing(netns: Netns, rate: int, seconds: float) -> Iterator[Callable[[], tuple[int, float]]]:
    """In a process of its own, as the reader must not wait for the maker's lock."""
    argv = [sys.executable, "-m", "tests.bench.follow", "--produce"]
    argv += [f"/run/netns/{netns.name}", str(rate), str(seconds)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)

    def result() -> tuple[int, float]:
        out, _ = process.communicate(timeout=seconds * 10 + 60)
        made, reached = out.split()
        return int(made), float(reached)

    try:
        yield result
    finally:
        process.kill()
        process.wait(10)


class Reader(threading.Thread):
    """What FollowConntrack does with lines, without the network."""

    def __init__(self, follower: Follower) -> None:
        super().__init__()
        self.follower = follower
        self.told = 0
        self.over = threading.Event()
        self.started = threading.Event()

    def run(self) -> None:
        with open(os.devnull, "wb") as out:
            for one in self.follower.changes():
                self.started.set()
                if self.over.is_set():
                    return
                if isinstance(one, Changes):
                    out.write(render_batch(one.batch, now=time.time(), kinds=one.kinds))
                    self.told += int((one.kinds == EventKind.NEW).sum())


def ours(bed: Bed, rate: int, seconds: float) -> dict[str, Any]:
    netns = tracking(bed, f"o{rate}-{int(seconds)}")
    kinds = frozenset({EventKind.NEW})
    with (
        open_conntrack(netns.handle, HostPaths()) as table,
        closing(
            table.follow(ConntrackFilters(), kinds, existing=False, poll_seconds=60)
        ) as follower,
    ):
        reader = Reader(follower)
        reader.start()
        reader.started.wait(10)
        with producing(netns, rate, seconds) as result:
            made, reached = result()
        end = time.monotonic() + 30
        while reader.told + follower.lost < made and time.monotonic() < end:
            time.sleep(0.05)
        lost = follower.lost
        reader.over.set()
        reader.join(10)
    return {
        "asked": rate,
        "reached": round(reached),
        "made": made,
        "told": reader.told,
        "lost_by_the_kernels_count": lost,
        "unaccounted": made - reader.told - lost,
    }


def theirs(bed: Bed, rate: int, seconds: float, *, buffer: int = 0) -> dict[str, Any]:
    """`buffer`: bytes that conntrack(8) asks for; 0: its default."""
    netns = tracking(bed, f"t{rate}-{buffer >> 20}")
    argv = ["ip", "netns", "exec", netns.name, "stdbuf", "-oL"]
    argv += ["conntrack", "-E", "-e", "NEW"]
    argv += ["-b", str(buffer)] if buffer else []
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(argv, stdout=out, stderr=errors)
        try:
            wait_until(lambda: listens(netns))
            with producing(netns, rate, seconds) as result:
                made, reached = result()
            before = -1
            while before != (before := os.fstat(out.fileno()).st_size):
                time.sleep(2)
        finally:
            process.terminate()
            process.wait(10)
        out.seek(0)
        told = sum(1 for _ in out)
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    return {
        "asked": rate,
        "reached": round(reached),
        "made": made,
        "told": told,
        "said": [line for line in said if "ENOBUFS" in line][:1],
    }


def listens(netns: Netns) -> bool:
    rows = [line.split() for line in netns.run("cat", "/proc/net/netlink").splitlines()[1:]]
    return any(row[1] == "12" and int(row[3], 16) for row in rows)


def sustained(rows: list[dict[str, Any]]) -> int:
    """The fastest rate of which every flow was told."""
    return max((row["reached"] for row in rows if row["told"] == row["made"]), default=0)


def main() -> None:
    if sys.argv[1:2] == ["--produce"]:
        produce(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
        return
    options = arguments(__doc__, runs=1)
    bed = Bed()
    try:
        mine = [ours(bed, rate, SHORT) for rate in RATES]
        other = [theirs(bed, rate, SHORT) for rate in RATES]
        # With as much room as the agent asks for.
        large = [theirs(bed, rate, SHORT, buffer=32 << 20) for rate in RATES]
        long = ours(bed, 10_000, LONG)
    finally:
        bed.close()
    report(
        options,
        figures={
            "agent": mine,
            "conntrack_e": other,
            "conntrack_e_large_buffer": large,
            "agent_sustained_flows_per_second": sustained(mine),
            "conntrack_e_sustained_flows_per_second": sustained(other),
            "conntrack_e_large_buffer_sustained_flows_per_second": sustained(large),
            "half_a_minute": long,
        },
        goals={"unaccounted_flows": goal(long["unaccounted"], at_most=0)},
    )


if __name__ == "__main__":
    main()
