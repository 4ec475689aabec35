"""What a large node costs in memory: ``python -m tests.bench.memory --json``.

An agent whose node has 250,000 conntrack entries and 10,000 services with 10 endpoints (430,000
lines of iptables rules) is asked everything that it can tell, one call after the other: metrics,
walks, all rules, all entries as text and as records, a snapshot.  The agent's own peak is its
VmHWM; the peak with its children is that of its cgroup, which is what a container's limit bounds.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import grpc

from gketrace.packet import Packet, parse_address
from gketrace_agent.kernel.netns import open_path, run_in_netns
from gketrace_proto.codec import encode
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1 import agent_pb2_grpc
from tests.agent.observe.bed import wait_until
from tests.bench.agent_process import AgentProcess, agent_process
from tests.bench.idle import PORT, scrape
from tests.bench.report import goal, report
from tests.bench.ruleset import namespace, restore
from tests.bench.ruleset_generate import BenchService, make_services
from tests.kernel.conntrack_made import flows, make

OWN_GOAL: Final = 256 << 20
_SECONDS: Final = 300
"""For one call, on a busy machine."""


def _walk(service: BenchService) -> pb.WalkRequest:
    packet = Packet(
        src=parse_address("10.142.0.77"),
        dst=parse_address(service.cluster_ip),
        protocol=6,
        sport=40000,
        dport=80,
    )
    return pb.WalkRequest(
        target=pb.Target(host=True), interface="eth0", packet=encode(packet), use_conntrack=True
    )


def _drain(stream: Any) -> int:
    return sum(message.ByteSize() for message in stream)


def _ask(netns: str, agent: AgentProcess, services: tuple[BenchService, ...]) -> dict[str, Any]:
    """Call → bytes of its answer, seconds, the agent's peak after it."""
    host = pb.Target(host=True)
    options = (("grpc.max_receive_message_length", 64 << 20),)
    with grpc.insecure_channel(f"unix:{agent.socket}", options=options) as channel:
        stub = agent_pb2_grpc.AgentStub(channel)
        one = _walk(services[len(services) // 2])
        calls: dict[str, Callable[[], int]] = {
            "metrics": lambda: int(scrape(netns)),
            "info": lambda: int(stub.GetInfo(pb.GetInfoRequest(), timeout=_SECONDS).ByteSize()),
            "walk": lambda: int(stub.Walk(one, timeout=_SECONDS).ByteSize()),
            "rules": lambda: _drain(
                stub.GetRules(pb.GetRulesRequest(target=host), timeout=_SECONDS)
            ),
            "snapshot": lambda: _drain(stub.Snapshot(pb.SnapshotRequest(), timeout=_SECONDS)),
            "conntrack_text": lambda: _drain(
                stub.ListConntrack(
                    pb.ListConntrackRequest(target=host, format=pb.CONNTRACK_FORMAT_TEXT),
                    timeout=_SECONDS,
                )
            ),
            "conntrack_entries": lambda: _drain(
                stub.ListConntrack(pb.ListConntrackRequest(target=host), timeout=_SECONDS)
            ),
            "walk_again": lambda: int(stub.Walk(one, timeout=_SECONDS).ByteSize()),
        }
        figures = {}
        for name, call in calls.items():
            start = time.perf_counter()
            size = call()
            figures[name] = {
                "bytes": size,
                "seconds": round(time.perf_counter() - start, 2),
                "own_peak": agent.memory("VmHWM"),
                "peak_of_all": agent.peak_of_all(),
            }
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--services", type=int, default=10_000, metavar="N")
    parser.add_argument("--entries", type=int, default=250_000, metavar="N")
    parser.add_argument("--backend", default="legacy", choices=("legacy", "nftables"))
    options = parser.parse_args()
    services = make_services(options.services, 10)
    with namespace(f"gkbm-{os.getpid()}") as name:
        restore(name, options.backend, services)
        with open_path(Path("/run/netns", name)) as handle:
            run_in_netns(handle, lambda: make(flows(options.entries)))
        with agent_process(name, "--metrics-listen", f"tcp://127.0.0.1:{PORT}") as agent:
            wait_until(lambda: scrape(name, sure=False), 120)
            calls = _ask(name, agent, services)
            own, everything = agent.memory("VmHWM"), agent.peak_of_all()
            after, mapped = agent.memory("VmRSS"), agent.memory("RssFile")
    report(
        options,
        figures={
            "services": options.services,
            "entries": options.entries,
            "backend": options.backend,
            "calls": calls,
            "own_peak": own,
            "own_after": after,
            "peak_of_all": everything,
            # Programs and libraries: a cgroup counts them only where it read them first.
            "own_mapped_files": mapped,
        },
        goals={"own_peak": goal(own, at_most=OWN_GOAL)},
    )


if __name__ == "__main__":
    main()
