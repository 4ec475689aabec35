"""What is followed: a Service's or a pod's connections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from gketrace.objects import Endpoint, Pod, Service
from gketrace.packet import Tuple5, protocol_name, protocol_number
from gketrace_cli.conntrack_filter import door_filters, endpoint_filters, pod_filters
from gketrace_proto.v1alpha1 import agent_pb2 as pb

if TYPE_CHECKING:
    from gketrace.connections import Connection
    from gketrace_cli.session import Session

__all__ = ["Scope", "changes", "node_addresses", "pod_scope", "service_scope"]


_End: TypeAlias = tuple[str, int, str]
"""Address, port (0: any), protocol."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """One moment's plan."""

    title: str
    """``Service default/web``, ``Pod default/web-0``."""
    namespace: str
    filters: tuple[pb.ConntrackFilter, ...]
    """An entry is wanted when one of them takes it."""
    doors: frozenset[tuple[str, int, int]] = frozenset()
    """Address, port, protocol of a Service's front doors."""
    addresses: frozenset[str] = frozenset()
    """Of a pod."""
    endpoints: tuple[Endpoint, ...] = ()
    service: Service | None = None
    pod: Pod | None = None
    past: tuple[tuple[Endpoint, float], ...] = ()
    """Endpoints that were there earlier, and when they were found to be gone (seconds since the
    epoch): their connections may still be."""
    _ends: frozenset[_End] = field(init=False, default=frozenset())

    def __post_init__(self) -> None:
        ends = frozenset((e.address, e.port, e.protocol.lower()) for e in self.endpoints)
        object.__setattr__(self, "_ends", ends)

    def takes(self, connection: Connection) -> bool:
        """Whether it is one of what is followed: the filters take more, as behind a translation an
        entry has only the endpoint."""
        if self.service is None:
            ends = (connection.first, connection.last)
            return any(str(a) in self.addresses for end in ends for a in (end.src, end.dst))
        return any(self._door(half.entry.orig) for half in connection.halves)

    def has_end(self, sent: Tuple5) -> bool:
        """Whether a packet is for one of the endpoints."""
        return any(end in self._ends for end in _ends_of(sent))

    def removed_at(self, sent: Tuple5) -> float | None:
        """When that which a packet is for was found to be an endpoint no more; None: it is one, or
        never was."""
        wanted = _ends_of(sent)
        return max(
            (at for e, at in self.past if (e.address, e.port, e.protocol.lower()) in wanted),
            default=None,
        )

    def concerns(self, sent: Tuple5) -> bool:
        """Whether a packet as its client sends it is to what is followed."""
        if self.service is None:
            return bool(self.addresses & {str(sent.src), str(sent.dst)})
        return self._door(sent)

    def _door(self, taken: Tuple5) -> bool:
        return (str(taken.dst), taken.dport or 0, taken.protocol) in self.doors


def _ends_of(sent: Tuple5) -> tuple[_End, _End]:
    address, protocol = str(sent.dst), protocol_name(sent.protocol)
    return (address, sent.dport or 0, protocol), (address, 0, protocol)


def node_addresses(session: Session) -> list[str]:
    """Of all nodes, as objects and agents say."""
    return [
        str(ip)
        for node in session.nodes
        for ip in (
            *node.internal_ips,
            *node.external_ips,
            *(seen.address for seen in session.fleet.addresses(node.name)),
        )
    ]


def service_scope(
    session: Session,
    service: Service,
    endpoints: Sequence[Endpoint],
    before: Scope | None = None,
    *,
    now: float = 0.0,
) -> Scope:
    """`before`: the plan that this one replaces, at `now` (seconds since the epoch)."""
    past: dict[_End, tuple[Endpoint, float]] = {}
    if before is not None:
        known = {(end.address, end.port, end.protocol) for end in endpoints}
        for end, at in (*before.past, *((end, now) for end in before.endpoints)):
            key = end.address, end.port, end.protocol
            if key not in known:
                past[key] = end, at
    node_ips = list(dict.fromkeys(node_addresses(session)))
    doors = door_filters(service, node_ips)
    direct = [*service.cluster_ips, *service.external_ips, *(e.ip for e in service.ingress if e.ip)]
    found = {
        (ip, port.port, protocol_number(port.protocol)) for port in service.ports for ip in direct
    } | {
        (ip, port.node_port, protocol_number(port.protocol))
        for port in service.ports
        if port.node_port
        for ip in node_ips
    }
    return Scope(
        title=f"Service {service.key}",
        namespace=service.namespace,
        filters=(*doors, *endpoint_filters((*endpoints, *(end for end, _ in past.values())))),
        doors=frozenset(found),
        endpoints=tuple(endpoints),
        service=service,
        past=tuple(past.values()),
    )


def pod_scope(pod: Pod, before: Scope | None = None) -> Scope:
    """All that has the pod at one of its ends."""
    earlier = before.addresses if before is not None else frozenset()
    filters = pod_filters(pod)
    kept = {one.address.partition("/")[0] for one in filters}
    filters += tuple(pb.ConntrackFilter(address=ip) for ip in sorted(earlier - kept))
    return Scope(
        title=f"Pod {pod.key}",
        namespace=pod.namespace,
        filters=filters,
        addresses=frozenset(pod.pod_ips) | earlier,
        pod=pod,
    )


def changes(old: Scope, new: Scope) -> list[str]:
    """What became different, one sentence each; empty: nothing that matters here."""
    said: list[str] = []
    if old.pod is not None and new.pod is not None and old.pod != new.pod:
        if old.pod.uid != new.pod.uid:
            said.append(
                f"pod {new.pod.key} was replaced: {_place(old.pod)} is now {_place(new.pod)}"
            )
        elif old.pod.pod_ips != new.pod.pod_ips:
            said.append(f"pod {new.pod.key} has other addresses: {_place(new.pod)}")
    before = {_end(end): end for end in old.endpoints}
    now = {_end(end): end for end in new.endpoints}
    said += [f"endpoint added: {key}" for key in now if key not in before]
    said += [f"endpoint removed: {key}" for key in before if key not in now]
    for key, end in now.items():
        if key in before and before[key].ready != end.ready:
            said.append(f"endpoint {key} is {'ready' if end.ready else 'not ready'} now")
    if old.service is not None and new.service is not None and old.doors != new.doors:
        added, removed = new.doors - old.doors, old.doors - new.doors
        said += [f"front door added: {ip}:{port}" for ip, port, _ in sorted(added)]
        said += [f"front door removed: {ip}:{port}" for ip, port, _ in sorted(removed)]
    return said


def _place(pod: Pod) -> str:
    return f"{', '.join(pod.pod_ips) or 'no address'} on {pod.node or 'no node'}"


def _end(end: Endpoint) -> str:
    name = f"{end.pod_key} " if end.pod else ""
    return f"{name}{end.address}:{end.port}/{end.protocol.lower()}"
