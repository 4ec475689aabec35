"""Making findings: the usual severity of a code, and evidence that several detectors cite."""

from __future__ import annotations

from collections.abc import Iterable

from gketrace.findings.model import Confidence, Evidence, Finding, Severity, evidence
from gketrace.findings.registry import code_of
from gketrace.objects import Endpoint, Service
from gketrace.snapshot import NetnsSnapshot
from gketrace.trace import Citation, Source

__all__ = ["cited", "finding", "of_endpoint", "of_service", "sysctl"]


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
    )


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
