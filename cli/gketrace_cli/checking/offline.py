"""Walks over what was read: the stitcher's questions answered without asking an agent again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gketrace.errors import GketraceError
from gketrace.findings.world import Sight
from gketrace.simulate.arrival import find_arrival
from gketrace.simulate.walk import WalkQuery, walk
from gketrace.snapshot import Maybe, NetnsSnapshot, Unavailable
from gketrace.stitch import Inquiry, NodeQuery, stitch
from gketrace.topology import Topology
from gketrace.trace import Ingress, NetnsKind, NetnsRef, Path, Walk

__all__ = ["OfflineView", "trace_offline"]


class OfflineView:
    """A `NodeView` over one sight."""

    def __init__(self, sight: Sight) -> None:
        self._sight = sight

    @property
    def node(self) -> str:
        return self._sight.node

    def snapshot(self, netns: NetnsRef) -> Maybe[NetnsSnapshot]:
        return self._sight.snapshot(netns)


def trace_offline(
    topology: Topology, sights: Mapping[str, Sight], inquiries: Sequence[Inquiry]
) -> tuple[tuple[Path, ...], ...]:
    """The paths of each inquiry, as `stitch` gives them."""
    run = stitch(topology, inquiries)
    try:
        batch = next(run)
        while True:
            batch = run.send([_walk(sights, query) for query in batch])
    except StopIteration as done:
        found: tuple[tuple[Path, ...], ...] = done.value
        return found


def _walk(sights: Mapping[str, Sight], query: NodeQuery) -> Maybe[Walk]:
    sight = sights.get(query.node)
    if sight is None:
        return Unavailable(reason=f"node {query.node} was not read")
    netns = sight.host.netns
    interface = ""
    if query.pod:
        netns = NetnsRef(node=query.node, kind=NetnsKind.POD, pod=query.pod)
        inside = sight.snapshot(netns)
        if isinstance(inside, Unavailable):
            return inside
        netns = inside.netns
    elif query.arrives:
        try:
            interface = find_arrival(sight.host, query.packet).interface
        except GketraceError as error:
            return Unavailable(reason=error.message)
    return walk(
        OfflineView(sight),
        WalkQuery(
            ingress=Ingress(netns=netns, interface=interface),
            packet=query.packet,
            flows=query.flows,
            use_conntrack=False,
        ),
    )
