"""nftables rules that are not iptables', as ``nft -j list table`` prints them.

Source: kernel net/netfilter/nf_tables_api.c; nftables src/json.c.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gketrace.errors import GketraceError, ParseError
from gketrace.ruleset import Ruleset
from gketrace.ruleset.nft_json import parse_nft_json
from gketrace.snapshot import Maybe, Unavailable
from gketrace_agent.kernel.netlink import NetlinkSocket
from gketrace_agent.kernel.nfnetlink import NftTable
from gketrace_agent.kernel.nft_tests import FAMILIES, NftTests, nft_tests
from gketrace_agent.kernel.process import Child, collect, find_program, start
from gketrace_agent.observe.iptables_dump import Programs, is_iptables

__all__ = ["NftablesDump", "NftablesReading", "start_nftables"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NftablesDump:
    """The tables that nftables itself made; iptables-nft's are not among them."""

    tables: tuple[tuple[NftTable, Maybe[bytes]], ...]
    """Each table's JSON, as nft printed it."""
    generation: int
    """nf_tables' generation when the reading began."""
    source: str
    """The command, without the table."""
    taken_at: float
    """Seconds since the epoch."""
    tests: Mapping[NftTable, NftTests] = field(default_factory=dict)
    """What nft may have left out, of the tables that are simulated."""
    _made: list[Maybe[Ruleset]] = field(default_factory=list, init=False, repr=False, compare=False)

    def rulesets(self) -> tuple[Maybe[Ruleset], ...]:
        """Every table's rule set, and an `Unavailable` for each that exists and could not be read.

        Indexed once, however many calls share the dump.
        """
        if not self._made:
            for table, text in self.tables:
                self._made.extend(self._read(table, text))
        return tuple(self._made)

    def _read(self, table: NftTable, text: Maybe[bytes]) -> Iterator[Maybe[Ruleset]]:
        if isinstance(text, Unavailable):
            yield Unavailable(reason=f"nftables table {table}: {text.reason}")
            return
        try:
            tables = parse_nft_json(
                text,
                source=f"{self.source} {table}",
                taken_at=self.taken_at,
                tests=self.tests.get(table, {}),
            )
        except ParseError as error:
            yield Unavailable(reason=f"nftables table {table}: {error}")
            return
        yield from tables.rulesets
        for why in tables.unmodelled:
            yield Unavailable(reason=why)


class NftablesReading:
    """Dumps under way; `finish` or `abandon` them."""

    def __init__(
        self,
        programs: Programs,
        netfilter: NetlinkSocket,
        tables: Sequence[NftTable],
        generation: int,
    ) -> None:
        self._programs = programs
        self._netfilter = netfilter
        self._tables = tuple(t for t in tables if not is_iptables(t))
        self._generation = generation
        self._taken_at = time.time()
        self._children: list[Child] = []
        self._why = ""
        program = find_program(*programs.nft) if self._tables else None
        self._command = (program or programs.nft[0], "-j", "list", "table")
        if self._tables and program is None:
            self._why = f"none of {', '.join(programs.nft)} is installed"
            return
        try:
            for table in self._tables:
                argv = (*self._command, table.family, table.name)
                self._children.append(start(argv, limit=programs.limit))
        except GketraceError as error:
            self.abandon()
            self._why = str(error)

    def abandon(self) -> None:
        """Kills what is under way."""
        for child in self._children:
            child.kill()
        self._children = []

    def finish(self) -> NftablesDump | None:
        """None: there are no such tables."""
        if not self._tables:
            return None
        texts: list[Maybe[bytes]]
        # While nft is at work.
        tests = {
            table: nft_tests(self._netfilter, table)
            for table in self._tables
            if table.family in FAMILIES
        }
        if self._why:
            texts = [Unavailable(reason=self._why) for _ in self._tables]
        else:
            texts = []
            for result in collect(self._children, timeout=self._programs.timeout):
                if isinstance(result, GketraceError):
                    texts.append(Unavailable(reason=str(result)))
                elif not result.ok or not result.stdout or result.stdout.isspace():
                    texts.append(Unavailable(reason=result.failure()))
                else:
                    texts.append(result.stdout)
        return NftablesDump(
            tables=tuple(zip(self._tables, texts, strict=True)),
            tests=tests,
            generation=self._generation,
            source=" ".join(self._command),
            taken_at=self._taken_at,
        )


def start_nftables(
    programs: Programs, netfilter: NetlinkSocket, tables: Sequence[NftTable], generation: int
) -> NftablesReading:
    """Starts nft for each of `tables` that iptables-nft does not own, inside the namespace."""
    return NftablesReading(programs, netfilter, tables, generation)
