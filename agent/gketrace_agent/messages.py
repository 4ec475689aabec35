"""The agent's own types ↔ the messages that the codec does not know, and requests as text."""

from __future__ import annotations

from typing import Any, Final, TypeVar

from google.protobuf.message import Message

from gketrace.errors import GketraceError, UsageError
from gketrace_agent.observe.conntrack_filter import ConntrackFilter, ConntrackFilters
from gketrace_agent.resolve.model import PodRef, ResolvedPod
from gketrace_proto import codec
from gketrace_proto.conntrack_filters import filters_from_proto
from gketrace_proto.v1alpha1 import agent_pb2, capture_pb2

__all__ = [
    "conntrack_filters",
    "describe_request",
    "pod_ref",
    "request_part",
    "resolved_to_proto",
    "target_pod",
]


T = TypeVar("T")
_DESCRIBED: Final = 500
"""Characters of what the log says about a request with many parts."""


def request_part(cls: type[T], message: Message) -> T:
    """A core type out of a request.  Raises `UsageError` for what does not decode."""
    try:
        return codec.decode(cls, message)
    except UsageError:
        raise
    except GketraceError as error:
        why = error.__cause__ or error
        raise UsageError(f"the request's {cls.__name__} is not understood: {why}") from None


def pod_ref(message: agent_pb2.PodRef) -> PodRef:
    """A request's pod.  A runtime's scheme before a container id is taken off."""
    return PodRef(
        namespace=message.namespace,
        name=message.name,
        uid=message.uid.lower(),
        container_ids=tuple(cid.rpartition("://")[2].lower() for cid in message.container_ids),
        pod_ips=tuple(message.pod_ips),
        host_network=message.host_network,
        config_hash=message.config_hash.lower(),
    )


def target_pod(target: agent_pb2.Target) -> PodRef | None:
    """The pod that a target names; None: the host.  Raises `UsageError` when it names neither."""
    which = target.WhichOneof("target")
    if which == "pod":
        return pod_ref(target.pod)
    if which == "host" and target.host:
        return None
    raise UsageError("the request names no target: the host or a pod")


def conntrack_filters(
    request: agent_pb2.ListConntrackRequest | agent_pb2.FollowConntrackRequest,
) -> ConntrackFilters:
    """All filters of a request; without any, every entry is wanted.  Raises `UsageError`."""
    return ConntrackFilters(filters_from_proto(ConntrackFilter, request))


def resolved_to_proto(pod: ResolvedPod) -> agent_pb2.ResolvedPod:
    found = pod.found
    return agent_pb2.ResolvedPod(
        namespace=found.namespace,
        name=found.name,
        uid=found.uid,
        netns=codec.encode(pod.netns),
        sandbox_id=found.sandbox_id,
        sandbox_pid=found.sandbox_pid,
        containers=[
            agent_pb2.Container(
                id=c.id,
                name=c.name,
                pid=c.pid,
                state=c.state,
                start_time=c.start_time,
                command=c.command,
            )
            for c in found.containers
        ],
        host_network=pod.host_network,
        runtime_handler=found.runtime_handler,
        method=found.method,
        steps=[agent_pb2.ResolveStep(step=s.step, ok=s.ok, detail=s.detail) for s in pod.steps],
        netns_path=found.netns_path,
        ips=found.ips,
        other_sandboxes=found.other_sandboxes,
    )


def describe_request(request: Any) -> str:
    """What a request is about, for the log: ``host``, ``pod default/web``, or nothing."""
    if isinstance(request, agent_pb2.ResolvePodRequest):
        return str(pod_ref(request.pod))
    if isinstance(request, capture_pb2.CaptureRequest):
        taps = (f"{_describe_target(tap.target)} {tap.interface}" for tap in request.taps)
        return ", ".join(taps)[:_DESCRIBED]
    target = getattr(request, "target", None)
    if not isinstance(target, agent_pb2.Target):
        return ""
    where = _describe_target(target)
    if isinstance(request, agent_pb2.WalkRequest):
        packet = request.packet
        return f"{where} {packet.src} → {packet.dst}:{packet.dport}/{packet.protocol}"
    return where


def _describe_target(target: agent_pb2.Target) -> str:
    return str(pod_ref(target.pod)) if target.WhichOneof("target") == "pod" else "host"
