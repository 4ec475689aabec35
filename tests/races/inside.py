"""The rounds, as PID 1 of namespaces of their own (`tests.races.__main__` makes them)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from tests.agent.pods import CGROUPS, FakeContainer, FakeRuntime, FakeSandbox, fake_runtime
from tests.races.agent import RaceAgent
from tests.races.calls import CALLS, WrongNamespace
from tests.races.pods import NAMESPACE, RacePod, poll
from tests.soak.gauges import read_gauges

_MOUNTS: Final = Path("/run/netns")
_KNOWN_BY: Final = ("cgroup", "pid", "path", "stale")
"""How the agent can find a pod: by its cgroup only; the runtime names its process, or its mounted
namespace; or it goes on naming them when they are gone."""
_WARM: Final = 10
"""Rounds of each kind before it is read what the agent holds."""
_COLD: Final = 25
"""Of so many restarts one is of a new process, with its second of imports; the others are of a fork
that has them."""
_POOL: Final = 4
"""Threads by which gRPC's pools may still grow after the first rounds."""
_HELD: Final = ("threads", "fds", "namespaces", "rings", "children", "zombies", "mounts")


@dataclass
class _Races:
    rng: random.Random
    agent: RaceAgent
    runtime: FakeRuntime
    root: Path
    pool: ThreadPoolExecutor
    made: int = 0
    reused: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Pods that live and were not answered for."""
    took: dict[str, float] = field(default_factory=dict)

    def pod(self, pid: int = 0) -> RacePod:
        self.made += 1
        return RacePod.start(self.made, self.root, pid)

    def ready(self, pod: RacePod) -> str:
        """Waits for it and lets the runtime know of it; returns how."""
        pod.wait(_MOUNTS, hold=self.rng.random() < 0.5)
        by = self.rng.choice(_KNOWN_BY)
        if by != "cgroup":
            box = FakeSandbox(
                id=uuid.uuid4().hex * 2,
                namespace=NAMESPACE,
                name=pod.name,
                uid=pod.uid,
                ip=pod.address,
            )
            if by in ("path", "stale"):
                box.netns_path = str(pod.path)
            if by in ("pid", "stale"):
                box.containers = [FakeContainer(id=pod.container_id, name="app", pid=pod.pid)]
            self.runtime.sandboxes.append(box)
        return by

    def forget(self, pod: RacePod) -> None:
        pod.forget()
        kept = [box for box in self.runtime.sandboxes if box.uid != pod.uid]
        self.runtime.sandboxes[:] = kept

    def call(self, kind: str, pod: RacePod) -> str:
        """What came of it: ``right``, ``wrong``, or the status."""
        try:
            CALLS[kind](self.agent.stub, pod)
        except WrongNamespace as error:
            self.wrong.append(f"{kind}: {error}")
            return "wrong"
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
                self.failed.append(f"{kind}: {error.code().name}: {error.details()}")
            return str(error.code().name)
        return "right"

    def living(self, kind: str, pod: RacePod) -> None:
        """A pod that is there must be answered for."""
        result = self.call(kind, pod)
        if result not in ("right", "wrong"):
            self.failed.append(f"{kind} of a living pod: {result}")

    def delay(self, kind: str) -> float:
        return self.rng.uniform(0, 1.2 * self.took.get(kind, 0.03))

    def deleted(self, kind: str, pod: RacePod, by: str) -> tuple[RacePod, str]:
        """One round: `pod` goes away in the middle of a call; its successor is returned."""
        if self.rng.random() < 0.5:
            began = time.monotonic()
            self.living(kind, pod)
            self.took[kind] = 0.8 * self.took.get(kind, 0.03) + 0.2 * (time.monotonic() - began)
        pid, delay = pod.pid, self.delay(kind)
        called: Future[str] = self.pool.submit(self.call, kind, pod)
        time.sleep(delay)
        if by != "stale":
            kept = [box for box in self.runtime.sandboxes if box.uid != pod.uid]
            self.runtime.sandboxes[:] = kept
        pod.kill()
        after = self.pod(pid)
        self.reused += after.pid == pid
        again: Future[str] = self.pool.submit(self.call, self.rng.choice([*CALLS]), pod)
        by = self.ready(after)
        self.answers[f"{kind}: {called.result()}"] += 1
        self.answers[f"after: {again.result()}"] += 1
        self.living(self.rng.choice(["resolved", "observed", kind]), after)
        self.forget(pod)
        return after, by

    def restarted(self, pod: RacePod, *, cold: bool) -> None:
        """One round: the agent ends in the middle of a call, and another one begins."""
        kind = self.rng.choice([*CALLS])
        called: Future[str] = self.pool.submit(self.call, kind, pod)
        time.sleep(self.delay(kind))
        self.agent.signal(self.rng.choice((signal.SIGTERM, signal.SIGKILL)))
        self.agent.ended()
        self.answers[f"restarted: {called.result()}"] += 1
        known = (os.getpid(), pod.pid, self.agent.nursery)
        poll(lambda: not _others(pod, known), "processes of an agent that has ended")
        self.agent.start(warm=not cold)
        self.living(self.rng.choice(["resolved", "observed", "walked"]), pod)


def _others(pod: RacePod, known: tuple[int, ...]) -> list[int]:
    """Processes that are neither `known` nor the pod's.  Zombies are reaped on the way."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in known:
            continue
        try:
            stat = Path("/proc", name, "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent = stat.rpartition(")")[2].split()[:2]
        if int(parent) == pod.pid:
            continue
        if state == "Z":
            with suppress(ChildProcessError):  # not ours to reap
                os.waitpid(int(name), os.WNOHANG)
            continue
        found.append(int(name))
    return found


