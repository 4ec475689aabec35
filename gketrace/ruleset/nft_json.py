"""``nft -j list ruleset`` or ``list table`` → one `NftRuleset` for each table.

Schema: libnftables-json(5).  nft prints one line; a regular expression over the bytes finds where
each object of the top-level array begins, which is safe because an unescaped quotation mark cannot
be part of a JSON string.  Text that is laid out in another way is read with `json` and laid out
anew first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from gketrace.errors import ParseError
from gketrace.ruleset.nft import NO_TESTS, Json, NftRuleset, NftTest, Span, TableText

__all__ = ["NftTables", "parse_nft_json", "tests_tail", "with_tests"]

_KINDS: Final = (
    "table|chain|rule|set|map|element|counter|quota|limit|flowtable|secmark|synproxy"
    "|ct helper|ct timeout|ct expectation|meter|kernel tests"
)
_TEXT: Final = rb'"((?:[^"\\]|\\.)*+)"'
_PAIR: Final = rb', "(name|table|chain)": ' + _TEXT
_OBJECT: Final = re.compile(
    rb'\{"('
    + _KINDS.encode()
    + rb')": \{"family": "([a-z0-9]+)"'
    + _PAIR
    + rb"(?:"
    + _PAIR
    + rb"(?:"
    + _PAIR
    + rb")?+)?+"
)
"""Rules name their table and their chain, all else its table and itself, tables themselves."""
_HEAD: Final = re.compile(rb'\s*\{"nftables": \[(?:\{"metainfo": \{[^{}]*\}\})?(?:, )?')
_MODELLED: Final = frozenset(("ip", "ip6", "inet"))


@dataclass(frozen=True, slots=True, kw_only=True)
class NftTables:
    """What one run of nft printed."""

    rulesets: tuple[NftRuleset, ...]
    """One for each table of the families ip, ip6 and inet."""
    unmodelled: tuple[str, ...]
    """What may decide about packets and is not simulated, one sentence each: tables of other
    families that hold rules, chains on other hooks."""


@dataclass(slots=True)
class _Table:
    chains: dict[str, Span] = field(default_factory=dict)
    rules: dict[str, list[Span]] = field(default_factory=dict)
    sets: dict[str, Span] = field(default_factory=dict)
    tests: Span | None = None


def parse_nft_json(
    text: bytes,
    *,
    source: str,
    taken_at: float,
    tests: Mapping[int, tuple[NftTest, ...]] = NO_TESTS,
) -> NftTables:
    """`tests`: rule handle → what nft may have left out; then the text must be of one table.
    A text that `with_tests` made brings its own.

    Raises `ParseError` with `source` and the offending text, in any kind of wrong input.

    What stands inside rules and sets is parsed later, when it is asked for, and may raise then.
    """
    if not text or text.isspace():
        raise ParseError("empty output of nft", source=source, line=0, text="")
    try:
        tables = _index(text)
        if tables is None:
            text = _normal(text, source)
            tables = _index(text)
    except ValueError as error:
        raise ParseError(
            f"a name that is not JSON: {error}",
            source=source,
            line=0,
            text=text[:200].decode("utf-8", "replace"),
        ) from error
    if tables is None:
        raise ParseError("not a list of nftables objects", source=source, line=0,
                         text=text[:200].decode("utf-8", "replace"))  # fmt: skip
    made: list[NftRuleset] = []
    unmodelled: list[str] = []
    for (family, name), found in tables.items():
        if family in _MODELLED:
            index = TableText(
                family=family,
                name=name,
                chains=found.chains,
                rules={chain: tuple(runs) for chain, runs in found.rules.items()},
                sets=found.sets,
            )
            own = tests if found.tests is None else _tests(text, found.tests, source)
            ruleset = NftRuleset(
                text=text, index=index, source=source, taken_at=taken_at, tests=own
            )
            made.append(ruleset)
            unmodelled += ruleset.unmodelled
        elif found.rules and family != "arp":
            # ARP hooks see no IP packets.
            unmodelled.append(f"table {family} {name}: tables of family {family} are not modelled")
    return NftTables(rulesets=tuple(made), unmodelled=tuple(unmodelled))


def _index(text: bytes) -> dict[tuple[str, str], _Table] | None:
    """Where the objects stand; None for text that nft did not lay out."""
    head = _HEAD.match(text)
    if head is None:
        return None
    end = _end(text)
    if text[end - 2 : end] != b"]}":
        return None
    tables: dict[tuple[str, str], _Table] = {}
    # One at a time: all of them at once take ten times the text.
    found = _OBJECT.finditer(text, head.end())
    match = next(found, None)
    if match is None:
        return tables if head.end() == end - 2 else None
    if match.start() != head.end():
        return None
    last: tuple[bytes, bytes] | None = None
    table = _Table()
    while match is not None:
        following = next(found, None)
        start = match.start()
        stop = (end if following is None else following.start()) - 2
        if text[stop - 1] != 0x7D:
            return None
        kind, family, key1, text1, key2, text2, key3, text3 = match.groups()
        match = following
        # Of rules and chains of one table there are thousands, next to one another.
        if key1 == b"table" and key2 is not None and key3 is None:
            of, other, value = text1, key2, text2
            own = value if other == b"name" else b""
            chain = value if other == b"chain" else b""
        else:
            names = {key1: text1, key2: text2, key3: text3}
            own, chain = names.get(b"name", b""), names.get(b"chain", b"")
            of = own if kind == b"table" else names.get(b"table", b"")
        if (family, of) != last:
            last = family, of
            table = tables.setdefault((family.decode(), _name(of)), _Table())
        if kind == b"rule":
            runs = table.rules.setdefault(_name(chain), [])
            # Rules that stand next to one another are one stretch.
            if runs and runs[-1][1] + 2 == start:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((start, stop))
        elif kind == b"chain":
            table.chains[_name(own)] = (start, stop)
        elif kind in (b"set", b"map"):
            table.sets[_name(own)] = (start, stop)
        elif kind == b"kernel tests":
            table.tests = start, stop
    return tables


def with_tests(
    text: bytes, family: str, table: str, tests: Mapping[int, tuple[NftTest, ...]]
) -> bytes:
    """nft's listing of one table with `tests` as one more object, for readers elsewhere."""
    size, tail = tests_tail(text, family, table, tests)
    return text[:size] + tail if tail else text


