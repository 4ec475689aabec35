"""Large rule sets: ``python -m tests.bench.ruleset --json [--services N ...] [--backend B ...]``.

kube-proxy-shaped rule sets are restored in a namespace made for it, and one service's packet is
asked for.  Measured against the backend's own dump command, by turns in one process:

- cold: from nothing read to the answer, the reading included;
- warm: the walk alone, over what has been read;
- memory: the agent's own, and beside it the largest child's;
- python-iptables reading the same tables, beside our reading of them (legacy, the small sizes).

The agent reads iptables-nft by netlink.  iptables-nft-save, beside it, takes time that grows with
the square of the rules, and iptables-nft-restore is slow, too: by default the larger sizes are run
for legacy and nftables only; ``--full`` runs all.  There the save command is run once, and killed
after ``--dump-timeout`` seconds: the ratio to it is then a bound.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from tests.bench.report import goal, report
from tests.bench.ruleset_generate import (
    NFACCT,
    BenchService,
    iptables_text,
    make_services,
    nft_table,
)

SIZES: Final = (100, 1000, 5000, 10000)
ENDPOINTS: Final = 10
NODE: Final = "10.142.0.8"
DUMPS: Final = {
    "legacy": ["iptables-legacy-save", "-c"],
    "nft": ["iptables-nft-save", "-c"],
    "nftables": ["nft", "-j", "list", "table", "ip", "kube-proxy"],
}
DEFAULT_MOST: Final = {"legacy": 10000, "nft": 1000, "nftables": 10000}
"""Services, without ``--full``."""
RUNS: Final = {100: 15, 1000: 7}
"""Turns by size; 3 for others."""
SLOW_DUMP: Final = {"legacy": 10000, "nft": 1000, "nftables": 10000}
"""Services beyond which the dump command itself is run once only."""

PYTHON_IPTABLES_MOST: Final = 1000
"""Services; it needs 1 ms a rule."""

COLD_GOAL: Final = 1.4
WARM_GOAL: Final = 0.005
GROWTH_GOAL: Final = 2.0
RSS_GOAL: Final = 256 << 20
PYTHON_IPTABLES_GOAL: Final = 50.0


@contextmanager
def namespace(name: str) -> Iterator[str]:
    """A node with a bridge for pods and a network with one neighbour; deleted at the end.

    The far ends of its links are in a namespace of their own: the agent does not know it.
    """
    far = f"{name}-far"
    lines = [
        "link set lo up",
        f"link add eth0 type veth peer name peer0 netns {far}",
        f"addr add {NODE}/24 dev eth0",
        "link add cbr0 type bridge",
        f"link add veth0 type veth peer name pod0 netns {far}",
        "link set veth0 master cbr0",
        "addr add 10.40.0.1/24 dev cbr0",
        *(f"link set {link} up" for link in ("eth0", "cbr0", "veth0")),
        "route add default via 10.142.0.2",
        "neigh add 10.142.0.2 lladdr 02:00:00:00:00:02 dev eth0 nud permanent",
    ]
    with ExitStack() as stack:
        for one in (name, far):
            subprocess.run(["ip", "netns", "add", one], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", one], check=True)
        _batch(name, lines)
        _batch(far, [f"link set {link} up" for link in ("peer0", "pod0")])
        _inside(name, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        for account in NFACCT:
            _inside(name, "nfacct", "add", account)
        yield name


def _batch(name: str, lines: list[str]) -> None:
    subprocess.run(["ip", "-n", name, "-batch", "-"], input="\n".join(lines).encode(), check=True)


def _inside(name: str, *argv: str, text: str = "") -> bytes:
    done = subprocess.run(
        ["ip", "netns", "exec", name, *argv], input=text.encode(), check=True, capture_output=True
    )
    return done.stdout


def restore(name: str, backend: str, services: tuple[BenchService, ...]) -> None:
    """Puts the rule set into the namespace."""
    if backend == "nftables":
        _inside(name, "nft", "-f", "-", text="".join(nft_table(services, NODE)))
    else:
        _inside(name, f"iptables-{backend}-restore", text="".join(iptables_text(services)))


def measure(
    name: str, backend: str, services: tuple[BenchService, ...], runs: int, most: float
) -> Any:
    """The worker's figures.  `most`: seconds for one dump command."""
    wanted = services[len(services) // 2]
    task = {
        "netns": name,
        "dump": DUMPS[backend],
        "dumps": runs if len(services) <= SLOW_DUMP[backend] else 1,
        "most": most,
        "runs": runs,
        # A client on the node's network; its packet is balanced over pods of other nodes.
        "interface": "eth0",
        "src": "10.142.0.77",
        "dst": wanted.cluster_ip,
        "endpoints": wanted.endpoints,
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.ruleset_worker", json.dumps(task)],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{backend}, {len(services)} services: {done.stderr}")
    return json.loads(done.stdout)


def python_iptables(name: str) -> float:
    """Seconds that python-iptables takes to read the same tables."""
    start = time.perf_counter()
    _inside(name, sys.executable, "-m", "gketrace_agent.kernel.iptc_reader", "4")
    return time.perf_counter() - start


def main() -> None:
    options = _options()
    figures: dict[str, Any] = {}
    goals: dict[str, dict[str, Any]] = {}
    for backend in options.backend:
        sizes = [n for n in options.services if options.full or n <= DEFAULT_MOST[backend]]
        warm: dict[int, float] = {}
        for size in sizes:
            services = make_services(size, ENDPOINTS)
            runs = options.runs or RUNS.get(size, 3)
            with namespace(f"gkbr-{os.getpid()}-{backend}") as name:
                restore(name, backend, services)
                found = measure(name, backend, services, runs, options.dump_timeout)
                key = f"{backend}_{size}"
                if backend == "legacy" and size <= PYTHON_IPTABLES_MOST:
                    seconds = python_iptables(name)
                    found["python_iptables_seconds"] = seconds
                    ratio = seconds / statistics.median(found["read_seconds"])
                    goals[f"{key}_python_iptables_to_read"] = goal(
                        round(ratio, 1), at_least=PYTHON_IPTABLES_GOAL
                    )
            figures[key] = found
            warm[size] = found["warm_seconds"]
            goals[f"{key}_cold_to_dump"] = goal(round(found["cold_to_dump"], 2), at_most=COLD_GOAL)
            goals[f"{key}_warm_seconds"] = goal(round(found["warm_seconds"], 5), at_most=WARM_GOAL)
            goals[f"{key}_rss_holding"] = goal(found["rss_holding"], at_most=RSS_GOAL)
        if len(warm) > 1:
            growth = warm[max(warm)] / warm[min(warm)]
            goals[f"{backend}_warm_growth_{min(warm)}_to_{max(warm)}"] = goal(
                round(growth, 2), at_most=GROWTH_GOAL
            )
    report(options, figures=figures, goals=goals)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--services", type=int, nargs="+", default=list(SIZES), metavar="N")
    parser.add_argument("--backend", nargs="+", default=list(DUMPS), choices=DUMPS)
    parser.add_argument("--runs", type=int, default=0, help="turns (default: by size)")
    parser.add_argument(
        "--dump-timeout", type=float, default=150.0, metavar="S", help="for one dump command"
    )
    parser.add_argument("--full", action="store_true", help="iptables-nft at all sizes: slow")
    return parser.parse_args()


if __name__ == "__main__":
    main()
