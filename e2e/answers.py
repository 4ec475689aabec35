"""What gketrace answers, beside what real packets meet: shared by the tests of the answers.

A `Desk` is one opened session of the CLI, so that hundreds of questions read the cluster once.
What it returns are the documents that `-o json` prints, made by the command's own functions.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any

from e2e.netlab import Lab, Probe, Result
from gketrace.packet import protocol_number
from gketrace_cli.asking import Asker
from gketrace_cli.commands.service import find_service
from gketrace_cli.find_pod import find_pod
from gketrace_cli.frontdoors import Door, Question, Selection, questions
from gketrace_cli.names import find_node
from gketrace_cli.options import Options
from gketrace_cli.render.trace_document import trace_document
from gketrace_cli.senders import resolve_sender
from gketrace_cli.session import Session
from gketrace_cli.verdict import Answer, judge_service

__all__ = [
    "COMMAND",
    "Case",
    "Desk",
    "Meeting",
    "Ran",
    "Said",
    "chains",
    "compare",
    "connect_all",
    "document",
    "meetings",
    "run_cli",
    "steps",
]

COMMAND = [str(Path(sys.executable).parent / "gketrace")]
"""The console script of the environment that the tests run in."""

_DOORS = {
    "clusterip": Door.CLUSTER_IP,
    "nodeport": Door.NODE_PORT,
    "loadbalancer": Door.LOAD_BALANCER,
    "externalip": Door.EXTERNAL_IP,
    "pod": Door.POD,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One question: the words of the command line, and the packet that they mean.

    `source` is what ``--from`` takes; `node` is ``--node``, empty when it is not given.
    """

    service: str
    source: str
    door: str
    address: str
    port: int
    protocol: str = "TCP"
    node: str = ""

    @property
    def title(self) -> str:
        return f"{self.source} -> {self.door} {self.service} {self.address}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the CLI says to one case: the JSON document and the exit code."""

    document: dict[str, Any]
    code: int

    @property
    def paths(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.document["paths"]
        return found


class Desk:
    """A session of the CLI on a lab, for many questions.  A context manager."""

    def __init__(self, lab: Lab) -> None:
        self._session = Session(Options(kubeconfig=str(lab.kubeconfig)))

    def __enter__(self) -> Desk:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session.close()

    def ask(self, cases: Iterable[Case]) -> dict[Case, Said]:
        """`gketrace service SERVICE --from SOURCE --via DOOR [--node NODE]` for each case."""
        by_service: dict[str, list[Case]] = {}
        for case in cases:
            by_service.setdefault(case.service, []).append(case)
        said: dict[Case, Said] = {}
        for key, wanted in by_service.items():
            said |= self._ask_service(key, wanted)
        return said

    def _ask_service(self, key: str, cases: Sequence[Case]) -> dict[Case, Said]:
        session = self._session
        namespace, name = key.split("/")
        service, endpoints = find_service(session, namespace, name)
        asked: list[Question] = []
        owner: list[Case] = []
        for case in cases:
            sender = resolve_sender(session, case.source, find_pod)
            if sender.pod is not None:
                session.pods.add(sender.pod)
            selection = Selection(
                senders=(sender,),
                door=_DOORS[case.door],
                node=find_node(case.node, session.nodes).name if case.node else "",
            )
            made, _ = questions(service, endpoints, session.nodes, selection)
            mine = [question for question in made if _is_of(question, case)]
            assert mine, f"{case.title}: the CLI asks nothing for it"
            asked += mine
            owner += [case] * len(mine)
        result = Asker(session, services=(service,)).ask(asked)
        answers: dict[Case, list[Answer]] = {case: [] for case in cases}
        for case, answer in zip(owner, result.answers, strict=True):
            answers[case].append(answer)
        return {case: _said(key, found) for case, found in answers.items()}


def _is_of(question: Question, case: Case) -> bool:
    return (str(question.address), question.port, question.protocol) == (
        str(ip_address(case.address)),
        case.port,
        protocol_number(case.protocol),
    )


def _said(key: str, answers: Sequence[Answer]) -> Said:
    missing = tuple(
        gap
        for answer in answers
        for path in answer.paths
        for gap in (*path.missing, *(path.reply.missing if path.reply else ()))
    )
    verdict = judge_service(f"Service {key}", answers, missing)
    document = trace_document("ServiceTrace", verdict, answers, query={}, missing=missing)
    return Said(document=document, code=int(verdict.code))


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Meeting:
    """What becomes of a connection, in the prober's words.

    `kind` is as `Result.kind`; `end` is the address and port that takes it, `peer` the source
    address seen there; `by` is ``icmp`` or ``tcp-reset`` for what is refused.
    """

    kind: str
    end: str = ""
    pod: str = ""
    peer: str = ""
    by: str = ""


def meetings(said: Said, protocol: str) -> set[Meeting]:
    """What the CLI's paths say that a client can meet; ``unknown`` where it does not tell."""
    return {_meeting(path, protocol) for path in said.paths}


_REFUSALS = {
    "icmp-port-unreachable": "icmp",
    "icmp6-port-unreachable": "icmp",
    "tcp-reset": "tcp-reset",
}


def _meeting(path: dict[str, Any], protocol: str) -> Meeting:
    outcome = path["outcome"]
    if outcome == "delivered":
        back = path["return"]
        assert back is not None
        gaps = {gap["what"] for gap in (*path["missing"], *back["missing"])}
        if gaps:
            return Meeting(kind="unknown")
        if back["outcome"] in ("delivered", "transmitted"):
            who, _, end = path["endpoint"].rpartition(" ")
            pod = who.removeprefix("pod/") if who.startswith("pod/") else ""
            return Meeting(kind="delivered", end=end, pod=pod, peer=path["sourceSeen"])
        return Meeting(kind="unknown" if back["outcome"] == "unknown" else "timeout")
    if outcome == "rejected":
        return Meeting(kind="refused", by=_REFUSALS.get(path["rejectWith"], path["rejectWith"]))
    if outcome == "refused":
        return Meeting(kind="refused", by="tcp-reset" if protocol == "TCP" else "icmp")
    if outcome in ("dropped", "unreachable", "no-neighbour", "looped"):
        return Meeting(kind="timeout")
    return Meeting(kind="unknown")


def _met(result: Result) -> Meeting:
    if result.kind == "delivered":
        assert result.local is not None
        assert result.peer_seen is not None
        address, port = result.local
        end = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        return Meeting(
            kind="delivered", end=end, pod=result.pod or "", peer=str(result.peer_seen[0])
        )
    if result.kind == "refused":
        port_unreachable = result.icmp in ((3, 3), (1, 4))
        by = "tcp-reset" if result.icmp is None else "icmp" if port_unreachable else "other"
        return Meeting(kind="refused", by=by)
    return Meeting(kind=result.kind)


def compare(case: Case, said: Said, result: Result) -> str | None:
    """None when the CLI's answer holds for the real connection, else what differs."""
    expected, real = meetings(said, case.protocol), _met(result)
    if real in expected:
        return None
    for choice in expected:
        # A node's own socket is named by the node: which pod it is the node cannot tell.
        if choice.kind == "delivered" and not choice.pod and replace(choice, pod=real.pod) == real:
            return None
    return f"{case.title}/{case.protocol}: said {sorted(expected)} {_details(said)}, met {real}"


def _details(said: Said) -> list[str]:
    found = []
    for path in said.paths:
        back = path["return"] or {"detail": None, "missing": []}
        gaps = [gap["why"] for gap in (*path["missing"], *back["missing"])]
        found.append(" / ".join(map(str, (path["detail"], back["detail"], *gaps))))
    return found


def steps(path: dict[str, Any]) -> list[dict[str, Any]]:
    """All steps of a path in order, each with its hop's `node` and `netns`."""
    return [
        {**step, "node": hop["node"], "netns": hop["netns"]}
        for hop in path["hops"]
        for step in hop["steps"]
    ]


def chains(path: dict[str, Any], node: str = "") -> list[str]:
    """The iptables chains that decided something, in order, each named once per visit."""
    found: list[str] = []
    for step in steps(path):
        if node and not (step["node"] or "").endswith(node):
            continue
        name = step["chain"]
        if name and (not found or found[-1] != name):
            found.append(name)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One run of the program."""

    out: str
    err: str
    code: int


def connect_all(
    lab: Lab, probes: list[Probe], judged: Callable[[int, Result], str | None]
) -> list[Result]:
    """The results.  Where one is wrong (`judged` says why) because nothing came in a second, the
    machine may have been busy with the others: that connection is made four more times, and each
    of those has twenty seconds; the worst of them counts."""
    results = lab.connect_all(probes)
    for number, result in enumerate(results):
        if result.kind == "timeout" and judged(number, result):
            again = lab.connect_all([probes[number]] * 4, timeout=20)
            results[number] = next((one for one in again if judged(number, one)), again[0])
    return results


def run_cli(lab: Lab | None, *arguments: str, timeout: float = 60.0, **env: str) -> Ran:
    """The program in a process of its own, with the lab's kubeconfig."""
    import os

    variables = {k: v for k, v in os.environ.items() if k not in ("KUBECONFIG", "NO_COLOR")}
    variables["COLUMNS"] = "80"
    if lab is not None:
        variables["KUBECONFIG"] = str(lab.kubeconfig)
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**variables, **env},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Ran(out=done.stdout, err=done.stderr, code=done.returncode)


def document(ran: Ran) -> dict[str, Any]:
    """What ``-o json`` printed."""
    parsed: dict[str, Any] = json.loads(ran.out)
    return parsed