def tests_tail(
    text: bytes, family: str, table: str, tests: Mapping[int, tuple[NftTest, ...]]
) -> tuple[int, bytes]:
    """What `with_tests` takes of the text, in bytes from its beginning, and what it puts behind it:
    a large text need not be copied for it."""
    end = _end(text)
    if not tests or not text.endswith(b"]}", 0, end):
        return len(text), b""
    listed = {
        str(handle): [[test.statement, test.after] for test in own] for handle, own in tests.items()
    }
    body = {"family": family, "table": table, "tests": listed}
    return end - 2, b", " + json.dumps({"kernel tests": body}).encode() + b"]}\n"


def _end(text: bytes) -> int:
    """Where it ends but for space."""
    end = len(text)
    while end and text[end - 1 : end].isspace():
        end -= 1
    return end


def _tests(text: bytes, span: Span, source: str) -> Mapping[int, tuple[NftTest, ...]]:
    piece = text[slice(*span)]
    try:
        listed = json.loads(piece)["kernel tests"]["tests"]
        return {
            int(handle): tuple(NftTest(statement=one, after=int(after)) for one, after in own)
            for handle, own in listed.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ParseError(
            f"no tests: {error!r}",
            source=source,
            line=0,
            text=piece[:200].decode("utf-8", "replace"),
        ) from error


def _name(raw: bytes) -> str:
    if b"\\" in raw:
        return str(json.loads(b'"' + raw + b'"'))
    return raw.decode("utf-8", "surrogateescape")


def _normal(text: bytes, source: str) -> bytes:
    """The same objects as nft lays them out."""
    try:
        whole: Json = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ParseError(f"not JSON: {error}", source=source, line=0,
                         text=text[:200].decode("utf-8", "replace")) from error  # fmt: skip
    items = whole.get("nftables") if isinstance(whole, dict) else None
    if not isinstance(items, list):
        raise ParseError("no list of nftables objects", source=source, line=0,
                         text=text[:200].decode("utf-8", "replace"))  # fmt: skip
    ordered: list[Json] = []
    for item in items:
        if not isinstance(item, dict) or len(item) != 1:
            raise ParseError("not an object with one key", source=source, line=0,
                             text=json.dumps(item)[:200])  # fmt: skip
        ((kind, body),) = item.items()
        if kind == "metainfo":
            continue
        if not isinstance(body, dict) or not isinstance(body.get("family"), str):
            raise ParseError(f"a {kind} without a family", source=source, line=0,
                             text=json.dumps(item)[:200])  # fmt: skip
        first = {k: body[k] for k in ("family", "name", "table", "chain") if k in body}
        ordered.append({kind: {**first, **body}})
    return json.dumps({"nftables": ordered}, ensure_ascii=False).encode("utf-8", "replace")
