"""Ways that end on a link: it is down, or nobody has the address there."""

from __future__ import annotations

from gketrace.findings.links import end_of
from gketrace.findings.making import at, cited, finding
from gketrace.findings.model import Finding
from gketrace.findings.stop import Stop
from gketrace.findings.world import World
from gketrace.packet import IPAddress
from gketrace.snapshot import Link, NetnsSnapshot, Unavailable
from gketrace.trace import Source, StepKind

__all__ = ["no_neighbour"]


def no_neighbour(world: World, stop: Stop) -> Finding:
    last = next((s for s in reversed(stop.steps) if s.interface), None)
    device = last.interface if last is not None else stop.outcome.interface
    if stop.citation.source is Source.NEIGHBOUR:
        hop = last.next_hop if last is not None else None
        return _neighbour(stop, device, hop or stop.outcome.packet.dst)
    if last is not None and last.kind in (StepKind.NEIGHBOUR, StepKind.BRIDGE):
        return _nobody_there(world, stop, device, last.next_hop or stop.outcome.packet.dst)
    where, netns = stop.where, stop.netns
    if stop.outcome.netns.pod and (end := _host_end_down(world, stop, device)) is not None:
        device, where, netns = end.name, f"node {stop.node}", "host"
    return finding(
        "GKT-313",
        f"{device} of {where} is down",
        [stop.proof],
        remedy="set it up, and find who set it down",
        command=at(f"ip link set {device} up", stop.node, netns),
        subjects=stop.subjects,
        nodes=[stop.node],
        cause=f"link {stop.node} {netns} {device}",
    )


def _neighbour(stop: Stop, device: str, hop: IPAddress) -> Finding:
    text = f"{hop} does not answer on {device} of {stop.where}"
    remedy, command = "see whether it is up and on that link", f"ip neigh show dev {device}"
    if stop.citation.text.endswith("PERMANENT"):  # nobody is asked for what was set by hand
        text = (
            f"A permanent neighbour entry on {device} of {stop.where} gives {hop} a link address "
            "that nobody has there"
        )
        remedy, command = "remove it, and find who made it", f"ip neigh del {hop} dev {device}"
    return finding(
        "GKT-312",
        text,
        [stop.proof],
        remedy=remedy,
        command=at(command, stop.node, stop.netns),
        subjects=stop.subjects,
        nodes=[stop.node],
        cause=f"neighbour {stop.node} {stop.netns} {hop}",
    )


def _nobody_there(world: World, stop: Stop, device: str, hop: IPAddress) -> Finding:
    """The link is up, and no port of its bridge has the address behind it."""
    pod = world.pod_by_address.get(hop)
    routes = [s.citation for s in stop.steps if s.kind is StepKind.ROUTE and s.citation]
    if pod is not None and pod.node and pod.node != stop.node and routes:
        text = routes[-1].text
        return finding(
            "GKT-306",
            f"The route of {stop.where} to pod {pod.key} is wrong: it leads out of {device}, and "
            f"the pod is on node {pod.node}",
            [cited(routes[-1], stop.node, stop.netns), stop.proof],
            remedy="remove it, and find who made it",
            command=at(f"ip route del {text}", stop.node, stop.netns),
            subjects=stop.subjects,
            nodes=[stop.node],
            cause=f"route {stop.node}  {text}",
        )
    return finding(
        "GKT-312",
        f"Nobody has {hop} on {device} of {stop.where}",
        [stop.proof],
        remedy="see what still leads there, or who should have it",
        command=at(f"ip neigh show dev {device}", stop.node, stop.netns),
        subjects=stop.subjects,
        nodes=[stop.node],
        cause=f"neighbour {stop.node} {stop.netns} {hop}",
    )


def _host_end_down(world: World, stop: Stop, device: str) -> Link | None:
    """The end on the node, when that is what is down: the pod's own has no carrier then, and is
    not to be set up."""
    sight = world.sights.get(stop.node)
    shot = sight.snapshot(stop.outcome.netns) if sight is not None else None
    if sight is None or not isinstance(shot, NetnsSnapshot) or isinstance(shot.links, Unavailable):
        return None
    if not any(link.name == device and link.up for link in shot.links):
        return None
    end = end_of(sight, stop.outcome.netns.pod)
    return end if end is not None and not end.up else None
