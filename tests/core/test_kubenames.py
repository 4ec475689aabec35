"""Chain names by hash, against kube-proxy's own tests and its real dumps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gketrace.kubenames import (
    ChainRole,
    ServicePort,
    endpoint_chain,
    endpoint_text,
    kube_chains,
    nft_endpoint_chain,
    nft_service_chain,
    service_chain,
)

WORLDS = Path(__file__).parents[1] / "data" / "worlds"


@pytest.mark.parametrize(
    ("service", "digest"),
    [
        (ServicePort(namespace="default", service="kubernetes", port="https"), "NPX46M4PTMTKRN6Y"),
        (
            ServicePort(namespace="kube-system", service="kube-dns", port="dns", protocol="udp"),
            "TCOU7JCQXEZGVUNU",
        ),
        (
            ServicePort(namespace="kube-system", service="kube-dns", port="dns-tcp"),
            "ERIFXISQEP7F7OF4",
        ),
        (ServicePort(namespace="ns1", service="svc1", port="p80"), "XPGD46QRK7WJZT7O"),
    ],
)
def test_service_chains(service: ServicePort, digest: str) -> None:
    for role in (ChainRole.SERVICE, ChainRole.LOCAL, ChainRole.EXTERNAL, ChainRole.FIREWALL):
        assert service_chain(role, service) == f"KUBE-{role.value}-{digest}"


def test_endpoint_chain() -> None:
    service = ServicePort(namespace="ns1", service="svc1", port="p80")
    assert endpoint_chain(service, "10.180.0.1:80") == "KUBE-SEP-SXIVWICOYRO3J4NJ"


def test_addresses_as_go_joins_them() -> None:
    assert endpoint_text("10.0.0.1", 80) == "10.0.0.1:80"
    assert endpoint_text("fd00::1", 80) == "[fd00::1]:80"


def test_nftables_names() -> None:
    service = ServicePort(namespace="default", service="lb-affinity-local", port="http")
    assert (
        nft_endpoint_chain(service, "10.40.2.10", 8080)
        == "endpoint-4POU6V6Q-default/lb-affinity-local/tcp/http__10.40.2.10/8080"
    )
    web = ServicePort(namespace="default", service="web", port="http")
    assert nft_service_chain("service-", web) == "service-SUSTUHLJ-default/web/tcp/http"
    long = ServicePort(namespace="n" * 63, service="s" * 63, port="p" * 150)
    name = nft_service_chain("service-", long)
    assert len(name) == len("service-") + 240
    assert name.endswith("...")


def services_of(world: Path) -> dict[ServicePort, list[str]]:
    """Each service port of a world with all its endpoints, ready or not."""
    found: dict[ServicePort, list[str]] = {}
    for item in json.loads((world / "services.json").read_text())["items"]:
        meta = item["metadata"]
        for port in item["spec"].get("ports", ()):
            service = ServicePort(
                namespace=meta["namespace"],
                service=meta["name"],
                port=port.get("name", ""),
                protocol=port.get("protocol", "TCP").lower(),
            )
            found[service] = []
    for item in json.loads((world / "endpointslices.json").read_text())["items"]:
        owner = item["metadata"]["labels"]["kubernetes.io/service-name"]
        for port in item.get("ports") or ():
            service = ServicePort(
                namespace=item["metadata"]["namespace"],
                service=owner,
                port=port.get("name", ""),
                protocol=port.get("protocol", "TCP").lower(),
            )
            for endpoint in item.get("endpoints") or ():
                for address in endpoint["addresses"]:
                    found.setdefault(service, []).append(endpoint_text(address, port["port"]))
    return found


@pytest.mark.parametrize(
    "world",
    sorted(p for p in WORLDS.iterdir() if "iptables" in p.name),
    ids=lambda p: p.name,
)
def test_every_chain_of_every_dump_has_an_owner(world: Path) -> None:
    known = kube_chains(services_of(world))
    seen: set[str] = set()
    for path in world.glob("node-*/ip*tables-save.txt"):
        seen |= set(re.findall(r"^:(KUBE-(?:SVC|SVL|SEP|EXT|FW|XLB)-\S+)", path.read_text(), re.M))
    assert seen
    assert seen <= known.keys()
