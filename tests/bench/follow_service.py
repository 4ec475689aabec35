"""Following a Service: ``python -m tests.bench.follow_service --json``.

Three agents with their real servers, each in a process of its own, follow three namespaces; the
core joins what they send, as ``gketrace service --follow`` does.  Flows are opened there at a
steady rate, a packet each, that the filters take (two of a door and one of the endpoint behind it,
on the second node).  Told are: connections a second that were followed without a loss, and the
processor time that an agent takes of one processor at 0, 100 and 1,000 connections a second.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from gketrace.connections import Place
from gketrace.conntrack_records import records_from_bytes
from gketrace.follow.joiner import Joiner, Phase
from gketrace_agent.conntracks import follow_entries
from gketrace_agent.kernel.conntrack_events import EventKind
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import open_path, run_in_netns
from gketrace_agent.observe.conntrack_filter import ConntrackFilter, ConntrackFilters
from gketrace_agent.observe.conntrack_table import open_conntrack
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from tests.agent.observe.bed import Bed, Netns
from tests.bench.report import arguments, goal, report
from tests.kernel.conntrack_made import Made, Maker, requests

RATES = (0, 100, 1_000, 2_000, 4_000)
SECONDS = 6.0
BUDGET = 60.0
"""Seconds after which no higher rate is begun."""
QUIET = 6.0
"""Seconds without a record after which the rest is lost."""
DOOR, ENDPOINT, NODE = "10.43.0.1", "10.40.1.6", "10.142.0.1"
FILTERS = ConntrackFilters(
    (
        ConntrackFilter(protocol=6, orig_dst=ip_network(f"{DOOR}/32"), orig_dport=80),
        ConntrackFilter(protocol=6, orig_dst=ip_network(f"{NODE}/32"), orig_dport=30080),
        ConntrackFilter(protocol=6, reply_src=ip_network(f"{ENDPOINT}/32"), reply_sport=8080),
    )
)
POOL = 10_000
"""Connections whose requests are made beforehand; after those, their ports are used again."""
STATES = (1, 2, 3, 4, 6, 7)
"""SYN_SENT to TIME_WAIT, as a connection passes them."""


def front(number: int, state: int) -> Made:
    """On the node that translates."""
    return Made(
        src=f"203.0.{number >> 14 & 127}.{1 + number % 200}",
        dst=NODE,
        sport=1024 + number % 50_000,
        dport=30080,
        reply_src=ENDPOINT,
        reply_sport=8080,
        reply_dst=NODE,
        reply_dport=1024 + number % 50_000,
        state=state,
        status=0 if state == 1 else 2,
        timeout=120,
    )


def back(number: int, state: int) -> Made:
    """On the endpoint's node."""
    return Made(
        src=NODE,
        dst=ENDPOINT,
        sport=1024 + number % 50_000,
        dport=8080,
        state=state,
        status=0 if state == 1 else 2,
        timeout=120,
    )


