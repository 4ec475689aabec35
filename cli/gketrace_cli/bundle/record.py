"""Live cluster → bundle: everything is asked for once, all nodes at the same time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from gketrace.errors import GketraceError, NotFoundError
from gketrace_cli import __version__
from gketrace_cli.bundle.model import HOST, Bundle, Listed, NodeRecord, Table
from gketrace_cli.bundle.objects import KINDS, cut
from gketrace_cli.podref import pod_ref, pod_target
from gketrace_proto.v1alpha1 import agent_pb2 as pb

if TYPE_CHECKING:
    from gketrace.objects import Pod
    from gketrace_cli.agents import Fleet
    from gketrace_cli.session import Session

__all__ = ["record"]

_HOST_TARGET: Final = pb.Target(host=True)


def record(session: Session, scope: tuple[str, ...], inside: frozenset[str] | None) -> Bundle:
    """`inside`: the pods (``namespace/name``) whose namespaces are saved; None: all.

    Raises: `GketraceError` when there is no cluster or no agent at all.
    """
    session.progress.say("reading the cluster")
    bundle = Bundle(
        created=time.time(),
        gketrace=__version__,
        context=session.cluster.context,
        namespace=session.cluster.namespace,
        scope=scope,
        lists=_lists(session),
    )
    names = [node.name for node in session.nodes]
    fleet = session.fleet
    fleet.greet(names)
    pods: dict[str, list[Pod]] = {name: [] for name in names}
    for name in names:
        for pod in session.pods.of_node(name):
            if inside is None or pod.key in inside:
                pods[name].append(pod)
    session.progress.say(f"reading {len(names)} nodes")
    for name in names:
        bundle.nodes[name] = _begin(fleet, name)
    there = [name for name in names if bundle.nodes[name].error is None]
    if names and not there:
        raise next(one.error for one in bundle.nodes.values() if one.error is not None)
    _snapshots(fleet, {name: bundle.nodes[name] for name in there}, pods)
    _the_rest(fleet, {name: bundle.nodes[name] for name in there}, pods)
    for name, text in fleet.hidden.items():
        bundle.nodes[name].hidden = text
    return bundle


def _lists(session: Session) -> dict[str, Listed]:
    """All kinds, of all namespaces; what may not be listed so is listed in the session's alone."""
    plurals = [plural for plural in KINDS if plural != "endpoints"]
    calls = {plural: partial(_list, session, plural, "") for plural in plurals}
    found: dict[str, Listed] = session.read(calls)
    if isinstance(found["endpointslices"].error, NotFoundError):
        found["endpoints"] = _list(session, "endpoints", "")
    for plural, listed in list(found.items()):
        if listed.error is not None and plural not in ("nodes", "namespaces"):
            name = session.namespace
            alone = _list(session, plural, name)
            if alone.error is None:
                found[f"{plural}@{name}"] = alone
    return found


def _list(session: Session, plural: str, namespace: str) -> Listed:
    try:
        items = session.cluster.items(KINDS[plural][0], plural, namespace)
    except GketraceError as error:
        return Listed(error=error)
    return Listed(items=[cut(plural, item) for item in items])


def _begin(fleet: Fleet, node: str) -> NodeRecord:
    error = fleet.failure(node)
    if error is not None:
        return NodeRecord(node=node, error=error)
    agent = fleet.agent(node)
    return NodeRecord(
        node=node, how=agent.how, address=agent.address, info=agent.info or pb.GetInfoReply()
    )


def _snapshots(
    fleet: Fleet, nodes: Mapping[str, NodeRecord], pods: Mapping[str, Iterable[Pod]]
) -> None:
    requests = {}
    for name in nodes:
        wanted = [pod_ref(pod) for pod in pods[name] if not pod.host_network]
        requests[name] = (name, "Snapshot", pb.SnapshotRequest(pods=wanted))
    for name, reply in fleet.stream(requests):
        if isinstance(reply, GketraceError):
            nodes[name].snapshot_error = reply
        elif reply is not None:
            _take(nodes[name], reply)


def _take(node: NodeRecord, reply: pb.SnapshotReply) -> None:
    """Chunks of one rule set become one."""
    if reply.HasField("rules") and node.replies and node.replies[-1].HasField("rules"):
        last, rules = node.replies[-1].rules, reply.rules
        here = (rules.backend, rules.family, rules.table, rules.unavailable)
        if here == (last.backend, last.family, last.table, last.unavailable):
            last.text += rules.text
            return
    node.replies.append(reply)


def _the_rest(
    fleet: Fleet, nodes: Mapping[str, NodeRecord], pods: Mapping[str, Iterable[Pod]]
) -> None:
    """Each pod by itself, connections, and the statistics last: what rose by then is rising."""
    form = pb.CONNTRACK_FORMAT_RECORDS
    first: dict[tuple[str, str, str], tuple[str, str, Any]] = {}
    last: dict[tuple[str, str, str], tuple[str, str, Any]] = {}
    for name in nodes:
        targets = {HOST: _HOST_TARGET} | {pod.key: pod_target(pod) for pod in pods[name]}
        for key, target in targets.items():
            if key != HOST:
                first[name, key, "pod"] = (name, "GetNetns", pb.GetNetnsRequest(target=target))
            wanted = pb.ListConntrackRequest(target=target, format=form)
            first[name, key, "entries"] = (name, "ListConntrack", wanted)
            asked = pb.GetConntrackStatsRequest(target=target)
            last[name, key, "statistics"] = (name, "GetConntrackStats", asked)
    for (name, key, what), answer in (fleet.ask(first) | fleet.ask(last)).items():
        table = nodes[name].tables.setdefault(key, Table())
        if what == "pod":
            nodes[name].pods[key] = answer
        elif what == "statistics":
            table.statistics = answer
        elif isinstance(answer, GketraceError):
            table.entries_error = answer
        else:
            table.entries = list(answer)
