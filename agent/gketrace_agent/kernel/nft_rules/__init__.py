"""iptables-nft's rules, read from the kernel by netlink and printed as iptables-nft-save -c does.

Why not that command: in Debian's 1.8.9 it sorts the chains' names in time that grows with the
square of their number, 95 s of a busy machine at 5,000 services, and does not end in two minutes at
10,000; and its stack grows with them (docs/adr/0007-nft-rules-by-netlink.md).

- `dump` asks for chains, and for each chain's rules;
- `rule` reads the expressions of one rule, `matches` and `targets` the structs of xtables in them,
  `sets` the names of ipsets;
- `template` makes that fast: a large set has rules of a few shapes;
- `save` puts the tables together; ``python -m gketrace_agent.kernel.nft_rules 4|6`` prints them,
  for sets so large that they are read in a process of their own.

Nothing is guessed.  A table with an expression, a match, a revision or a flag that is not known
here is left out, with the reason, and is for iptables-nft-save to print.  The test is that both
texts are the same (tests/kernel/test_nft_rules.py).
"""

from __future__ import annotations

from gketrace_agent.kernel.nft_rules.save import (
    TABLES,
    NftText,
    NotRead,
    nft_chains,
    nft_text,
)

__all__ = ["TABLES", "NftText", "NotRead", "nft_chains", "nft_text"]
