"""What a large node costs in memory: ``python -m tests.bench.memory --json``.

An agent whose node has 250,000 conntrack entries and 10,000 services with 10 endpoints (430,000
lines of iptables rules) is asked everything that it can tell, one call after the other: metrics,
walks, all rules, all entries as text and as records, a snapshot.  Then the large ones are asked all
at once, by as many clients as ``--at-once`` says for each.  The agent's own peak is its VmHWM; the
peak with its children is that of its cgroup, which is what a container's limit bounds.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
ALL_GOAL: Final = 768 << 20
"""The DaemonSet's limit."""
_LARGE: Final = ("rules", "snapshot", "walk", "conntrack_text", "conntrack_entries")
_SECONDS: Final = 900
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


def _calls(
    stub: agent_pb2_grpc.AgentStub, netns: str, services: tuple[BenchService, ...]
) -> dict[str, Callable[[], int]]:
    """Each returns the bytes of its answer."""
    host = pb.Target(host=True)
    one = _walk(services[len(services) // 2])
    return {
        "metrics": lambda: int(scrape(netns)),
        "info": lambda: int(stub.GetInfo(pb.GetInfoRequest(), timeout=_SECONDS).ByteSize()),
        "walk": lambda: int(stub.Walk(one, timeout=_SECONDS).ByteSize()),
        "rules": lambda: _drain(stub.GetRules(pb.GetRulesRequest(target=host), timeout=_SECONDS)),
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


def _timed(agent: AgentProcess, call: Callable[[], int]) -> dict[str, Any]:
    """Bytes of its answer, seconds, and the agent's peaks after it."""
    start = time.perf_counter()
    size = call()
    return {
        "bytes": size,
        "seconds": round(time.perf_counter() - start, 2),
        "own_peak": agent.memory("VmHWM"),
        "peak_of_all": agent.peak_of_all(),
    }


@contextmanager
def _stub(agent: AgentProcess) -> Iterator[agent_pb2_grpc.AgentStub]:
    """Over a connection of its own."""
    options = (("grpc.max_receive_message_length", 64 << 20), ("grpc.use_local_subchannel_pool", 1))
    with grpc.insecure_channel(f"unix:{agent.socket}", options=options) as channel:
        yield agent_pb2_grpc.AgentStub(channel)


def _ask(netns: str, agent: AgentProcess, services: tuple[BenchService, ...]) -> dict[str, Any]:
    """One after the other."""
    with _stub(agent) as stub:
        calls = _calls(stub, netns, services)
        return {name: _timed(agent, call) for name, call in calls.items()}


def _ask_at_once(
    netns: str, agent: AgentProcess, services: tuple[BenchService, ...], of_each: int
) -> dict[str, Any]:
    """The large ones, `of_each` clients for each.  Raises grpc.RpcError when one is refused."""

    def one(name: str) -> int:
        with _stub(agent) as stub:
            return _calls(stub, netns, services)[name]()

    def everything() -> int:
        with ThreadPoolExecutor(of_each * len(_LARGE)) as pool:
            return sum(pool.map(one, _LARGE * of_each))

    return _timed(agent, everything)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--services", type=int, default=10_000, metavar="N")
    parser.add_argument("--entries", type=int, default=250_000, metavar="N")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="clients of each call")
    parser.add_argument("--backend", default="legacy", choices=("legacy", "nftables"))
    options = parser.parse_args()
    services = make_services(options.services, 10)
    with namespace(f"gkbm-{os.getpid()}") as name:
        restore(name, options.backend, services)
        with open_path(Path("/run/netns", name)) as handle:
            run_in_netns(handle, lambda: make(flows(options.entries)))
        more = ("--metrics-listen", f"tcp://127.0.0.1:{PORT}", f"--max-call-seconds={_SECONDS}")
        with agent_process(name, *more) as agent:
            wait_until(lambda: scrape(name, sure=False), 120)
            calls = _ask(name, agent, services)
            own, everything = agent.memory("VmHWM"), agent.peak_of_all()
            at_once = _ask_at_once(name, agent, services, options.at_once)
            after, mapped = agent.memory("VmRSS"), agent.memory("RssFile")
    report(
        options,
        figures={
            "services": options.services,
            "entries": options.entries,
            "backend": options.backend,
            "calls": calls,
            "at_once": {"clients": options.at_once * len(_LARGE), **at_once},
            "own_peak": own,
            "own_after": after,
            "peak_of_all": everything,
            # Programs and libraries: a cgroup counts them only where it read them first.
            "own_mapped_files": mapped,
        },
        goals={
            "own_peak": goal(own, at_most=OWN_GOAL),
            **(
                {}  # this machine has no memory controller to ask
                if at_once["peak_of_all"] is None
                else {"peak_of_all_at_once": goal(at_once["peak_of_all"], at_most=ALL_GOAL)}
            ),
        },
    )


if __name__ == "__main__":
    main()
