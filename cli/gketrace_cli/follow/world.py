"""The cluster's objects as they were read last: what is followed, and whose addresses are whose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from gketrace.errors import GketraceError
from gketrace.trace import Missing
from gketrace_cli.addressbook import AddressBook
from gketrace_cli.follow.scope import Scope

if TYPE_CHECKING:
    from gketrace.objects import Pod
    from gketrace_cli.session import Session

__all__ = ["World", "read_world"]


@dataclass(slots=True)
class World:
    """The cluster as it was read last."""

    scope: Scope
    book: AddressBook
    node_of: dict[str, str]
    pods: dict[str, Pod]
    missing: tuple[Missing, ...] = field(default=())


def read_world(
    session: Session, read_scope: Callable[[Session, Scope | None], Scope], before: Scope | None
) -> World:
    """Raises: `GketraceError`; without names it does."""
    scope = read_scope(session, before)
    missing: tuple[Missing, ...] = ()
    try:
        read = session.read({"pods": session.cluster.pods, "services": session.cluster.services})
    except GketraceError as error:
        read = {"pods": session.pods.known, "services": ()}
        missing = (Missing(what="names", why=f"addresses have no names: {error.message}"),)
    pods = {
        ip: pod
        for pod in read["pods"]
        if not pod.host_network and pod.phase not in ("Succeeded", "Failed")
        for ip in pod.pod_ips
    }
    for pod in read["pods"]:
        session.pods.add(pod)
    by_key = {pod.key: pod for pod in read["pods"] if not pod.host_network}
    for end in scope.endpoints:  # often the only one that knows a pod's second address
        owner = by_key.get(end.pod_key)
        if owner is not None and end.address_type != "FQDN":
            pods.setdefault(end.address, owner)
    node_of = {ip: pod.node for ip, pod in pods.items()}
    for node in session.nodes:
        node_of.update(dict.fromkeys((*node.internal_ips, *node.external_ips), node.name))
        seen = session.fleet.addresses(node.name)
        node_of.update((str(one.address), node.name) for one in seen)
    book = AddressBook(nodes=session.nodes, pods=_with_addresses(pods), services=read["services"])
    return World(scope=scope, book=book, node_of=node_of, pods=pods, missing=missing)


def _with_addresses(pods: dict[str, Pod]) -> list[Pod]:
    """The pods, each with all of the addresses that it is known by."""
    known: dict[str, tuple[str, ...]] = {}
    for ip, pod in pods.items():
        known[pod.key] = (*known.get(pod.key, ()), ip)
    by_key = {pod.key: pod for pod in pods.values()}
    return [replace(pod, pod_ips=known[key]) for key, pod in by_key.items()]
