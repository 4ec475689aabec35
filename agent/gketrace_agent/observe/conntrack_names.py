"""What kube-proxy's rules call the destinations that they translate.

Its iptables rules have comments that begin with ``namespace/name:port``; its nftables maps lead to
chains called ``service-HASH-namespace/name/protocol/port``.

Source: kubernetes pkg/proxy/iptables/proxier.go, pkg/proxy/nftables/proxier.go
servicePortChainNameBase().
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import Any, Final

from gketrace.packet import protocol_name, protocol_number
from gketrace.ruleset.nft_json import parse_nft_json

__all__ = ["Destination", "ServiceNames", "nft_service_names", "service_names"]

Destination = tuple[str, int, str]
"""Address (empty: any of the node's), port, protocol."""
ServiceNames = Mapping[Destination, str]

_RULE: Final = re.compile(
    rb"^(?:\[\d+:\d+\] )?-A (KUBE-SERVICES|KUBE-NODEPORTS|KUBE-EXTERNAL-SERVICES) ([^\n]*)$", re.M
)
_DESTINATION: Final = re.compile(rb"-d ([0-9a-fA-F.:]+)/(?:32|128)\b")
_PROTOCOL: Final = re.compile(rb"-p ([a-z0-9]+)")
_PORT: Final = re.compile(rb"--dport (\d+)")
_COMMENT: Final = re.compile(rb'--comment "?([^" ]+)')
_TARGET: Final = re.compile(rb"-j KUBE-(?:SVC|EXT|XLB|FW|SEP)-")


def service_names(text: bytes) -> dict[Destination, str]:
    """What kube-proxy's rules call the destinations that they translate: its comments begin with
    ``namespace/name:port``.

    `text` is iptables-save's.  Node ports have no address: ``("", port, protocol)``.
    """
    names: dict[Destination, str] = {}
    for match in _RULE.finditer(text):
        rule = match[2]
        protocol, port = _PROTOCOL.search(rule), _PORT.search(rule)
        comment, where = _COMMENT.search(rule), _DESTINATION.search(rule)
        if not (protocol and port and comment and _TARGET.search(rule)):
            continue
        if (where is None) != (match[1] == b"KUBE-NODEPORTS"):
            continue
        address = "" if where is None else str(ip_address(where[1].decode()))
        number = protocol_number(protocol[1].decode())
        names[address, int(port[1]), protocol_name(number)] = comment[1].decode()
    return names


_NFT_MAPS: Final = frozenset({"service-ips", "service-nodeports"})
_NFT_CHAIN: Final = re.compile(r"(?:service|external)-[A-Z0-9]{8}-([^/]+/[^/]+)/[a-z]+/(.*)")


def nft_service_names(text: bytes) -> dict[Destination, str]:
    """The same of nftables mode.  `text`: of ``nft -j list table ip kube-proxy``.

    Raises `ParseError` for what is no such document.
    """
    names: dict[Destination, str] = {}
    for table in parse_nft_json(text, source="nft -j list table", taken_at=0.0).rulesets:
        for name in _NFT_MAPS:
            found = table.set(name)
            if found is not None:
                names.update(_elements(found.elements))
    return names


def _elements(elements: Iterable[Any]) -> Iterable[tuple[Destination, str]]:
    """Map elements that are understood; of another shape, there is only no name."""
    for element in elements:
        match element:
            case [{"elem": {"val": {"concat": [*key]}}}, {"goto": {"target": str(target)}}]:
                pass
            case [{"concat": [*key]}, {"goto": {"target": str(target)}}]:
                pass
            case _:
                continue
        match key:
            case [str(address), str(protocol), int(port)]:
                destination = str(ip_address(address)), port, protocol
            case [str(protocol), int(port)]:
                destination = "", port, protocol
            case _:
                continue
        chain = _NFT_CHAIN.fullmatch(target)
        if chain is not None:
            yield destination, f"{chain[1]}:{chain[2]}".rstrip(":")
