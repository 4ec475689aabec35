"""`RuleTree`: rule sets as the agent sent them → chains, who jumps where, and whose they are.

Pure.  Whose a chain is follows from the hash in its name (`gketrace.kubenames`), never from a
comment: kube-proxy leaves comments out of large rule sets, and anybody may write one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from gketrace.errors import NotFoundError
from gketrace.kubenames import (
    ChainRole,
    ServicePort,
    endpoint_chain,
    endpoint_text,
    nft_endpoint_chain,
    nft_service_chain,
    service_chain,
)
from gketrace.objects import Endpoint, Service
from gketrace.ruleset.iptables import IptablesRuleset
from gketrace.ruleset.iptables_save import parse_iptables_save
from gketrace.ruleset.model import BaseChain
from gketrace.ruleset.nft import NftRuleset
from gketrace.ruleset.nft_json import parse_nft_json
from gketrace.ruleset.nft_text import element_text
from gketrace.simulate.targets import Jump
from gketrace.trace import Hook, Missing
from gketrace_cli.names import close_names

__all__ = [
    "ChainView",
    "JumpView",
    "Owner",
    "RuleLine",
    "RuleText",
    "RuleTree",
    "TableView",
    "make_tree",
    "owners",
    "select_chain",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleText:
    """One rule set as an agent sent it: its replies joined."""

    backend: str
    family: int
    table: str = ""
    """nftables: ``ip kube-proxy``."""
    text: bytes = b""
    unavailable: str = ""
    taken_at: float = 0.0
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The Service port, and for an endpoint's chain the endpoint, that a chain belongs to."""

    service: ServicePort
    role: str
    """``SVC``, ``SEP``, ``EXT`` …; for nftables ``service``, ``endpoint``, ``external`` …"""
    endpoint: str = ""

    def __str__(self) -> str:
        arrow = f" → {self.endpoint}" if self.endpoint else ""
        return f"{self.service}{arrow}"


