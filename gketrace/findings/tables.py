"""Connection tracking as a whole: room, losses, ports, and what it calls INVALID."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from gketrace.conntrack import ConntrackEntry
from gketrace.findings.making import at, cited, finding, rules_like, sysctl
from gketrace.findings.model import Confidence, Evidence, Finding, Severity, evidence
from gketrace.findings.world import Sight, TableState, World
from gketrace.packet import IPAddress, protocol_name
from gketrace.ruleset.iptables import IptablesRuleset
from gketrace.ruleset.nft import NftRuleset
from gketrace.snapshot import Unavailable
from gketrace.trace import Citation, Source

__all__ = ["STATS", "invalid", "losses", "ports", "room"]

_NEARLY: Final = 0.9
_INVALID: Final = 100
"""Packets that a rule dropped as INVALID since it was loaded; a few are usual: late segments."""
_RANGE: Final = (1024, 65535)
"""Where masquerading looks for a port, for clients' ports above 1023 (nf_nat_l4proto_unique_tuple,
net/netfilter/nf_nat_core.c)."""
_SCARCE: Final = 0.8
_TO_PORTS: Final = re.compile(r"-j (?:MASQUERADE --to-ports|SNAT --to-source \S+:)\s?(\d+)-(\d+)")
_RANGED: Final = re.compile(rb"-j (?:MASQUERADE --to-ports|SNAT --to-source \S+:)\s?\d+-\d+")
STATS: Final = "/proc/net/stat/nf_conntrack"


def room(world: World) -> Iterator[Finding]:
    """GKT-204 and GKT-205."""
    for sight in world.sights.values():
        table = sight.table_later if isinstance(sight.table, Unavailable) else sight.table
        if isinstance(table, Unavailable) or not table.limit:
            continue
        share = table.entries / table.limit
        dropped = _rose(sight, "drop") + _rose(sight, "early_drop")
        if share < _NEARLY:
            continue
        full = table.entries >= table.limit or (dropped > 0 and share > 0.95)
        said = "is full" if full else f"is {share:.0%} full"
        proof = [
            evidence(Source.SYSCTL, f"net.netfilter.nf_conntrack_count = {table.entries}",
                     node=sight.node),
            evidence(Source.SYSCTL, f"net.netfilter.nf_conntrack_max = {table.limit}",
                     node=sight.node),
        ]  # fmt: skip
        for name in ("drop", "early_drop"):
            if table.counters.get(name):
                proof.append(_counter(sight, table, name))
        yield finding(
            "GKT-205" if full else "GKT-204",
            f"The connection-tracking table of node {sight.node} {said}: {table.entries} of "
            f"{table.limit} entries" + ("; new connections are dropped" if full else ""),
            proof,
            remedy="raise the limit, and find what opens so many connections",
            command=at(
                f"sysctl -w net.netfilter.nf_conntrack_max={max(131072, 2 * table.limit)}",
                sight.node,
            ),
            subjects=[f"node {sight.node}"],
            nodes=[sight.node],
        )


def _rose(sight: Sight, name: str) -> int:
    if isinstance(sight.table, Unavailable) or isinstance(sight.table_later, Unavailable):
        return 0
    return sight.table_later.counters.get(name, 0) - sight.table.counters.get(name, 0)


def _counter(sight: Sight, table: TableState, name: str) -> Evidence:
    rose = _rose(sight, name)
    text = f"{STATS}: {name} {table.counters.get(name, 0)}"
    return evidence(
        Source.KERNEL, text, node=sight.node, note=f"rose by {rose} meanwhile" if rose else ""
    )


def losses(world: World) -> Iterator[Finding]:
    """GKT-206: two connections wanted one tuple; the packet of the second one is lost."""
    for sight in world.sights.values():
        table = sight.table
        if isinstance(table, Unavailable):
            continue
        failed, rose = table.counters.get("insert_failed", 0), _rose(sight, "insert_failed")
        if rose <= 0:
            continue  # what was lost at some time since the node started says nothing of now
        yield finding(
            "GKT-206",
            f"On node {sight.node} {rose} packets were lost just now as their entry could not be "
            f"inserted, and {failed} before since the node started",
            [_counter(sight, table, "insert_failed")],
            remedy="let MASQUERADE pick ports with --random-fully; for DNS, send A and AAAA from "
            "two sockets (single-request-reopen) or use NodeLocal DNS",
            command=f"gketrace conntrack --node {sight.node} --stats",
            subjects=[f"node {sight.node}"],
            nodes=[sight.node],
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """What one port can be used for once: the tuple without it."""

    protocol: int
    source: IPAddress
    target: IPAddress
    port: int | None

    def __str__(self) -> str:
        return f"{self.target}:{self.port}/{protocol_name(self.protocol)}"


def ports(world: World) -> Iterator[Finding]:
    """GKT-207: towards one destination, each translated connection needs a port of its own."""
    for sight in world.sights.values():
        if isinstance(sight.entries, Unavailable):
            continue
        used: dict[_Place, set[int]] = {}
        sample: dict[_Place, ConntrackEntry] = {}
        for entry in sight.entries:
            back = entry.reply
            if entry.src_nat and back.dport is not None:
                place = _Place(back.protocol, back.dst, back.src, back.sport)
                used.setdefault(place, set()).add(back.dport)
                sample.setdefault(place, entry)
        narrow = _narrow(sight)
        for place, taken in used.items():
            first, last = _RANGE
            rule: Evidence | None = None
            for (low, high), proof in narrow:
                if all(low <= port <= high for port in taken):
                    first, last, rule = low, high, proof
            size = last - first + 1
            if len(taken) < _SCARCE * size:
                continue
            yield finding(
                "GKT-207",
                f"Node {sight.node} uses {len(taken)} of {size} ports of {place.source} towards "
                f"{place}: soon no further connection can be translated",
                [
                    *([rule] if rule is not None else []),
                    evidence(
                        Source.CONNTRACK,
                        str(sample[place]),
                        node=sight.node,
                        note=f"one of {len(taken)} entries",
                    ),
                ],
                remedy="use fewer connections to that place, more source addresses, or a wider "
                "range of ports",
                command=f"gketrace conntrack --node {sight.node} --reply-src {place.target}",
                subjects=[f"node {sight.node}"],
                nodes=[sight.node],
                cause=f"ports {sight.node} {place}",
                severity=Severity.ERROR if len(taken) >= size else None,
            )


def _narrow(sight: Sight) -> list[tuple[tuple[int, int], Evidence]]:
    """Rules that translate to a range of ports of their own."""
    found = []
    for one in sight.host.rulesets:
        if isinstance(one, IptablesRuleset):
            for rule in rules_like(one, _RANGED):
                match = _TO_PORTS.search(rule.text)
                if match:
                    pair = (int(match[1]), int(match[2]))
                    found.append((pair, cited(rule.citation, sight.node)))
    return found


def invalid(world: World) -> Iterator[Finding]:
    """GKT-209: by the counter of the rule that drops them."""
    for sight in world.sights.values():
        for citation in _invalid_rules(sight):
            count = citation.packets or 0
            rose = _rose(sight, "invalid")
            if count < _INVALID:
                continue
            proof = [cited(citation, sight.node)]
            if not isinstance(sight.table, Unavailable) and sight.table.counters.get("invalid"):
                proof.append(_counter(sight, sight.table, "invalid"))
            if not isinstance(sight.host.sysctls, Unavailable):
                name = "net.netfilter.nf_conntrack_tcp_be_liberal"
                if name in sight.host.sysctls:
                    proof.append(sysctl(sight.host, name, sight.host.sysctls[name]))
            yield finding(
                "GKT-209",
                f"Node {sight.node} dropped {count} packets as INVALID: they belong to no "
                "connection that it knows, or are out of its window"
                + (f"; {rose} more just now" if rose else ""),
                proof,
                remedy="look for answers that come by another way, or for a sender that reorders",
                command=f"gketrace conntrack --node {sight.node} --stats",
                subjects=[f"node {sight.node}"],
                nodes=[sight.node],
                cause=f"invalid {sight.node}",
                confidence=Confidence.LIKELY,
            )


def _invalid_rules(sight: Sight) -> Iterator[Citation]:
    for one in sight.host.rulesets:
        if isinstance(one, IptablesRuleset):
            for name in ("KUBE-FORWARD", "FORWARD", "INPUT"):
                for rule in one.chain("filter", name) or ():
                    if "INVALID" in rule.text and "-j DROP" in rule.text:
                        yield rule.citation
        elif isinstance(one, NftRuleset):
            for name in one.chain_names:
                if "forward" in name or "invalid" in name:
                    for nft_rule in one.chain(name) or ():
                        if "invalid" in nft_rule.text and "drop" in nft_rule.text:
                            yield nft_rule.citation
