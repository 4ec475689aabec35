"""Where the packets of what is followed are captured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gketrace.capture.plan import Route
from gketrace.trace import Missing
from gketrace_cli.capture.planning import NodeTaps, node_taps, plan_service
from gketrace_proto.v1alpha1 import capture_pb2 as pb

if TYPE_CHECKING:
    from gketrace_cli.follow.scope import Scope
    from gketrace_cli.session import Session

__all__ = ["PacketPlan", "plan_packets"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PacketPlan:
    """Taps by node, and the paths that they are on."""

    routes: tuple[Route, ...]
    taps: dict[str, NodeTaps]
    missing: tuple[Missing, ...] = ()


def plan_packets(session: Session, scope: Scope) -> PacketPlan:
    """Of a Service along its walked paths, any client; of a pod at its own interface.

    Raises: `GketraceError`.
    """
    if scope.service is not None:
        planning = plan_service(session, f"{scope.service.namespace}/{scope.service.name}")
        session.progress.clear()
        return PacketPlan(
            routes=planning.plan.routes,
            taps=node_taps(session, planning.plan),
            missing=planning.missing,
        )
    from gketrace_cli.capture.targets import parse_targets, plain_taps

    assert scope.pod is not None
    targets, _ = parse_targets([f"pod/{scope.pod.key}"])
    both = pb.CAPTURE_DIRECTION_UNSPECIFIED
    found = plain_taps(session, targets, interfaces=(), text="", snap_length=0, direction=both)
    by_node: dict[str, NodeTaps] = {}
    for one in found:
        before = by_node.get(one.node, NodeTaps(planned=(), taps=(), descriptions=()))
        by_node[one.node] = NodeTaps(
            planned=(),
            taps=(*before.taps, one.request),
            descriptions=(*before.descriptions, one.description),
        )
    return PacketPlan(routes=(), taps=by_node)
