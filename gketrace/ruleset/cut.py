"""One table or chain out of a rule set's text."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, Final

__all__ = ["count_nftables", "cut_iptables", "cut_nftables"]

_RULE: Final = re.compile(rb"^(?:\[\d+:\d+\] )?-A ", re.M)
_COUNTED: Final = re.compile(rb'\{\s*"(rule|chain)"\s*:\s*\{')


def cut_iptables(text: bytes, table: str, chain: str) -> bytes:
    """The lines of one table, of one chain, or both; what is left can still be restored."""
    if not table and not chain:
        return text
    kept: list[bytes] = []
    section: list[bytes] = []
    wanted = False
    for line in text.splitlines(keepends=True):
        if line.startswith(b"*"):
            wanted = not table or line[1:].strip() == table.encode()
            section = [line]
        elif line.startswith(b"COMMIT"):
            # A table that does not have the chain says nothing about it.
            if wanted and (not chain or len(section) > 1):
                kept += [*section, line]
        elif not chain or _of_chain(line, chain.encode()):
            section.append(line)
    return b"".join(kept)


def _of_chain(line: bytes, chain: bytes) -> bool:
    if line.startswith(b":"):
        return line[1:].split(b" ", 1)[0] == chain
    found = _RULE.match(line)
    return found is not None and line[found.end() :].split(None, 1)[0] == chain


def cut_nftables(text: bytes, chain: str) -> bytes:
    """The JSON with no other chain's definition and rules."""
    if not chain:
        return text
    items = [item for item in json.loads(text)["nftables"] if _of_nft_chain(item, chain)]
    return json.dumps({"nftables": items}).encode()


def count_nftables(text: bytes) -> tuple[int, int]:
    """The rules and the chains of ``nft -j list``.

    They are not loaded, which would take twenty times the text's memory: no string of JSON holds a
    quotation mark that is not escaped.
    """
    found = Counter(match[1] for match in _COUNTED.finditer(text))
    return found[b"rule"], found[b"chain"]


def _of_nft_chain(item: dict[str, Any], chain: str) -> bool:
    if "chain" in item:
        return bool(item["chain"]["name"] == chain)
    if "rule" in item:
        return bool(item["rule"]["chain"] == chain)
    return True
