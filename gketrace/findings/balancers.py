"""Load balancers' health checks that do not get in, or whose answers do not get out.

Each probe was walked like any packet (`Way.stands_for`).  What stops other packets, too, is their
own finding, which the probe joins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gketrace.findings.making import cited, finding, of_service
from gketrace.findings.model import Confidence, Evidence, Finding, Severity, evidence
from gketrace.findings.stop import Stop
from gketrace.findings.ways import failing_ways, named, stops
from gketrace.findings.world import World
from gketrace.objects import Service
from gketrace.trace import Source

__all__ = ["health_checks"]

_SHOWN: Final = 3
"""Services, ranges or targets that a sentence names."""


def health_checks(world: World) -> Iterator[Finding]:
    """GKT-116: one finding for each rule, route or switch, on whichever nodes it is."""
    probes = list(stops(way for way in world.ways if way.stands_for))
    if not probes:
        return
    said = {(one.code, one.cause) for one in failing_ways(world)}
    by_cause: dict[tuple[str, ...], list[tuple[Stop, Finding]]] = {}
    for stop in probes:
        why = named(world, stop)
        if why is None:
            continue
        if (why.code, why.cause) in said:
            yield why  # joins what is said of it
            continue
        rule = stop.citation
        key = (why.code, stop.netns, rule.table, rule.chain, rule.text)
        by_cause.setdefault(key, []).append((stop, why))
    for cause, found in by_cause.items():
        yield _blocked(world, cause, found)


def _blocked(world: World, cause: tuple[str, ...], found: list[tuple[Stop, Finding]]) -> Finding:
    first = found[0][0]
    services = list(dict.fromkeys(stop.way.service for stop, _ in found))
    ranges = list(dict.fromkeys(stop.way.stands_for for stop, _ in found))
    nodes = list(dict.fromkeys(stop.node for stop, _ in found))
    answers = all(stop.path is not stop.way.path for stop, _ in found)
    target = first.way.path.target.removesuffix("/tcp")
    what = "The answers to the load balancer's health checks" if answers else "Health checks"
    place = f"{'to' if answers else 'from'} {_some(ranges)}"
    return finding(
        "GKT-116",
        f"{what} of {'Service' if len(services) == 1 else 'Services'} {_some(services)} {place} "
        f"{'do not leave' if answers else 'do not get through'} "
        f"node{'s' if len(nodes) > 1 else ''} {_some(nodes)}: {_by(first)}; "
        "the balancer takes out what does not answer",
        [
            *_each_node(found),
            *_asked(world, services, found),
            *(_range(one) for one in ranges),
        ],
        remedy="let these ranges through before it; VPC firewall rules have to let them in, too, "
        "and are not visible here",
        command=f"gketrace trace {first.way.path.source.rpartition(' ')[2]} {target} "
        f"--node {first.way.sender_node or first.node}",
        subjects=[*(f"service {name}" for name in services), *(f"node {name}" for name in nodes)],
        nodes=nodes,
        cause=f"health check {' '.join(cause)}",
        severity=Severity.ERROR,
        confidence=Confidence.LIKELY,
    )


def _by(stop: Stop) -> str:
    """What stopped it, in a few words."""
    rule = stop.citation
    verb = "rejects" if stop.outcome.reject_with else "drops"
    if rule.source is Source.RULE:
        return f"{rule.table} {rule.chain}:{rule.position} {verb} them"
    if rule.source is Source.POLICY:
        return f"the policy of {rule.table} {rule.chain} drops them"
    return stop.outcome.detail or rule.text


def _each_node(found: list[tuple[Stop, Finding]]) -> Iterator[Evidence]:
    """The rule as each node has it, and which probes meet it there."""
    by_node: dict[str, list[Stop]] = {}
    for stop, _ in found:
        by_node.setdefault(stop.node, []).append(stop)
    for node, mine in by_node.items():
        ranges = list(dict.fromkeys(stop.way.stands_for for stop in mine))
        targets = list(dict.fromkeys(stop.way.path.target for stop in mine))
        note = f"{_some(ranges)} → {_some(targets)}"
        yield cited(mine[0].citation, node, mine[0].netns, note=note)


def _asked(
    world: World, services: list[str], found: list[tuple[Stop, Finding]]
) -> Iterator[Evidence]:
    """Why a probe goes to that port."""
    for name in services[:_SHOWN]:
        service = world.services_by_key.get(name)
        if service is not None:
            target = next(s.way.path.target for s, _ in found if s.way.service == name)
            yield of_service(service, _why(service, target))


def _why(service: Service, target: str) -> str:
    port = target.removesuffix("/tcp").rpartition(":")[2]
    if service.health_check_node_port and str(service.health_check_node_port) == port:
        return f"spec.healthCheckNodePort {port}"
    if service.type == "LoadBalancer" and port == "10256":
        return "spec.externalTrafficPolicy Cluster: the balancer asks kube-proxy on port 10256"
    return f"cloud.google.com/neg: the balancer asks pods themselves, on port {port}"


def _range(text: str) -> Evidence:
    return evidence(Source.OBJECT, f"{text} is a documented range of health checks")


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    rest = f" and {more} more" if more > 0 else ""
    return ", ".join(names[:_SHOWN]) + rest
