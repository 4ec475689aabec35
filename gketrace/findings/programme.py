"""What kube-proxy programmed on one node, read from its rules.

iptables mode: the jumps from KUBE-SERVICES to a Service's chain, from there to its endpoints'
chains, and their DNAT (pkg/proxy/iptables/proxier.go, syncProxyRules).  nftables mode: the chains
``service-…``, whose rules name the endpoints (pkg/proxy/nftables/proxier.go).  Only names are read
here; what the rules do to a packet is the walk's to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from gketrace.kubenames import ChainRole, ServicePort, nft_service_chain, service_chain
from gketrace.ruleset.iptables import IptablesRuleset
from gketrace.ruleset.nft import NftRuleset
from gketrace.snapshot import NetnsSnapshot, Unavailable
from gketrace.trace import Citation, Source

__all__ = ["Programme", "read_programme"]

_JUMP: Final = re.compile(
    rb"-A (KUBE-(?:SVC|SVL|XLB)-[A-Z2-7]{16}) [^\n]*?-j (KUBE-SEP-[A-Z2-7]{16})\n"
)
_DNAT: Final = re.compile(rb"-A (KUBE-SEP-[A-Z2-7]{16}) [^\n]*? --to-destination (\S+)")
_ENTRY: Final = re.compile(
    rb"-A KUBE-SERVICES [^\n]*?-j (KUBE-(?:SVC|SVL|XLB|FW|EXT)-[A-Z2-7]{16})\n"
)
_NFT_VERDICT: Final = re.compile(r"__([0-9a-f.]+)/(\d+)(?=[\s\"},]|$)")
_NFT_DNAT: Final = re.compile(r"\b(\d+\.\d+\.\d+\.\d+|[0-9a-f]*:[0-9a-f:]+) \. (\d+)")
_ROLES: Final = (ChainRole.SERVICE, ChainRole.LOCAL, ChainRole.EXTERNAL_LOCAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Iptables:
    """Of one family and backend."""

    rules: IptablesRuleset
    entries: frozenset[str]
    """Chains that KUBE-SERVICES jumps to."""
    endpoints: Mapping[str, tuple[str, ...]]
    """Service chain → endpoint chains."""
    targets: Mapping[str, str]
    """Endpoint chain → ``10.40.0.6:8080``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Programme:
    """One node's."""

    iptables: tuple[_Iptables, ...] = ()
    nft: tuple[NftRuleset, ...] = ()
    unreadable: tuple[str, ...] = ()
    """Rule sets that exist and were not read: then nothing is said of what is missing."""
    memo: dict[tuple[ServicePort, int], frozenset[str] | None] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def present(self) -> bool:
        """Whether kube-proxy has rules here at all."""
        return bool(self.iptables or self.nft)

    def present_for(self, family: int) -> bool:
        return any(one.rules.family == family for one in self.iptables) or any(
            one.family == family for one in self.nft
        )

    def endpoints(self, name: ServicePort, family: int) -> frozenset[str] | None:
        """Where the rules send connections to this port; None: they do not know the Service."""
        key = (name, family)
        if key not in self.memo:
            self.memo[key] = self._endpoints(name, family)
        return self.memo[key]

    def _endpoints(self, name: ServicePort, family: int) -> frozenset[str] | None:
        found: set[str] = set()
        known = False
        for one in self.iptables:
            if one.rules.family != family:
                continue
            doors, lists = _chains(name)
            if not one.entries.isdisjoint(doors):
                known = True
            for service in lists:
                for chain in one.endpoints.get(service, ()):
                    if chain in one.targets:
                        found.add(one.targets[chain])
        for table in self.nft:
            if table.family != family:
                continue
            for prefix in ("service-", "local-"):
                ends = _nft_endpoints(table, nft_service_chain(prefix, name))
                if ends is not None:
                    known = True
                    found |= ends
        return frozenset(found) if known else None

    def cite(self, name: ServicePort, family: int) -> Citation | None:
        """A rule that speaks for `endpoints`: the first of the Service's chain."""
        for one in self.iptables:
            if one.rules.family == family:
                for role in _ROLES:
                    chain = one.rules.chain("nat", service_chain(role, name))
                    if chain is not None and len(chain):
                        return chain.rule(len(chain)).citation
        for table in self.nft:
            if table.family == family:
                for prefix in ("service-", "local-"):
                    rules = table.chain(nft_service_chain(prefix, name))
                    for rule in rules or ():
                        return rule.citation
        return None

    def cite_absence(self, name: ServicePort, family: int) -> Citation:
        """Says where the Service's chain would stand."""
        if self.nft:
            text = f"no chain {nft_service_chain('service-', name)}"
            return Citation(
                source=Source.RULE, text=text, backend="nftables", table="ip kube-proxy"
            )
        backend = next((o.rules.backend for o in self.iptables if o.rules.family == family), "")
        text = f"no rule of KUBE-SERVICES leads to {service_chain(ChainRole.SERVICE, name)}"
        return Citation(
            source=Source.RULE, text=text, backend=backend, table="nat", chain="KUBE-SERVICES"
        )

    def cite_endpoint(self, address: str) -> Citation | None:
        """The rule that translates to `address`."""
        for one in self.iptables:
            for chain_name, target in one.targets.items():
                if target == address:
                    for rule in one.rules.chain("nat", chain_name) or ():
                        if f"--to-destination {address}" in rule.text:
                            return rule.citation
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        named = f"__{host.replace(':', '.')}/{port}"
        for table in self.nft:
            for name in table.chain_names:
                if name.startswith(("service-", "local-")):
                    for rule in table.chain(name) or ():
                        if f"{host} . {port}" in rule.text or named in rule.text:
                            return rule.citation
        return None


