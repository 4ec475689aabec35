"""What an agent costs that nobody asks: ``python -m tests.bench.idle --json [--minutes N]``.

An agent whose node is a namespace with a small cluster's rules is scraped every 15 s and otherwise
left alone.  Its memory and processor time are read from /proc; the first scrape, which imports what
the metrics need, is before the beginning.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from tests.agent.observe.bed import wait_until
from tests.bench.agent_process import agent_process
from tests.bench.report import goal, report
from tests.bench.ruleset import namespace, restore
from tests.bench.ruleset_generate import make_services

EVERY = 15.0
"""Seconds between scrapes, as Prometheus' defaults are 15 s to 60 s."""
SERVICES = 100
RSS_GOAL = 90 << 20
CPU_GOAL = 0.005
"""Of one core."""
PORT = 9411


def scrape(netns: str, *, sure: bool = True) -> bool:
    """Reads /metrics there.  Raises `CalledProcessError` when it cannot, if it is to be `sure`."""
    code = (
        "import sys, urllib.request as r\n"
        f"text = r.urlopen('http://127.0.0.1:{PORT}/metrics', timeout=10).read()\n"
        "sys.exit(b'gketrace' not in text)"
    )
    argv = ["ip", "netns", "exec", netns, sys.executable, "-S", "-c", code]
    said = None if sure else subprocess.DEVNULL
    return subprocess.run(argv, check=sure, stderr=said).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N")
    options = parser.parse_args()
    with namespace(f"gkbi-{os.getpid()}") as name:
        restore(name, "legacy", make_services(SERVICES, 10))
        with agent_process(name, "--metrics-listen", f"tcp://127.0.0.1:{PORT}") as agent:
            wait_until(lambda: scrape(name, sure=False), 60)
            for _ in range(3):
                scrape(name)
            before, begun, first = agent.cpu(), time.monotonic(), agent.counts()
            memory = [agent.memory("VmRSS")]
            scrapes = 0
            while time.monotonic() - begun < options.minutes * 60:
                time.sleep(max(0.0, begun + EVERY * (scrapes + 1) - time.monotonic()))
                scrape(name)
                scrapes += 1
                memory.append(agent.memory("VmRSS"))
            seconds = time.monotonic() - begun
            spent = agent.cpu() - before
            last, peak = agent.counts(), agent.memory("VmHWM")
    share = spent / seconds
    report(
        options,
        figures={
            "seconds": round(seconds, 1),
            "scrapes": scrapes,
            "rss_begin": memory[0],
            "rss_end": memory[-1],
            "rss_most": max(memory),
            "rss_peak_since_start": peak,
            "cpu_seconds": round(spent, 2),
            "threads": [first["task"], last["task"]],
            "file_descriptors": [first["fd"], last["fd"]],
        },
        goals={
            "rss_most": goal(max(memory), at_most=RSS_GOAL),
            "cpu_share_of_a_core": goal(round(share, 5), at_most=CPU_GOAL),
        },
    )


if __name__ == "__main__":
    main()
