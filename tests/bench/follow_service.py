"""Following a Service: ``python -m tests.bench.follow_service --json``.

A lab of three nodes with their real agents, and the real ``gketrace service --follow -o jsonl``,
which finds them by the API and reads them over gRPC.  Connections to the Service's NodePort are
made through netlink, as the kernel's own entries of them would be: on the node that translates,
and on the endpoint's; they pass SYN_SENT to TIME_WAIT and are removed.  Told are connections a
second that each became one record with the entries of both nodes, and the processor time, of one
processor, that agents and the CLI take at 0, 100 and 1,000 connections a second; and all of theirs
for each thousand connections, which a machine with other work puts off, and does not change.

What is not in a record must be in the summary: events that a kernel dropped, nodes that were
behind, connections that were told without waiting for one.  ``unsaid`` counts what is in neither.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e.netlab import Lab
from gketrace_agent.kernel.netns import open_path, run_in_netns
from tests.bench.report import arguments, goal, report
from tests.kernel.conntrack_made import Made, Maker, requests

RATES = (0, 100, 1_000, 2_000, 4_000)
SECONDS = 6.0
BUDGET = 100.0
"""Seconds after which no higher rate is begun."""
SERVICE, NODE_PORT, PORT = "hello-server", 31830, 8080
POD = "hello-server-579859fb5b-szrwh"
POOL = 10_000
"""Connections whose requests are made beforehand; after those, their ports are used again."""
STATES = (1, 2, 3, 4, 6, 7)
"""SYN_SENT to TIME_WAIT, as a connection passes them."""
CLI = "from gketrace_cli.main import main; main()"


@dataclass(frozen=True, slots=True)
class Way:
    """Where connections come in, and where they end."""

    node: str
    pod: str

    def front(self, number: int, state: int) -> Made:
        """On the node that translates: to the pod, from its own address."""
        port = 1024 + number % 50_000
        return Made(
            src=f"203.0.{number >> 14 & 127}.{1 + number % 200}",
            dst=self.node,
            sport=port,
            dport=NODE_PORT,
            reply_src=self.pod,
            reply_sport=PORT,
            reply_dst=self.node,
            reply_dport=port,
            state=state,
            status=0 if state == 1 else 2,
            timeout=120,
        )

    def back(self, number: int, state: int) -> Made:
        """On the endpoint's node."""
        return Made(
            src=self.node,
            dst=self.pod,
            sport=1024 + number % 50_000,
            dport=PORT,
            state=state,
            status=0 if state == 1 else 2,
            timeout=120,
        )


