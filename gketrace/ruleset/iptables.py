"""`IptablesRuleset`: an index over the text of iptables-save; chains are parsed when entered.

A node may hold half a million rules (54 MB of text) of which one packet meets a few dozen.  So the
text is kept as it came, one pass finds where each chain's rules stand, and a chain's rules become
`Rule` objects when something enters it.  In long chains (KUBE-SERVICES has a rule for each service)
even that would be too slow: `Chain.candidates` leaves out rules that name another destination
address or port than the packet's, which it finds by text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv6Address
from typing import Final, TypeAlias

from gketrace.packet import PORT_PROTOCOLS, Packet
from gketrace.ruleset.model import (
    IPTABLES_HOOKS,
    IPTABLES_NFT_SECURITY,
    BaseChain,
    Rule,
    Ruleset,
)
from gketrace.ruleset.rule_text import read_rule
from gketrace.trace import Hook

__all__ = ["Chain", "IptablesRuleset", "Span", "TableIndex"]

Span: TypeAlias = tuple[int, int]
"""First and one past the last byte of a stretch of the text."""

_LONG: Final = 48
"""Chains with more rules than this are searched by address and port."""
_CACHED_RULES: Final = 20_000
"""Parsed rules that are kept; about 1.5 KB each."""

_BASE_NAMES: Final = frozenset(hook.value for hook in Hook)
_LINE: Final = re.compile(rb"[^\n]*+\n")
_COUNTERS: Final = rb"(?:\[[\d:]++\] )?+"
_BY_DESTINATION: Final = re.compile(
    _COUNTERS + rb"-A \S++(?: (?:! )?+-s \S++)?+ -d ([0-9a-f.:]++)/(?:32|128) [^\n]*+\n"
)
"""A rule whose first condition after ``-s`` is one destination address."""
_BY_PORT: Final = re.compile(
    _COUNTERS + rb"-A \S++(?: (?:! )?+-[sd] \S++)*+ -p (?:tcp|udp|sctp)"
    rb'(?: -m comment --comment (?:"(?:[^"\\\n]++|\\.)*+"|[^" ]\S*+))?+'
    rb"(?: -m addrtype --dst-type LOCAL)?+"
    rb" -m (?:tcp|udp|sctp) --dport ([1-9]\d*+) [^\n]*+\n"
)
"""A rule that asks for one destination port before anything that has a side effect."""
_DECLARATION: Final = re.compile(rb":([^ \n]+) (\S+)(?: \[(\d+):(\d+)\])?[^\n]*\n")


class TableIndex:
    """Where one table's lines stand in the text."""

    __slots__ = ("declared", "name", "rules")

    def __init__(self, name: str) -> None:
        self.name = name
        self.declared: list[Span] = []
        """Runs of ``:CHAIN POLICY [0:0]`` lines."""
        self.rules: dict[bytes, int | tuple[int, ...]] = {}
        """Chain → where its rules are, each run as ``start << 32 | end`` (one int is a quarter of
        the memory of a tuple); a tuple of them when the chain's rules are not in one run."""

    def spans(self, chain: bytes) -> tuple[Span, ...]:
        packed = self.rules.get(chain, ())
        runs = packed if isinstance(packed, tuple) else (packed,)
        return tuple((run >> 32, run & 0xFFFFFFFF) for run in runs)


class Chain:
    """One chain of one table; its rules are parsed when they are first asked for."""

    __slots__ = ("_always", "_by_dst", "_by_port", "_owner", "_parsed", "_spans", "_starts",
                 "bytes", "name", "packets", "policy", "table")  # fmt: skip

    def __init__(
        self, owner: IptablesRuleset, table: str, name: str, spans: tuple[Span, ...]
    ) -> None:
        self.table: Final = table
        self.name: Final = name
        self.policy: str = ""
        """``ACCEPT`` or ``DROP`` of a base chain; empty for a user's chain."""
        self.packets: int | None = None
        self.bytes: int | None = None
        self._owner = owner
        self._spans = spans
        self._starts: list[int] | None = None
        self._parsed: dict[int, Rule] = {}
        self._always: list[int] | None = None
        self._by_dst: dict[str, list[int]] = {}
        self._by_port: dict[int, list[int]] = {}

    @property
    def _lines(self) -> list[int]:
        """Offset of each rule's line."""
        if self._starts is None:
            text = self._owner.text
            self._starts = [
                m.start() for start, end in self._spans for m in _LINE.finditer(text, start, end)
            ]
        return self._starts

    def __len__(self) -> int:
        return len(self._lines)

    def rule(self, position: int) -> Rule:
        """The rule at `position`, 1-based.  Raises `IndexError`."""
        known = self._parsed.get(position)
        if known is None:
            if not 1 <= position <= len(self._lines):
                raise IndexError(position)
            known = self._parsed[position] = self._read(position)
            self._owner.count_parsed(1)
        return known

    def __iter__(self) -> Iterator[Rule]:
        """All rules in order, without keeping those that were not kept already."""
        for position in range(1, len(self._lines) + 1):
            yield self._parsed.get(position) or self._read(position)

    def candidates(self, packet: Packet) -> Iterator[Rule]:
        """The rules that this packet may match, in order.

        What is left out is certain not to match and has no side effect: its destination address
        or port, which the kernel compares first, is another.
        """
        positions: Sequence[int]
        if len(self._lines) <= _LONG:
            positions = range(1, len(self._lines) + 1)
        else:
            positions = self._select(packet)
        for position in positions:
            yield self.rule(position)

    def _read(self, position: int) -> Rule:
        text = self._owner.text
        start = self._lines[position - 1]
        line = text[start : text.index(b"\n", start)].decode("utf-8", "surrogateescape")
        return read_rule(
            line,
            backend=self._owner.backend,
            family=self._owner.family,
            table=self.table,
            position=position,
            is_chain=self._is_chain,
        )

    def _is_chain(self, name: str) -> bool:
        return self._owner.has_chain(self.table, name)

    def _select(self, packet: Packet) -> Sequence[int]:
        if self._always is None:
            self._index()
        assert self._always is not None
        some = self._always + self._by_dst.get(str(packet.dst), [])
        if packet.protocol in PORT_PROTOCOLS and not packet.fragment:
            if packet.dport is None:
                for positions in self._by_port.values():
                    some += positions
            else:
                some += self._by_port.get(packet.dport, [])
        some.sort()
        return some

    def _index(self) -> None:
        always: list[int] = []
        by_dst: dict[str, list[int]] = {}
        by_port: dict[int, list[int]] = {}
        text, six = self._owner.text, self._owner.family == 6
        for position, start in enumerate(self._lines, 1):
            if found := _BY_DESTINATION.match(text, start):
                key = found[1].decode()
                if six:
                    try:
                        key = str(IPv6Address(key))
                    except ValueError:
                        always.append(position)
                        continue
                by_dst.setdefault(key, []).append(position)
            elif found := _BY_PORT.match(text, start):
                by_port.setdefault(int(found[1]), []).append(position)
            else:
                always.append(position)
        self._by_dst, self._by_port, self._always = by_dst, by_port, always

    def forget(self) -> int:
        """Drop parsed rules; how many they were."""
        count = len(self._parsed)
        self._parsed = {}
        return count


