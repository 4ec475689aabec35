"""What kube-proxy has to programme, from Services and EndpointSlices.

After pkg/proxy/topology.go, CategorizeEndpoints: the ready endpoints, and where there are none,
those that are serving while they terminate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gketrace.kubenames import ServicePort as PortName
from gketrace.kubenames import endpoint_text
from gketrace.objects import Endpoint, Service, ServicePort

__all__ = ["Expected", "expected", "port_name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """One port of one Service."""

    service: Service
    port: ServicePort
    known: tuple[Endpoint, ...]
    """All endpoints of the port."""
    usable: tuple[Endpoint, ...]
    """Those that traffic may go to."""

    def addresses(self, family: int) -> frozenset[str]:
        """The usable ones as kube-proxy writes them: ``10.40.0.6:8080``."""
        return self._texts(self.usable, family)

    def all_addresses(self, family: int) -> frozenset[str]:
        """Also those that are not ready: they may be leaving."""
        return self._texts(self.known, family)

    def local(self, node: str, family: int) -> frozenset[str]:
        return self._texts((e for e in self.usable if e.node == node), family)

    def _texts(self, endpoints: Iterable[Endpoint], family: int) -> frozenset[str]:
        kind = f"IPv{family}"
        return frozenset(
            endpoint_text(e.address, e.port) for e in endpoints if e.address_type == kind
        )

    @property
    def hinted(self) -> bool:
        """Whether a node may leave endpoints out (topology hints)."""
        return any(e.hint_zones or e.hint_nodes for e in self.usable)

    @property
    def families(self) -> tuple[int, ...]:
        return tuple(sorted({6 if ":" in ip else 4 for ip in self.service.cluster_ips}))


def port_name(service: Service, port: ServicePort) -> PortName:
    """The name that kube-proxy's chains are made from."""
    return PortName(
        namespace=service.namespace,
        service=service.name,
        port=port.name,
        protocol=port.protocol.lower(),
    )


def expected(
    services: Iterable[Service], endpoints: Iterable[Endpoint]
) -> Mapping[PortName, Expected]:
    """For each port of each Service with addresses of its own."""
    of_port: dict[tuple[str, str, str, str], list[Endpoint]] = {}
    for end in endpoints:
        key = (end.namespace, end.service, end.port_name, end.protocol)
        of_port.setdefault(key, []).append(end)
    found = {}
    for service in services:
        if service.headless or service.type == "ExternalName" or not service.cluster_ips:
            continue
        for port in service.ports:
            known = of_port.get((service.namespace, service.name, port.name, port.protocol), [])
            ready = [e for e in known if e.ready]
            usable = ready or [e for e in known if e.serving and e.terminating]
            found[port_name(service, port)] = Expected(
                service=service, port=port, known=tuple(known), usable=tuple(usable)
            )
    return found
