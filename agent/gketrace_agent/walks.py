"""A packet's walk on this node: where it comes in, the walk itself, what it rests on."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from typing import Final

from gketrace.errors import UnavailableError
from gketrace.packet import Packet
from gketrace.simulate.arrival import Arrival, find_arrival
from gketrace.simulate.walk import WalkQuery, walk
from gketrace.snapshot import NetnsSnapshot, Unavailable
from gketrace.trace import Disposition, Flow, Ingress, Missing, Walk
from gketrace_agent.namespaces import OpenTarget
from gketrace_agent.observe.snapshot import Observation, Observer
from gketrace_agent.observe.view import LiveNodeView

__all__ = ["Arrival", "Walked", "find_arrival", "walk_here"]

_ABSENT: Final = 10
"""Pods that were not found and are named in one reply."""


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
        arrival = ""
        if arrives and not interface:
            host = view.snapshot(target.here.ref)
            if isinstance(host, Unavailable):
                raise UnavailableError(f"{target.here.ref}: {host.reason}")
            found = find_arrival(host, packet)
            interface, arrival = found.interface, found.because
        query = WalkQuery(
            ingress=Ingress(netns=target.here.ref, interface=interface),
            packet=packet,
            flows=flows,
            use_conntrack=use_conntrack,
        )
        walked = walk(view, query)
        missing = walked.missing + tuple(
            one
            for observation in view.observations.values()
            for one in _unreported(observation.snapshot)
        )
    missing += _absent(target, walked, node)
    return Walked(
        walk=replace(walked, missing=missing),
        arrival=arrival,
        observe_seconds=observing,
        walk_seconds=time.monotonic() - started - observing,
    )


def _unreported(snapshot: NetnsSnapshot) -> tuple[Missing, ...]:
    """What is missing and cannot be seen in the data: tables that changed under the reader.

    What could not be read at all is `Unavailable` there, and the walk says so where it matters.
    """
    values = (getattr(snapshot, f.name) for f in fields(snapshot) if f.name != "rulesets")
    reasons = {v.reason for v in (*values, *snapshot.rulesets) if isinstance(v, Unavailable)}
    return tuple(missing for missing in snapshot.missing if missing.why not in reasons)


def _absent(target: OpenTarget, walked: Walk, node: str) -> tuple[Missing, ...]:
    """Named pods that were not found and that the packet may have met without our knowing.

    It was sent out towards such a pod's address, or its way ends in something unknown.
    """
    outcomes = [leaf.outcome for leaf in walked.leaves()]
    unknown = any(outcome.disposition is Disposition.UNKNOWN for outcome in outcomes)
    met = {str(address) for o in outcomes for address in (o.packet.dst, o.next_hop)}
    whys = [why for pod, why in target.absent.items() if unknown or not met.isdisjoint(pod.pod_ips)]
    missing = [Missing(what="pod", why=why, node=node) for why in whys[:_ABSENT]]
    if len(whys) > _ABSENT:
        more = f"{len(whys) - _ABSENT} more pods were not found"
        missing.append(Missing(what="pod", why=more, node=node))
    return tuple(missing)
