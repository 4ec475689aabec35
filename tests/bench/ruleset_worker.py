"""What `tests.bench.ruleset` runs in a process of its own: one rule set, read and walked.

``python -m tests.bench.ruleset_worker`` with the task as JSON in its one argument; the figures as
JSON on standard output.  The process has nothing but the agent's packages in it, so that its
memory is the agent's.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from gketrace.packet import Packet
from gketrace.simulate.walk import WalkQuery, walk
from gketrace.snapshot import NetnsSnapshot, NodeView, Unavailable
from gketrace.trace import Disposition, Ingress, NetnsKind, NetnsRef, Walk
from gketrace_agent.kernel.netns import NetnsHandle, open_path, run_in_netns
from gketrace_agent.observe.snapshot import Namespace, Observer
from gketrace_agent.observe.view import LiveNodeView

WARM = 200
"""Walks over one snapshot; the first ones parse what the packet meets."""


def _rss() -> int:
    """Resident bytes of this process now."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


class Question:
    """One packet to one service, asked of an agent that has read nothing yet, or of a snapshot."""

    def __init__(self, task: dict[str, Any], handle: NetnsHandle) -> None:
        self.ref = NetnsRef(node="bench", kind=NetnsKind.HOST, inode=handle.inode)
        self.handle = handle
        self.packet = Packet(
            src=ip_address(task["src"]),
            dst=ip_address(task["dst"]),
            protocol=6,
            sport=40000,
            dport=80,
            tcp_flags=2,
        )
        self.query = WalkQuery(
            ingress=Ingress(netns=self.ref, interface=task["interface"]), packet=self.packet
        )
        self.endpoints = task["endpoints"]

    def cold(self) -> tuple[float, LiveNodeView]:
        """Seconds from nothing to the answer, and the view that holds what was read."""
        start = time.perf_counter()
        view = LiveNodeView("bench", Observer(), [Namespace(ref=self.ref, handle=self.handle)])
        answer = walk(view, self.query)
        seconds = time.perf_counter() - start
        self.check(answer)
        return seconds, view

    def read(self) -> float:
        """Seconds to read and index the rule sets alone."""
        start = time.perf_counter()
        only = frozenset({"rulesets"})
        Observer().observe(Namespace(ref=self.ref, handle=self.handle), only=only).close()
        return time.perf_counter() - start

    def warm(self, view: NodeView) -> tuple[float, float]:
        """The same walk over what has been read: seconds, and processor seconds, which other
        work on the machine does not touch."""
        start, spent = time.perf_counter(), time.process_time()
        answer = walk(view, self.query)
        seconds = time.perf_counter() - start, time.process_time() - spent
        self.check(answer)
        return seconds

    def check(self, answer: Walk) -> None:
        """The answer is right: each endpoint with its share, all sent on."""
        leaves = list(answer.leaves())
        ends = {str(leaf.outcome.packet.dst) for leaf in leaves}
        kinds = {leaf.outcome.disposition for leaf in leaves}
        if ends != set(self.endpoints) or Disposition.UNKNOWN in kinds:
            raise SystemExit(f"wrong answer: {ends}, {kinds}: {leaves[0].outcome.detail}")


def _dump(handle: NetnsHandle, argv: list[str], most: float) -> tuple[float, bool]:
    """Seconds that the dump command takes by itself, its output thrown away; whether it ended in
    `most` seconds, and was not killed then."""

    def run() -> tuple[float, bool]:
        start = time.perf_counter()
        # Not wait(timeout): it looks only every 50 ms whether the command has ended.
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
            watch = threading.Timer(most, process.kill)
            watch.start()
            code = process.wait()
            seconds = time.perf_counter() - start
            watch.cancel()
        if seconds >= most:
            return most, False
        if code:
            raise subprocess.CalledProcessError(code, argv)
        return seconds, True

    resource.setrlimit(resource.RLIMIT_STACK, (512 << 20, resource.RLIM_INFINITY))
    return run_in_netns(handle, run)


def main() -> None:
    task = json.loads(sys.argv[1])
    with open_path(Path("/run/netns", task["netns"])) as handle:
        question = Question(task, handle)
        base = _rss()
        _, view = question.cold()
        question.warm(view)
        gc.collect()
        held, peak = _rss(), _peak()
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        warm = [question.warm(view) for _ in range(WARM)]
        size, lines = _size(view.snapshot(question.ref))
        parts = {k: round(v, 4) for o in view.observations.values() for k, v in o.seconds.items()}
        view.close()
        del view
        dumps: list[float] = []
        colds, reads, ended = [], [], True
        for _ in range(task["runs"]):
            if len(dumps) < task["dumps"]:
                seconds, ended = _dump(handle, task["dump"], task["most"])
                dumps.append(seconds)
            seconds, view = question.cold()
            view.close()
            del view
            colds.append(seconds)
            reads.append(question.read())
    figures = {
        "bytes": size,
        "lines": lines,
        "dump_seconds": dumps,
        "dump_ended": ended,
        "cold_seconds": colds,
        "cold_to_dump": statistics.median(colds) / statistics.median(dumps),
        "cold_to_dump_best": min(colds) / min(dumps),
        "read_seconds": reads,
        "warm_seconds": statistics.median(wall for wall, _ in warm),
        "warm_seconds_best": min(wall for wall, _ in warm),
        "warm_cpu_seconds": statistics.median(cpu for _, cpu in warm),
        "rss_before": base,
        "rss_holding": held,
        "rss_peak": peak,
        "children_peak": children,
        "observer_seconds": parts,
    }
    json.dump(figures, sys.stdout)


def _size(snapshot: NetnsSnapshot | Unavailable) -> tuple[int, int]:
    """Bytes and lines of the rule sets' text."""
    assert isinstance(snapshot, NetnsSnapshot)
    texts = [getattr(ruleset, "text", b"") for ruleset in snapshot.rulesets]
    return sum(map(len, texts)), sum(text.count(b"\n") for text in texts)


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main()
