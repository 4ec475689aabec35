"""Tables as iptables-nft-save -c prints them, without its comment lines.

Source: iptables 1.8.9 iptables/xtables-save.c (__do_output), nft.c (xtables_ipv4, nft_chain_save,
nft_chain_foreach), nft-cache.c (nft_cache_add_base_chain, nft_cache_sort_chains).
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from gketrace_agent.kernel.netlink import NetlinkSocket
from gketrace_agent.kernel.nfnetlink import NFNL_HEADER
from gketrace_agent.kernel.nft_rules.dump import (
    Chain,
    Hook,
    RuleDump,
    chains_of,
    head_of,
)
from gketrace_agent.kernel.nft_rules.rule import RuleReader
from gketrace_agent.kernel.nft_rules.sets import SetNames, ask_for_name
from gketrace_agent.kernel.nft_rules.words import NotRendered

__all__ = ["TABLES", "NftText", "NotRead", "nft_chains", "nft_text"]

_HOOKS: Final = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
_PRIORITIES: Final = {
    "mangle": {0: -150, 1: -150, 2: -150, 3: -150, 4: -150},
    "security": {1: 150, 2: 150, 3: 150},
    "raw": {0: -300, 3: -300},
    "filter": {1: 0, 2: 0, 3: 0},
    "nat": {0: -100, 1: 100, 3: -100, 4: 100},
}
"""Table → hook → priority, in the order in which iptables-nft-save prints the tables."""
TABLES: Final = tuple(_PRIORITIES)
"""The tables that iptables has, in that order."""
_POLICIES: Final = {0: "DROP", 1: "ACCEPT"}
_FAMILIES: Final = {4: socket.AF_INET, 6: socket.AF_INET6}


@dataclass(frozen=True, slots=True, kw_only=True)
class NotRead:
    """A table that holds something that is not known here."""

    table: str
    reason: str
    """The chain and the expression."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NftText:
    """All of iptables-nft's tables of one family."""

    text: bytes
    left: tuple[NotRead, ...]
    """The tables that are not in it."""


def nft_chains(netfilter: NetlinkSocket, family: int) -> dict[str, list[Chain]]:
    """Table → chains, of those tables that iptables uses; `family` is 4 or 6.

    Raises `NetlinkError`.
    """
    found = chains_of(netfilter, _FAMILIES[family])
    return {table: chains for table, chains in found.items() if table in _PRIORITIES}


def nft_text(
    netfilter: NetlinkSocket, family: int, tables: Collection[str], chains: dict[str, list[Chain]]
) -> NftText:
    """The text of `tables`; `chains` as `nft_chains` gave them.

    `netfilter` belongs to the calling thread's namespace.  Raises `NetlinkError`,
    `TimeoutExceeded`.  Whether the rules changed meanwhile is for the caller to see, by their
    generation.
    """
    reader = RuleReader(family, SetNames(functools.partial(ask_for_name, netfilter)))
    text = bytearray()
    left = []
    with RuleDump(_FAMILIES[family]) as dump:
        for table in TABLES:
            if table not in tables:
                continue
            start = len(text)
            try:
                _table(text, table, chains.get(table, []), dump, reader)
            except NotRendered as reason:
                del text[start:]
                left.append(NotRead(table=table, reason=str(reason)))
    return NftText(text=bytes(text), left=tuple(left))


def _table(
    text: bytearray, table: str, chains: Sequence[Chain], dump: RuleDump, reader: RuleReader
) -> None:
    ordered, line = _ordered(table, chains), reader.line
    lines = [f"*{table}", *(_head(name, hook) for name, hook, _ in ordered), ""]
    text += "\n".join(lines).encode("latin-1")
    for name, _, real in ordered:
        if not real:
            continue
        lines = []
        head = head_of(table, name)
        at = NFNL_HEADER.size + len(head)
        for body in dump.rules(head):
            try:
                if not body.startswith(head, NFNL_HEADER.size):
                    raise NotRendered("of another chain")
                lines.append(line(body[at:], name))
            except NotRendered as reason:
                raise NotRendered(f"rule {len(lines) + 1} of {name}: {reason}") from None
        if lines:
            lines.append("")
            text += "\n".join(lines).encode("latin-1")
    text += b"COMMIT\n"


def _ordered(table: str, chains: Sequence[Chain]) -> list[tuple[str, Hook | None, bool]]:
    """(name, hook, whether it exists): base chains by hook, those that are missing too, then the
    others by name.

    Raises `NotRendered` for base chains that iptables would not have made.
    """
    bases: dict[int, Chain] = {}
    for chain in chains:
        if (hook := chain.hook) is None:
            continue
        number = hook.number
        kind = (
            table if table == "nat" else "route" if (table, number) == ("mangle", 3) else "filter"
        )
        expected = (_PRIORITIES[table].get(number), _HOOKS[number : number + 1], kind)
        if (hook.priority, (chain.name,), hook.type) != expected or number in bases:
            raise NotRendered(f"base chain {chain.name} is not one of iptables")
        bases[number] = chain
    ordered: list[tuple[str, Hook | None, bool]] = []
    for number in sorted(_PRIORITIES[table]):
        base = bases.get(number)
        if base is None:
            ordered.append((_HOOKS[number], _MISSING, False))
        else:
            ordered.append((base.name, base.hook, True))
    return ordered + [(n, None, True) for n in sorted(c.name for c in chains if c.hook is None)]


_MISSING: Final = Hook(number=0, priority=0, type="", policy=1, packets=0, bytes=0)
"""A base chain that iptables has not made yet."""


def _head(name: str, hook: Hook | None) -> str:
    if hook is None:
        return f":{name} - [0:0]"
    if hook.policy not in _POLICIES:
        raise NotRendered(f"base chain {name} of policy {hook.policy}")
    return f":{name} {_POLICIES[hook.policy]} [{hook.packets}:{hook.bytes}]"
