"""Who listens where an endpoint should: GKT-105 and GKT-106.

The walk's own end (`gketrace.simulate.delivery`) says who would take a connection to each
endpoint, so that a finding and a trace never differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

from gketrace.citing import cite_socket
from gketrace.findings.making import cited, finding, of_endpoint
from gketrace.findings.model import Finding
from gketrace.findings.world import Sight, World
from gketrace.objects import Endpoint
from gketrace.packet import Packet, protocol_number
from gketrace.snapshot import NetnsSnapshot, Socket, Unavailable
from gketrace.trace import Disposition

__all__ = ["listeners"]


def listeners(world: World) -> Iterator[Finding]:
    """Each endpoint that is in use, once for each of its ports."""
    services: dict[tuple[str, str, int, str], list[str]] = {}
    of: dict[tuple[str, str, int, str], Endpoint] = {}
    usable = [end for one in world.expected.values() for end in one.usable]
    named = {(e.namespace, e.service) for e in usable}
    usable += [
        e for e in world.endpoints if e.ready and (e.namespace, e.service) not in named
    ]  # headless Services
    for end in usable:
        if end.address_type == "FQDN" or not end.port:
            continue
        key = (end.node, end.address, end.port, end.protocol)
        services.setdefault(key, []).append(f"service {end.namespace}/{end.service}")
        of[key] = end
    for key, end in of.items():
        sight = world.sights.get(end.node)
        space = None if sight is None else _space(world, sight, end)
        if space is not None:
            yield from _judge(space, end, services[key])


def _space(world: World, sight: Sight, end: Endpoint) -> NetnsSnapshot | None:
    """The namespace that has the endpoint's address; None: it was not read."""
    address = ip_address(end.address)
    pod = world.pod_by_address.get(address)
    if pod is not None:
        found = sight.pods.get(pod.key)
        return None if found is None or isinstance(found, Unavailable) else found
    node = world.node_by_address.get(address)
    return sight.host if node is not None and node.name == sight.node else None


def _judge(space: NetnsSnapshot, end: Endpoint, services: list[str]) -> Iterator[Finding]:
    from gketrace.simulate.delivery import deliver

    address = ip_address(end.address)
    packet = Packet(
        src=address,
        dst=address,
        protocol=protocol_number(end.protocol),
        sport=61234,
        dport=end.port,
    )
    ended = deliver(packet, snapshot=space, in_iface="", flows=())
    outcome = ended.outcome
    if outcome.disposition is not Disposition.REFUSED or outcome.citation is None:
        return
    subjects = [f"pod {end.pod_key}" if end.pod else f"node {end.node}", *services]
    where = f"{end.address}:{end.port}/{end.protocol.lower()}"
    near = _on_loopback(space, packet)
    netns = str(space.netns)
    command = f"gketrace pod {end.node}"
    if end.pod:
        command = f"gketrace pod {end.pod} -n {end.pod_namespace or end.namespace}"
    cause = f"listener {end.node} {where}"
    if near is not None:
        yield finding(
            "GKT-106",
            f"{subjects[0]} listens on {near.address}:{near.port} only, so connections to "
            f"{where} are refused",
            [cited(cite_socket(near), end.node, netns), of_endpoint(end)],
            remedy="bind the program to 0.0.0.0 (or ::), or to the pod's address",
            command=command,
            subjects=subjects,
            nodes=[end.node],
            cause=cause,
        )
        return
    yield finding(
        "GKT-105",
        f"Nothing in {subjects[0]} listens on port {end.port}/{end.protocol.lower()}: connections "
        f"to {where} are refused",
        [cited(outcome.citation, end.node, netns), of_endpoint(end)],
        remedy="correct the Service's targetPort, or make the program listen there",
        command=command,
        subjects=subjects,
        nodes=[end.node],
        cause=cause,
    )


def _on_loopback(space: NetnsSnapshot, packet: Packet) -> Socket | None:
    if isinstance(space.sockets, Unavailable):
        return None
    return next(
        (
            one
            for one in space.sockets
            if one.protocol == packet.protocol
            and one.port == packet.dport
            and one.address.is_loopback
            and one.state != "RAW"
        ),
        None,
    )
