"""Loads random nftables tables, and finds what this kernel and nft lack."""

from __future__ import annotations

import random
import re

from tests.kernel.oracle.bed import Bed
from tests.kernel.oracle.generate_nft import TABLE, objects
from tests.kernel.oracle.generate_nft_actions import ACTIONS
from tests.kernel.oracle.generate_nft_conditions import CONDITIONS
from tests.kernel.oracle.nft_parts import NAT_HOOKS

__all__ = ["is_rule", "probe_nft", "restore"]

_RULE = re.compile(r"    (?!type |elements )")
_LINE = re.compile(r"/dev/stdin:(\d+):")


def is_rule(line: str) -> bool:
    """Whether it is one of a chain's rules, as the generator indents them."""
    return _RULE.match(line) is not None


def restore(bed: Bed, lines: list[str]) -> list[str]:
    """Loads the table; rules that the kernel or nft refuses are taken out and returned."""
    lines, refused = list(lines), []
    while True:
        try:
            bed.command(["nft", "-f", "/dev/stdin"], text="\n".join(lines) + "\n")
        except RuntimeError as error:
            bad = {int(n) - 1 for n in _LINE.findall(str(error))}
            rules = sorted(n for n in bad if is_rule(lines[n]))
            if not rules:
                raise
            # One bad rule makes nft complain of others behind it: only the first is sure.
            refused.append(lines.pop(rules[0]).strip())
            continue
        return refused


def probe_nft(bed: Bed) -> frozenset[str]:
    """Names of the parts that this kernel or nft lacks, found by trying each."""
    absent: set[str] = set()
    rng = random.Random(1)
    for part in (*CONDITIONS, *ACTIONS):
        kind = part.kinds[0]
        hook = next(h for h in part.hooks if kind != "nat" or h in NAT_HOOKS)
        text = part.write(rng, 4, hook).replace("@MAC@", "02:00:00:00:00:01")
        text = text.replace("@CHAIN@", "other")
        lines = [f"table ip {TABLE} {{", *objects(rng, 4)]
        lines += [
            f"  map services-{hook} {{ type ipv4_addr . inet_proto . inet_service : verdict; }}"
        ]
        lines += ["  chain other { }", "  chain base {"]
        priority = -300 if part.before < 0 else 0
        lines += [f"    type {kind} hook {hook} priority {priority};", f"    {text}", "  }", "}"]
        try:
            bed.command(["nft", "-f", "/dev/stdin"], text="\n".join(lines) + "\n")
        except RuntimeError:
            absent.add(part.name)
            continue
        bed.command(["nft", "delete", "table", "ip", TABLE])
    return frozenset(absent)
