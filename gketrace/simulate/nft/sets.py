"""Elements of sets and maps, indexed as the kernel's back ends find them.

Source: nft_set_hash.c, nft_set_rbtree.c and nft_set_pipapo.c in net/netfilter.  Keys without
intervals are looked up in a dict, intervals by bisection, concatenations with intervals one after
the other.  Where a field of the key is not known, all elements that may fit are found.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from gketrace.ruleset.nft_text import element_text
from gketrace.simulate.nft.datatypes import BITS, PROTOCOLS, Pattern, Span, Starts, read_pattern
from gketrace.simulate.nft.values import NotKnown, Scalar

__all__ = ["Element", "Elements", "Key", "fits", "index_elements"]

Json: TypeAlias = Any
Key: TypeAlias = tuple[Scalar | NotKnown, ...]

_STATEFUL: Final = ("limit", "quota", "ct count")
"""Expressions of an element that may stop the rule when it is looked up."""


@dataclass(frozen=True, slots=True, eq=False)
class Element:
    """One element of a set or map."""

    patterns: tuple[Pattern, ...]
    """Empty: the catch-all element, ``*``."""
    json: Json
    """As nft printed it; ``[key, data]`` for maps."""
    data: Json = None
    """A map's data, still JSON."""
    expires: int | None = None
    """Seconds, when it was read."""
    gate: str = ""
    """A stateful expression that it carries and whose answer is not known."""

    @property
    def text(self) -> str:
        return element_text(self.json)


@dataclass(slots=True)
class Elements:
    """The elements of one set or map."""

    types: tuple[str, ...]
    is_map: bool = False
    plain: dict[tuple[Scalar, ...], Json] = field(default_factory=dict)
    """Key → the element as nft printed it, of those that are a key and data, and no more."""
    exact: dict[tuple[Scalar, ...], Element] = field(default_factory=dict)
    """Other elements with just one key."""
    lows: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, Element]] = field(default_factory=list)
    """Intervals of a set with one field, in ascending order."""
    loose: list[Element] = field(default_factory=list)
    """Concatenations with intervals, and wildcards."""
    default: Element | None = None
    _partial: dict[tuple[bool, ...], dict[tuple[Scalar, ...], list[Element]]] = field(
        default_factory=dict
    )

    def lookup(self, key: Key) -> list[Element]:
        """The element that has `key`; several when a field is not known; empty: none has.

        The catch-all element is not among them (`default`).
        """
        known = tuple(part for part in key if not isinstance(part, NotKnown))
        if len(known) < len(key):
            return self._candidates(key, known)
        hit = self.exact.get(known)
        if hit is None and known in self.plain:
            hit = self.exact[known] = self._element(known)
        if hit is not None:
            return [hit]
        if self.spans and isinstance(known[0], int):
            at = bisect_right(self.lows, known[0]) - 1
            if at >= 0 and self.spans[at][1] >= known[0]:
                return [self.spans[at][2]]
        return [element for element in self.loose if _all_fit(element.patterns, known)]

    def _element(self, key: tuple[Scalar, ...]) -> Element:
        item = self.plain[key]
        return Element(key, item, item[1] if self.is_map else None)

    def _candidates(self, key: Key, known: tuple[Scalar, ...]) -> list[Element]:
        mask = tuple(not isinstance(part, NotKnown) for part in key)
        index = self._partial.get(mask)
        if index is None:
            index = self._partial[mask] = {}
            whole = {key: self._element(key) for key in self.plain} | self.exact
            for values, element in whole.items():
                part = tuple(v for v, use in zip(values, mask, strict=True) if use)
                index.setdefault(part, []).append(element)
        found = list(index.get(known, ()))
        if len(key) == 1:
            found += [element for _, _, element in self.spans]
        found += [
            element
            for element in self.loose
            if _all_fit([p for p, use in zip(element.patterns, mask, strict=True) if use], known)
        ]
        return found


def fits(pattern: Pattern, value: Scalar) -> bool:
    """Whether a known value is what the pattern says."""
    if isinstance(pattern, Span):
        return isinstance(value, int) and pattern.low <= value <= pattern.high
    if isinstance(pattern, Starts):
        return isinstance(value, str) and value.startswith(pattern.text)
    return pattern == value


def _all_fit(patterns: Sequence[Pattern], values: Sequence[Scalar]) -> bool:
    return all(fits(p, v) for p, v in zip(patterns, values, strict=True))


def index_elements(items: Sequence[Json], types: tuple[str, ...], *, is_map: bool) -> Elements:
    """Raises `ValueError` for a key that is not understood."""
    made = Elements(types, is_map)
    spans: list[tuple[int, int, Element]] = []
    others: list[Json] = []
    for item in items:
        key = _plain_key(item[0] if is_map else item, types)
        if key is None:
            others.append(item)
        else:
            made.plain[key] = item
    for element in _read(others, types, is_map=is_map):
        patterns = element.patterns
        if not patterns:
            made.default = element
        elif not any(isinstance(p, Span | Starts) for p in patterns):
            made.exact[tuple(p for p in patterns if not isinstance(p, Span | Starts))] = element
        elif len(patterns) == 1 and isinstance(patterns[0], Span):
            spans.append((patterns[0].low, patterns[0].high, element))
        else:
            made.loose.append(element)
    spans.sort(key=lambda span: span[0])
    made.spans = spans
    made.lows = [low for low, _, _ in spans]
    return made


_DOTTED: Final = re.compile(
    r"(0|[1-9]\d?\d?)\.(0|[1-9]\d?\d?)\.(0|[1-9]\d?\d?)\.(0|[1-9]\d?\d?)", re.A
)


def _plain_key(key: Json, types: tuple[str, ...]) -> tuple[Scalar, ...] | None:
    """The key of an element that is nothing but addresses and numbers, as nearly all are; None:
    another one.  A table of kube-proxy's has tens of thousands."""
    if type(key) is dict:
        parts = key.get("concat")
        if type(parts) is not list or len(parts) != len(types) or len(key) != 1:
            return None
    elif len(types) == 1:
        parts = (key,)
    else:
        return None
    values: list[Scalar] = []
    for part, kind in zip(parts, types, strict=True):
        if type(part) is int and kind in BITS:
            values.append(part)
        elif type(part) is str and kind == "ipv4_addr":
            found = _DOTTED.fullmatch(part)
            if found is None:
                return None
            try:
                values.append(int.from_bytes(bytes(map(int, found.groups())), "big"))
            except ValueError:
                return None
        elif type(part) is str and kind == "inet_proto" and part in PROTOCOLS:
            values.append(PROTOCOLS[part])
        else:
            return None
    return tuple(values)


def _read(items: Sequence[Json], types: tuple[str, ...], *, is_map: bool) -> Iterator[Element]:
    for item in items:
        key, data = (item[0], item[1]) if is_map else (item, None)
        expires, gate = None, ""
        if isinstance(key, dict) and "elem" in key:
            body = key["elem"]
            expires = body.get("expires")
            gate = next((name for name in _STATEFUL if name in body), "")
            key = body["val"]
        yield Element(_patterns(key, types), item, data, expires, gate)


def _patterns(key: Json, types: tuple[str, ...]) -> tuple[Pattern, ...]:
    if key == "*":
        return ()
    parts = key["concat"] if isinstance(key, dict) and "concat" in key else [key]
    if len(parts) != len(types):
        raise ValueError(f"{len(parts)} fields where the type has {len(types)}")
    return tuple(read_pattern(part, kind) for part, kind in zip(parts, types, strict=True))