@contextmanager
def _races(seed: int) -> Iterator[_Races]:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    _MOUNTS.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "gkraces", str(_MOUNTS)], check=True)
    root = CGROUPS / f"gkraces-{uuid.uuid4().hex[:8]}"
    root.mkdir()
    with (
        tempfile.TemporaryDirectory(prefix="gkraces") as folder,
        fake_runtime(Path(folder, "cri.sock")) as runtime,
        ThreadPoolExecutor(4) as pool,
    ):
        agent = RaceAgent(Path(folder), Path(folder, "cri.sock"))
        races = _Races(random.Random(seed), agent, runtime, root, pool)
        try:
            yield races
        finally:
            agent.stop()
            for procs in root.rglob("cgroup.procs"):
                for text in procs.read_text().split():
                    os.kill(int(text), signal.SIGKILL)
            for path, _, _ in os.walk(root, topdown=False):
                poll(lambda path=path: _gone(Path(path)), f"{path} is still used")


def _gone(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:  # a process in it has not quite ended
        return False
    return True


def _held(agent: RaceAgent) -> dict[str, int]:
    """When nothing is under way: the least of some readings, as threads end a little later."""
    agent.wait_settled()
    readings = []
    for _ in range(10):
        readings.append(read_gauges(agent.pid))
        time.sleep(0.05)
    return {name: min(one[name] for one in readings) for name in readings[0]}


def _run(times: int, seed: int, kinds: list[str], quiet: bool) -> dict[str, Any]:
    begun = time.monotonic()
    done: Counter[str] = Counter()
    with _races(seed) as races:
        pod = races.pod()
        by = races.ready(pod)
        deleting = [kind for kind in kinds if kind in CALLS]
        first: dict[str, int] = {}
        for number in range(times if deleting else 0):
            for kind in deleting:
                pod, by = races.deleted(kind, pod, by)
                done[kind] += 1
            if number == min(_WARM, times // 2):
                first = _held(races.agent)
            if not quiet and number % 50 == 49:
                print(f"{time.monotonic() - begun:.0f} s: {dict(done)}", flush=True)
        last = _held(races.agent) if deleting else {}
        for number in range(times if "restarted" in kinds else 0):
            cold = number % _COLD == 0
            races.restarted(pod, cold=cold)
            done["restarted"] += 1
            done["restarted_cold"] += cold
            if not quiet and number % 50 == 49:
                print(f"{time.monotonic() - begun:.0f} s: {number + 1} restarts", flush=True)
        pod.kill()
        races.forget(pod)
    grown = {
        name: max(0, last[name] - first[name] - (_POOL if name == "threads" else 0))
        for name in _HELD
        if last
    }
    leaks = sum(grown.values())
    return {
        "times": dict(done),
        "answers": dict(sorted(races.answers.items())),
        "pid_reused": races.reused,
        "wrong": races.wrong[:20],
        "failed": races.failed[:20],
        "held_first": first,
        "held_last": last,
        "seconds": round(time.monotonic() - begun, 1),
        "goals": {
            "wrong_namespaces": _goal(len(races.wrong)),
            "living_pods_not_answered_for": _goal(len(races.failed)),
            "left_behind": _goal(leaks),
        },
    }


def _goal(value: int) -> dict[str, Any]:
    return {"value": value, "goal": 0, "met": value == 0}


def main() -> int:
    times, seed, quiet, *kinds = sys.argv[1:]
    result = _run(int(times), int(seed), kinds, quiet == "True")
    print(json.dumps(result))
    return 0 if all(goal["met"] for goal in result["goals"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
