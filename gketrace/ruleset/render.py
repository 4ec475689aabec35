"""Rules back to text that iptables-restore accepts."""

from __future__ import annotations

from collections.abc import Iterator

from gketrace.ruleset.iptables import IptablesRuleset
from gketrace.ruleset.model import Rule

__all__ = ["render_rule", "render_ruleset"]


def render_rule(rule: Rule, *, counters: bool = False) -> str:
    """``-A CHAIN …`` from the parsed rule (not from its text), without a newline.

    What was not understood is written as it was read.
    """
    words = [f"-A {rule.chain}", *(match.render() for match in rule.matches)]
    if rule.target is not None:
        words.append(rule.target.render())
    line = " ".join(words)
    if counters and rule.packets is not None:
        return f"[{rule.packets}:{rule.bytes or 0}] {line}"
    return line


def render_ruleset(ruleset: IptablesRuleset, *, counters: bool = False) -> Iterator[str]:
    """Lines, without newlines, for ``iptables-restore`` (with ``-c`` when `counters`)."""
    for table in ruleset.tables:
        yield f"*{table}"
        chains = [
            chain
            for name in ruleset.chain_names(table)
            if (chain := ruleset.chain(table, name)) is not None
        ]
        for chain in chains:
            yield f":{chain.name} {chain.policy or '-'} [{chain.packets or 0}:{chain.bytes or 0}]"
        for chain in chains:
            for rule in chain:
                yield render_rule(rule, counters=counters)
        yield "COMMIT"
