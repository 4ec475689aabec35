"""What a Service says of the cloud's load balancer in front of it, and where its probes come from.

Ranges and annotations are those that Google documents: Cloud Load Balancing, "Firewall rules"; GKE,
"LoadBalancer Service parameters" and "Container-native load balancing".
"""

from __future__ import annotations

import json
from ipaddress import ip_network
from typing import Final

from gketrace.objects import Service, ServicePort

__all__ = [
    "ANNOTATIONS",
    "EXTERNAL",
    "OTHERS",
    "is_internal",
    "only_ports",
    "source",
    "with_groups",
]

EXTERNAL: Final = ("35.191.0.0/16", "209.85.152.0/22", "209.85.204.0/22")
"""Ranges of the probes of external passthrough Network Load Balancers."""
OTHERS: Final = ("35.191.0.0/16", "130.211.0.0/22")
"""Of internal passthrough ones, and of those that are proxies: Application Load Balancers too."""
_KINDS: Final = ("networking.gke.io/load-balancer-type", "cloud.google.com/load-balancer-type")
_CLASSES: Final = {
    "": None,
    "networking.gke.io/l4-regional-external": False,
    "networking.gke.io/l4-regional-internal": True,
}
"""loadBalancerClass → whether it is internal; None: an annotation says so.  Others are not the
cloud's own."""
_GROUPS: Final = "cloud.google.com/neg"
_GROUPS_STATUS: Final = "cloud.google.com/neg-status"
_PORT_MAPS: Final = ("network_endpoint_groups", "exposed_ports")
ANNOTATIONS: Final = (*_KINDS, _GROUPS, _GROUPS_STATUS)
"""The annotations of a Service that are looked at."""


def source(text: str) -> str:
    """The address that stands for all of a range: its first but one."""
    return str(ip_network(text)[1])


def is_internal(service: Service) -> bool | None:
    """None: the balancer is not one of the cloud's passthrough ones."""
    if service.type != "LoadBalancer" or service.load_balancer_class not in _CLASSES:
        return None
    known = _CLASSES[service.load_balancer_class]
    if known is not None:
        return known
    return any(service.annotations.get(name, "").lower() == "internal" for name in _KINDS)


def with_groups(service: Service) -> tuple[ServicePort, ...]:
    """The ports that have network endpoint groups of pods (NEGs), as far as the Service tells.

    The NEG controller writes the ports into an annotation.  Without that, the user's own one names
    them, or says ``ingress``, which tells of one port only where there is only one.
    """
    ports = tuple(port for port in service.ports if port.protocol == "TCP")
    status = _json(service.annotations.get(_GROUPS_STATUS, ""))
    wish = _json(service.annotations.get(_GROUPS, ""))
    for named in (status.get(_PORT_MAPS[0]), wish.get(_PORT_MAPS[1])):
        if isinstance(named, dict):
            return tuple(port for port in ports if str(port.port) in named)
    return ports if wish.get("ingress") is True and len(service.ports) == 1 else ()


def only_ports(name: str, text: str) -> str:
    """An annotation without the names of groups and zones in it, which name more than is needed."""
    if name in _KINDS:
        return text
    value = _json(text)
    kept: dict[str, object] = {
        key: {port: {} for port in named}
        for key in _PORT_MAPS
        if isinstance(named := value.get(key), dict)
    }
    if value.get("ingress") is True:
        kept["ingress"] = True
    return json.dumps(kept)


def _json(text: str) -> dict[str, object]:
    """Whatever somebody wrote there: what is not an object says nothing."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
