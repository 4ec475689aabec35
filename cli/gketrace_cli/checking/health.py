"""Health checks of the cloud's load balancers, as packets to trace.

A passthrough balancer asks each node: its kube-proxy on `healthCheckNodePort` where
externalTrafficPolicy is Local, else on port 10256.  A container-native one asks each pod on its own
port.  One address stands for each of the documented ranges that probes come from.  What lies before
the nodes, VPC firewall rules above all, no agent sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import zip_longest
from typing import Final

from gketrace.findings.world import Sight
from gketrace.objects import Endpoint, Node, Service
from gketrace.packet import IPAddress, Protocol
from gketrace.simulate.fib.decision import RouteKind
from gketrace_cli.balancers import EXTERNAL, OTHERS, is_internal, source, with_groups
from gketrace_cli.frontdoors import Door, Question, Sender, ready_endpoints

__all__ = ["HealthProbe", "health_probes"]

AT_MOST: Final = 60
"""Probes that are traced."""
_HEALTHZ: Final = 10256
"""kube-proxy's --healthz-bind-address, which GKE's check of policy Cluster asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthProbe:
    """One probe."""

    question: Question
    service: str
    """``namespace/name``."""
    stands_for: str
    """The range of its source."""


def health_probes(
    nodes: Sequence[Node],
    sights: Mapping[str, Sight],
    services: Sequence[Service],
    endpoints: Sequence[Endpoint],
    *,
    at_most: int = AT_MOST,
) -> tuple[tuple[HealthProbe, ...], int]:
    """What is to be traced, and how many were left out.  Nothing outside of Google's cloud."""
    seen = {n.name: n for n in nodes if n.provider_id.startswith("gce://") and n.name in sights}
    seen = {name: node for name, node in seen.items() if sights[name].by_rules}
    by_service: dict[str, list[Endpoint]] = {}
    for end in endpoints:
        by_service.setdefault(f"{end.namespace}/{end.service}", []).append(end)
    by_pair: dict[tuple[str, str], list[HealthProbe]] = {}
    for service in services if seen else ():
        found = [
            *_to_nodes(service, seen, sights),
            *_to_pods(service, seen, by_service.get(service.key, [])),
        ]
        for probe in found:
            by_pair.setdefault((probe.question.entry, probe.stands_for), []).append(probe)
    # By turns, so that a cut leaves each node, each range and many Services.
    turned = [
        [*mine[turn % len(mine) :], *mine[: turn % len(mine)]]
        for turn, mine in enumerate(by_pair.values())
    ]
    every = [one for row in zip_longest(*turned) for one in row if one is not None]
    return tuple(every[:at_most]), max(0, len(every) - at_most)


def _to_nodes(
    service: Service, nodes: Mapping[str, Node], sights: Mapping[str, Sight]
) -> Iterator[HealthProbe]:
    """Of a passthrough balancer that has its address."""
    virtual = [ip_address(e.ip) for e in service.ingress if e.ip and e.ip_mode == "VIP"]
    virtual = [ip for ip in virtual if ip.version == 4]
    internal = is_internal(service)
    if internal is None or not virtual:
        return
    port = _HEALTHZ
    if service.external_traffic_policy == "Local":
        if not service.health_check_node_port:
            return
        port = service.health_check_node_port
    for node in nodes.values():
        own = [ip for ip in map(ip_address, node.internal_ips) if ip.version == 4]
        # The guest agent gives a node the balancer's address.  One without it may just not be
        # among the balancer's backends, so that nothing follows from that.
        balanced = [ip for ip in virtual if _has(sights[node.name], ip)]
        for address in (balanced or own)[:1]:
            for text in OTHERS if internal else EXTERNAL:
                yield _probe(service, text, address, port, node.name)


def _has(sight: Sight, address: IPAddress) -> bool:
    return any(decision.kind is RouteKind.LOCAL for decision in sight.fib.output(address))


def _to_pods(
    service: Service, nodes: Mapping[str, Node], endpoints: Sequence[Endpoint]
) -> Iterator[HealthProbe]:
    """Of a container-native balancer: one pod of each node, as all have the same labels."""
    for port in with_groups(service):
        on: dict[str, Endpoint] = {}
        for end in ready_endpoints(endpoints, port):
            if end.address_type == "IPv4" and end.port and end.node in nodes:
                on.setdefault(end.node, end)
        for node, end in on.items():
            for text in OTHERS:
                yield _probe(service, text, ip_address(end.address), end.port, node)


def _probe(service: Service, text: str, address: IPAddress, port: int, node: str) -> HealthProbe:
    question = Question(
        door=Door.HEALTH_CHECK,
        sender=Sender(address=ip_address(source(text)), assumed=True),
        address=address,
        port=port,
        protocol=Protocol.TCP,
        entry=node,
        via=node,
        use_conntrack=False,
    )
    return HealthProbe(question=question, service=service.key, stands_for=text)
