"""Everything that decides about packets on this node, namespace by namespace."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gketrace.errors import GketraceError
from gketrace_agent.namespaces import OpenTarget
from gketrace_agent.observe.snapshot import Observation, Observer
from gketrace_agent.resolve.model import PodRef
from gketrace_agent.rulesets import rule_chunks, summaries
from gketrace_proto import codec
from gketrace_proto.v1alpha1 import agent_pb2

__all__ = ["snapshot_replies"]

Statistics = Callable[[], agent_pb2.GetConntrackStatsReply]


def snapshot_replies(
    target: OpenTarget,
    observer: Observer,
    pods: dict[PodRef, agent_pb2.PodRef],
    statistics: Statistics,
    *,
    rules: bool = True,
) -> Iterator[agent_pb2.SnapshotReply]:
    """The node's own namespace, then those of `pods`, each read when its turn comes.

    `pods` are the request's, in its own words; pods of the host's network are not read again.  The
    rules of the node's own namespace are read with their counters of now; `rules` False leaves
    their text out.
    """
    with observer.observe(target.host, known=target.known, fresh=True) as observation:
        first = _begin(observation)
        try:
            first.conntrack.CopyFrom(statistics())
        except GketraceError as error:
            first.snapshot.unavailable["conntrack"] = str(error)
        yield first
        if rules:
            yield from _rules(observation)
    by_key = {namespace.ref.pod: namespace for namespace in target.known if namespace.ref.pod}
    for pod, words in pods.items():
        if pod in target.absent:
            yield agent_pb2.SnapshotReply(pod=words, unavailable=target.absent[pod])
            continue
        namespace = by_key.get(f"{pod.namespace}/{pod.name}")
        if namespace is None or namespace.handle.inode == target.host.handle.inode:
            continue
        try:
            observed = observer.observe(namespace, known=target.known)
        except GketraceError as error:
            yield agent_pb2.SnapshotReply(pod=words, unavailable=str(error))
            continue
        with observed as observation:
            reply = _begin(observation)
            reply.pod.CopyFrom(words)
            reply.runtime_handler = namespace.runtime_handler
            yield reply
            yield from _rules(observation)


def _begin(observation: Observation) -> agent_pb2.SnapshotReply:
    snapshot = codec.snapshot_to_proto(observation.snapshot)
    snapshot.rulesets.extend(summaries(observation.iptables, observation.nftables))
    return agent_pb2.SnapshotReply(snapshot=snapshot)


def _rules(observation: Observation) -> Iterator[agent_pb2.SnapshotReply]:
    for chunk in rule_chunks(observation.iptables, observation.nftables):
        yield agent_pb2.SnapshotReply(rules=chunk)
