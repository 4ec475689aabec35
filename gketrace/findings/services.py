"""Services by their objects alone: no endpoints, none ready, policies, names of ports, ranges.

The nodes' rules may say otherwise; that is drift, and proxy.py's to find.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from gketrace.findings.expected import Expected
from gketrace.findings.making import finding, of_endpoint, of_service
from gketrace.findings.model import Evidence, Finding, Severity, evidence
from gketrace.findings.world import World
from gketrace.objects import Pod, Service
from gketrace.trace import Citation, Source

__all__ = [
    "local_policies",
    "named_ports",
    "no_endpoints",
    "port_clashes",
    "source_ranges",
]


def no_endpoints(world: World) -> Iterator[Finding]:
    """GKT-101 and GKT-102."""
    by_service: dict[str, list[Expected]] = {}
    for one in world.expected.values():
        by_service.setdefault(one.service.key, []).append(one)
    for key, ports in by_service.items():
        service = ports[0].service
        empty = [one for one in ports if not one.usable]
        if not empty:
            continue
        known = [end for one in empty for end in one.known]
        which = "" if len(empty) == len(ports) else f" on port {_ports(empty)}"
        if known:
            yield finding(
                "GKT-102",
                f"Service {key} has {_count(known, 'endpoint')}{which} and none is ready: "
                f"{_refused(world, empty)}",
                [of_endpoint(end) for end in known],
                remedy="find out why the pods are not ready",
                command=f"kubectl describe pod -n {service.namespace} "
                + " ".join(sorted({end.pod for end in known if end.pod})[:3]),
                subjects=[f"service {key}"],
            )
            continue
        selector = ",".join(f"{k}={v}" for k, v in sorted(service.selector.items()))
        proof = [evidence(Source.OBJECT, f"no EndpointSlice of {key} has an endpoint{which}")]
        if service.selector:
            proof.append(of_service(service, f"spec.selector {selector}"))
            remedy = "make the selector match the pods' labels, or start pods that it matches"
            command = f"kubectl get pods -n {service.namespace} -l {selector} -o wide"
        else:
            proof.append(of_service(service, "no spec.selector"))
            remedy = "a Service without a selector needs EndpointSlices that somebody writes"
            command = (
                f"kubectl get endpointslices -n {service.namespace} "
                f"-l kubernetes.io/service-name={service.name}"
            )
        yield finding(
            "GKT-101",
            f"Service {key} has no endpoints{which}: {_refused(world, empty)}",
            proof,
            remedy=remedy,
            command=command,
            subjects=[f"service {key}"],
        )


def local_policies(world: World) -> Iterator[Finding]:
    """GKT-103 and GKT-104: by design, nodes without an endpoint drop."""
    for service in world.services:
        outside = service.external_traffic_policy == "Local" and service.type in (
            "NodePort",
            "LoadBalancer",
        )
        inside = service.internal_traffic_policy == "Local"
        for code, applies, field in (
            ("GKT-103", outside, "externalTrafficPolicy"),
            ("GKT-104", inside, "internalTrafficPolicy"),
        ):
            if applies:
                yield from _local_gap(world, service, code, field)


def _local_gap(world: World, service: Service, code: str, field: str) -> Iterator[Finding]:
    usable = [
        end
        for one in world.expected.values()
        if one.service.key == service.key
        for end in one.usable
    ]
    having = {end.node for end in usable}
    without = [node.name for node in world.nodes if node.name not in having]
    if not usable or not without:
        return
    asked = [
        way
        for way in world.ways
        if way.service == service.key
        and way.asked
        and way.standing in ("configured", "broken")
        and field in way.configured
    ]
    what = "from outside to" if code == "GKT-103" else "to its ClusterIP from"
    yield finding(
        code,
        f"Service {service.key} has {field} Local and no endpoint on {len(without)} of "
        f"{len(world.nodes)} nodes: what comes {what} these nodes is dropped",
        [
            of_service(service, f"spec.{field} Local"),
            *(
                evidence(Source.OBJECT, f"node {name} has no endpoint of {service.key}")
                for name in without
            ),
        ],
        remedy=f"run a pod on each node, or set {field} to Cluster",
        command=f"kubectl patch service -n {service.namespace} {service.name} "
        f'-p \'{{"spec":{{"{field}":"Cluster"}}}}\'',
        subjects=[f"service {service.key}"],
        nodes=without,
        severity=Severity.ERROR if asked else None,
    )


def named_ports(world: World) -> Iterator[Finding]:
    """GKT-107: targetPort is a name that no container of the selected pods has.

    The endpoint controller leaves such a pod's port out (FindPort in pkg/api/v1/pod/util.go), so
    the Service's endpoints lack it.
    """
    for service in world.services:
        if not service.selector or all(isinstance(p.target_port, int) for p in service.ports):
            continue
        chosen = [pod for pod in world.pods if _selected(service, pod)]
        if not chosen:
            continue
        for port in service.ports:
            if isinstance(port.target_port, int):
                continue
            lacking = [pod for pod in chosen if not _has_port(pod, port.target_port, port.protocol)]
            if len(lacking) < len(chosen):
                continue
            if not world.all_pods and _has_endpoint(world, service, port.name):
                continue  # of a pod that is not among the known ones
            names = sorted({p.name for pod in chosen for c in pod.containers for p in c.ports})
            yield finding(
                "GKT-107",
                f"Service {service.key} sends port {port.port} to the port named "
                f"{port.target_port!r}, which none of its {len(chosen)} pods declares",
                [
                    of_service(
                        service,
                        f"spec.ports {port.name or port.port}: targetPort {port.target_port}/"
                        f"{port.protocol}",
                    ),
                    *(
                        evidence(
                            Source.OBJECT,
                            f"Pod {pod.key}: containers' ports {', '.join(filter(None, names))}",
                        )
                        for pod in lacking
                    ),
                ],
                remedy="name a container port so, or use one of the names that are there",
                command=f"kubectl edit service -n {service.namespace} {service.name}",
                subjects=[f"service {service.key}"],
            )


def _has_endpoint(world: World, service: Service, port_name: str) -> bool:
    of = (service.namespace, service.name, port_name)
    return any((e.namespace, e.service, e.port_name) == of for e in world.endpoints)


def _selected(service: Service, pod: Pod) -> bool:
    if pod.namespace != service.namespace or pod.phase in ("Succeeded", "Failed"):
        return False
    return all(pod.labels.get(key) == value for key, value in service.selector.items())


def _has_port(pod: Pod, name: str, protocol: str) -> bool:
    return any(
        p.name == name and p.protocol == protocol
        for container in pod.containers
        if not container.init
        for p in container.ports
    )


def source_ranges(world: World) -> Iterator[Finding]:
    """GKT-108."""
    for service in world.services:
        if not service.source_ranges or service.type != "LoadBalancer":
            continue
        kept_out = [
            way
            for way in world.ways
            if way.service == service.key
            and "SourceRanges" in way.configured
            and way.standing == "configured"
            and way.asked
        ]
        ranges = ", ".join(service.source_ranges)
        proof = [of_service(service, f"spec.loadBalancerSourceRanges {ranges}")]
        for way in kept_out:
            proof += _outcome(way.path.outcome.citation, way.path.outcome.netns.node)
        who = kept_out[0].path.source if kept_out else "clients outside them"
        yield finding(
            "GKT-108",
            f"Service {service.key} takes load balancer traffic from {ranges} only: "
            f"{who} {'is' if kept_out else 'are'} dropped without an answer",
            proof,
            remedy="add the client's range, if it should be let in",
            command=f"kubectl edit service -n {service.namespace} {service.name}",
            subjects=[f"service {service.key}"],
            severity=Severity.ERROR if kept_out else None,
        )


def _outcome(citation: Citation | None, node: str) -> Iterable[Evidence]:
    if citation is not None:
        yield Evidence(citation=citation, node=node, netns="host")


def port_clashes(world: World) -> Iterator[Finding]:
    """GKT-109: whose rule comes first gets the connections; the other never sees one."""
    host_ports = [
        (pod, port)
        for pod in world.pods
        if not pod.host_network and pod.phase not in ("Succeeded", "Failed")
        for container in pod.containers
        for port in container.ports
        if port.host_port
    ]
    for service in world.services:
        for port in service.ports:
            if not port.node_port:
                continue
            for pod, declared in host_ports:
                if (declared.host_port, declared.protocol) != (port.node_port, port.protocol):
                    continue
                yield finding(
                    "GKT-109",
                    f"Port {port.node_port}/{port.protocol.lower()} of node {pod.node} is both "
                    f"the NodePort of Service {service.key} and the hostPort of pod {pod.key}: "
                    "one of them never gets a connection",
                    [
                        of_service(service, f"spec.ports nodePort {port.node_port}"),
                        evidence(
                            Source.OBJECT,
                            f"Pod {pod.key}: hostPort {declared.host_port}/{declared.protocol}",
                        ),
                        *_first_rule(world, pod.node, port.node_port),
                    ],
                    remedy="give one of them another port",
                    command=f"gketrace rules {pod.node} --chain KUBE-NODEPORTS",
                    subjects=[f"service {service.key}", f"pod {pod.key}"],
                    nodes=[pod.node],
                )


def _first_rule(world: World, node: str, port: int) -> Iterator[Evidence]:
    """kube-proxy's own rule for the port, where the node's rules were read."""
    sight = world.sights.get(node)
    if sight is None:
        return
    for one in sight.programme.iptables:
        for rule in one.rules.chain("nat", "KUBE-NODEPORTS") or ():
            if f"--dport {port} " in rule.text:
                yield Evidence(citation=rule.citation, node=node, netns="host")
                return


def _refused(world: World, empty: Iterable[Expected]) -> str:
    """What nodes make of connections to ports without a usable endpoint, by the rules read."""
    ports = [name for name, one in world.expected.items() if one in empty]
    led = [
        sight.node
        for sight in world.sights.values()
        if any(sight.programme.endpoints(name, family) for name in ports for family in (4, 6))
    ]
    if not led:
        return "nodes refuse its connections"
    return f"rules of {_count(led, 'node')} still lead to some"


def _ports(ports: Iterable[Expected]) -> str:
    return ", ".join(one.port.name or str(one.port.port) for one in ports)


def _count(items: Sequence[object], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"