@dataclass(frozen=True, slots=True, kw_only=True)
class JumpView:
    """A chain that a rule leads to."""

    chain: str
    goto: bool = False
    key: str = ""
    """For a verdict map: the element that leads there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleLine:
    """One rule."""

    position: int
    text: str
    """Without ``-A CHAIN``."""
    packets: int | None = None
    bytes: int | None = None
    handle: int | None = None
    jumps: tuple[JumpView, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainView:
    """One chain."""

    name: str
    rules: tuple[RuleLine, ...]
    base: BaseChain | None = None
    """Set for a chain that hangs on a hook."""
    owner: Owner | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TableView:
    """One table of one backend and family."""

    backend: str
    family: int
    name: str
    chains: Mapping[str, ChainView]
    taken_at: float = 0.0
    callers: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    """Chain → the rules that lead to it, as (chain, position)."""

    @property
    def title(self) -> str:
        """``iptables-nft IPv4 nat``."""
        family = f" IPv{self.family}" if self.family and self.backend != "nftables" else ""
        return f"{self.backend}{family} {self.name}"

    @property
    def roots(self) -> tuple[ChainView, ...]:
        """The chains on hooks, in the hooks' order."""
        order = list(Hook)
        found = [(c.base, c) for c in self.chains.values() if c.base is not None]
        found.sort(key=lambda pair: (order.index(pair[0].hook), pair[0].priority))
        return tuple(chain for _, chain in found)

    @property
    def rule_count(self) -> int:
        return sum(len(chain.rules) for chain in self.chains.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleTree:
    """Everything that was asked for."""

    tables: tuple[TableView, ...]
    missing: tuple[Missing, ...] = ()

    @property
    def backends(self) -> tuple[str, ...]:
        """Those that hold rules."""
        return tuple(dict.fromkeys(t.backend for t in self.tables if t.rule_count))


_NFT_JUMP: Final = re.compile(r"(?:(\S+) : )?\b(jump|goto) ([^\s,}]+)")
_NFT_MAP: Final = re.compile(r"\bvmap @(\S+)")


def make_tree(texts: Iterable[RuleText], whose: Mapping[str, Owner], *, node: str) -> RuleTree:
    """Raises `ParseError` for text that is none of the tools'."""
    tables: list[TableView] = []
    missing: list[Missing] = []
    for one in texts:
        if one.unavailable:
            missing.append(Missing(what=one.backend, why=one.unavailable, node=node))
        elif one.backend == "nftables":
            parsed = parse_nft_json(one.text, source=one.source, taken_at=one.taken_at)
            tables += [_nft_table(ruleset, whose) for ruleset in parsed.rulesets]
            missing += [Missing(what="nftables", why=why, node=node) for why in parsed.unmodelled]
        else:
            ruleset = parse_iptables_save(
                one.text,
                source=one.source,
                backend=one.backend,
                family=one.family,
                taken_at=one.taken_at,
                empty_ok=True,
            )
            tables += [_iptables_table(ruleset, table, whose) for table in ruleset.tables]
    return RuleTree(tables=tuple(map(_with_callers, tables)), missing=tuple(missing))


def _iptables_table(ruleset: IptablesRuleset, table: str, whose: Mapping[str, Owner]) -> TableView:
    base = {b.chain: b for hook in Hook for b in ruleset.base_chains(hook) if b.table == table}
    chains = {}
    for name in ruleset.chain_names(table):
        rules = []
        for rule in ruleset.chain(table, name) or ():
            target = rule.target
            # A part of a table lacks the chains that it jumps to; the text says that it does.
            jumps: tuple[JumpView, ...] = ()
            if isinstance(target, Jump):
                jumps = (JumpView(chain=target.chain, goto=target.goto),)
            rules.append(
                RuleLine(
                    position=rule.position,
                    text=rule.text.removeprefix(f"-A {name}").strip(),
                    packets=rule.packets,
                    bytes=rule.bytes,
                    jumps=jumps,
                )
            )
        chains[name] = ChainView(
            name=name, rules=tuple(rules), base=base.get(name), owner=whose.get(name)
        )
    return TableView(
        backend=ruleset.backend,
        family=ruleset.family,
        name=table,
        chains=chains,
        taken_at=ruleset.taken_at,
    )


def _nft_table(ruleset: NftRuleset, whose: Mapping[str, Owner]) -> TableView:
    base = {b.chain: b for hook in Hook for b in ruleset.base_chains(hook)}
    chains = {}
    for name in ruleset.chain_names:
        rules = [
            RuleLine(
                position=rule.position,
                text=rule.text,
                packets=rule.packets,
                bytes=rule.bytes,
                handle=rule.handle,
                jumps=_nft_jumps(ruleset, rule.text),
            )
            for rule in ruleset.chain(name) or ()
        ]
        chains[name] = ChainView(
            name=name, rules=tuple(rules), base=base.get(name), owner=whose.get(name)
        )
    return TableView(
        backend="nftables",
        family=ruleset.family,
        name=ruleset.table,
        chains=chains,
        taken_at=ruleset.taken_at,
    )


def _nft_jumps(ruleset: NftRuleset, text: str) -> tuple[JumpView, ...]:
    pieces = [text]
    if (found := _NFT_MAP.search(text)) and (named := ruleset.set(found[1])) is not None:
        pieces += [element_text(element) for element in named.elements]
    jumps = []
    for piece in pieces:
        for found in _NFT_JUMP.finditer(piece):
            key = piece[: found.start(2)].rpartition(" : ")[0] if piece is not text else found[1]
            jumps.append(JumpView(chain=found[3], goto=found[2] == "goto", key=key or ""))
    return tuple(jumps)


def _with_callers(table: TableView) -> TableView:
    callers: dict[str, list[tuple[str, int]]] = {}
    for chain in table.chains.values():
        for rule in chain.rules:
            for target in dict.fromkeys(jump.chain for jump in rule.jumps):
                callers.setdefault(target, []).append((chain.name, rule.position))
    return TableView(
        backend=table.backend,
        family=table.family,
        name=table.name,
        chains=table.chains,
        taken_at=table.taken_at,
        callers={name: tuple(rules) for name, rules in callers.items()},
    )


def select_chain(tree: RuleTree, chain: str) -> RuleTree:
    """Only the tables that have it.  Raises `NotFoundError` with the names that come close."""
    tables = tuple(table for table in tree.tables if chain in table.chains)
    if not tables:
        names = {name for table in tree.tables for name in table.chains}
        raise NotFoundError(f'chain "{chain}" not found', hint=close_names(chain, names))
    return RuleTree(tables=tables, missing=tree.missing)


_NFT_PREFIXES: Final = ("service-", "local-", "external-", "firewall-")


def owners(services: Iterable[Service], endpoints: Sequence[Endpoint]) -> dict[str, Owner]:
    """Every chain name that kube-proxy could give in either mode → whose it is."""
    by_port: dict[tuple[str, str, str, str], dict[tuple[str, int], None]] = {}
    for one in endpoints:
        key = (one.namespace, one.service, one.port_name, one.protocol.lower())
        by_port.setdefault(key, {})[one.address, one.port] = None
    found: dict[str, Owner] = {}
    for service in services:
        for port in service.ports:
            named = ServicePort(
                namespace=service.namespace,
                service=service.name,
                port=port.name,
                protocol=port.protocol.lower(),
            )
            for role in ChainRole:
                if role is not ChainRole.ENDPOINT:
                    found[service_chain(role, named)] = Owner(service=named, role=role.value)
            for prefix in _NFT_PREFIXES:
                owner = Owner(service=named, role=prefix.rstrip("-"))
                found[nft_service_chain(prefix, named)] = owner
            key = (named.namespace, named.service, named.port, named.protocol)
            for address, number in by_port.get(key, ()):
                text = endpoint_text(address, number)
                sep = Owner(service=named, role=ChainRole.ENDPOINT.value, endpoint=text)
                found[endpoint_chain(named, text)] = sep
                nft = Owner(service=named, role="endpoint", endpoint=text)
                found[nft_endpoint_chain(named, address, number)] = nft
    return found
