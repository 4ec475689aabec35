"""The run itself."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from e2e.netlab import Lab, Probe
from e2e.netlab.nodeinit import AGENT_ARGUMENTS
from gketrace.packet import Packet, parse_address
from gketrace_proto.codec import encode
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1 import agent_pb2_grpc, capture_pb2
from gketrace_proto.v1alpha1 import target_pb2 as target
from tests.soak.gauges import GAUGES, agent_pid, read_gauges, slope

__all__ = ["soak"]

_EVERY: Final = 5.0
"""Seconds between two readings of what the agents hold."""
_LOOKS: Final = 5
"""Looks of which a reading is the least: what calls hold that are under way is let go in between,
and a leak is not."""
_WARM_UP: Final = 0.25
"""The part of the run whose readings do not count: what is imported and cached first."""
_GROWTH: Final = {"rss": 24 << 20, "threads": 4, "fds": 6, "namespaces": 4, "mounts": 1}
"""What the slope may add up to over the rest of the run; of others nothing.  A call that is under
way holds threads, descriptors and memory, and the fitted line of a short run shows some of it."""
_OPTIONS: Final = (("grpc.max_receive_message_length", 64 << 20),)


@dataclass
class _Soak:
    lab: Lab
    rng: random.Random
    stop: threading.Event = field(default_factory=threading.Event)
    calls: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    streamed: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str, error: Exception | None = None) -> None:
        with self.lock:
            self.calls[what] += 1
            if error is not None:
                text = str(error)
                if isinstance(error, grpc.RpcError):
                    text = f"{error.code().name}: {error.details()}"
                self.errors.append(f"{what}: {text}")


def _pods(lab: Lab, node: str) -> list[target.PodRef]:
    found = []
    for key, pod in lab.state["pods"].items():
        if pod["node"] == node and not pod["synthetic"]:
            namespace, _, name = key.partition("/")
            found.append(target.PodRef(namespace=namespace, name=name, uid=pod["uid"]))
    return found


def _requests(lab: Lab, node: str) -> dict[str, Callable[[agent_pb2_grpc.AgentStub], object]]:
    """Every kind of call but the streams, on one node."""
    host = pb.Target(host=True)
    pods = _pods(lab, node)
    walked = Packet(
        src=parse_address("203.0.113.10"),
        dst=parse_address(lab.state["nodes"][node]["ip"]),
        protocol=6,
        sport=40000,
        dport=30080,
    )
    walk = pb.WalkRequest(target=host, interface="eth0", packet=encode(walked), use_conntrack=True)
    text = pb.CONNTRACK_FORMAT_TEXT
    calls: dict[str, Callable[[agent_pb2_grpc.AgentStub], object]] = {
        "GetInfo": lambda s: s.GetInfo(pb.GetInfoRequest(), timeout=60),
        "Walk": lambda s: s.Walk(walk, timeout=60),
        "GetRules": lambda s: list(s.GetRules(pb.GetRulesRequest(target=host), timeout=60)),
        "Snapshot": lambda s: list(s.Snapshot(pb.SnapshotRequest(pods=pods), timeout=60)),
        "ListConntrack": lambda s: list(
            s.ListConntrack(pb.ListConntrackRequest(target=host, format=text), timeout=60)
        ),
        "GetConntrackStats": lambda s: s.GetConntrackStats(
            pb.GetConntrackStatsRequest(target=host), timeout=60
        ),
    }
    for pod in pods[:1]:
        inside = pb.Target(pod=pod)
        calls |= {
            "ResolvePod": lambda s, pod=pod: s.ResolvePod(
                pb.ResolvePodRequest(pod=pod), timeout=60
            ),
            "GetNetns": lambda s, inside=inside: s.GetNetns(
                pb.GetNetnsRequest(target=inside, pods=pods), timeout=60
            ),
            "ListConntrack of a pod": lambda s, inside=inside: list(
                s.ListConntrack(pb.ListConntrackRequest(target=inside), timeout=60)
            ),
        }
    return calls


def _caller(run: _Soak, pool: ThreadPoolExecutor, rate: float) -> None:
    """`rate` calls a second, whether the ones before have ended or not."""
    channels = {
        node: grpc.insecure_channel(f"unix:{run.lab.agent_socket(node)}", options=_OPTIONS)
        for node in run.lab.state["nodes"]
    }
    kinds = [
        (node, what, call) for node in channels for what, call in _requests(run.lab, node).items()
    ]

    def one(node: str, what: str, call: Callable[[agent_pb2_grpc.AgentStub], object]) -> None:
        try:
            call(agent_pb2_grpc.AgentStub(channels[node]))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the run looks for
            run.count(what, error)
        else:
            run.count(what)

    begun, sent = time.monotonic(), 0
    while not run.stop.is_set():
        pool.submit(one, *run.rng.choice(kinds))
        sent += 1
        run.stop.wait(max(0.0, begun + sent / rate - time.monotonic()))
    pool.shutdown(wait=True)
    for channel in channels.values():
        channel.close()


def _streamer(run: _Soak, node: str, what: str) -> None:
    """A follow or a capture that is opened again every few seconds, as people do."""
    host = pb.Target(host=True)
    with grpc.insecure_channel(f"unix:{run.lab.agent_socket(node)}", options=_OPTIONS) as channel:
        stub = agent_pb2_grpc.AgentStub(channel)
        while not run.stop.is_set():
            try:
                if what == "FollowConntrack":
                    stream = stub.FollowConntrack(
                        pb.FollowConntrackRequest(
                            target=host, existing=True, format=pb.CONNTRACK_FORMAT_TEXT
                        )
                    )
                else:
                    tap = capture_pb2.CaptureTap(target=host, interface="eth0", filter="tcp")
                    limits = capture_pb2.CaptureLimits(seconds=20)
                    stream = stub.Capture(capture_pb2.CaptureRequest(taps=[tap], limits=limits))
                ends = time.monotonic() + run.rng.uniform(4, 12)
                for _ in stream:
                    with run.lock:
                        run.streamed[what] += 1
                    if time.monotonic() > ends or run.stop.is_set():
                        stream.cancel()
                        break
                run.count(what)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.CANCELLED:
                    run.count(what, error)
                    run.stop.wait(1)


def _traffic(run: _Soak) -> None:
    """Connections through NodePort and ClusterIP, so that tables and streams have something."""
    nodes = [node["ip"] for node in run.lab.state["nodes"].values()]
    while not run.stop.is_set():
        probes = [Probe(source="client/203.0.113.10", address=ip, port=30080) for ip in nodes]
        run.lab.connect_all(probes)
        run.stop.wait(0.2)


def _scraper(run: _Soak) -> None:
    code = (
        "import ssl, sys, urllib.request as r;"
        "unchecked = ssl._create_unverified_context();"
        "a = 'https://127.0.0.1:9411/metrics';"
        "t = r.urlopen(a, timeout=20, context=unchecked).read();"
        "sys.exit(b'gketrace_conntrack_entries' not in t)"
    )
    while not run.stop.wait(5):
        for node in run.lab.state["nodes"]:
            done = run.lab.exec(f"node/{node}", ["python3", "-S", "-c", code])
            error = None if done.returncode == 0 else RuntimeError(done.stderr.strip()[-300:])
            run.count("scrape", error)


@contextlib.contextmanager
def _lab(name: str) -> Iterator[Lab]:
    """A lab whose agents serve /metrics, too."""
    before = os.environ.get(AGENT_ARGUMENTS)
    os.environ[AGENT_ARGUMENTS] = "--metrics-listen=tcp://127.0.0.1:9411"
    try:
        with Lab(name) as lab:
            yield lab
    finally:
        if before is None:
            del os.environ[AGENT_ARGUMENTS]
        else:
            os.environ[AGENT_ARGUMENTS] = before


def soak(
    name: str,
    *,
    seconds: float,
    rate: float,
    seed: int,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """One run in a lab of its own: its figures, and under `goals` what is to hold."""
    readings: dict[str, list[tuple[float, dict[str, int]]]] = defaultdict(list)
    with _lab(name) as lab:
        run = _Soak(lab, random.Random(seed))
        cgroup = Path(lab.state["cgroup"])
        agents = {node: agent_pid(cgroup, node) for node in lab.state["nodes"]}
        pool = ThreadPoolExecutor(16)
        nodes = list(agents)
        work: list[tuple[Any, ...]] = [(_caller, run, pool, rate), (_traffic, run), (_scraper, run)]
        work += [(_streamer, run, node, "FollowConntrack") for node in nodes]
        work += [(_streamer, run, node, "Capture") for node in nodes]
        threads = [threading.Thread(target=what, args=given) for what, *given in work]
        for thread in threads:
            thread.start()
        begun = time.monotonic()
        try:
            while time.monotonic() - begun < seconds:
                looks: dict[str, list[dict[str, int]]] = defaultdict(list)
                for _ in range(_LOOKS):
                    pause = begun + seconds - time.monotonic()
                    time.sleep(min(_EVERY, max(0.1, pause)) / _LOOKS)
                    for node, pid in agents.items():
                        looks[node].append(read_gauges(pid))
                for node, seen in looks.items():
                    least = {gauge: min(one[gauge] for one in seen) for gauge in seen[0]}
                    readings[node].append((time.monotonic() - begun, least))
                if progress is not None:
                    _, last = readings[nodes[0]][-1]
                    shown = " ".join(f"{key}={value}" for key, value in last.items())
                    progress(f"{time.monotonic() - begun:6.0f}s calls={run.calls.total()} {shown}")
        finally:
            run.stop.set()
            for thread in threads:
                thread.join()
        # What ended streams and calls held is let go.
        deadline = time.monotonic() + 60
        while True:
            after = {node: read_gauges(pid) for node, pid in agents.items()}
            if all(not one["rings"] and not one["zombies"] for one in after.values()):
                break
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
        return _result(run, readings, after, seconds)


def _result(
    run: _Soak,
    readings: dict[str, list[tuple[float, dict[str, int]]]],
    after: dict[str, dict[str, int]],
    seconds: float,
) -> dict[str, Any]:
    growth: dict[str, float] = {}
    for gauge in GAUGES:
        worst = 0.0
        for taken in readings.values():
            kept = [(at, one[gauge]) for at, one in taken if at >= seconds * _WARM_UP]
            line = slope([at for at, _ in kept], [value for _, value in kept])
            worst = max(worst, line * seconds * (1 - _WARM_UP))
        growth[gauge] = round(worst, 2)
    goals: dict[str, Any] = {
        f"{gauge}_growth": {
            "value": growth[gauge],
            "goal": _GROWTH.get(gauge, 0),
            "met": growth[gauge] <= _GROWTH.get(gauge, 0),
        }
        for gauge in GAUGES
        if gauge not in ("rings", "children")  # they come and go with the calls
    }
    left = sum(one["rings"] + one["zombies"] for one in after.values())
    goals["left_behind"] = {"value": left, "goal": 0, "met": left == 0}
    goals["errors"] = {"value": len(run.errors), "goal": 0, "met": not run.errors}
    return {
        "seconds": seconds,
        "calls": dict(run.calls),
        "stream_messages": dict(run.streamed),
        "errors": run.errors[:20],
        "first": {node: taken[0][1] for node, taken in readings.items()},
        "last": {node: taken[-1][1] for node, taken in readings.items()},
        "after": after,
        "growth": growth,
        "goals": goals,
    }
