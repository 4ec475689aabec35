"""Rule sets as text: chunks for the wire, one table or chain of them, counts.  Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from gketrace.ruleset.cut import count_nftables, cut_iptables, cut_nftables
from gketrace.ruleset.nft_json import tests_tail, with_tests
from gketrace.snapshot import Maybe, Unavailable
from gketrace_agent.observe.iptables import IptablesDump, IptablesDumps
from gketrace_agent.observe.nftables import NftablesDump
from gketrace_proto.v1alpha1 import agent_pb2, snapshot_pb2

__all__ = ["cut_iptables", "cut_nftables", "rule_chunks", "summaries"]

_CHUNK: Final = 64 << 10
"""Bytes of text in one message."""
_RULE: Final = re.compile(rb"^(?:\[\d+:\d+\] )?-A ", re.M)
_CHAIN: Final = re.compile(rb"^:", re.M)
_TABLE: Final = re.compile(rb"^\*(\S+)", re.M)
_NFT_FAMILIES: Final = {"ip": 4, "ip6": 6}
"""Others (``inet``, ``bridge``, …) are 0."""


def summaries(
    iptables: Maybe[IptablesDumps], nftables: Maybe[NftablesDump | None]
) -> Iterator[snapshot_pb2.RulesetSummary]:
    """One line for each rule set; one without a backend's name says why nothing was read."""
    if isinstance(iptables, Unavailable):
        yield snapshot_pb2.RulesetSummary(backend="iptables", unavailable=iptables.reason)
    else:
        for dump in iptables.dumps:
            if isinstance(dump, Unavailable):
                yield snapshot_pb2.RulesetSummary(backend="iptables", unavailable=dump.reason)
            else:
                yield _iptables_summary(dump)
    if isinstance(nftables, Unavailable):
        yield snapshot_pb2.RulesetSummary(backend="nftables", unavailable=nftables.reason)
    elif nftables is not None:
        for table, text in nftables.tables:
            summary = snapshot_pb2.RulesetSummary(
                backend="nftables",
                family=_NFT_FAMILIES.get(table.family, 0),
                tables=[str(table)],
            )
            if isinstance(text, Unavailable):
                summary.unavailable = text.reason
            else:
                summary.rules, summary.chains = count_nftables(text)
            yield summary


def _iptables_summary(dump: IptablesDump) -> snapshot_pb2.RulesetSummary:
    return snapshot_pb2.RulesetSummary(
        backend=dump.backend,
        family=dump.family,
        rules=sum(1 for _ in _RULE.finditer(dump.text)),
        chains=sum(1 for _ in _CHAIN.finditer(dump.text)),
        tables=[name.decode() for name in _TABLE.findall(dump.text)],
    )


def rule_chunks(
    iptables: Maybe[IptablesDumps],
    nftables: Maybe[NftablesDump | None],
    *,
    table: str = "",
    chain: str = "",
) -> Iterator[agent_pb2.GetRulesReply]:
    """Every rule set's text, or its `table` and `chain` only, in messages of 64 KiB."""
    if isinstance(iptables, Unavailable):
        yield agent_pb2.GetRulesReply(backend="iptables", unavailable=iptables.reason)
    else:
        for dump in iptables.dumps:
            if isinstance(dump, Unavailable):
                yield agent_pb2.GetRulesReply(backend="iptables", unavailable=dump.reason)
                continue
            head = agent_pb2.GetRulesReply(
                backend=dump.backend,
                family=dump.family,
                taken_at=dump.taken_at,
                source=dump.source,
            )
            yield from _chunks(head, cut_iptables(dump.text, table, chain))
    if isinstance(nftables, Unavailable):
        yield agent_pb2.GetRulesReply(backend="nftables", unavailable=nftables.reason)
    elif nftables is not None:
        for one, text in nftables.tables:
            if table and table not in (one.name, str(one)):
                continue
            head = agent_pb2.GetRulesReply(
                backend="nftables",
                family=_NFT_FAMILIES.get(one.family, 0),
                table=str(one),
                taken_at=nftables.taken_at,
                source=f"{nftables.source} {one}",
            )
            if isinstance(text, Unavailable):
                head.unavailable = text.reason
                yield head
            else:
                tests = nftables.tests.get(one, {})
                if chain:
                    whole = with_tests(text, one.family, one.name, tests)
                    yield from _chunks(head, cut_nftables(whole, chain))
                else:
                    size, tail = tests_tail(text, one.family, one.name, tests)
                    yield from _chunks(head, text, size)
                    if tail:
                        yield from _chunks(head, tail)


def _chunks(
    head: agent_pb2.GetRulesReply, text: bytes, size: int | None = None
) -> Iterator[agent_pb2.GetRulesReply]:
    """`text`, or its first `size` bytes.  At least one message, so that a rule set without rules is
    there too."""
    end = len(text) if size is None else size
    for start in range(0, max(end, 1), _CHUNK):
        message = agent_pb2.GetRulesReply()
        message.CopyFrom(head)
        message.text = text[start : min(start + _CHUNK, end)]
        yield message
