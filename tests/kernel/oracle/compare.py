"""The kernel's story of one packet against the simulator's walk of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from gketrace.conntrack import ConntrackEntry, CtStatus
from gketrace.packet import Packet, Tuple5
from gketrace.snapshot import ConntrackView, Unavailable
from gketrace.trace import Disposition, Flow, Hook, Leaf, Source, StepAction, StepKind, Walk
from tests.kernel.oracle.bed import TRACE_TABLE
from tests.kernel.oracle.inject import Seen, parse
from tests.kernel.oracle.tracing import Story

__all__ = ["Judgement", "Observed", "RuleId", "Verdict", "judge", "observe_story"]

RuleId = tuple[str, str, int]
"""(table, chain, 1-based position)."""


class Verdict(Enum):
    """What comparing the two gave."""

    AGREE = "agreement"
    DISAGREE = "disagreement"
    UNKNOWN = "unknown"
    """The simulator said that it does not know, and nothing that it did say was wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What the kernel did with one packet."""

    nft: tuple[RuleId, ...]
    """Rules that matched, in order, of nftables and iptables-nft."""
    legacy: tuple[RuleId, ...]
    """Rules that matched, in order, of legacy iptables."""
    end: str
    """``local``, ``sent`` or ``gone`` (dropped by a rule, or stopped by routing)."""
    seen: Seen | None
    """The packet as it left; None when it did not."""
    interface: str
    mark: int

    def __str__(self) -> str:
        rules = " ".join(f"{t}:{c}:{n}" for t, c, n in (*self.nft, *self.legacy))
        return f"{rules} => {self.end} {self.seen} {self.interface} mark {self.mark:#x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    verdict: Verdict
    reason: str = ""
    rules: tuple[RuleId, ...] = ()
    """The rules at which the two part, the simulator's first."""
    leaf: Leaf | None = None
    """The simulator's branch that the kernel took."""


def observe_story(
    story: Story,
    handles: Mapping[tuple[str, str, int], int],
    rule_count: Mapping[tuple[str, str], int],
    links: Mapping[int, str],
) -> Observed:
    """The kernel's events as rule positions and an end.

    `rule_count`: legacy (table, chain) → number of rules; a ``return:N`` or ``policy:N`` past it is
    the implicit end of the chain, not a rule.
    """
    nft: list[RuleId] = []
    legacy: list[RuleId] = []
    end, seen, interface, mark = "gone", None, "", 0
    for event in story.events:
        if event.backend == "legacy":
            if event.number <= rule_count.get((event.table, event.chain), 0):
                legacy.append((event.table, event.chain, event.number))
            continue
        if event.table == TRACE_TABLE:
            if event.chain.startswith("last-") and event.header:
                end = "local" if event.chain == "last-input" else "sent"
                seen, mark = parse(event.header), event.mark
                interface = links.get(event.oif or event.iif, "")
            elif event.chain.startswith("first-") and event.kind == "rule":
                end, seen = "gone", None
            continue
        if event.kind == "rule" and event.number:
            position = handles.get((event.table, event.chain, event.number), -1)
            nft.append((event.table, event.chain, position))
    return Observed(
        nft=tuple(nft), legacy=tuple(legacy), end=end, seen=seen, interface=interface, mark=mark
    )


_LOCAL = frozenset({Disposition.DELIVERED, Disposition.REFUSED})


def _predicted_rules(leaf: Leaf) -> tuple[tuple[RuleId, ...], tuple[RuleId, ...]]:
    nft: list[RuleId] = []
    legacy: list[RuleId] = []
    for branch in leaf.branches:
        for step in branch.steps:
            cited = step.citation
            if step.kind is not StepKind.RULE or cited is None or cited.source is not Source.RULE:
                continue
            table = cited.table.split()[-1]
            into = legacy if cited.backend == "iptables-legacy" else nft
            into.append((table, cited.chain, cited.position))
    return tuple(nft), tuple(legacy)


def _end_of(leaf: Leaf) -> str:
    disposition = leaf.outcome.disposition
    if _lost_when_confirmed(leaf):
        # That is behind all rules, and the last hook that is traced.
        return "local" if leaf.branches[-1].steps[-1].hook is Hook.INPUT else "sent"
    last = next((s for b in reversed(leaf.branches) for s in reversed(b.steps)), None)
    if disposition in _LOCAL or (last is not None and last.kind is StepKind.SOCKET):
        # An UNKNOWN at the socket is past all rules: the packet has come in.
        return "local"
    if disposition in (Disposition.TRANSMITTED, Disposition.NO_NEIGHBOUR):
        return "sent"
    return "gone"