class IptablesRuleset(Ruleset):
    """What one run of iptables-save printed.  Made by `parse_iptables_save`."""

    __slots__ = ("_chains", "_parsed_rules", "_tables", "notes", "text")

    def __init__(
        self,
        *,
        backend: str,
        family: int,
        source: str,
        taken_at: float,
        text: bytes,
        tables: Mapping[str, TableIndex],
        notes: tuple[str, ...],
    ) -> None:
        super().__init__(backend=backend, family=family, source=source, taken_at=taken_at)
        self.text: Final = text
        """As it was read; ends with a newline."""
        self.notes: Final = notes
        """Comment lines other than the header and footer: warnings of the tool."""
        self._tables = tables
        self._chains: dict[tuple[str, str], Chain | None] = {}
        self._parsed_rules = 0

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables, in the order of the text."""
        return tuple(self._tables)

    def base_chains(self, hook: Hook) -> tuple[BaseChain, ...]:
        found: list[BaseChain] = []
        for table in self._tables:
            for on, priority, kind in IPTABLES_HOOKS.get(table, ()):
                chain = self.chain(table, hook.value) if on is hook else None
                if table == "security" and self.backend == "iptables-nft":
                    priority = IPTABLES_NFT_SECURITY
                if chain is not None and chain.policy:
                    found.append(
                        BaseChain(
                            table=table,
                            chain=chain.name,
                            hook=hook,
                            priority=priority,
                            type=kind,
                            policy=chain.policy,
                            packets=chain.packets,
                            bytes=chain.bytes,
                        )
                    )
        return tuple(sorted(found, key=lambda base: base.priority))

    def chain(self, table: str, name: str) -> Chain | None:
        """The chain, or None when the table has none of that name."""
        try:
            return self._chains[table, name]
        except KeyError:
            chain = self._chains[table, name] = self._find(table, name)
            return chain

    def has_chain(self, table: str, name: str) -> bool:
        """Cheaper than `chain` for chains that have rules."""
        index = self._tables.get(table)
        if index is None:
            return False
        key = name.encode("utf-8", "surrogateescape")
        return key in index.rules or self.chain(table, name) is not None

    def chain_names(self, table: str) -> tuple[str, ...]:
        """All chains of a table, in the order of the text.  Walks all declarations."""
        index = self._tables.get(table)
        if index is None:
            return ()
        names = {
            m[1].decode("utf-8", "surrogateescape"): None
            for start, end in index.declared
            for m in _DECLARATION.finditer(self.text, start, end)
        }
        names.update((n.decode("utf-8", "surrogateescape"), None) for n in index.rules)
        return tuple(names)

    def _find(self, table: str, name: str) -> Chain | None:
        index = self._tables.get(table)
        if index is None:
            return None
        key = name.encode("utf-8", "surrogateescape")
        needle = b":" + key + b" "
        declaration = None
        # A chain with rules exists; only base chains say more in their declaration.
        search = key not in index.rules or name in _BASE_NAMES
        for start, end in index.declared if search else ():
            at = start if self.text.startswith(needle, start) else -1
            if at < 0 and (at := self.text.find(b"\n" + needle, start, end)) >= 0:
                at += 1
            if at >= 0:
                declaration = _DECLARATION.match(self.text, at, end)
                break
        if declaration is None and key not in index.rules:
            return None
        chain = Chain(self, table, name, index.spans(key))
        if declaration is not None and declaration[2] != b"-":
            chain.policy = declaration[2].decode()
            if declaration[3] is not None:
                chain.packets, chain.bytes = int(declaration[3]), int(declaration[4])
        return chain

    def count_parsed(self, number: int) -> None:
        """Keeps the parsed rules within bounds: beyond the limit all are dropped and read again."""
        self._parsed_rules += number
        if self._parsed_rules > _CACHED_RULES:
            self._parsed_rules = 0
            for chain in list(self._chains.values()):
                if chain is not None:
                    chain.forget()
            if len(self._chains) > _CACHED_RULES:
                self._chains.clear()
