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
from itertools import accumulate
from typing import Any, Final, TypeAlias

from gketrace.packet import PORT_PROTOCOLS, Packet
from gketrace.ruleset.model import (
    IPTABLES_HOOKS,
    IPTABLES_NFT_SECURITY,
    BaseChain,
    Rule,
    Ruleset,
)
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
_RULE: Final = re.compile(
    rb"(?:\[[\d:]++\] )?+-A [^ \n]++(?:"
    # One destination address is its first condition after -s.
    rb" (?:(?:! )?+-s \S++ )?+-d ([0-9a-f.:]++)/(?:32|128) |"
    # One destination port is asked for before anything that has a side effect.
    rb"(?: (?:! )?+-[sd] \S++)*+ -p (?:tcp|udp|sctp)"
    rb'(?: -m comment --comment (?:"(?:[^"\\\n]++|\\.)*+"|[^" ]\S*+))?+'
    rb"(?: -m addrtype --dst-type LOCAL)?+"
    rb" -m (?:tcp|udp|sctp) --dport ([1-9]\d*+) |)[^\n]*+\n"
)
"""A rule, with the destination address or port without which it certainly does not match."""
_DROPS: Final = re.compile(rb"^:\S+ DROP ", re.M)
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


class _Store:
    """What a rule set and its chains share.  Holds no chain: a rule set of 50 MB must go when it is
    let go of, not when the garbage collector next looks for cycles."""

    __slots__ = ("_exist", "backend", "epoch", "family", "parsed", "tables", "text")

    def __init__(
        self, text: bytes, backend: str, family: int, tables: Mapping[str, TableIndex]
    ) -> None:
        self.text, self.backend, self.family, self.tables = text, backend, family, tables
        self._exist: dict[tuple[str, str], bool] = {}
        self.parsed = 0
        """Rules that are kept by all chains together."""
        self.epoch = 0
        """Goes up when they are too many; each chain then drops its own."""

    def count_parsed(self) -> None:
        self.parsed += 1
        if self.parsed > _CACHED_RULES:
            self.parsed = 0
            self.epoch += 1

    def declaration(self, table: str, key: bytes) -> re.Match[bytes] | None:
        """The line ``:CHAIN POLICY [0:0]``."""
        needle = b":" + key + b" "
        for start, end in self.tables[table].declared:
            at = start if self.text.startswith(needle, start) else -1
            if at < 0 and (at := self.text.find(b"\n" + needle, start, end)) >= 0:
                at += 1
            if at >= 0:
                return _DECLARATION.match(self.text, at, end)
        return None

    def has_chain(self, table: str, name: str) -> bool:
        """Every rule asks it of its target; targets that are none are few."""
        index = self.tables.get(table)
        if index is None:
            return False
        key = name.encode("utf-8", "surrogateescape")
        if key in index.rules:
            return True
        known = self._exist.get((table, name))
        if known is None:
            if len(self._exist) > _CACHED_RULES:
                self._exist.clear()
            known = self._exist[table, name] = self.declaration(table, key) is not None
        return known


_NEEDS_CONNTRACK: Final = re.compile(
    rb" -m (?:conntrack|state|connmark|connbytes|connlimit|connlabel|helper|cluster)\b"
    rb"| -j (?:DNAT|SNAT|MASQUERADE|REDIRECT|NETMAP|CT|NOTRACK|CONNMARK|CONNSECMARK|SYNPROXY"
    rb"|CLUSTERIP)\b"
)
"""Extensions whose checkentry calls nf_ct_netns_get(): the namespace tracks while one is in use."""
_OFTEN: Final = (b" -j MASQUERADE ", b" -j DNAT ", b" -m conntrack ")
"""What the expression finds in most rule sets; plain words are found ten times as fast."""