def produce(rate: int, seconds: float, way: Way, paths: list[str]) -> None:
    """Opens, changes and ends entries in two namespaces at once; waits for a line to begin; prints
    how many and in how many seconds."""
    makers = []
    for path in paths:
        with open_path(Path(path)) as handle:
            makers.append(run_in_netns(handle, Maker))
    step = max(rate // 50, 1)
    pool = max(min(int(rate * seconds), POOL) // step, 1)
    ready = [
        [
            batch
            for half in (way.front, way.back)
            for batch in _life(half, range(n * step, (n + 1) * step))
        ]
        for n in range(pool)
    ]
    print("ready", flush=True)
    sys.stdin.readline()
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
    print(made, time.perf_counter() - begin)


def _life(half: Callable[[int, int], Made], numbers: range) -> list[tuple[bytes, int]]:
    """Requests that make, change and delete the entries of these connections."""
    found: list[tuple[bytes, int]] = []
    for state in STATES:
        found += requests([half(number, state) for number in numbers], update=state != 1)
    found += requests([half(number, 7) for number in numbers], delete=True)
    return found


@dataclass
class Follower:
    """The program under way."""

    process: subprocess.Popen[str]
    out: Path
    err: Path
    records: int = 0
    whole: int = 0
    summary: dict[str, Any] = field(default_factory=dict)
    cpu: float = 0.0
    """Seconds of processor time, from its start to its end."""

    def wait_ready(self) -> None:
        end = time.monotonic() + 120
        while "followed from now on" not in self.err.read_text():
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < end, self.err.read_text()
            time.sleep(0.1)

    def finish(self) -> None:
        self.process.send_signal(signal.SIGINT)
        _, status, used = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu = used.ru_utime + used.ru_stime
        for line in self.out.read_text().splitlines():
            one = json.loads(line)
            if one["kind"] == "FollowSummary":
                self.summary = one
            else:
                self.records += 1
                self.whole += len(one["entries"]) == 2 and one["outcome"] == "closed"


@contextmanager
def follower(lab: Lab, directory: Path) -> Iterator[Follower]:
    out, err = directory / "out", directory / "err"
    with out.open("w") as writing, err.open("w") as saying:
        process = subprocess.Popen(
            [sys.executable, "-c", CLI, "service", SERVICE, "--follow", "-o", "jsonl"],
            stdout=writing,
            stderr=saying,
            env={**os.environ, "KUBECONFIG": str(lab.kubeconfig)},
            text=True,
        )
    try:
        yield Follower(process, out, err)
    finally:
        process.kill()
        process.wait()


def agents(lab: Lab) -> list[int]:
    """The agents' processes, one of each node."""
    found = []
    for node in lab.world.nodes:
        namespace = os.readlink(f"/proc/{lab.node(node.short)['pid']}/ns/net")
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                same = os.readlink(entry / "ns/net") == namespace
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            if same and any(word.endswith(b"gketrace-agent") for word in words):
                found.append(int(entry.name))
    assert len(found) == len(lab.world.nodes), found
    return found


def cpu(pid: int) -> float:
    """Seconds of processor time so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(lab: Lab, rate: int) -> tuple[int, float]:
    """Connections that were made, and the seconds that took."""
    first = lab.node("33fg")
    last = lab.node(lab.pod(POD)["node"])
    argv = [sys.executable, "-m", "tests.bench.follow_service", "--produce", str(rate)]
    argv += [str(SECONDS), first["ip"], lab.pod(POD)["ip"]]
    argv += [f"/proc/{node['pid']}/ns/net" for node in (first, last)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        text, _ = process.communicate("go\n", timeout=120)
    made, took = text.split()
    return int(made), float(took)


def measure(lab: Lab, rate: int, directory: Path) -> dict[str, Any]:
    pids = agents(lab)
    with follower(lab, directory) as one:
        one.wait_ready()
        pids.append(one.process.pid)
        before, begun = [cpu(pid) for pid in pids], time.monotonic()
        made, took = 0, SECONDS
        if rate:
            made, took = load(lab, rate)
        else:
            time.sleep(SECONDS)
        # A record comes a little after the end of what it is about.
        time.sleep(1.0)
        seconds = time.monotonic() - begun
        used = [cpu(pid) - start for pid, start in zip(pids, before, strict=True)]
        ending = time.monotonic()
        one.finish()
        whole = [cpu(pid) - start for pid, start in zip(pids[:-1], before, strict=False)]
    said = one.summary
    blind = said["lostEvents"] or said["behind"] or said["gaps"] or said["unheard"]
    return {
        "asked": rate,
        "reached": round(made / took),
        "made": made,
        "records": one.records,
        "of_both_nodes": one.whole,
        "lost_events": sum(said["lostEvents"].values()),
        "nodes_behind": len(said["behind"]),
        "told_early": said["unheard"],
        "unsaid": 0 if blind else made - one.whole,
        "agent_cpu_percent": [round(100 * one / seconds, 1) for one in used[:-1]],
        "cli_cpu_percent": round(100 * used[-1] / seconds, 1),
        # Until the end: what a busy machine puts off is in these.
        "agents_cpu_seconds": round(sum(whole), 2),
        "cli_cpu_seconds": round(one.cpu - before[-1], 2),
        "seconds_to_end": round(time.monotonic() - ending, 1),
    }


def main() -> None:
    if sys.argv[1:2] == ["--produce"]:
        asked, seconds, node, pod, *paths = sys.argv[2:]
        produce(int(asked), float(seconds), Way(node, pod), paths)
        return
    options = arguments(__doc__, runs=1)
    begun = time.monotonic()
    rows: list[dict[str, Any]] = []
    with (
        Lab("bench-follow", topology="ptp") as lab,
        tempfile.TemporaryDirectory() as directory,
    ):
        for rate in RATES:
            done = len(rows) >= 3
            if done and (
                rows[-1]["made"] != rows[-1]["of_both_nodes"] or time.monotonic() - begun > BUDGET
            ):
                break  # nothing higher goes without a loss, or there is no time for it
            rows.append(measure(lab, rate, Path(directory)))
            print(rows[-1], file=sys.stderr, flush=True)
    whole = [row for row in rows if row["made"] and row["of_both_nodes"] == row["made"]]
    seen = sum(row["of_both_nodes"] for row in rows)
    report(
        options,
        figures={
            "rates": rows,
            "followed_without_loss_per_second": max((r["reached"] for r in whole), default=0),
            "agent_cpu_percent_by_rate": {
                str(row["asked"]): max(row["agent_cpu_percent"]) for row in rows[:3]
            },
            "cli_cpu_percent_by_rate": {
                str(row["asked"]): row["cli_cpu_percent"] for row in rows[:3]
            },
        }
        | {
            f"{who}_cpu_seconds_for_1000_connections": round(
                1000 * sum(row[f"{who}_cpu_seconds"] for row in rows if row["made"]) / seen, 2
            )
            for who in ("agents", "cli")
        },
        goals={
            "not_in_a_record_at_1000_per_second": goal(
                rows[2]["made"] - rows[2]["of_both_nodes"], at_most=0
            ),
            "unsaid": goal(sum(row["unsaid"] for row in rows), at_most=0),
        },
    )


if __name__ == "__main__":
    main()