@lru_cache(maxsize=65536)
def _chains(name: ServicePort) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(all chains of a Service port, those that list endpoints): the same on every node."""
    doors = tuple(service_chain(role, name) for role in ChainRole if role.value != "SEP")
    return doors, tuple(service_chain(role, name) for role in _ROLES)


def _nft_endpoints(table: NftRuleset, name: str) -> set[str] | None:
    chain = table.chain(name)
    if chain is None:
        return None
    found: set[str] = set()
    for rule in chain:
        for pattern in (_NFT_DNAT, _NFT_VERDICT):
            for address, port in pattern.findall(rule.text):
                host = f"[{address}]" if ":" in address else address
                if pattern is _NFT_VERDICT and address.count(".") != 3:
                    host = f"[{address.replace('.', ':')}]"
                found.add(f"{host}:{port}")
    return found


def read_programme(host: NetnsSnapshot) -> Programme:
    """From the node's own namespace."""
    iptables = tuple(_read_iptables(host))
    nft = tuple(
        one
        for one in host.rulesets
        if isinstance(one, NftRuleset) and one.table in ("ip kube-proxy", "ip6 kube-proxy")
    )
    gone = tuple(one.reason for one in host.rulesets if isinstance(one, Unavailable))
    return Programme(iptables=iptables, nft=nft, unreadable=gone)


def _read_iptables(host: NetnsSnapshot) -> Iterator[_Iptables]:
    for one in host.rulesets:
        if not isinstance(one, IptablesRuleset) or not one.has_chain("nat", "KUBE-SERVICES"):
            continue
        endpoints: dict[str, list[str]] = {}
        for chain, end in _JUMP.findall(one.text):
            endpoints.setdefault(chain.decode(), []).append(end.decode())
        yield _Iptables(
            rules=one,
            entries=frozenset(name.decode() for name in _ENTRY.findall(one.text)),
            endpoints={name: tuple(ends) for name, ends in endpoints.items()},
            targets={name.decode(): to.decode() for name, to in _DNAT.findall(one.text)},
        )
