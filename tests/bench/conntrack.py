"""Reading the connection-tracking table: ``python -m tests.bench.conntrack --json``.

A namespace is filled through netlink with 10,000, 60,000 and 250,000 entries.  At each size, by
turns: ``conntrack -L``; the agent's dump with every column decoded; its dump as text; a whole list
through gRPC to a client's standard output, the client started cold; the entries of one address
beside ``conntrack -L | grep``.  At 10,000 also pyroute2's ``dump_entries``.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.observe.conntrack_filter import ConntrackFilter, ConntrackFilters
from gketrace_agent.observe.conntrack_lines import render_batch
from gketrace_agent.observe.conntrack_table import ConntrackTable, open_conntrack
from tests.agent.observe.bed import Bed, Netns, wait_until
from tests.bench.report import arguments, goal, report
from tests.kernel.conntrack_made import Made, flows, make

SIZES = (10_000, 60_000, 250_000)
RARE = "10.77.0.1"
TEXT = 1


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run(argv: list[str]) -> None:
    done = subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.decode()}")


def decode_all(table: ConntrackTable) -> int:
    """Every column of every entry."""
    count = 0
    for batch in table.read(ConntrackFilters()).batches():
        for group in batch.groups:
            count += len(group)
            for name in group.layout.fields:
                if name.endswith(("_src", "_dst")):
                    group.octets(name).copy()
                else:
                    group.column(name)
    return count


def render_all(table: ConntrackTable) -> None:
    with open(os.devnull, "wb") as out:
        for batch in table.read(ConntrackFilters()).batches():
            out.write(render_batch(batch, now=time.time()))


def read_rare(table: ConntrackTable) -> None:
    wanted = ConntrackFilter(orig_dst=ip_network(RARE))
    found = [e for b in table.read(ConntrackFilters((wanted,))).batches() for e in b.entries()]
    if len(found) != 10:
        raise SystemExit(f"{len(found)} entries with {RARE} where there are 10")


def client(path: str, limit: int) -> None:
    """What a command line does: dials the agent, asks for text, writes it.  `limit` 0: all."""
    import grpc

    from gketrace_proto.v1alpha1 import agent_pb2, agent_pb2_grpc

    options = (("grpc.max_receive_message_length", 64 << 20),)
    with grpc.insecure_channel(f"unix:{path}", options=options) as channel:
        request = agent_pb2.ListConntrackRequest(
            target=agent_pb2.Target(host=True), format=TEXT, limit=limit
        )
        for reply in agent_pb2_grpc.AgentStub(channel).ListConntrack(request):
            sys.stdout.buffer.write(reply.text)
            if reply.HasField("summary") and not reply.summary.consistent:
                raise SystemExit("the table could not be read in one piece")


@contextlib.contextmanager
def agent(netns: Netns) -> Iterator[tuple[str, Callable[[], int]]]:
    """An agent whose host is that namespace; its socket, and its peak memory in KiB."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/agent.sock"
        binary = str(Path(sys.executable).parent / "gketrace-agent")
        argv = ["ip", "netns", "exec", netns.name, "unshare", "--fork", "--pid", "--mount-proc"]
        argv += [binary, "serve", "--listen", f"unix://{path}", "--log-file", f"{folder}/log"]
        process = subprocess.Popen(argv)
        try:
            wait_until(lambda: os.path.exists(path), 20)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            wait_until(lambda: bool(children.read_text().split()), 5)
            served = children.read_text().split()[0]

            def peak() -> int:
                text = Path(f"/proc/{served}/status").read_text()
                return int(text.split("VmHWM:")[1].split()[0])

            yield path, peak
            os.kill(int(served), 15)
        finally:
            process.wait(20)


def measure(netns: Netns, size: int, runs: int) -> dict[str, Any]:
    inside = ["ip", "netns", "exec", netns.name]
    listing = [*inside, "conntrack", "-L"]
    grep = [*inside, "sh", "-c", f"conntrack -L 2>/dev/null | grep -F {RARE}"]
    times: dict[str, list[float]] = {}
    with open_conntrack(netns.handle, HostPaths()) as table, agent(netns) as (path, peak):
        client_argv = [sys.executable, "-m", "tests.bench.conntrack", "--client", path]
        run([*client_argv, "1"])  # what the agent imports and allocates at its first call
        before = peak()
        cold = [*client_argv, "0"]
        run(cold)  # warms the page cache
        for _ in range(runs):
            for name, work in (
                ("conntrack_list", lambda: run(listing)),
                ("agent_decode", lambda: decode_all(table)),
                ("agent_text", lambda: render_all(table)),
                ("grpc_to_stdout", lambda: run(cold)),
                ("conntrack_grep", lambda: run(grep)),
                ("agent_filtered", lambda: read_rare(table)),
            ):
                times.setdefault(name, []).append(timed(work))
        grown = peak() - before
    seconds = {name: round(statistics.median(found), 4) for name, found in times.items()}
    base = seconds["conntrack_list"]
    return {
        "entries": size,
        "seconds": seconds,
        "ratio_decode": round(seconds["agent_decode"] / base, 2),
        "ratio_text": round(seconds["agent_text"] / base, 2),
        "ratio_grpc": round(seconds["grpc_to_stdout"] / base, 2),
        "ratio_filtered": round(seconds["agent_filtered"] / seconds["conntrack_grep"], 3),
        "agent_peak_growth_mib": round(grown / 1024, 1),
    }


def pyroute2_seconds(netns: Netns) -> float:
    from pyroute2 import Conntrack

    def dump() -> int:
        with Conntrack() as conntrack:
            return sum(1 for _ in conntrack.dump_entries())

    return timed(lambda: netns.inside(dump))


def main() -> None:
    if sys.argv[1:2] == ["--client"]:
        client(sys.argv[2], int(sys.argv[3]))
        return
    options = arguments(__doc__, runs=5)
    bed = Bed()
    sizes: list[dict[str, Any]] = []
    slow = fast = 0.0
    try:
        netns = bed.netns("bench")
        done = 0
        rare = [Made(src=f"10.78.0.{n}", dst=RARE, sport=1, dport=2) for n in range(1, 11)]
        netns.inside(lambda: make(rare))
        for size in SIZES:
            more, start = size - done, done
            netns.inside(
                lambda more=more, start=start: make(flows(more - 10 * (not start), start=start))
            )
            done = size
            sizes.append(measure(netns, size, options.runs))
            if size == SIZES[0]:
                slow = pyroute2_seconds(netns)
                fast = sizes[0]["seconds"]["agent_decode"]
    finally:
        bed.close()
    last = sizes[-1]
    report(
        options,
        figures={
            "sizes": sizes,
            "pyroute2_dump_entries_seconds": round(slow, 3),
        },
        goals={
            "decode_to_conntrack": goal(last["ratio_decode"], at_most=0.8),
            "grpc_to_stdout_to_conntrack": goal(last["ratio_grpc"], at_most=2.0),
            "filtered_to_conntrack_grep": goal(last["ratio_filtered"], at_most=0.5),
            "times_faster_than_pyroute2": goal(round(slow / fast, 1), at_least=40),
            "agent_growth_mib": goal(last["agent_peak_growth_mib"], at_most=64),
        },
    )


if __name__ == "__main__":
    main()
