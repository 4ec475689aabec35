"""Random rule sets, restored one after the other into one test bed."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

from tests.kernel.oracle.bed import Bed
from tests.kernel.oracle.fixed_sets import FIXED, FixedSet
from tests.kernel.oracle.generate import HOOKS, IPSETS, NFACCT, Generator, probe_kernel
from tests.kernel.oracle.generate_nft import TABLE, NftGenerator
from tests.kernel.oracle.nft_load import is_rule, probe_nft, restore
from tests.kernel.oracle.record import Record
from tests.kernel.oracle.run import Tally, rig, run_cases
from tests.kernel.oracle.view import WalkFunction

__all__ = ["PER_SET", "RandomRun"]

PER_SET = 50
"""Cases sent through one rule set."""


@dataclass(slots=True, kw_only=True)
class RandomRun:
    """Figures of a run over random rule sets."""

    seed: int
    walk: WalkFunction
    tally: Tally = field(default_factory=Tally)
    coverage: Counter[str] = field(default_factory=Counter)
    """How often each match and target stands in a rule set that was sent packets."""
    absent: frozenset[str] = frozenset()
    absent_nft: frozenset[str] = frozenset()
    sets: int = 0
    records: list[Record] | None = None
    refused: int = 0
    """Rule sets that iptables-restore refused: they are counted, not judged."""
    nft_rules: int = 0
    """Single rules that were made for nft."""
    refused_rules: int = 0
    """Of them those that nft refused: they were left out."""

    def run(self, count: int) -> None:
        """`count` cases, in turns through all backends and both families."""
        with Bed() as bed:
            prepare(bed)
            self.absent = probe_kernel(bed)
            self.absent_nft = probe_nft(bed)
            for chosen in FIXED:
                self._fixed(bed, chosen, min(chosen.cases, count - self.tally.cases))
            for number in itertools.count():
                if self.tally.cases >= count:
                    return
                backend = ("nft", "legacy", "nftables")[number % 3]
                family = (4, 6)[number // 3 % 2]
                share = min(PER_SET, count - self.tally.cases)
                if backend == "nftables":
                    self._nftables(bed, number, family, share)
                else:
                    self._one(bed, number, backend, family, share)

    def _fixed(self, bed: Bed, chosen: FixedSet, share: int) -> None:
        """A set that is not random: chance alone reaches some things too seldom."""
        maker = Generator(
            rng=random.Random(f"{self.seed}/{chosen.name}"),
            family=4,
            backend="nft",
            absent=self.absent,
            mac=bed.peer_mac("eth0"),
        )
        bed.command(chosen.load, text=chosen.text)
        try:
            with rig(bed, self.walk, legacy=False, records=self.records) as machine:
                name = f"{chosen.name} {self.seed}"
                self.tally.add(run_cases(machine, name, maker.cases(bed), share))
        finally:
            if chosen.table:
                bed.command(["nft", "delete", "table", *chosen.table.split()])
                bed.command(["conntrack", "-F"])
            else:
                clean(bed, "iptables-nft-restore")

    def _one(self, bed: Bed, number: int, backend: str, family: int, share: int) -> None:
        maker = Generator(
            rng=random.Random(f"{self.seed}/{number}"),
            family=family,
            backend=backend,
            absent=self.absent,
            mac=bed.peer_mac("eth0"),
        )
        tool = f"{'ip' if family == 4 else 'ip6'}tables-{backend}-restore"
        try:
            bed.command([tool], text=maker.ruleset())
        except RuntimeError:
            # Tables before the one that was refused are in place.
            clean(bed, tool)
            self.refused += 1
            return
        try:
            with rig(bed, self.walk, legacy=backend == "legacy", records=self.records) as machine:
                name = f"random {self.seed}/{number} {backend} IPv{family}"
                self.tally.add(run_cases(machine, name, maker.cases(bed), share))
        finally:
            clean(bed, tool)
        self.sets += 1
        self.coverage.update(maker.coverage)

    def _nftables(self, bed: Bed, number: int, family: int, share: int) -> None:
        """One table of nftables' own; now and then iptables' rules of either backend beside it."""
        rng = random.Random(f"{self.seed}/{number}")
        mac = bed.peer_mac("eth0")
        maker = NftGenerator(rng=rng, family=family, absent=self.absent_nft, mac=mac)
        lines = maker.lines()
        self.nft_rules += sum(map(is_rule, lines))
        self.refused_rules += len(restore(bed, lines))
        try:
            bed.command(["nft", "-j", "list", "table", maker.table_family, TABLE])
        except RuntimeError:
            # nft 1.0.6 dies of an assertion over some rules that it took a moment before.
            bed.command(["nft", "delete", "table", maker.table_family, TABLE])
            self.refused += 1
            return
        beside = rng.choice(("", "", "nft", "legacy"))
        tool = f"{'ip' if family == 4 else 'ip6'}tables-{beside}-restore" if beside else ""
        try:
            if beside:
                other = Generator(
                    rng=rng, family=family, backend=beside, absent=self.absent, mac=mac
                )
                try:
                    bed.command([tool], text=other.ruleset())
                    self.coverage.update(other.coverage)
                except RuntimeError:
                    self.refused += 1
            with rig(bed, self.walk, legacy=beside == "legacy", records=self.records) as machine:
                name = (
                    f"random {self.seed}/{number} nftables{beside and ' and '}{beside} IPv{family}"
                )
                self.tally.add(run_cases(machine, name, maker.cases(bed), share))
        finally:
            bed.command(["nft", "delete", "table", maker.table_family, TABLE])
            if tool:
                clean(bed, tool)
            bed.command(["conntrack", "-F"])
        self.sets += 1
        self.coverage.update(maker.coverage)


def prepare(bed: Bed) -> None:
    """The objects that rules name: sets and an accounting object."""
    bed.command(["nfacct", "add", NFACCT])
    for name, (kind, elements) in IPSETS.items():
        bed.command(["ipset", "create", name, *kind.split()])
        for element in elements:
            bed.command(["ipset", "add", name, *element.split()])


def clean(bed: Bed, tool: str) -> None:
    """Empties all tables, and connection tracking."""
    text = ""
    for table, hooks in HOOKS.items():
        policies = "".join(f":{hook} ACCEPT [0:0]\n" for hook in hooks)
        text += f"*{table}\n{policies}COMMIT\n"
    bed.command([tool], text=text)
    bed.command(["conntrack", "-F"])
