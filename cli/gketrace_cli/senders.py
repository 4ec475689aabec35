"""``--from`` and the ends of `gketrace trace`: what was typed → who sends."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

from gketrace.errors import GketraceError, UsageError
from gketrace.objects import Pod
from gketrace.packet import IPAddress
from gketrace_cli.find_pod import refuse_ended
from gketrace_cli.frontdoors import Sender
from gketrace_cli.names import Kind, Named, find_node, node_of_address, parse_named

if TYPE_CHECKING:
    from gketrace_cli.session import Session

__all__ = ["pod_of_address", "resolve_sender", "sender_of"]

FindPod = Callable[["Session", str, str], Pod]


def resolve_sender(session: Session, text: str, find_pod: FindPod) -> Sender:
    """Raises: `UsageError`, `NotFoundError`, `GoneError`."""
    return sender_of(session, parse_named(text), find_pod)


def sender_of(session: Session, named: Named, find_pod: FindPod) -> Sender:
    """An address that a node or pod of the cluster owns is that node or pod."""
    sport = _source_port(named)
    if named.kind is Kind.SERVICE:
        raise UsageError(f"{named.text!r}: a service sends nothing", hint="name a pod, node or IP")
    if named.kind is Kind.NODE:
        return Sender(node=find_node(named.name, session.nodes).name, port=sport)
    if named.kind is Kind.POD:
        pod = find_pod(session, named.namespace or session.namespace, named.name)
        return _of_pod(pod, None, sport)
    assert named.address is not None  # what Kind.ADDRESS means
    node = node_of_address(named.address, session.nodes)
    if node is not None:
        return Sender(node=node.name, address=named.address, port=sport)
    found = pod_of_address(session, named.address)
    if found is not None:
        return _of_pod(found, named.address, sport)
    return Sender(address=named.address, port=sport)


def _source_port(named: Named) -> int | None:
    if not named.port:
        return None
    if not named.port.isdigit():
        raise UsageError(f"{named.text!r}: a source port is a number")
    return int(named.port)


def _of_pod(pod: Pod, address: IPAddress | None, port: int | None) -> Sender:
    refuse_ended(pod)
    if not pod.node:
        raise UsageError(f"pod {pod.key} is not on any node yet, so it sends nothing")
    if pod.host_network:
        return Sender(node=pod.node, pod=pod, address=address, port=port)
    if address is None and len(pod.pod_ips) == 1:
        address = ip_address(pod.pod_ips[0])
    return Sender(node=pod.node, pod=pod, address=address, port=port)


def pod_of_address(session: Session, address: IPAddress) -> Pod | None:
    """The running pod that has the address; None: none has, or pods may not be listed."""
    try:
        listed = session.cluster.pods(field_selector=f"status.podIP={address}")
        if not listed and address.version == 6:
            listed = session.cluster.pods()
    except GketraceError:
        # Without the right to list pods: outside the pods' ranges it is certain that none has it.
        if any(address in ip_network(cidr) for n in session.nodes for cidr in n.pod_cidrs):
            raise
        return None
    for pod in listed:
        if pod.host_network or pod.phase in ("Succeeded", "Failed"):
            continue
        if any(ip_address(ip) == address for ip in pod.pod_ips):
            return pod
    return None