def _lost_when_confirmed(leaf: Leaf) -> bool:
    cited = leaf.outcome.citation
    return cited is not None and cited.text == "__nf_conntrack_confirm"


def _packet_differs(packet: Packet, seen: Seen, mark: int) -> str:
    pairs = (
        ("src", str(packet.src), seen.src),
        ("dst", str(packet.dst), seen.dst),
        ("protocol", packet.protocol, seen.protocol),
        ("tos", packet.dscp << 2 | packet.ecn, seen.tos),
        ("mark", packet.mark, mark),
    )
    wrong = [f"{name} {mine} but kernel {its}" for name, mine, its in pairs if mine != its]
    may_be_unknown = (
        ("sport", packet.sport if packet.has_ports else None, seen.sport),
        ("dport", packet.dport if packet.has_ports else None, seen.dport),
        ("ttl", packet.ttl, seen.ttl),
    )
    wrong += [
        f"{name} {mine} but kernel {its}"
        for name, mine, its in may_be_unknown
        if mine is not None and mine != its
    ]
    return ", ".join(wrong)


def _tuple_differs(mine: Tuple5, its: Tuple5) -> bool:
    if (mine.src, mine.dst, mine.protocol) != (its.src, its.dst, its.protocol):
        return True
    return any(
        a is not None and a != b for a, b in ((mine.sport, its.sport), (mine.dport, its.dport))
    )


_NAT_BITS = CtStatus.SRC_NAT | CtStatus.DST_NAT


def _flow_differs(flow: Flow, conntrack: ConntrackView, *, mark: bool) -> str:
    found = conntrack.lookup(flow.entry.orig, flow.entry.zone)
    if isinstance(found, Unavailable):
        return f"conntrack unavailable: {found.reason}"
    if found is None:
        return f"no conntrack entry for {flow.entry.orig}"
    if _tuple_differs(flow.entry.reply, found.reply):
        return f"conntrack reply {flow.entry.reply} but kernel {found.reply}"
    if mark and (flow.entry.mark or 0) != (found.mark or 0):
        return f"ct mark {flow.entry.mark} but kernel {found.mark}"
    if flow.entry.status & _NAT_BITS != found.status & _NAT_BITS:
        return f"ct status {flow.entry.status:#x} but kernel {found.status:#x}"
    return ""


def _is_kept(leaf: Leaf, conntrack: ConntrackView) -> bool:
    """Whether the connection that the leaf's packet opens has got its entry."""
    first = leaf.branches[0].steps[0].before.tuple5
    return isinstance(conntrack.lookup(first), ConntrackEntry)


def _tracked(flow: Flow) -> bool:
    """An entry that the walk says the kernel would make, in the zone in which it is looked up."""
    entry = flow.entry
    return flow.assumed and not entry.status & CtStatus.UNTRACKED and not entry.zone


def _undecided(leaf: Leaf) -> frozenset[RuleId]:
    """The rules that it says it cannot decide, and that change nothing either way."""
    return frozenset(
        (step.citation.table.split()[-1], step.citation.chain, step.citation.position)
        for branch in leaf.branches
        for step in branch.steps
        if step.action is StepAction.UNKNOWN
        and step.citation is not None
        and step.citation.source is Source.RULE
    )


def _leaf_differs(
    leaf: Leaf, seen: Observed, masters: Mapping[str, str], open_rules: frozenset[RuleId]
) -> str:
    open_rules |= _undecided(leaf)
    nft, legacy = (
        tuple(rule for rule in rules if rule not in open_rules) for rules in _predicted_rules(leaf)
    )
    for name, mine, all_its in (("nft", nft, seen.nft), ("legacy", legacy, seen.legacy)):
        its = tuple(rule for rule in all_its if rule not in open_rules)
        if mine != its and not (leaf.chance is None and _is_part_of(mine, its)):
            return f"{name} rules {_first_difference(mine, its)}"
    unresolved = leaf.outcome.disposition is Disposition.NO_NEIGHBOUR and seen.end == "gone"
    if _end_of(leaf) != seen.end and not unresolved:
        return (
            f"ends {leaf.outcome.disposition.value} ({leaf.outcome.detail}) but kernel {seen.end}"
        )
    if seen.seen is None:
        return ""
    out = leaf.outcome.interface
    left = leaf.outcome.disposition is Disposition.TRANSMITTED
    if seen.end == "sent" and left and seen.interface != masters.get(out, out):
        return f"leaves by {leaf.outcome.interface} but kernel {seen.interface}"
    return _packet_differs(leaf.outcome.packet, seen.seen, seen.mark)