class Chain:
    """One chain of one table; its rules are parsed when they are first asked for."""

    __slots__ = ("_always", "_by_dst", "_by_port", "_epoch", "_parsed", "_spans", "_starts",
                 "_store", "bytes", "name", "packets", "policy", "table")  # fmt: skip

    def __init__(self, store: _Store, table: str, name: str, spans: tuple[Span, ...]) -> None:
        self.table: Final = table
        self.name: Final = name
        self.policy: str = ""
        """``ACCEPT`` or ``DROP`` of a base chain; empty for a user's chain."""
        self.packets: int | None = None
        self.bytes: int | None = None
        self._store = store
        self._epoch = store.epoch
        self._spans = spans
        self._starts: list[int] | None = None
        self._parsed: dict[int, Rule] = {}
        self._always: list[int] | None = None
        self._by_dst: dict[bytes, list[int]] = {}
        self._by_port: dict[int, list[int]] = {}

    @property
    def _lines(self) -> list[int]:
        """Offset of each rule's line."""
        if self._starts is None:
            text = self._store.text
            starts: list[int] = []
            for start, end in self._spans:
                starts += accumulate(map(len, _LINE.findall(text, start, end)), initial=start)
                del starts[-1]
            self._starts = starts
        return self._starts

    def __len__(self) -> int:
        return len(self._lines)

    def rule(self, position: int) -> Rule:
        """The rule at `position`, 1-based.  Raises `IndexError`."""
        if self._epoch != self._store.epoch:
            self._epoch, self._parsed = self._store.epoch, {}
        known = self._parsed.get(position)
        if known is None:
            if not 1 <= position <= len(self._lines):
                raise IndexError(position)
            self._store.count_parsed()
            known = self._parsed[position] = self._read(position)
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
        positions = self.selection(packet)
        for position in range(1, len(self._lines) + 1) if positions is None else positions:
            yield self.rule(position)

    def selection(self, packet: Packet) -> Sequence[int] | None:
        """The positions of `candidates`; None: all rules of the chain, which is short."""
        return None if len(self._lines) <= _LONG else self._select(packet)

    def _read(self, position: int) -> Rule:
        # Here, as it brings all matches and targets with it: many answers read no rule.
        from gketrace.ruleset.rule_text import read_rule

        text = self._store.text
        start = self._lines[position - 1]
        line = text[start : text.index(b"\n", start)].decode("utf-8", "surrogateescape")
        return read_rule(
            line,
            backend=self._store.backend,
            family=self._store.family,
            table=self.table,
            position=position,
            is_chain=self._is_chain,
        )

    def _is_chain(self, name: str) -> bool:
        return self._store.has_chain(self.table, name)

    def _select(self, packet: Packet) -> Sequence[int]:
        if self._always is None:
            self._always = self._index()
        some = self._always + self._by_dst.get(str(packet.dst).encode(), [])
        if packet.protocol in PORT_PROTOCOLS and not packet.fragment:
            if packet.dport is None:
                for positions in self._by_port.values():
                    some += positions
            else:
                some += self._by_port.get(packet.dport, [])
        some.sort()
        return some

    def _index(self) -> list[int]:
        """Fills `_by_dst` and `_by_port`; the positions that are in neither."""
        always: list[int] = []
        text, six, by_dst = self._store.text, self._store.family == 6, self._by_dst
        keys = [key for start, end in self._spans for key in _RULE.findall(text, start, end)]
        for position, (address, port) in enumerate(keys, 1):
            if address:
                if six:
                    try:
                        address = str(IPv6Address(address.decode())).encode()
                    except ValueError:
                        always.append(position)
                        continue
                if address in by_dst:
                    by_dst[address].append(position)
                else:
                    by_dst[address] = [position]
            elif port:
                self._by_port.setdefault(int(port), []).append(position)
            else:
                always.append(position)
        return always


class IptablesRuleset(Ruleset):
    """What one run of iptables-save printed.  Made by `parse_iptables_save`."""

    __slots__ = ("_chains", "_needs_conntrack", "_store", "_tables", "notes", "paths", "text")

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
        self._store = _Store(text, backend, family, tables)
        self._chains: dict[tuple[str, str], Chain | None] = {}
        self._needs_conntrack: bool | None = None
        self.paths: Final[dict[tuple[str, str], tuple[Any, ...]]] = {}
        """What an evaluator remembers of packets' ways: base chain → the last used first."""

    def needs_conntrack(self, family: int) -> bool:
        if self._needs_conntrack is None:
            self._needs_conntrack = (
                any(words in self.text for words in _OFTEN)
                or _NEEDS_CONNTRACK.search(self.text) is not None
            )
        return self._needs_conntrack and family == self.family

    @property
    def holds_rules(self) -> bool:
        """It has a rule, or a policy that is not ACCEPT."""
        return any(
            index.rules or any(_DROPS.search(self.text, *span) for span in index.declared)
            for index in self._tables.values()
        )

    def declares(self, chain: bytes) -> bool:
        """Whether any table has a chain of this name."""
        return any(self._store.declaration(table, chain) is not None for table in self._tables)

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
            if len(self._chains) > _CACHED_RULES:
                self._chains.clear()
            chain = self._chains[table, name] = self._find(table, name)
            return chain

    def has_chain(self, table: str, name: str) -> bool:
        """Cheaper than `chain` for chains that have rules."""
        return self._store.has_chain(table, name)

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
        # A chain with rules exists; only base chains say more in their declaration.
        declaration = None
        if key not in index.rules or name in _BASE_NAMES:
            declaration = self._store.declaration(table, key)
        if declaration is None and key not in index.rules:
            return None
        chain = Chain(self._store, table, name, index.spans(key))
        if declaration is not None and declaration[2] != b"-":
            chain.policy = declaration[2].decode()
            if declaration[3] is not None:
                chain.packets, chain.bytes = int(declaration[3]), int(declaration[4])
        return chain
