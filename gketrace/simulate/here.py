"""A packet's walk on one node: where it comes in, the walk itself, and what it lacks.

The agent asks this of the node as it is; a bundle's reader asks it of the node as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Final

from gketrace.errors import UnavailableError
from gketrace.packet import Packet
from gketrace.simulate.arrival import find_arrival
from gketrace.simulate.walk import WalkQuery, walk
from gketrace.snapshot import NetnsSnapshot, NodeView, Unavailable
from gketrace.trace import Disposition, Flow, Ingress, Missing, NetnsRef, Walk

__all__ = ["AbsentPod", "walk_from"]

_ABSENT: Final = 10
"""Pods that were not found and are named in one reply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsentPod:
    """A pod that was named and whose namespace is not to be had."""

    pod_ips: tuple[str, ...]
    why: str


def walk_from(
    view: NodeView,
    here: NetnsRef,
    packet: Packet,
    *,
    interface: str,
    arrives: bool,
    flows: tuple[Flow, ...],
    use_conntrack: bool,
    seen: Callable[[], Iterable[NetnsSnapshot]],
    absent: Iterable[AbsentPod],
) -> tuple[Walk, str]:
    """The walk, and why the packet arrives where it does (empty: that was not asked).

    `seen`: what `view` has given, once the walk has ended.
    Raises: `UnavailableError` when it cannot be told where the packet arrives.
    """
    arrival = ""
    if arrives and not interface:
        host = view.snapshot(here)
        if isinstance(host, Unavailable):
            raise UnavailableError(f"{here}: {host.reason}")
        found = find_arrival(host, packet)
        interface, arrival = found.interface, found.because
    query = WalkQuery(
        ingress=Ingress(netns=here, interface=interface),
        packet=packet,
        flows=flows,
        use_conntrack=use_conntrack,
    )
    walked = walk(view, query)
    unreported = (one for snapshot in seen() for one in _unreported(snapshot))
    missing = (*walked.missing, *unreported, *_absent(absent, walked, view.node))
    return replace(walked, missing=missing), arrival


def _unreported(snapshot: NetnsSnapshot) -> tuple[Missing, ...]:
    """What is missing and cannot be seen in the data: tables that changed under the reader.

    What could not be read at all is `Unavailable` there, and the walk says so where it matters.
    """
    values = (getattr(snapshot, f.name) for f in fields(snapshot) if f.name != "rulesets")
    reasons = {v.reason for v in (*values, *snapshot.rulesets) if isinstance(v, Unavailable)}
    return tuple(missing for missing in snapshot.missing if missing.why not in reasons)


def _absent(pods: Iterable[AbsentPod], walked: Walk, node: str) -> tuple[Missing, ...]:
    """Named pods that were not found and that the packet may have met without our knowing.

    It was sent out towards such a pod's address, or its way ends in something unknown.
    """
    outcomes = [leaf.outcome for leaf in walked.leaves()]
    unknown = any(outcome.disposition is Disposition.UNKNOWN for outcome in outcomes)
    met = {str(address) for o in outcomes for address in (o.packet.dst, o.next_hop)}
    whys = [pod.why for pod in pods if unknown or not met.isdisjoint(pod.pod_ips)]
    missing = [Missing(what="pod", why=why, node=node) for why in whys[:_ABSENT]]
    if len(whys) > _ABSENT:
        more = f"{len(whys) - _ABSENT} more pods were not found"
        missing.append(Missing(what="pod", why=more, node=node))
    return tuple(missing)
