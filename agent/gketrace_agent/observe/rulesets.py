"""Dumps → the core's rule sets: everything that hangs on a namespace's hooks."""

from __future__ import annotations

from gketrace.errors import ParseError
from gketrace.ruleset import Ruleset
from gketrace.ruleset.nft_json import parse_nft_json
from gketrace.snapshot import Maybe, Unavailable
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
    for table, text in nftables.tables:
        if isinstance(text, Unavailable):
            made.append(Unavailable(reason=f"nftables table {table}: {text.reason}"))
            continue
        source = f"{nftables.source} {table}"
        try:
            tables = parse_nft_json(
                text,
                source=source,
                taken_at=nftables.taken_at,
                tests=nftables.tests.get(table, {}),
            )
        except ParseError as error:
            made.append(Unavailable(reason=f"nftables table {table}: {error}"))
            continue
        made += tables.rulesets
        made += [Unavailable(reason=why) for why in tables.unmodelled]
    return tuple(made)
