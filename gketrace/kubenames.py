"""The names that kube-proxy gives to its chains and sets, computed from Services and endpoints.

iptables mode (pkg/proxy/iptables/proxier.go: servicePortPolicyClusterChain() and its siblings,
servicePortEndpointChainName()): a prefix, and 16 base32 digits of a SHA-256 over the service port's
name and protocol, and for endpoints the address.  The same in all versions since 1.2.

nftables mode (pkg/proxy/nftables/proxier.go: servicePortChainNameBase(), hashAndTruncate()): a
prefix, 8 such digits over a readable name, and that name.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

__all__ = [
    "ChainRole",
    "KubeChain",
    "ServicePort",
    "endpoint_chain",
    "endpoint_text",
    "kube_chains",
    "nft_endpoint_chain",
    "nft_service_chain",
    "service_chain",
]


class ChainRole(Enum):
    """What a chain of one service port is for."""

    SERVICE = "SVC"
    """All its endpoints."""
    LOCAL = "SVL"
    """Endpoints of this node only."""
    FIREWALL = "FW"
    """Source ranges of the load balancer."""
    EXTERNAL = "EXT"
    """Traffic from outside of the cluster (1.24 and later)."""
    EXTERNAL_LOCAL = "XLB"
    """The same for externalTrafficPolicy Local, before 1.24."""
    ENDPOINT = "SEP"
    """One endpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePort:
    """One port of a Service (ServicePortName in pkg/proxy/types.go, and its protocol)."""

    namespace: str
    service: str
    port: str = ""
    """The port's name; empty for a port without one."""
    protocol: str = "tcp"
    """``tcp``, ``udp`` or ``sctp``."""

    @property
    def name(self) -> str:
        """``namespace/service:port``."""
        return f"{self.namespace}/{self.service}" + (f":{self.port}" if self.port else "")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class KubeChain:
    """Whose chain it is."""

    name: str
    role: ChainRole
    service: ServicePort
    endpoint: str = ""
    """``10.40.0.6:8080`` or ``[fd00::6]:8080``, for `ChainRole.ENDPOINT`."""

    def __str__(self) -> str:
        return f"{self.service} → {self.endpoint}" if self.endpoint else str(self.service)


def _digest(text: str, length: int) -> str:
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:length]


def service_chain(role: ChainRole, service: ServicePort) -> str:
    """``KUBE-SVC-TCOU7JCQXEZGVUNU``."""
    return f"KUBE-{role.value}-{_digest(service.name + service.protocol.lower(), 16)}"


def endpoint_text(address: str, port: int) -> str:
    """As net.JoinHostPort() writes it: IPv6 addresses in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def endpoint_chain(service: ServicePort, endpoint: str) -> str:
    """``KUBE-SEP-SXIVWICOYRO3J4NJ``; also the name of the endpoint's affinity list (xt_recent)."""
    return f"KUBE-SEP-{_digest(service.name + service.protocol.lower() + endpoint, 16)}"


_NFT_LENGTH: Final = 240
"""knftables.NameLengthMax less room for the prefix (chainNameBaseLengthMax)."""


def _nft_name(name: str) -> str:
    full = f"{_digest(name, 8)}-{name}"
    return full if len(full) <= _NFT_LENGTH else full[: _NFT_LENGTH - 3] + "..."


def _nft_base(service: ServicePort) -> str:
    return f"{service.namespace}/{service.service}/{service.protocol.lower()}/{service.port}"


def nft_service_chain(prefix: str, service: ServicePort) -> str:
    """``service-2QRHZV4L-ns1/svc1/tcp/p80``; `prefix` is ``service-``, ``local-``, ``external-``
    or ``firewall-``."""
    return prefix + _nft_name(_nft_base(service))


def nft_endpoint_chain(
    service: ServicePort, address: str, port: int, prefix: str = "endpoint-"
) -> str:
    """``endpoint-5OJB2KTY-ns1/svc1/tcp/p80__10.180.0.1/80``; `prefix` may be ``affinity-``."""
    name = f"{_nft_base(service)}__{address.replace(':', '.')}/{port}"
    return prefix + _nft_name(name)


def kube_chains(services: Mapping[ServicePort, Iterable[str]]) -> dict[str, KubeChain]:
    """Every chain name that kube-proxy's iptables mode could give, and whose it is.

    `services` holds each service port's endpoints as `endpoint_text` writes them.
    """
    found: dict[str, KubeChain] = {}
    for service, endpoints in services.items():
        for role in ChainRole:
            if role is ChainRole.ENDPOINT:
                continue
            name = service_chain(role, service)
            found[name] = KubeChain(name=name, role=role, service=service)
        for endpoint in endpoints:
            name = endpoint_chain(service, endpoint)
            found[name] = KubeChain(
                name=name, role=ChainRole.ENDPOINT, service=service, endpoint=endpoint
            )
    return found
