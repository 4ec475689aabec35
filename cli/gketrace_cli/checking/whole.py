"""The check of a whole cluster: reads it, traces over what was read, and finds."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gketrace.errors import ExitCode, UsageError
from gketrace.findings.detect import find
from gketrace.findings.model import Finding, Severity
from gketrace.findings.registry import code_of
from gketrace.findings.world import Way, World
from gketrace.topology import SeenAddress
from gketrace.trace import Disposition, Missing
from gketrace_cli.asking import inquiry, make_topology
from gketrace_cli.astray import is_relayed
from gketrace_cli.checking.health import health_probes
from gketrace_cli.checking.offline import trace_offline
from gketrace_cli.checking.probes import probes
from gketrace_cli.checking.sights import read_sights
from gketrace_cli.checking.ways import ways_of
from gketrace_cli.frontdoors import Door
from gketrace_cli.inputs import read_input
from gketrace_cli.verdict import Answer, outcome_text

if TYPE_CHECKING:
    from gketrace.objects import Pod
    from gketrace_cli.session import Session

__all__ = ["IGNORE_FILE", "Checked", "Ignore", "check_world", "read_ignores", "read_world"]

IGNORE_FILE: Final = ".gketrace-ignore"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """The answer."""

    findings: tuple[Finding, ...]
    ignored: int
    world: World
    left_out: int
    """Ways that were not traced."""

    @property
    def unknown(self) -> tuple[Way, ...]:
        """Ways whose end could not be told, but for those that no node could tell."""
        return tuple(
            way for way in self.world.ways if way.standing == "unknown" and not _beyond(way)
        )

    @property
    def beyond(self) -> tuple[Way, ...]:
        """Ways to Services and pods that leave what nodes see: to an endpoint outside the cluster,
        or into a sidecar of the sender."""
        return tuple(
            way
            for way in self.world.ways
            if way.standing == "unknown"
            and _beyond(way)
            and way.path.front_door != Door.ADDRESS.value
        )

    @property
    def code(self) -> ExitCode:
        if self.world.missing or self.unknown:
            return ExitCode.PARTIAL
        if any(one.severity is Severity.ERROR for one in self.findings):
            return ExitCode.BROKEN
        return ExitCode.OK


def _beyond(way: Way) -> bool:
    if way.path.front_door == Door.ADDRESS.value:
        return True
    if way.path.missing:
        return False
    return way.path.outcome.disposition is Disposition.TRANSMITTED or is_relayed(way.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ignore:
    """One line of the ignore file, or one ``--ignore``."""

    code: str
    subject: str = "*"
    """A pattern of `fnmatch`; a finding is ignored when it fits all its subjects."""

    def takes(self, one: Finding) -> bool:
        return one.code == self.code and all(
            fnmatch.fnmatchcase(subject, self.subject) for subject in one.subjects
        )


def read_ignores(codes: Iterable[str], file: str | None) -> tuple[Ignore, ...]:
    """Raises: `UsageError`, `NotFoundError`."""
    found = [Ignore(code=code_of(code).code) for code in codes]
    path = Path(file or IGNORE_FILE)
    if file is None and not path.exists():
        return tuple(found)
    try:
        lines = read_input(path).decode().splitlines()
    except OSError as error:
        raise UsageError(f"cannot read the ignore file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"cannot read the ignore file {path}: it is not UTF-8") from None
    for line in lines:
        words = line.partition("#")[0].split(None, 1)
        if words:
            subject = words[1].strip() if len(words) > 1 else "*"
            found.append(Ignore(code=code_of(words[0]).code, subject=subject))
    return tuple(found)


def read_world(session: Session) -> tuple[World, int]:
    """All nodes, pods and Services; and how many ways were not traced."""
    session.progress.say("reading the cluster")
    read = session.read(
        {
            "services": session.cluster.services,
            "endpoints": session.cluster.endpoints,
            "pods": session.cluster.pods,
        }
    )
    nodes = session.nodes
    for pod in read["pods"]:
        session.pods.add(pod)
    alive = [p for p in read["pods"] if p.phase not in ("Succeeded", "Failed")]
    by_node: dict[str, list[Pod]] = {node.name: [] for node in nodes}
    for pod in alive:
        # One that has not started yet has no namespace to read.
        if pod.node in by_node and pod.phase == "Running":
            by_node[pod.node].append(pod)
    session.progress.say(f"reading {len(nodes)} nodes")
    sights = read_sights(session, by_node)
    world = World(
        nodes=nodes,
        pods=read["pods"],
        services=read["services"],
        endpoints=read["endpoints"],
        sights=sights.by_node,
        missing=sights.missing,
    )
    seen = {node.name: session.fleet.addresses(node.name) for node in nodes}
    session.progress.say("tracing")
    return trace_world(world, seen)


def trace_world(world: World, seen: Mapping[str, tuple[SeenAddress, ...]]) -> tuple[World, int]:
    """The world with its ways traced, and how many were not; `seen`: each node's own addresses."""
    alive = [p for p in world.pods if p.phase not in ("Succeeded", "Failed")]
    topology = make_topology(world.nodes, alive, world.services, seen)
    there = [node for node in world.nodes if node.name in world.sights]
    asked, left_out = probes(there, alive, world.services, world.endpoints)
    checks, more = health_probes(there, world.sights, world.services, world.endpoints)
    questions = [*(question for question, _ in asked), *(check.question for check in checks)]
    traced = trace_offline(topology, world.sights, [inquiry(question) for question in questions])
    answers = [
        Answer(question=question, paths=paths)
        for question, paths in zip(questions, traced, strict=True)
    ]
    ways = ways_of(answers[: len(asked)], {n: service for n, (_, service) in enumerate(asked)})
    for check, answer in zip(checks, answers[len(asked) :], strict=True):
        found = ways_of([answer], check.service)
        ways += tuple(replace(way, stands_for=check.stands_for) for way in found)
    return replace(world, ways=ways), left_out + more


def check_world(world: World, left_out: int, ignores: Sequence[Ignore], least: Severity) -> Checked:
    """What is found in it, without what is to be ignored and what is less than `least`."""
    found = [one for one in find(world) if one.severity.rank <= least.rank]
    kept = tuple(one for one in found if not any(i.takes(one) for i in ignores))
    return Checked(findings=kept, ignored=len(found) - len(kept), world=world, left_out=left_out)


def missing_of(checked: Checked) -> tuple[Missing, ...]:
    """What was not seen, and ways that could not be told."""
    gaps = list(checked.world.missing)
    for way in checked.unknown:
        path = way.path
        seen = [*path.missing, *(path.reply.missing if path.reply is not None else ())]
        if not seen:
            end = path.reply if path.reply is not None else path
            why = f"could not tell: {outcome_text(end)}"
            node = end.outcome.netns.node
            seen = [Missing(what=f"{path.source} → {path.target}", why=why, node=node)]
        gaps += seen
    # A walk into what was not read says the same once more.
    return tuple({(gap.node, gap.why): gap for gap in reversed(gaps)}.values())[::-1]


__all__ += ["missing_of", "trace_world"]
