"""Kubernetes objects, cut down to what answers rest on.

What is kept is named here, field by field: environment values, commands, mounts, other annotations
than those named, and whatever a later version of the API adds never get into a bundle.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from gketrace_cli.balancers import ANNOTATIONS, only_ports

__all__ = ["KINDS", "cut"]

_KEEP: Final = True
Shape = Any
"""True: as it is (a plain value, or a list of such).  A dict: these keys.  A list of one shape: of
each item.  ``{"*": True}``: all keys of a map of strings.  A function: what it leaves of a text."""

_METADATA: Final = {"name": _KEEP, "namespace": _KEEP, "uid": _KEEP, "deletionTimestamp": _KEEP}
_LABELLED: Final = {**_METADATA, "labels": {"*": _KEEP}}
_PORTS: Final = [
    {"name": _KEEP, "containerPort": _KEEP, "protocol": _KEEP, "hostPort": _KEEP, "hostIP": _KEEP}
]
_CONTAINERS: Final = [{"name": _KEEP, "ports": _PORTS}]
_STATUSES: Final = [
    {
        "name": _KEEP,
        "containerID": _KEEP,
        "ready": _KEEP,
        "restartCount": _KEEP,
        "state": {"running": {}, "waiting": {}, "terminated": {}},
    }
]
_CONDITIONS: Final = [{"type": _KEEP, "status": _KEEP}]
_REFERENCE: Final = {"kind": _KEEP, "name": _KEEP, "namespace": _KEEP}
_OLD_ADDRESSES: Final = [{"ip": _KEEP, "nodeName": _KEEP, "targetRef": _REFERENCE}]

KINDS: Final[dict[str, tuple[str, Shape]]] = {
    "nodes": (
        "",
        {
            "metadata": _LABELLED,
            "spec": {
                "podCIDR": _KEEP,
                "podCIDRs": _KEEP,
                "unschedulable": _KEEP,
                "providerID": _KEEP,
                "taints": [{"key": _KEEP, "value": _KEEP, "effect": _KEEP}],
            },
            "status": {
                "addresses": [{"type": _KEEP, "address": _KEEP}],
                "conditions": _CONDITIONS,
                "nodeInfo": {
                    "kubeletVersion": _KEEP,
                    "kubeProxyVersion": _KEEP,
                    "containerRuntimeVersion": _KEEP,
                    "kernelVersion": _KEEP,
                    "osImage": _KEEP,
                },
            },
        },
    ),
    "pods": (
        "",
        {
            "metadata": {
                **_LABELLED,
                "annotations": {"kubernetes.io/config.hash": _KEEP},
            },
            "spec": {
                "nodeName": _KEEP,
                "hostNetwork": _KEEP,
                "runtimeClassName": _KEEP,
                "initContainers": _CONTAINERS,
                "containers": _CONTAINERS,
                "ephemeralContainers": _CONTAINERS,
            },
            "status": {
                "phase": _KEEP,
                "reason": _KEEP,
                "hostIP": _KEEP,
                "podIP": _KEEP,
                "podIPs": [{"ip": _KEEP}],
                "conditions": _CONDITIONS,
                "initContainerStatuses": _STATUSES,
                "containerStatuses": _STATUSES,
                "ephemeralContainerStatuses": _STATUSES,
            },
        },
    ),
    "services": (
        "",
        {
            "metadata": {
                **_LABELLED,
                "annotations": {name: partial(only_ports, name) for name in ANNOTATIONS},
            },
            "spec": {
                "type": _KEEP,
                "clusterIP": _KEEP,
                "clusterIPs": _KEEP,
                "externalIPs": _KEEP,
                "externalName": _KEEP,
                "loadBalancerSourceRanges": _KEEP,
                "loadBalancerClass": _KEEP,
                "ports": [
                    {
                        "name": _KEEP,
                        "port": _KEEP,
                        "protocol": _KEEP,
                        "targetPort": _KEEP,
                        "nodePort": _KEEP,
                        "appProtocol": _KEEP,
                    }
                ],
                "selector": {"*": _KEEP},
                "externalTrafficPolicy": _KEEP,
                "internalTrafficPolicy": _KEEP,
                "sessionAffinity": _KEEP,
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": _KEEP}},
                "trafficDistribution": _KEEP,
                "healthCheckNodePort": _KEEP,
                "publishNotReadyAddresses": _KEEP,
                "ipFamilies": _KEEP,
            },
            "status": {
                "loadBalancer": {"ingress": [{"ip": _KEEP, "hostname": _KEEP, "ipMode": _KEEP}]}
            },
        },
    ),
    "endpointslices": (
        "discovery.k8s.io",
        {
            "metadata": {**_METADATA, "labels": {"kubernetes.io/service-name": _KEEP}},
            "addressType": _KEEP,
            "endpoints": [
                {
                    "addresses": _KEEP,
                    "conditions": {"ready": _KEEP, "serving": _KEEP, "terminating": _KEEP},
                    "nodeName": _KEEP,
                    "zone": _KEEP,
                    "targetRef": _REFERENCE,
                    "hints": {"forZones": [{"name": _KEEP}], "forNodes": [{"name": _KEEP}]},
                }
            ],
            "ports": [{"name": _KEEP, "port": _KEEP, "protocol": _KEEP, "appProtocol": _KEEP}],
        },
    ),
    "endpoints": (
        "",
        {
            "metadata": _METADATA,
            "subsets": [
                {
                    "addresses": _OLD_ADDRESSES,
                    "notReadyAddresses": _OLD_ADDRESSES,
                    "ports": [{"name": _KEEP, "port": _KEEP, "protocol": _KEEP}],
                }
            ],
        },
    ),
    "namespaces": ("", {"metadata": {"name": _KEEP}}),
}
"""Plural → its API group, and what is kept of an object."""


def cut(plural: str, obj: Any) -> dict[str, Any]:
    """What is kept of one object of that kind."""
    kept = _cut(KINDS[plural][1], obj)
    return kept if isinstance(kept, dict) else {}


def _cut(shape: Shape, value: Any) -> Any:
    if shape is _KEEP:
        if isinstance(value, list):
            return [item for item in value if not isinstance(item, (dict, list))]
        return None if isinstance(value, dict) else value
    if callable(shape):
        return shape(value) if isinstance(value, str) else None
    if isinstance(shape, list):
        return [_cut(shape[0], item) for item in value] if isinstance(value, list) else None
    if not isinstance(value, dict):
        return None
    if "*" in shape:
        return {key: _cut(_KEEP, item) for key, item in value.items()}
    return {key: _cut(inner, value[key]) for key, inner in shape.items() if key in value}
