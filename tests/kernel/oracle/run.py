"""Runs cases through the kernel and the simulator, batch by batch, and counts."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_address

from gketrace.packet import Protocol, TcpFlags, Tuple5
from gketrace.ruleset import Ruleset
from gketrace.ruleset.iptables import IptablesRuleset
from gketrace.ruleset.nft import NftRuleset
from gketrace.simulate.query import WalkQuery
from gketrace.snapshot import ConntrackView, NetnsSnapshot, Unavailable
from gketrace.trace import Ingress, Leaf, NetnsRef, StepKind, Walk
from gketrace_agent.kernel.netns import open_path
from gketrace_agent.observe.snapshot import Namespace, Observer
from tests.kernel.oracle.bed import TRACE_TABLE, Bed
from tests.kernel.oracle.compare import Judgement, Observed, RuleId, Verdict, judge, observe_story
from tests.kernel.oracle.fixtures import Case
from tests.kernel.oracle.generate_nft_conditions import NFT_OPEN
from tests.kernel.oracle.inject import build
from tests.kernel.oracle.record import Record, Remembered
from tests.kernel.oracle.tracing import Story, gather, own_keys
from tests.kernel.oracle.view import DutView, WalkFunction

__all__ = ["Disagreement", "Rig", "Tally", "rig", "run_cases"]

BATCH = 48
LEGACY_BATCH = 16
"""Smaller: the kernel log is a ring of a few hundred KiB."""
_QUIET, _PATIENCE = 0.02, 0.3
"""Seconds without an event after which a batch, or a case that is told again alone, is over.  Where
the processors are busy a packet may wait for ksoftirqd."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """One case on which the simulator was wrong, with all that is needed to look into it."""

    world: str
    case: Case
    reason: str
    kernel: str
    simulator: tuple[str, ...]
    rules: tuple[str, ...] = ()
    """Text of the rules at which the two part."""

    def __str__(self) -> str:
        lines = [
            f"{self.world}: {self.case.label}",
            f"  packet    {self.case.packet} flags {self.case.packet.tcp_flags:#x} "
            f"via {self.case.ingress or 'local'}",
            f"  differs   {self.reason}",
            *(f"  rule      {rule}" for rule in self.rules),
            f"  kernel    {self.kernel}",
        ]
        lines += [f"  simulator {leaf}" for leaf in self.simulator]
        return "\n".join(lines)


@dataclass(slots=True, kw_only=True)
class Tally:
    """Figures of a run."""

    cases: int = 0
    agreements: int = 0
    unknown: int = 0
    disagreements: list[Disagreement] = field(default_factory=list)
    unknowns: list[Disagreement] = field(default_factory=list)
    """The first of each reason."""
    ends: Counter[str] = field(default_factory=Counter)
    """What became of the packets: ``local``, ``sent``, ``gone``."""
    lost: int = 0
    """Packets of which the kernel told nothing, in spite of a second try."""

    def add(self, other: Tally) -> None:
        self.cases += other.cases
        self.agreements += other.agreements
        self.unknown += other.unknown
        self.disagreements += other.disagreements
        self.unknowns += other.unknowns
        self.ends.update(other.ends)
        self.lost += other.lost


@dataclass(slots=True, kw_only=True)
class Rig:
    """A bed with rules in it, and what the simulator knows of it."""

    bed: Bed
    view: DutView
    conntrack: ConntrackView
    handles: dict[str, dict[tuple[str, str, int], int]]
    rule_count: dict[str, dict[tuple[str, str], int]]
    links: dict[int, str]
    masters: dict[str, str]
    """Bridge port → its bridge."""
    rules: dict[tuple[int, str, str, int], str]
    """(family, table, chain, position) → text."""
    open_rules: dict[int, frozenset[RuleId]]
    """Family → the rules that no simulator can decide."""
    legacy: bool
    walk: WalkFunction
    observe: Callable[[frozenset[str]], NetnsSnapshot]
    """Observes some nouns of the namespace under test again."""
    records: list[Record] | None = None
    """Where to keep what kernel and simulator agreed on; None: nowhere."""
    keys: Iterator[int] = field(default_factory=lambda: itertools.cycle(own_keys()))

    def refresh(self) -> None:
        """Reads again what packets change: lists of xt_recent, ipsets, nft sets."""
        shot = self.view.shot
        if shot.recent:
            shot = replace(shot, recent=self.observe(frozenset({"recent"})).recent)
        if shot.ipsets:
            shot = replace(shot, ipsets=self.observe(frozenset({"ipsets"})).ipsets)
        if any(isinstance(r, NftRuleset) and r.written_by_packets for r in shot.rulesets):
            seen = self.observe(frozenset({"rulesets"})).rulesets
            shot = replace(shot, rulesets=tuple(r for r in seen if not _is_trace_table(r)))
        self.view.shot = shot


def _is_trace_table(ruleset: Ruleset | Unavailable) -> bool:
    """The table that turns the trace on is none of the rules under test."""
    return isinstance(ruleset, NftRuleset) and ruleset.table.endswith(f" {TRACE_TABLE}")


@contextmanager
def rig(
    bed: Bed, walk: WalkFunction, *, legacy: bool, records: list[Record] | None = None
) -> Iterator[Rig]:
    """Observes the bed's namespace (rules must be in place), then turns the kernel's trace on."""
    handle = open_path(f"/run/netns/{bed.dut}")
    ref = NetnsRef(node=bed.node.name, inode=handle.inode)
    observer = Observer()
    try:
        with observer.observe(Namespace(ref=ref, handle=handle)) as seen:
            shot = seen.snapshot
            conntrack = shot.conntrack
            if isinstance(conntrack, Unavailable) or isinstance(shot.links, Unavailable):
                raise RuntimeError(f"the bed cannot be observed: {seen.failures}")
            bed.trace_table()

            def observe(nouns: frozenset[str]) -> NetnsSnapshot:
                with observer.observe(Namespace(ref=ref, handle=handle), only=nouns) as part:
                    return part.snapshot

            rules = _rules_of(shot)
            masters = {link.ifindex: link.name for link in shot.links if link.kind == "bridge"}
            yield Rig(
                bed=bed,
                observe=observe,
                rules=rules,
                open_rules={
                    family: frozenset(
                        key[1:]
                        for key, text in rules.items()
                        if key[0] == family and _is_open(key[1], text)
                    )
                    for family in (4, 6)
                },
                masters={
                    link.name: masters[link.master] for link in shot.links if link.master in masters
                },
                view=DutView(node=bed.node.name, shot=shot),
                conntrack=conntrack,
                handles={
                    family: bed.handles(family) | bed.handles("inet") for family in ("ip", "ip6")
                },
                rule_count={
                    "ip": _count_legacy(bed, "iptables-legacy-save") if legacy else {},
                    "ip6": _count_legacy(bed, "ip6tables-legacy-save") if legacy else {},
                },
                links={link.ifindex: link.name for link in shot.links},
                legacy=legacy,
                walk=walk,
                records=records,
            )
            bed.command(["nft", "delete", "table", "ip", "gktrace"])
            bed.command(["nft", "delete", "table", "ip6", "gktrace"])
    finally:
        handle.close()


def _count_legacy(bed: Bed, tool: str) -> dict[tuple[str, str], int]:
    """(table, chain) → number of rules, of what a legacy save command prints."""
    count: Counter[tuple[str, str]] = Counter()
    table = ""
    for line in bed.command([tool]).splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith("-A "):
            count[table, line.split()[1]] += 1
    return dict(count)


def run_cases(machine: Rig, world: str, cases: Iterable[Case], count: int) -> Tally:
    """Sends `count` of the cases, and later packets of the connections that they open."""
    tally = Tally()
    source = iter(cases)
    while tally.cases < count:
        size = LEGACY_BATCH if machine.legacy else BATCH
        batch = list(itertools.islice(source, min(size, count - tally.cases)))
        if not batch:
            break
        later = [case for wave in _waves(batch) for case in _run_batch(machine, world, wave, tally)]
        # The answers first: a second packet is judged by what connection tracking then knows.
        for more in (
            [case for case in later if case.label.startswith("later: answer")],
            [case for case in later if not case.label.startswith("later: answer")],
        ):
            for wave in _waves(more[: max(0, count - tally.cases)]):
                _run_batch(machine, world, wave, tally)
    return tally


def _waves(batch: list[Case]) -> Iterator[list[Case]]:
    """The batch in order, parted where a packet has the tuple of an earlier one (ICMP, GRE)."""
    wave: dict[Tuple5, Case] = {}
    for case in batch:
        if case.packet.tuple5 in wave:
            yield list(wave.values())
            wave = {}
        wave[case.packet.tuple5] = case
    if wave:
        yield list(wave.values())


def _run_batch(machine: Rig, world: str, batch: list[Case], tally: Tally) -> list[Case]:
    """Judges one batch; what disagrees is sent again alone, so that noise is told from fault.

    Returns the later packets to send.
    """
    later: list[Case] = []
    for case, judgement, seen, walk in _judge(machine, batch):
        if judgement.verdict is not Verdict.AGREE or seen is None:
            again = _fresh(case)
            case, judgement, seen, walk = _judge(machine, [again], quiet=_PATIENCE)[0]
        tally.cases += 1
        if seen is None:
            tally.lost += 1
            continue
        tally.ends[seen.end] += 1
        if judgement.verdict is Verdict.AGREE:
            tally.agreements += 1
            later += _later(machine, case, seen)
            continue
        story = Disagreement(
            world=world,
            case=case,
            reason=judgement.reason,
            kernel=str(seen),
            rules=tuple(
                f"{':'.join(map(str, rule))} {_rule_text(machine, case, rule)}"
                for rule in judgement.rules
            ),
            simulator=tuple(_leaf_text(leaf) for leaf in itertools.islice(walk.leaves(), 4)),
        )
        if judgement.verdict is Verdict.UNKNOWN:
            tally.unknown += 1
            tally.unknowns.append(story)
        else:
            tally.disagreements.append(story)
    return later


def _rule_text(machine: Rig, case: Case, rule: RuleId) -> str:
    return machine.rules.get((case.packet.family, *rule), "")


def _rules_of(shot: NetnsSnapshot) -> dict[tuple[int, str, str, int], str]:
    """(family, table, chain, position) → the rule as iptables-save prints it."""
    found: dict[tuple[int, str, str, int], str] = {}
    for ruleset in shot.rulesets:
        if isinstance(ruleset, NftRuleset):
            name = ruleset.table.split()[-1]
            for rule in (r for chain in ruleset.chain_names for r in ruleset.chain(chain) or ()):
                for family in (ruleset.family,) if ruleset.family else (4, 6):
                    found[family, name, rule.chain, rule.position] = rule.text
            continue
        if not isinstance(ruleset, IptablesRuleset):
            continue
        table = ""
        count: Counter[str] = Counter()
        for line in ruleset.text.decode().splitlines():
            if line.startswith("*"):
                table = line[1:]
                count.clear()
            elif " -A " in line:
                chain = line.split(" -A ", 1)[1].split()[0]
                count[chain] += 1
                found[ruleset.family, table, chain, count[chain]] = line
    return found


_OPEN = re.compile(r"-m (?:limit|hashlimit|u32|bpf|owner)\b|--mode nth")
"""Matches that rest on what no snapshot shows."""


def _is_open(table: str, text: str) -> bool:
    if "-A " not in text:
        return NFT_OPEN.search(text) is not None
    # In raw, connmark sees the mark of a template, which earlier packets may have set.
    return _OPEN.search(text) is not None or (table == "raw" and "-m connmark" in text)


def _fresh(case: Case) -> Case:
    """The same question as a new connection, where it is the first packet of one."""
    if not case.packet.has_ports or case.label.startswith("later"):
        return case
    return replace(case, packet=replace(case.packet, sport=random.randrange(1024, 65536)))


Judged = tuple[Case, Judgement, Observed | None, Walk]


def _judge(machine: Rig, batch: list[Case], *, quiet: float = _QUIET) -> list[Judged]:
    machine.refresh()
    host = machine.view.shot.netns
    queries = [
        WalkQuery(ingress=Ingress(netns=host, interface=c.ingress), packet=c.packet) for c in batch
    ]
    before = Remembered(machine.conntrack)
    shot = replace(machine.view.shot, conntrack=before)
    view = DutView(node=machine.view.node, shot=shot)
    walks = [machine.walk(view, query) for query in queries]
    keys = [(case.packet.family, next(machine.keys)) for case in batch]
    stories = {key: Story(key=key) for key in keys}
    if machine.legacy:
        machine.bed.log.read({})
    for case, key in zip(batch, keys, strict=True):
        try:
            machine.bed.send(case.ingress, build(case.packet, key[1]), mark=case.packet.mark)
        except OSError:
            # The kernel refuses it before any hook (no route, for instance): an empty story.
            continue
        if machine.legacy:
            machine.bed.log.read(stories)
    gather(
        stories,
        machine.bed.trace,
        machine.bed.log if machine.legacy else None,
        len(batch),
        time.monotonic() + 30,
        quiet,
    )
    judged: list[Judged] = []
    after = Remembered(machine.conntrack)
    kept = replace(shot, conntrack=before.closed())
    for case, key, query, walk in zip(batch, keys, queries, walks, strict=True):
        family = "ip" if case.packet.family == 4 else "ip6"
        seen = observe_story(
            stories[key], machine.handles[family], machine.rule_count[family], machine.links
        )
        told = bool(stories[key].events) or not case.ingress
        open_rules = machine.open_rules[case.packet.family]
        judgement = judge(walk, seen, after, machine.masters, open_rules)
        if machine.records is not None and told and judgement.verdict is Verdict.AGREE:
            machine.records.append(
                Record(
                    world=case.label,
                    query=query,
                    shot=kept,
                    seen=seen,
                    after=after.closed(),
                    masters=machine.masters,
                    open_rules=open_rules,
                )
            )
        judged.append((case, judgement, seen if told else None, walk))
    return judged


def _later(machine: Rig, case: Case, seen: Observed) -> list[Case]:
    """The answer to a packet that was sent on, and a second packet of its connection."""
    first = case.packet
    if case.label.startswith("later") or seen.end != "sent" or seen.seen is None:
        return []
    if first.protocol not in (Protocol.TCP, Protocol.UDP) or first.tcp_flags != TcpFlags.SYN:
        return []
    back = _ingress_of(machine, seen)
    if back is None:
        return []
    sent = replace(
        first, src=ip_address(seen.seen.src), dst=ip_address(seen.seen.dst), sport=seen.seen.sport,
        dport=seen.seen.dport,
    )  # fmt: skip
    answer = replace(sent.reply(), ttl=64, tcp_flags=TcpFlags.SYN | TcpFlags.ACK)
    if back.startswith("veth") and not machine.bed.node.reachable_from_pod(str(answer.dst)):
        return []
    return [
        Case(
            ingress=back,
            packet=replace(
                answer, length=len(build(answer, 1)), src_mac=machine.bed.peer_mac(back)
            ),
            label=f"later: answer to {case.label}",
        ),
        Case(
            ingress=case.ingress,
            packet=replace(first, tcp_flags=TcpFlags.ACK),
            label=f"later: second packet of {case.label}",
        ),
    ]


def _ingress_of(machine: Rig, seen: Observed) -> str | None:
    """The interface at which the receiver's answer comes in."""
    if seen.interface in ("eth0", "eth1"):
        return seen.interface
    assert seen.seen is not None
    for index, addresses in enumerate(machine.bed.node.pods):
        if seen.seen.dst in addresses:
            return f"veth{index}"
    return None


def _leaf_text(leaf: Leaf) -> str:
    rules = [
        f"{s.citation.table.split()[-1]}:{s.citation.chain}:{s.citation.position}"
        for b in leaf.branches
        for s in b.steps
        if s.kind is StepKind.RULE and s.citation is not None
    ]
    outcome = leaf.outcome
    ways = [
        f"{s.kind.value}/{s.interface}"
        for b in leaf.branches
        for s in b.steps
        if s.kind in (StepKind.ROUTE, StepKind.BRIDGE, StepKind.TRANSMIT)
    ]
    return (
        f"{' '.join(rules)} [{' '.join(ways)}] => {outcome.disposition.value} "
        f"{outcome.packet} {outcome.interface} "
        f"mark {outcome.packet.mark:#x} chance {leaf.chance} ({outcome.detail})"
    )