def _is_part_of(mine: Sequence[RuleId], its: Sequence[RuleId]) -> bool:
    """Whether the walk's rules all stand in the kernel's, in order.

    Where a rule cannot be decided and either way leads to the same, the walk goes on once and does
    not say which rules were passed on the way.
    """
    rest = iter(its)
    return all(rule in rest for rule in mine)


def _parting(mine: Sequence[RuleId], its: Sequence[RuleId]) -> int:
    at = next((i for i, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b), None)
    return min(len(mine), len(its)) if at is None else at


def _first_difference(mine: Sequence[RuleId], its: Sequence[RuleId]) -> str:
    at = _parting(mine, its)
    show = [":".join(map(str, rules[at])) if at < len(rules) else "-" for rules in (mine, its)]
    return f"at {at}: {show[0]} but kernel {show[1]}"


def _unknown_fits(leaf: Leaf, seen: Observed, open_rules: frozenset[RuleId]) -> bool:
    """An UNKNOWN leaf whose rules, all but the last, begin the kernel's."""
    if leaf.outcome.disposition is not Disposition.UNKNOWN:
        return False
    for mine, its in zip(_predicted_rules(leaf), (seen.nft, seen.legacy), strict=True):
        known = [rule for rule in mine[:-1] if rule not in open_rules]
        if known != [rule for rule in its if rule not in open_rules][: len(known)]:
            return False
    return True


def judge(
    walk: Walk,
    seen: Observed,
    conntrack: ConntrackView | None,
    masters: Mapping[str, str],
    open_rules: frozenset[RuleId] = frozenset(),
) -> Judgement:
    """Does some branch of the walk tell the kernel's story?  `conntrack` checks its flows too.

    `masters`: bridge port → bridge; the kernel's trace names the bridge, the walk the port.
    `open_rules`: those that no simulator can decide (a rate limit, say): where they change nothing
    the walk leaves them out, so they are left out of both.
    """
    reasons: list[tuple[int, str, tuple[RuleId, ...]]] = []
    unknown = False
    for leaf in walk.leaves():
        reason = _leaf_differs(leaf, seen, masters, open_rules)
        # A RST from the node's own stack takes the entry away again at once.
        lasting = seen.end == "sent" or leaf.outcome.disposition is Disposition.DELIVERED
        if not reason and lasting and conntrack is not None:
            # The node's own answer to what it takes in runs through the rules too, and may mark
            # the connection again.
            mark = seen.end == "sent"
            tracked = (flow for flow in leaf.flows if _tracked(flow))
            reason = "; ".join(
                filter(None, (_flow_differs(flow, conntrack, mark=mark) for flow in tracked))
            )
            if not reason and _lost_when_confirmed(leaf) and _is_kept(leaf, conntrack):
                reason = "lost when it is confirmed, but the kernel has its entry"
        if not reason:
            if leaf.chance is not None and leaf.chance <= 0:
                return Judgement(verdict=Verdict.DISAGREE, reason="chance is 0", leaf=leaf)
            return Judgement(verdict=Verdict.AGREE, leaf=leaf)
        unknown = unknown or _unknown_fits(leaf, seen, open_rules)
        nft, legacy = _predicted_rules(leaf)
        common = sum(a == b for a, b in zip(nft, seen.nft, strict=False))
        common += sum(a == b for a, b in zip(legacy, seen.legacy, strict=False))
        parted = [
            rules[at]
            for mine, its in ((nft, seen.nft), (legacy, seen.legacy))
            if mine != its
            for at in (_parting(mine, its),)
            for rules in (mine, its)
            if at < len(rules)
        ]
        reasons.append((common, reason, tuple(parted)))
    if unknown:
        return Judgement(verdict=Verdict.UNKNOWN, reason="the simulator does not know")
    best = max(reasons, default=(0, "the walk has no leaves", ()))
    return Judgement(verdict=Verdict.DISAGREE, reason=best[1], rules=best[2])
