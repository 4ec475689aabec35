"""What is to be captured, as typed: ``pod/web-0``, ``node/2jdh:cbr0``; then a filter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gketrace.errors import UnavailableError, UsageError
from gketrace_cli.names import find_node
from gketrace_cli.podref import pod_target
from gketrace_proto.v1alpha1 import capture_pb2 as pb
from gketrace_proto.v1alpha1 import target_pb2

if TYPE_CHECKING:
    from gketrace_cli.session import Session

__all__ = ["ParsedTarget", "PlainTap", "parse_targets", "plain_taps"]

_KINDS: Final = {
    **dict.fromkeys(("pod", "pods", "po"), "pod"),
    **dict.fromkeys(("service", "services", "svc"), "service"),
    **dict.fromkeys(("node", "nodes", "no"), "node"),
}
_TARGET: Final = re.compile(rf"({'|'.join(_KINDS)})/([^\s:]+)(?::(\S+))?")
_POD_INTERFACE: Final = "eth0"
"""What CNI plug-ins call a pod's interface, by the kubelet's wish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedTarget:
    kind: str
    """``pod``, ``service`` or ``node``."""
    name: str
    interface: str = ""

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainTap:
    """One tap of a pod or node."""

    node: str
    request: pb.CaptureTap
    description: str


def parse_targets(words: Sequence[str]) -> tuple[tuple[ParsedTarget, ...], str]:
    """The targets that stand in front, and the filter after them."""
    targets: list[ParsedTarget] = []
    rest = list(words)
    while rest and (found := _TARGET.fullmatch(rest[0])):
        kind, name, interface = found.groups()
        targets.append(ParsedTarget(kind=_KINDS[kind], name=name, interface=interface or ""))
        rest.pop(0)
    return tuple(targets), " ".join(rest)


def plain_taps(
    session: Session,
    targets: Sequence[ParsedTarget],
    *,
    interfaces: Sequence[str],
    text: str,
    snap_length: int,
    direction: pb.CaptureDirection.ValueType,
) -> tuple[PlainTap, ...]:
    """For pods and nodes.  Raises `NotFoundError`, `UsageError`, `UnavailableError`."""
    from gketrace_cli.find_pod import find_pod_named

    found: dict[tuple[str, str, str], PlainTap] = {}
    for target in targets:
        if target.kind == "pod":
            pod = find_pod_named(session, target.name)
            if not pod.node:
                raise UsageError(f"pod {pod.key} is not on any node yet, so it has no network")
            node, where = pod.node, pod_target(pod)
            names = [target.interface] if target.interface else list(interfaces)
            if not names and pod.host_network:
                names = [_uplink(session, node)]
            names = names or [_POD_INTERFACE]
        else:
            node = find_node(target.name, session.nodes).name
            where = target_pb2.Target(host=True)
            names = [target.interface] if target.interface else list(interfaces)
            names = names or [_uplink(session, node)]
        for name in names:
            request = pb.CaptureTap(
                target=where,
                interface=name,
                filter=text,
                snap_length=snap_length,
                direction=direction,
            )
            key = node, where.SerializeToString(deterministic=True).hex(), name
            found.setdefault(key, PlainTap(node=node, request=request, description=str(target)))
    return tuple(found.values())


def _uplink(session: Session, node: str) -> str:
    """The interface that has the node's own address."""
    session.reach([node])
    session.fleet.agent(node)
    own = {str(one) for one in find_node(node, session.nodes).internal_ips}
    for seen in session.fleet.addresses(node):
        if str(seen.address) in own:
            return seen.interface
    raise UnavailableError(
        f"node {node} has none of its addresses on any interface, so which one is not clear",
        hint="name one: -i eth0, or -i any",
    )
