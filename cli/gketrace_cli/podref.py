"""A Kubernetes Pod → how an agent is told which pod is meant."""

from __future__ import annotations

from gketrace.objects import Pod
from gketrace_proto.v1alpha1 import agent_pb2 as pb

__all__ = ["pod_ref", "pod_target"]


def pod_ref(pod: Pod) -> pb.PodRef:
    return pb.PodRef(
        namespace=pod.namespace,
        name=pod.name,
        uid=pod.uid,
        container_ids=[c.id for c in pod.containers if c.id],
        pod_ips=list(pod.pod_ips),
        host_network=pod.host_network,
        config_hash=pod.config_hash,
    )


def pod_target(pod: Pod) -> pb.Target:
    """The pod's namespace; the node's own for a hostNetwork pod."""
    return pb.Target(pod=pod_ref(pod))
