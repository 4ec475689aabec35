"""Reading the connection-tracking table: ``python -m tests.bench.conntrack --json``.

A namespace is filled through netlink with 10,000, 60,000 and 250,000 entries.  At each size, by
turns: ``conntrack -L``; the agent's dump with every column decoded; its dump as text; a whole list
through the agent and ``gketrace conntrack -o conntrack``, a process started cold that also asks an
API server for the nodes, to standard output; the entries of one address, by the agent and by the
command, beside ``conntrack -L | grep`` (of the command's time nearly all is its own start).  At
10,000 also pyroute2's ``dump_entries``.  At each size the agent's metrics are scraped, too.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
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
from tests.cli.stage import stage
from tests.kernel.conntrack_made import Made, flows, make

SIZES = (10_000, 60_000, 250_000)
RARE = "10.77.0.1"
NODE = "2jdh"
METRICS = 9411
COMMAND = str(Path(sys.executable).parent / "gketrace")


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


@contextlib.contextmanager
def agent(netns: Netns) -> Iterator[tuple[str, Callable[[], int]]]:
    """An agent whose host is that namespace; its socket, and its peak memory in KiB.  It serves
    metrics on the namespace's own loopback."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/agent.sock"
        binary = str(Path(sys.executable).parent / "gketrace-agent")
        argv = ["ip", "netns", "exec", netns.name, "unshare", "--fork", "--pid", "--mount-proc"]
        argv += [binary, "serve", "--listen", f"unix://{path}", "--log-file", f"{folder}/log"]
        argv += ["--node-name", NODE, "--metrics-listen", f"tcp://127.0.0.1:{METRICS}"]
        argv += ["--insecure"]
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


def scrape(netns: Netns) -> tuple[float, float]:
    """Seconds that Prometheus would wait, and those that the agent says it took."""

    def fetch() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{METRICS}/metrics", timeout=10) as reply:
            return str(reply.read().decode())

    start = time.perf_counter()
    text = netns.inside(fetch)
    took = time.perf_counter() - start
    said = next(x for x in text.splitlines() if x.startswith("gketrace_agent_scrape_seconds "))
    return took, float(said.split()[1])


def measure(netns: Netns, kubeconfig: Path, size: int, runs: int) -> dict[str, Any]:
    inside = ["ip", "netns", "exec", netns.name]
    listing = [*inside, "conntrack", "-L"]
    grep = [*inside, "sh", "-c", f"conntrack -L 2>/dev/null | grep -F {RARE}"]
    times: dict[str, list[float]] = {}
    with open_conntrack(netns.handle, HostPaths()) as table, agent(netns) as (path, peak):
        command = [COMMAND, "conntrack", NODE, "-o", "conntrack", "--kubeconfig", str(kubeconfig)]
        command += ["--agent", f"{NODE}=unix://{path}"]
        run([*command, "--limit", "1"])  # what the agent imports and allocates at its first call
        scrapes = [scrape(netns) for _ in range(20)]
        before = peak()
        run(command)  # warms the page cache
        for _ in range(runs):
            for name, work in (
                ("conntrack_list", lambda: run(listing)),
                ("agent_decode", lambda: decode_all(table)),
                ("agent_text", lambda: render_all(table)),
                ("command_to_stdout", lambda: run(command)),
                ("conntrack_grep", lambda: run(grep)),
                ("agent_filtered", lambda: read_rare(table)),
                ("command_filtered", lambda: run([*command, "-d", RARE])),
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
        "ratio_command": round(seconds["command_to_stdout"] / base, 2),
        "ratio_filtered": round(seconds["agent_filtered"] / seconds["conntrack_grep"], 3),
        "ratio_command_filtered": round(seconds["command_filtered"] / seconds["conntrack_grep"], 3),
        "agent_peak_growth_mib": round(grown / 1024, 1),
        "scrape_seconds": round(statistics.median(one for one, _ in scrapes), 4),
        "scrape_agent_seconds": round(statistics.median(one for _, one in scrapes), 4),
    }


def pyroute2_seconds(netns: Netns) -> float:
    from pyroute2 import Conntrack

    def dump() -> int:
        with Conntrack() as conntrack:
            return sum(1 for _ in conntrack.dump_entries())

    return timed(lambda: netns.inside(dump))


def main() -> None:
    options = arguments(__doc__, runs=5)
    bed = Bed()
    sizes: list[dict[str, Any]] = []
    slow = fast = 0.0
    with contextlib.ExitStack() as stack:
        stack.callback(bed.close)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        kubeconfig = stack.enter_context(stage(Path(folder))).api.kubeconfig
        netns = bed.netns("bench")
        netns.ip("link", "set", "lo", "up")
        done = 0
        rare = [Made(src=f"10.78.0.{n}", dst=RARE, sport=1, dport=2) for n in range(1, 11)]
        netns.inside(lambda: make(rare))
        for size in SIZES:
            more, start = size - done, done
            netns.inside(
                lambda more=more, start=start: make(flows(more - 10 * (not start), start=start))
            )
            done = size
            sizes.append(measure(netns, kubeconfig, size, options.runs))
            if size == SIZES[0]:
                slow = pyroute2_seconds(netns)
                fast = sizes[0]["seconds"]["agent_decode"]
    last = sizes[-1]
    report(
        options,
        figures={
            "sizes": sizes,
            "pyroute2_dump_entries_seconds": round(slow, 3),
        },
        goals={
            "decode_to_conntrack": goal(last["ratio_decode"], at_most=0.8),
            "command_to_stdout_to_conntrack": goal(last["ratio_command"], at_most=2.0),
            "filtered_to_conntrack_grep": goal(last["ratio_filtered"], at_most=0.5),
            "times_faster_than_pyroute2": goal(round(slow / fast, 1), at_least=40),
            "agent_growth_mib": goal(last["agent_peak_growth_mib"], at_most=64),
            "scrape_agent_seconds": goal(last["scrape_agent_seconds"], at_most=0.02),
        },
    )


if __name__ == "__main__":
    main()
