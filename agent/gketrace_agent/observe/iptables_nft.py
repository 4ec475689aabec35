"""iptables-nft's rules: by netlink, and by iptables-nft-save where something in them is not known.

Small sets are read here and now; large ones in a process of their own, which the interpreter's lock
and this process's memory do not feel.

Source: `gketrace_agent.kernel.nft_rules`; iptables iptables/xtables-save.c (__do_output).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from typing import Final

from gketrace.errors import GketraceError
from gketrace_agent.kernel.nft_rules import TABLES, NftText, NotRead, nft_chains, nft_text
from gketrace_agent.kernel.process import Child, Completed, start
from gketrace_agent.kernel.reader import KernelReader

__all__ = [
    "begin_nft",
    "child_text",
    "incompatible_table",
    "merged_text",
    "nothing_read",
    "reasons",
    "save_arguments",
]

_HERE: Final = 20000
"""Chains, rules and jumps of one family that are read in this process: some 0.2 s, not much more
than a process of its own takes to begin."""
_TABLE: Final = b"# Table `"
_INCOMPATIBLE: Final = re.compile(rb"# Table `([^'\n]*)' (?:is incompatible|contains incompatible)")


def begin_nft(
    reader: KernelReader, family: int, tables: Collection[str], *, limit: int
) -> NftText | Child:
    """The text of `tables`, or the process that makes it.  `family`: 4 or 6; `limit`: bytes.

    Call inside the namespace.  Raises `NetlinkError`, `UnavailableError`, `TimeoutExceeded`.
    """
    chains = nft_chains(reader.netfilter, family)
    if sum(1 + chain.use for of_table in chains.values() for chain in of_table) <= _HERE:
        return nft_text(reader.netfilter, family, tables, chains)
    argv = (sys.executable, "-I", "-m", "gketrace_agent.kernel.nft_rules", str(family))
    return start(argv, limit=limit)


def child_text(result: Completed | GketraceError, tables: Collection[str]) -> NftText:
    """What the process of `begin_nft` gave."""
    if isinstance(result, GketraceError):
        return nothing_read(tables, result.message)
    if not result.ok:
        return nothing_read(tables, result.failure())
    left = (line.partition("\t") for line in result.stderr.splitlines())
    return NftText(
        text=result.stdout, left=tuple(NotRead(table=t, reason=why) for t, _, why in left)
    )


def nothing_read(tables: Collection[str], reason: str) -> NftText:
    """All of `tables` are for iptables-nft-save."""
    left = tuple(NotRead(table=table, reason=reason) for table in TABLES if table in tables)
    return NftText(text=b"", left=left)


def reasons(found: NftText) -> str:
    """Which tables were left, and why."""
    return "; ".join(f"table {left.table}: {left.reason}" for left in found.left)


def save_arguments(found: NftText) -> tuple[str, ...]:
    """What iptables-nft-save is to print: one table, or all when there are several to choose."""
    if len(found.left) == 1:
        return ("-c", "-t", found.left[0].table)
    return ("-c",)


def merged_text(found: NftText, saved: bytes) -> bytes | NotRead:
    """Both texts together; the table that `saved` lacks, if it does."""
    parts = [found.text]
    for left in found.left:
        name = re.escape(left.table.encode())
        part = re.search(rb"^\*" + name + rb"\n.*?^COMMIT\n", saved, re.MULTILINE | re.DOTALL)
        if part is None:
            return left
        parts.append(part[0])
    return b"".join(parts)


def incompatible_table(text: bytes) -> str | None:
    """The table that iptables-nft-save says that it left out."""
    at = text.find(_TABLE)
    while at >= 0:
        found = _INCOMPATIBLE.match(text, at)
        if found and (at == 0 or text[at - 1] == 0x0A):
            return found[1].decode("utf-8", "backslashreplace")
        at = text.find(_TABLE, at + 1)
    return None
