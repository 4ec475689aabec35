"""``match``: comparisons and set membership (nft_cmp.c, nft_range.c, nft_lookup.c)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Any, Final, TypeAlias

from gketrace.simulate.nft.datatypes import read_flags, read_pattern, read_scalar
from gketrace.simulate.nft.expressions import evaluate, types_of
from gketrace.simulate.nft.lookup import as_key, changed, find_element
from gketrace.simulate.nft.scene import Scene
from gketrace.simulate.nft.sets import Elements, fits
from gketrace.simulate.nft.values import BREAK, Branch, NotKnown, Value, merged

__all__ = ["match"]

Json: TypeAlias = Any
Decision: TypeAlias = Callable[[Value, Scene], "tuple[bool | NotKnown, str]"]

_ORDER: Final[Mapping[str, Callable[[int, int], bool]]] = {"<": lt, ">": gt, "<=": le, ">=": ge}


def match(body: Json, scene: Scene) -> tuple[Branch, ...]:
    """Branches of 1 (it matches), BREAK (it does not) and `NotKnown`."""
    left = evaluate(body["left"], scene)
    decide = _decision_of(body, scene)
    found: list[Branch] = []
    for branch in left:
        if branch.value is BREAK:
            found.append(branch)
            continue
        answer, note = decide(branch.value, scene)
        value: Value
        if isinstance(answer, NotKnown):
            value = answer
        else:
            value = 1 if answer else BREAK
        found.append(Branch(value, branch.chance, branch.drawn, note or branch.note))
    return merged(found)


@dataclass(frozen=True, slots=True)
class _Made:
    """A decision, made once for all packets of a family."""

    family: int
    decide: Decision


def _decision_of(body: Json, scene: Scene) -> Decision:
    memo, family = scene.ruleset.memo, scene.packet.family
    known = memo.get(id(body))
    if known is not None and isinstance(known[1], _Made) and known[1].family == family:
        return known[1].decide
    decide = _decision(body, scene)
    memo[id(body)] = (body, _Made(family, decide))
    return decide


def _decision(body: Json, scene: Scene) -> Decision:
    """What is compared; of the scene, only the rule set and the packet's family are looked at."""
    op, right = body["op"], body["right"]
    if op not in ("==", "!=", "in", "!", *_ORDER):
        raise ValueError(f"the operator {op!r} is not known")
    negated = op in ("!=", "!")
    types = types_of(body["left"], scene)
    if isinstance(right, bool):
        return _there(right, negated)
    if isinstance(right, str) and right.startswith("@"):
        name = right[1:]
        return _member(scene.named_set(right)[1], name, negated)
    if isinstance(right, dict) and "set" in right:
        return _member(scene.anonymous(right["set"], types, is_map=False), "", negated)
    if len(types) > 1:
        items = [right]
        return _member(scene.anonymous(items, types, is_map=False), "", negated)
    kind = types[0] if types else "integer"
    if kind == "unsupported":
        return lambda value, _: (_unknown(value) or NotKnown("its data type is not modelled"), "")
    if op in _ORDER:
        return _ordered(_ORDER[op], read_scalar(right, kind))
    if op in ("in", "!"):
        return _any_bit(read_flags(right, kind), negated)
    if isinstance(right, dict) and not {"prefix", "range", "|"} & set(right):
        return _same(right, types, negated)
    pattern = read_pattern(right, kind)

    def compare(value: Value, _: Scene) -> tuple[bool | NotKnown, str]:
        if isinstance(value, NotKnown):
            return value, ""
        if isinstance(value, tuple) or value is BREAK:
            raise ValueError("a concatenation compared with one value")
        return fits(pattern, value) is not negated, ""

    return compare


def _unknown(value: Value) -> NotKnown | None:
    return value if isinstance(value, NotKnown) else None


def _there(wanted: bool, negated: bool) -> Decision:
    """``exists`` and ``missing``: of an interface, an option or a header."""

    def decide(value: Value, _: Scene) -> tuple[bool | NotKnown, str]:
        if isinstance(value, NotKnown):
            return value, ""
        return (bool(value) is wanted) is not negated, ""

    return decide


def _ordered(compare: Callable[[int, int], bool], limit: int | str) -> Decision:
    def decide(value: Value, _: Scene) -> tuple[bool | NotKnown, str]:
        if isinstance(value, NotKnown):
            return value, ""
        if not isinstance(value, int) or not isinstance(limit, int):
            raise ValueError("names are not ordered here")
        return compare(value, limit), ""

    return decide


def _any_bit(bits: int, negated: bool) -> Decision:
    def decide(value: Value, _: Scene) -> tuple[bool | NotKnown, str]:
        if isinstance(value, NotKnown):
            return value, ""
        if not isinstance(value, int):
            raise ValueError("flags of what is not a number")
        return bool(value & bits) is not negated, ""

    return decide


def _same(right: Json, types: tuple[str, ...], negated: bool) -> Decision:
    """Two expressions compared with one another."""

    def decide(value: Value, scene: Scene) -> tuple[bool | NotKnown, str]:
        others = evaluate(right, scene, types)
        other = others[0].value
        if len(others) > 1:
            return NotKnown("a comparison with what is drawn"), ""
        if other is BREAK:
            return False, ""
        for side in (value, other):
            if isinstance(side, NotKnown):
                return side, ""
        return (value == other) is not negated, ""

    return decide


def _member(elements: Elements, name: str, negated: bool) -> Decision:
    of = f" of set {name}" if name else ""

    def decide(value: Value, scene: Scene) -> tuple[bool | NotKnown, str]:
        key = as_key(value)
        change = changed(scene, name, key) if name else None
        if change is not None:
            what = "added to" if change.add else "deleted from"
            return change.add is not negated, f"this packet was {what} set {name} just before"
        found, certain = find_element(elements, key, scene)
        if not found:
            return negated, ""
        first = found[0]
        note = f"element {first.text}{of}"
        if first.gate:
            return NotKnown(f"the {first.gate} of {note}"), note
        if certain or all(not isinstance(part, NotKnown) for part in key):
            return not negated, note if name else ""
        reason = next(part for part in key if isinstance(part, NotKnown))
        return NotKnown(f"whether it is {note}: {reason.reason}"), ""

    return decide
