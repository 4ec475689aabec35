"""`NftRuleset`: one nftables table, an index over the JSON that nft printed; parsed when asked for.

A table of kube-proxy's may hold 10,000 Services (60 MB of JSON) of which one packet meets a few
rules.  So the text is kept as it came, `gketrace.ruleset.nft_json` finds where each object stands
in it, and a chain's rules or a set's elements are parsed when the walk first comes to them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from gketrace.errors import ParseError
from gketrace.packet import Packet
from gketrace.ruleset.model import BaseChain, ChainType, Rule, Ruleset
from gketrace.ruleset.nft_text import rule_text
from gketrace.trace import Citation, Hook, Source

__all__ = [
    "NO_TESTS",
    "Json",
    "NftChain",
    "NftRule",
    "NftRuleset",
    "NftSet",
    "NftTest",
    "Span",
    "TableText",
]

Json: TypeAlias = Any
"""What `json.loads` gives: libnftables-json(5) is the schema."""
Span: TypeAlias = tuple[int, int]
"""First and one past the last byte of a stretch of the text."""

_FAMILIES: Final[Mapping[str, int]] = {"ip": 4, "ip6": 6, "inet": 0}
_HOOKS: Final[Mapping[str, Hook]] = {hook.value.lower(): hook for hook in Hook}
_TRACKS: Final = re.compile(
    rb'"(?:ct|ct count|ct helper|ct timeout|ct expectation|masquerade|redirect|flow|synproxy)": '
)
"""Expressions whose init calls nf_ct_netns_get() with the table's family; notrack has none."""
_WRITES: Final = re.compile(rb'\{"(?:set|map)": \{"op": ')
_NAT: Final = re.compile(rb'"(?:dnat|snat)": \{(?:"family": "(ip6?)")?')
"""nft_nat_init() asks for the family that the statement names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NftTest:
    """A comparison that the kernel makes, and that nft may take for part of what is behind it."""

    statement: Json
    """As nft would print it."""
    after: int
    """How many of the rule's statements that change something come before it."""