def produce(paths: list[str], rate: int, seconds: float) -> None:
    """Opens, changes and ends entries in two namespaces at once; prints how many and how fast."""
    makers = []
    for path in paths:
        with open_path(Path(path)) as handle:
            makers.append(run_in_netns(handle, Maker))
    step = max(rate // 50, 1)
    pool = max(min(int(rate * seconds), POOL) // step, 1)
    ready = [
        [batch for half in (front, back) for batch in _life(half, range(n * step, (n + 1) * step))]
        for n in range(pool)
    ]
    made, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        if made >= passed * rate:
            time.sleep(0.002)
            continue
        batches = ready[made // step % pool]
        half = len(batches) // 2
        for one, other in zip(batches[:half], batches[half:], strict=True):
            assert not makers[0].send(*one)
            assert not makers[1].send(*other)
        made += step
    took = time.perf_counter() - begin
    print(made, made / took)


def _life(half: Callable[[int, int], Made], numbers: range) -> list[tuple[bytes, int]]:
    """Requests that make, change and delete the entries of these connections."""
    found: list[tuple[bytes, int]] = []
    for state in STATES:
        found += requests([half(number, state) for number in numbers], update=state != 1)
    found += requests([half(number, 7) for number in numbers], delete=True)
    return found


def follow(path: str, out: int) -> None:
    """What an agent does for one FollowConntrack, in a process of its own: messages, with their
    length before each, to `out`."""
    kinds = frozenset(EventKind)
    with (
        open_path(Path(path)) as handle,
        open_conntrack(handle, HostPaths()) as table,
        closing(table.follow(FILTERS, kinds, existing=True, poll_seconds=2.0)) as follower,
        os.fdopen(out, "wb") as pipe,
    ):
        base = pb.FollowConntrackStatus(tracked=True)
        for reply in follow_entries(follower, pb.CONNTRACK_FORMAT_RECORDS, base):
            data = reply.SerializeToString()
            pipe.write(len(data).to_bytes(4, "big") + data)
            pipe.flush()


@dataclass
class Node:
    """One agent's process and what it says."""

    place: Place
    process: subprocess.Popen[bytes]
    lost: int = 0
    statuses: int = 0

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def agents(spaces: list[Netns]) -> Iterator[list[Node]]:
    with ExitStack() as stack:
        nodes = []
        for number, space in enumerate(spaces):
            argv = [sys.executable, "-m", "tests.bench.follow_service", "--follow"]
            process = subprocess.Popen(
                [*argv, f"/run/netns/{space.name}"], stdout=subprocess.PIPE, bufsize=1 << 20
            )
            assert process.stdout is not None
            stack.callback(process.stdout.close)
            stack.callback(process.wait)
            stack.callback(process.kill)
            nodes.append(Node(Place(node=f"n{number}"), process))
        yield nodes


class Client:
    """The CLI's side: reads all agents and joins."""

    def __init__(self, nodes: list[Node]) -> None:
        self.joiner = Joiner()
        self.lock = threading.Lock()
        self.nodes = nodes
        self.closed = self.whole = 0
        self.threads = [threading.Thread(target=self.read, args=(node,)) for node in nodes]
        for thread in self.threads:
            thread.daemon = True
            thread.start()

    def read(self, node: Node) -> None:
        pipe = node.process.stdout
        assert pipe is not None
        while len(head := pipe.read(4)) == 4:
            size = int.from_bytes(head, "big")
            if len(data := pipe.read(size)) < size:
                return  # the process was ended
            reply = pb.FollowConntrackReply.FromString(data)
            with self.lock:
                if reply.HasField("status"):
                    node.statuses += 1
                    node.lost = reply.status.lost
                    self.joiner.heard(node.place, reply.status.at)
                    if node.statuses == 2:
                        self.joiner.read_whole(node.place, reply.status.at)
                records = list(records_from_bytes(reply.records))
                self.joiner.feed(node.place, reply.at, reply.kinds, records, after=reply.after)
                self.take(time.time())

    def take(self, now: float) -> None:
        for one in self.joiner.told(now):
            if one.phase is Phase.CLOSED:
                self.closed += 1
                self.whole += len(one.connection.halves) == 2


def measure(bed: Bed, rate: int) -> dict[str, Any]:
    spaces = [bed.netns(f"f{rate}-{number}") for number in range(3)]
    made, reached = 0, 0.0
    with agents(spaces) as nodes:
        client = Client(nodes)
        end = time.monotonic() + 60
        while any(node.statuses < 2 for node in nodes) and time.monotonic() < end:
            time.sleep(0.05)
        before = [node.cpu() for node in nodes]
        mine, begun = time.process_time(), time.monotonic()
        if rate:
            argv = [sys.executable, "-m", "tests.bench.follow_service", "--produce", str(rate)]
            argv += [str(SECONDS), *(f"/run/netns/{space.name}" for space in spaces[:2])]
            text = subprocess.run(
                argv, stdout=subprocess.PIPE, text=True, check=True, timeout=60
            ).stdout
            made, reached = int(text.split()[0]), float(text.split()[1])
            begun = time.monotonic() - made / reached  # without the making ready before
        else:
            time.sleep(SECONDS)
        seconds = time.monotonic() - begun
        used = [node.cpu() - start for node, start in zip(nodes, before, strict=True)]
        client_used = time.process_time() - mine
        end, before_last = time.monotonic() + QUIET, client.closed
        while client.closed < made and time.monotonic() < end:
            time.sleep(0.2)
            with client.lock:
                client.take(time.time())
            if client.closed != before_last:  # what is lost does not come, so only news wait
                end, before_last = time.monotonic() + QUIET, client.closed
        lost = sum(node.lost for node in nodes)
        for node in nodes:
            node.process.kill()
        for thread in client.threads:
            thread.join(10)
    return {
        "asked": rate,
        "reached": round(reached),
        "made": made,
        "records": client.closed,
        "of_both_nodes": client.whole,
        "lost_by_the_kernels_count": lost,
        "agent_cpu_percent": [round(100 * one / seconds, 1) for one in used],
        "client_cpu_percent": round(100 * client_used / seconds, 1),
    }


def lossy(row: dict[str, Any]) -> bool:
    return bool(row["made"] != row["of_both_nodes"])


def main() -> None:
    if sys.argv[1:2] == ["--produce"]:
        produce(sys.argv[4:], int(sys.argv[2]), float(sys.argv[3]))
        return
    if sys.argv[1:2] == ["--follow"]:
        follow(sys.argv[2], os.dup(1))
        return
    options = arguments(__doc__, runs=1)
    begun = time.monotonic()
    bed = Bed()
    try:
        rows: list[dict[str, Any]] = []
        for rate in RATES:
            if len(rows) >= 3 and (lossy(rows[-1]) or time.monotonic() - begun > BUDGET):
                break  # nothing higher goes without a loss, or there is no time for it
            rows.append(measure(bed, rate))
            print(rows[-1], file=sys.stderr, flush=True)
    finally:
        bed.close()
    whole = [row for row in rows if row["made"] and row["of_both_nodes"] == row["made"]]
    report(
        options,
        figures={
            "rates": rows,
            "followed_without_loss_per_second": max((r["reached"] for r in whole), default=0),
            "agent_cpu_percent_by_rate": {
                str(row["asked"]): max(row["agent_cpu_percent"]) for row in rows[:3]
            },
        },
        goals={
            "unaccounted_at_1000_per_second": goal(
                rows[2]["made"] - rows[2]["of_both_nodes"], at_most=0
            )
        },
    )


if __name__ == "__main__":
    main()
