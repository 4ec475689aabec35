"""Findings of one answer: of a Service, of a trace, of a pod.

They rest on what the command has read anyway; nothing more is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gketrace.conntrack import ConntrackEntry
from gketrace.errors import GketraceError
from gketrace.findings.detect import find
from gketrace.findings.model import Finding
from gketrace.findings.world import Sight, World
from gketrace.objects import Endpoint, Node, Pod, Service
from gketrace.snapshot import NetnsSnapshot, Unavailable
from gketrace.trace import NetnsRef
from gketrace_cli.checking.ways import ways_of
from gketrace_cli.verdict import Answer

if TYPE_CHECKING:
    from gketrace_cli.liveness import LiveReading
    from gketrace_cli.podreport import PodReport

__all__ = ["pod_findings", "service_findings", "trace_findings"]


def service_findings(
    service: Service,
    endpoints: Sequence[Endpoint],
    nodes: Sequence[Node],
    pods: Iterable[Pod],
    answers: Sequence[Answer],
    live: LiveReading,
) -> tuple[Finding, ...]:
    """Of `gketrace service`: the Service's objects, the ways traced, its live connections."""
    entries: dict[str, list[ConntrackEntry]] = {}
    for one in live.found:
        entries.setdefault(one.place.node, []).append(one.entry)
    world = World(
        nodes=tuple(nodes),
        pods=tuple(pods),
        all_pods=False,
        services=(service,),
        endpoints=tuple(endpoints),
        sights={node: _blind(node, tuple(found)) for node, found in entries.items()},
        ways=ways_of(answers, service.key),
    )
    return _of(find(world), f"service {service.key}")


def trace_findings(
    answers: Sequence[Answer],
    nodes: Sequence[Node],
    pods: Iterable[Pod],
    services: Sequence[Service],
    read_endpoints: Callable[[Service], Sequence[Endpoint]],
) -> tuple[Finding, ...]:
    """Of `gketrace trace`: what stopped the packet, or its answer.

    `read_endpoints` is called when a packet to a Service did not arrive.
    """
    wanted = {str(answer.question.address) for answer in answers}
    door = next((s for s in services if wanted & set(s.cluster_ips)), None)
    ways = ways_of(answers, door.key if door is not None else "")
    world = World(nodes=tuple(nodes), pods=tuple(pods), all_pods=False, ways=ways)
    broken = any(way.standing in ("broken", "configured") for way in ways)
    if door is None or not broken:
        return find(world)
    try:
        endpoints = tuple(read_endpoints(door))
    except GketraceError:
        return find(world)  # what the Service has is not known: nothing is said of it
    return find(replace(world, services=(door,), endpoints=endpoints))


def pod_findings(report: PodReport) -> tuple[Finding, ...]:
    """Of `gketrace pod`: the pod's namespace and its node's, without their rules."""
    pod = report.pod
    handlers = {}
    if report.resolved.runtime_handler not in ("", "runc"):
        handlers[pod.key] = report.resolved.runtime_handler
    sight = Sight(
        node=pod.node,
        host=report.host,
        pods={} if report.shared else {pod.key: report.inside},
        handlers=handlers,
        plane="",
    )
    world = World(
        nodes=(report.node,) if report.node is not None else (),
        pods=(pod,),
        all_pods=False,
        sights={pod.node: sight},
    )
    return _of(find(world), f"pod {pod.key}", f"node {pod.node}")


def _of(findings: Iterable[Finding], *subjects: str) -> tuple[Finding, ...]:
    """Those of the subjects, and those that explain one of them."""
    return tuple(
        one
        for one in findings
        if any(set(subjects) & set(each.subjects) for each in (one, *one.consequences))
    )


def _blind(node: str, entries: tuple[ConntrackEntry, ...]) -> Sight:
    """A node of which only connections were read."""
    none = Unavailable(reason="not asked for")
    host = NetnsSnapshot(
        netns=NetnsRef(node=node),
        links=none,
        addresses=none,
        routes=none,
        rules=none,
        neighbours=none,
        fdb=none,
        sysctls=none,
        sockets=none,
        rulesets=(none,),
        conntrack=none,
        recent=none,
        ipsets=none,
    )
    return Sight(node=node, host=host, entries=entries)
