"""Dumps → the core's rule sets: everything that hangs on a namespace's hooks."""

from __future__ import annotations

from gketrace.ruleset import Ruleset
from gketrace.snapshot import Maybe
from gketrace_agent.observe.iptables import IptablesDump, IptablesDumps
from gketrace_agent.observe.nftables import NftablesDump

__all__ = ["make_rulesets"]


def make_rulesets(
    iptables: IptablesDumps, nftables: NftablesDump | None
) -> tuple[Maybe[Ruleset], ...]:
    """Every rule set, and an `Unavailable` for each that exists and could not be read."""
    made: list[Maybe[Ruleset]] = [
        dump.ruleset() if isinstance(dump, IptablesDump) else dump for dump in iptables.dumps
    ]
    if nftables is None:
        return tuple(made)
    return (*made, *nftables.rulesets())
