"""Making findings: the usual severity of a code, and evidence that several detectors cite."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from gketrace.findings.model import Confidence, Evidence, Finding, Severity, evidence
from gketrace.findings.registry import code_of
from gketrace.objects import Endpoint, Pod, Service
from gketrace.snapshot import NetnsSnapshot
from gketrace.trace import Citation, Source

if TYPE_CHECKING:
    from gketrace.ruleset import Rule
    from gketrace.ruleset.iptables import IptablesRuleset

__all__ = [
    "at",
    "cited",
    "finding",
    "of_endpoint",
    "of_service",
    "proxy_logs",
    "rules_like",
    "sysctl",
]

_CHAIN: Final = re.compile(rb"(?:\[\d+:\d+\] )?-A (\S+) ")


def finding(
    code: str,
    text: str,
    proof: Iterable[Evidence],
    *,
    remedy: str,
    command: str,
    subjects: Iterable[str],
    nodes: Iterable[str] = (),
    cause: str = "",
    severity: Severity | None = None,
    confidence: Confidence = Confidence.CERTAIN,
    families: Iterable[int] = (),
) -> Finding:
    """`cause` empty: the subjects are what it hangs on."""
    about = tuple(dict.fromkeys(subjects))
    return Finding(
        code=code,
        severity=severity or code_of(code).severity,
        confidence=confidence,
        text=text,
        evidence=tuple(dict.fromkeys(proof)),
        remedy=remedy,
        command=command,
        subjects=about,
        nodes=tuple(dict.fromkeys(node for node in nodes if node)),
        cause=cause or " ".join(about),
        families=frozenset(families),
    )


def at(command: str, node: str, netns: str = "host") -> str:
    """A command that is run elsewhere than gketrace: the shell takes what is said of the place for
    a comment, so that the line can be pasted as it is."""
    inside = "" if netns == "host" else f"in {netns} "
    return f"{command}  # {inside}on node {node}"


def proxy_logs(pods: Iterable[Pod], node: str) -> str:
    """Of the node's own kube-proxy, where its pod is known; else of some by their label."""
    for pod in pods:
        if (pod.namespace, pod.node) == ("kube-system", node) and pod.name.startswith("kube-proxy"):
            return f"kubectl -n kube-system logs {pod.name} --tail=50"
    return "kubectl -n kube-system logs -l component=kube-proxy --tail=50"


def cited(citation: Citation, node: str, netns: str = "host", note: str = "") -> Evidence:
    """What an agent read."""
    return Evidence(citation=citation, node=node, netns=netns, note=note)


def of_service(service: Service, text: str) -> Evidence:
    """A field of a Service."""
    return evidence(Source.OBJECT, f"Service {service.key}: {text}")


def of_endpoint(end: Endpoint) -> Evidence:
    """An element of an EndpointSlice."""
    said = f"ready {str(end.ready).lower()}, serving {str(end.serving).lower()}"
    said += f", terminating {str(end.terminating).lower()}"
    whose = f" ({end.pod})" if end.pod else ""
    text = f"{end.source} in {end.namespace}: {end.address}:{end.port}{whose} {said}"
    return evidence(Source.OBJECT, text)


def sysctl(shot: NetnsSnapshot, name: str, value: str, note: str = "") -> Evidence:
    """A switch of a namespace."""
    return Evidence(
        citation=Citation(source=Source.SYSCTL, text=f"{name} = {value}"),
        node=shot.netns.node,
        netns=str(shot.netns),
        note=note,
    )


def rules_like(one: IptablesRuleset, pattern: re.Pattern[bytes]) -> Iterator[Rule]:
    """The rules whose text `pattern` finds; only the chains that hold one are parsed."""
    lines: dict[str, set[str]] = {}
    for found in pattern.finditer(one.text):
        start = one.text.rfind(b"\n", 0, found.start()) + 1
        chain = _CHAIN.match(one.text, start)
        if chain is not None:
            end = one.text.index(b"\n", start)
            text = one.text[start:end].decode("utf-8", "replace")
            lines.setdefault(chain[1].decode("utf-8", "replace"), set()).add(text)
    for name, texts in lines.items():
        for table in one.tables:
            for rule in one.chain(table, name) or ():
                if any(text.endswith(rule.text) for text in texts):
                    yield rule
