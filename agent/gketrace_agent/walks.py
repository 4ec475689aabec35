"""A packet's walk on this node: where it comes in, the walk itself, what it rests on."""

from __future__ import annotations

import time
from dataclasses import dataclass

from gketrace.packet import Packet
from gketrace.simulate.here import AbsentPod, walk_from
from gketrace.trace import Flow, Walk
from gketrace_agent.namespaces import OpenTarget
from gketrace_agent.observe.snapshot import Observation, Observer
from gketrace_agent.observe.view import LiveNodeView

__all__ = ["Walked", "walk_here"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Walked:
    """A walk, and what it took."""

    walk: Walk
    arrival: str
    observe_seconds: float
    walk_seconds: float


def walk_here(
    target: OpenTarget,
    observer: Observer,
    packet: Packet,
    *,
    interface: str,
    arrives: bool,
    flows: tuple[Flow, ...],
    use_conntrack: bool,
) -> Walked:
    """Walks `packet` from `target` over the node as it is now."""
    started = time.monotonic()
    observing = 0.0

    def observed(observation: Observation) -> None:
        nonlocal observing
        observing += observation.seconds["total"]

    node = target.host.ref.node
    with LiveNodeView(node, observer, target.known, observed=observed) as view:
        walked, arrival = walk_from(
            view,
            target.here.ref,
            packet,
            interface=interface,
            arrives=arrives,
            flows=flows,
            use_conntrack=use_conntrack,
            seen=lambda: [one.snapshot for one in view.observations.values()],
            absent=[AbsentPod(pod_ips=pod.pod_ips, why=why) for pod, why in target.absent.items()],
        )
    return Walked(
        walk=walked,
        arrival=arrival,
        observe_seconds=observing,
        walk_seconds=time.monotonic() - started - observing,
    )
