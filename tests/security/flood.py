"""Clients that mean no good, a thousand of each kind, and one that does.

``python -m tests.security.flood [--connections N] [--seconds S] [--kind KIND] [--json]``: an agent
with TLS, tokens and metrics; then for each kind of crowd, a process of its own (`crowd`), N
connections at once that are kept up for S seconds.  Meanwhile a good client makes calls, every
other one with a token and on a connection of its own, new each time.  Goals: it is answered each
time, within a second; the agent is the same process at the end, has logged no error, holds no more
descriptors and threads than before, and never had more than 256 MiB of memory.  Exit status 1 when
one is missed; figures as JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from e2e.kubeapi.harness import until
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1.agent_pb2_grpc import AgentStub
from tests.security.bed import NODE, Bed, agent_process_bed, metadata
from tests.security.crowd import KINDS
from tests.soak.gauges import read_gauges

__all__ = ["ON_METRICS", "Figures", "flood"]

ON_METRICS: Final = "plain TCP to metrics"
_KINDS: Final = (*KINDS, ON_METRICS)
_GOAL: Final = 1.0
"""Seconds for an answer."""
_MEMORY: Final = 256 << 20
"""Bytes, of the agent alone, as in everything that it does."""
_PAUSE: Final = 0.05
"""Seconds between the good client's calls."""
_KEPT: Final = 8
"""Connections to the API server that an agent keeps (`gketrace_agent.access.apiserver`)."""
_GONE: Final = 30.0
"""Seconds in which what the crowds held must be let go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one kind of crowd."""

    kind: str
    crowd: dict[str, int]
    """What it did: connections made, most at once, ended by the agent."""
    calls: int
    failed: dict[str, int]
    """The good client's failures by status."""
    worst_seconds: float
    median_seconds: float
    rss: int
    """Of the agent, in bytes, while the crowd is there."""


def _call(stub: AgentStub, token: str) -> str:
    """Empty, or the status."""
    try:
        stub.GetInfo(pb.GetInfoRequest(), metadata=metadata(token), timeout=20)
    except grpc.RpcError as error:
        return f"{error.code().name}: {error.details()}"
    return ""


@contextmanager
def _crowd(kind: str, port: int, connections: int, token: str) -> Iterator[dict[str, int]]:
    """While it is there; what it did is in the dict afterwards."""
    did: dict[str, int] = {}
    # It stands for other machines: the agent's share of this one is not to be measured by it.
    argv = ["nice", "-n", "10", sys.executable, "-m", "tests.security.crowd"]
    argv += [kind, str(port), str(connections), "1", NODE]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{token}\n")
            process.stdin.flush()
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"the crowd {kind!r} did not come together")
            yield did
            process.stdin.close()
            did.update(json.loads(process.stdout.readline()))
        finally:
            process.kill()


def _one(bed: Bed, kind: str, connections: int, seconds: float, good: str, bad: str) -> Figures:
    port, what = (bed.metrics, "plain TCP") if kind == ON_METRICS else (bed.port, kind)
    took: list[float] = []
    failed: Counter[str] = Counter()
    with bed.channel() as kept:
        _call(AgentStub(kept), good)
        with _crowd(what, port, connections, bad) as did:
            ends = time.monotonic() + seconds
            while time.monotonic() < ends:
                for new in (True, False):
                    # As the CLI does: a new token for each command.
                    token = bed.token("default/viewer") if new else good
                    began = time.monotonic()
                    if new:
                        with bed.channel() as channel:
                            problem = _call(AgentStub(channel), token)
                    else:
                        problem = _call(AgentStub(kept), good)
                    took.append(time.monotonic() - began)
                    if problem:
                        failed[problem] += 1
                    time.sleep(_PAUSE)
            rss = read_gauges(bed.pid)["rss"]
    return Figures(
        kind=kind,
        crowd=did,
        calls=len(took),
        failed=dict(failed),
        worst_seconds=round(max(took), 3),
        median_seconds=round(sorted(took)[len(took) // 2], 3),
        rss=rss,
    )


def _held(bed: Bed) -> int:
    """Descriptors that are not connections to the API server: of those the agent keeps as many as
    asked it at once, for the next time (`_KEPT`), which is more or less by the machine's load."""
    return read_gauges(bed.pid)["fds"] - bed.api.open_count("connections")


def _errors(log: Path) -> list[str]:
    said = [json.loads(line) for line in log.read_text().splitlines()]
    return [json.dumps(one) for one in said if one["level"] == "error"]


def flood(
    kinds: Sequence[str],
    *,
    connections: int,
    seconds: float,
    tell: Callable[[Figures], None] = lambda figures: None,
) -> dict[str, Any]:
    """All of it; `tell` is called after each kind."""
    found = []
    with (
        tempfile.TemporaryDirectory(prefix="gkflood") as folder,
        agent_process_bed(Path(folder)) as bed,
    ):
        good, bad = bed.token("default/viewer"), bed.token("default/capturer")
        with bed.channel() as channel:
            _call(AgentStub(channel), good)
        before, held = read_gauges(bed.pid), _held(bed)
        for kind in kinds:
            found.append(_one(bed, kind, connections, seconds, good, bad))
            tell(found[-1])
        until(lambda: _held(bed) <= held, seconds=_GONE)
        after, kept = read_gauges(bed.pid), bed.api.open_count("connections") - 1
        errors = _errors(bed.folder / "agent.log")
    worst = max(one.worst_seconds for one in found)
    failed = sum(sum(one.failed.values()) for one in found)
    memory = max(after["rss"], *(one.rss for one in found))
    return {
        "connections": connections,
        "seconds": seconds,
        "kinds": [asdict(one) for one in found],
        "held_before": before,
        "held_after": after,
        "errors": errors[:20],
        "goals": {
            "worst_seconds": _goal(worst, _GOAL),
            "failed": _goal(failed, 0),
            "errors_logged": _goal(len(errors), 0),
            # gRPC's own pools grow by some threads.
            "kept_for_the_api": _goal(kept, _KEPT),
            "threads_left": _goal(after["threads"] - before["threads"], 60),
            "rss": _goal(memory, _MEMORY),
        },
    }


def _goal(value: float, most: float) -> dict[str, Any]:
    return {"value": value, "goal": most, "met": value <= most}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connections", type=int, default=1000, metavar="N")
    parser.add_argument("--seconds", type=float, default=15.0, metavar="S", help="of each kind")
    parser.add_argument("--kind", action="append", choices=_KINDS, metavar="KIND")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    given = parser.parse_args()

    def tell(one: Figures) -> None:
        print(
            f"{one.kind}: {one.crowd}; {one.calls} calls, worst {one.worst_seconds} s, "
            f"median {one.median_seconds} s, failed: {one.failed or 'none'}, "
            f"agent {one.rss >> 20} MiB",
            flush=True,
        )

    result = flood(
        given.kind or _KINDS,
        connections=given.connections,
        seconds=given.seconds,
        tell=(lambda one: None) if given.json else tell,
    )
    print(json.dumps(result))
    return 0 if all(goal["met"] for goal in result["goals"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