NO_TESTS: Final[Mapping[int, tuple[NftTest, ...]]] = {}
_CHANGES: Final = frozenset(("mangle", "set", "map", "notrack"))
"""Statements that change the packet, its connection or a set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NftRule(Rule):
    """One rule; `Rule.matches` and `target` are empty, `statements` says it all."""

    statements: tuple[Json, ...]
    """In the order in which the kernel runs them, with the tests that nft may leave out."""
    handle: int | None = None
    comment: str = ""

    def _cite(self) -> Citation:
        return Citation(
            source=Source.RULE,
            text=self.text,
            backend=self.backend,
            table=self.table,
            chain=self.chain,
            position=self.position,
            handle=self.handle,
            packets=self.packets,
            bytes=self.bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NftSet:
    """A named set or map, as it was read; its elements are still JSON."""

    name: str
    types: tuple[str, ...]
    """Data types of the key's fields: ``("ipv4_addr", "inet_service")``."""
    data: tuple[str, ...] = ()
    """A map's data types, or ``("verdict",)``; empty for a set.  An object map: ``counter`` ..."""
    flags: frozenset[str] = frozenset()
    timeout: int | None = None
    """Seconds that an element lasts unless it says otherwise."""
    elements: tuple[Json, ...] = ()
    comment: str = ""

    @property
    def is_map(self) -> bool:
        return bool(self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableText:
    """Where one table's objects stand in the text."""

    family: str
    """``ip``, ``ip6`` or ``inet``."""
    name: str
    chains: Mapping[str, Span]
    rules: Mapping[str, tuple[Span, ...]]
    """Chain → runs of its rules."""
    sets: Mapping[str, Span]
    """Sets and maps."""


class NftChain:
    """One chain; its rules are parsed when they are first asked for."""

    __slots__ = ("_owner", "_rules", "name")

    def __init__(self, owner: NftRuleset, name: str) -> None:
        self.name: Final = name
        self._owner = owner
        self._rules: tuple[NftRule, ...] | None = None

    @property
    def rules(self) -> tuple[NftRule, ...]:
        if self._rules is None:
            self._rules = tuple(self._owner.read_rules(self.name))
        return self._rules

    def __iter__(self) -> Iterator[NftRule]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def candidates(self, packet: Packet) -> Iterator[NftRule]:
        """The rules that this packet may match: all of them; nftables' maps do the selecting."""
        return iter(self.rules)


class NftRuleset(Ruleset):
    """One table of ``nft -j list ruleset``.  Made by `parse_nft_json`."""

    __slots__ = (
        "_base",
        "_chains",
        "_index",
        "_needs",
        "_sets",
        "_tests",
        "memo",
        "text",
        "unmodelled",
    )

    def __init__(
        self,
        *,
        text: bytes,
        index: TableText,
        source: str,
        taken_at: float,
        tests: Mapping[int, tuple[NftTest, ...]] = NO_TESTS,
    ) -> None:
        super().__init__(
            backend="nftables",
            family=_FAMILIES[index.family],
            source=source,
            taken_at=taken_at,
        )
        self.text: Final = text
        """The whole JSON text that the table is part of."""
        self._index = index
        self._tests = tests
        self._chains: dict[str, NftChain] = {}
        self._sets: dict[str, NftSet | None] = {}
        self._needs: tuple[bool, bool] | None = None
        self.memo: Final[dict[int, tuple[Json, object]]] = {}
        """What an evaluator made of a piece of this rule set, by the piece's id(); the piece is
        kept beside it, so that its id stays its own."""
        self._base, self.unmodelled = self._read_base_chains()

    @property
    def table(self) -> str:
        """Family and name, as nft names it: ``ip kube-proxy``."""
        return f"{self._index.family} {self._index.name}"

    @property
    def nft_family(self) -> str:
        """``ip``, ``ip6`` or ``inet``."""
        return self._index.family

    @property
    def chain_names(self) -> tuple[str, ...]:
        return tuple(self._index.chains)

    @property
    def set_names(self) -> tuple[str, ...]:
        """Sets and maps."""
        return tuple(self._index.sets)

    def base_chains(self, hook: Hook) -> tuple[BaseChain, ...]:
        return self._base.get(hook, ())

    def chain(self, name: str) -> NftChain | None:
        """None: the table has no chain of that name."""
        if name not in self._index.chains:
            return None
        known = self._chains.get(name)
        if known is None:
            known = self._chains[name] = NftChain(self, name)
        return known

    def has_rules(self, chain: str) -> bool:
        """Without parsing them."""
        return bool(self._index.rules.get(chain))

    def set(self, name: str) -> NftSet | None:
        """The named set or map; None: there is none.  Raises `ParseError`."""
        if name not in self._sets:
            span = self._index.sets.get(name)
            self._sets[name] = None if span is None else self._read_set(span)
        return self._sets[name]

    def needs_conntrack(self, family: int) -> bool:
        """Whether some expression makes connection tracking of `family` (4, 6) run here."""
        if self._needs is None:
            own = {"ip": (4,), "ip6": (6,), "inet": (4, 6)}[self._index.family]
            wanted: set[int] = set()
            for start, end in self._spans():
                if _TRACKS.search(self.text, start, end):
                    wanted.update(own)
                for found in _NAT.finditer(self.text, start, end):
                    named = found[1]
                    wanted.update(own if named is None else (6 if named == b"ip6" else 4,))
                if len(wanted) == len(own):
                    break
            self._needs = (4 in wanted, 6 in wanted)
        return self._needs[family == 6]

    @property
    def written_by_packets(self) -> bool:
        """Whether some rule adds elements to sets: they change without a new generation."""
        return any(_WRITES.search(self.text, *span) for span in self._spans())

    def _spans(self) -> Iterator[Span]:
        for runs in self._index.rules.values():
            yield from runs

    def load(self, span: Span, *, array: bool = False) -> Json:
        """A stretch of the text.  Raises `ParseError`."""
        piece = self.text[span[0] : span[1]]
        try:
            return json.loads(b"[" + piece + b"]" if array else piece)
        except (ValueError, RecursionError) as error:
            raise self._refused(f"not JSON: {error}", span) from error

    def _refused(self, message: str, span: Span) -> ParseError:
        piece = self.text[span[0] : span[1]][:200].decode("utf-8", "replace")
        return ParseError(message, source=self.source, line=0, text=piece)

    def read_rules(self, chain: str) -> Iterator[NftRule]:
        """The rules of a chain, parsed anew.  Raises `ParseError`."""
        position = 0
        for span in self._index.rules.get(chain, ()):
            for item in self.load(span, array=True):
                position += 1
                yield self._rule(item, chain, position)

    def _rule(self, item: Json, chain: str, position: int) -> NftRule:
        body = item.get("rule") if isinstance(item, dict) else None
        if not isinstance(body, dict) or not isinstance(body.get("expr"), list):
            raise ParseError("not a rule", source=self.source, line=0, text=json.dumps(item)[:200])
        statements = tuple(body["expr"])
        handle = body.get("handle")
        tests = self._tests.get(handle, ()) if isinstance(handle, int) else ()
        comment = str(body.get("comment", ""))
        packets = size = None
        for statement in statements:
            counter = statement.get("counter") if isinstance(statement, dict) else None
            if isinstance(counter, dict) and "packets" in counter:
                packets, size = counter["packets"], counter.get("bytes")
                break
        return NftRule(
            backend=self.backend,
            table=self.table,
            chain=chain,
            position=position,
            matches=(),
            target=None,
            text=rule_text(statements, comment, self.nft_family),
            packets=packets,
            bytes=size,
            statements=_with_tests(statements, tests),
            handle=handle if isinstance(handle, int) else None,
            comment=comment,
        )

    def _read_set(self, span: Span) -> NftSet:
        item = self.load(span)
        try:
            body = next(iter(item.values()))
            data = body.get("map", ())
            return NftSet(
                name=body["name"],
                types=_types(body.get("type", ())),
                data=_types(data) if data else (),
                flags=frozenset(_listed(body.get("flags", ()))),
                timeout=body.get("timeout"),
                elements=tuple(body.get("elem", ())),
                comment=body.get("comment", ""),
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._refused(f"a set of another shape: {error!r}", span) from error

    def _read_base_chains(self) -> tuple[dict[Hook, tuple[BaseChain, ...]], tuple[str, ...]]:
        found: dict[Hook, list[BaseChain]] = {}
        strange: list[str] = []
        for name, (start, end) in self._index.chains.items():
            if self.text.find(b'"hook": ', start, end) < 0:
                continue
            try:
                body = self.load((start, end))["chain"]
                hook = _HOOKS.get(body.get("hook", ""))
                if hook is None or body.get("type") not in ("filter", "nat", "route"):
                    if self._index.rules.get(name) or body.get("policy") == "drop":
                        strange.append(
                            f"chain {name} of table {self.table}: hook {body.get('hook')} is not "
                            "modelled"
                        )
                    continue
                base = BaseChain(
                    table=self.table,
                    chain=name,
                    hook=hook,
                    priority=int(body["prio"]),
                    type=ChainType(body["type"]),
                    policy=str(body.get("policy", "accept")).upper(),
                )
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise self._refused(f"a chain of another shape: {error!r}", (start, end)) from error
            found.setdefault(hook, []).append(base)
        ordered: dict[Hook, tuple[BaseChain, ...]] = {}
        for hook, chains in found.items():
            # nf_hook_entries_grow(): of chains with one priority, the last registered is first.
            chains.reverse()
            chains.sort(key=lambda base: base.priority)
            ordered[hook] = tuple(chains)
        return ordered, tuple(strange)


def _with_tests(statements: tuple[Json, ...], tests: tuple[NftTest, ...]) -> tuple[Json, ...]:
    """The tests as early as nothing that stands before them has changed anything.

    One that nft has printed, too, is then made twice, which does no harm.
    """
    if not tests:
        return statements
    waiting = list(tests)
    whole: list[Json] = []
    changes = 0
    for statement in (*statements, None):
        while waiting and waiting[0].after <= changes:
            whole.append(waiting.pop(0).statement)
        if statement is not None:
            whole.append(statement)
            changes += isinstance(statement, dict) and not _CHANGES.isdisjoint(statement)
    # Fewer changes than the kernel makes: nft has not printed all.
    whole = [{"unlisted": test.statement} for test in waiting] + whole
    return tuple(whole)


def _types(value: Json) -> tuple[str, ...]:
    """``"ipv4_addr"``, ``"ipv4_addr . inet_service"`` or a list → the fields' types."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(" . "))
    return tuple(part for item in value for part in _types(item))


def _listed(value: Json) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
