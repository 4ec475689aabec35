"""The Kubernetes objects as values; see `gketrace.objects`."""

from __future__ import annotations

from gketrace.objects import (
    Container,
    ContainerPort,
    Endpoint,
    LoadBalancerIngress,
    Node,
    Pod,
    Service,
    ServicePort,
    Taint,
)

__all__ = [
    "Container",
    "ContainerPort",
    "Endpoint",
    "LoadBalancerIngress",
    "Node",
    "Pod",
    "Service",
    "ServicePort",
    "Taint",
]
