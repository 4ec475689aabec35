"""Rules: iptables and nftables, parsed from what the kernel's tools print.

::

    model.py           Ruleset, BaseChain, Rule, Match, Target: what every backend's rules are
    options.py         iptables' command-line grammar: tokens → options, and values back to text
    iptables.py        IptablesRuleset: an index over the text; chains are parsed when entered
    rule_text.py       one line → Rule; what is not understood is kept word for word
    iptables_save.py   parse_iptables_save(text) → IptablesRuleset, parse_rule(line) → Rule
    render.py          Rule, IptablesRuleset → text that iptables-restore accepts
    nft.py             NftRuleset: an index over nft's JSON; chains are parsed when entered
    nft_json.py        parse_nft_json(text) → NftRuleset of each table
    nft_text.py        that JSON → the syntax of ``nft list ruleset``
    line_breaks.py     line breaks inside of quotation marks, before lines are read
    cut.py             one table or chain out of a rule set's text

A `Ruleset` is one backend's rules of one address family in one namespace.  The matches and targets
themselves are in `gketrace.simulate.matches` and `gketrace.simulate.targets`, one file a family of
extensions: each class holds its fields, its options' names, how they are parsed and printed, and
how the kernel evaluates them.

Only the model is imported here, so that `gketrace.ruleset` stands below `gketrace.simulate`.
"""

from __future__ import annotations

from gketrace.ruleset.model import BaseChain, Match, Rule, Ruleset, Target

__all__ = ["BaseChain", "Match", "Rule", "Ruleset", "Target"]
