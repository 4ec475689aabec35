"""Expressions: ``evaluate(JSON) → branches``.

Source: net/netfilter/nft_bitwise.c, nft_numgen.c, nft_hash.c, nft_lookup.c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Final, TypeAlias

from gketrace.ruleset.nft import NftSet
from gketrace.simulate.nft import meta as surroundings
from gketrace.simulate.nft import payload as header
from gketrace.simulate.nft.datatypes import Span, Starts, read_flags, read_pattern
from gketrace.simulate.nft.lookup import find_data
from gketrace.simulate.nft.scene import Scene
from gketrace.simulate.nft.values import (
    BREAK,
    Branch,
    NotKnown,
    Value,
    certain,
    combine,
    merged,
    not_known,
)

__all__ = ["BINARY", "evaluate", "fields", "types_of"]

Json: TypeAlias = Any

MAX_DRAW: Final = 65_536
"""``numgen … mod N`` beyond this is one unknown number instead of N branches."""
_MASK: Final = (1 << 128) - 1

BINARY: Final[Mapping[str, Callable[[int, int], int]]] = {
    "&": lambda a, b: a & b,
    "|": lambda a, b: a | b,
    "^": lambda a, b: a ^ b,
    "<<": lambda a, b: a << b,
    ">>": lambda a, b: a >> b,
}
_WIDTHS: Final[Mapping[str, int]] = {"mark": 32, "ipv4_addr": 32, "inet_service": 16}


def _single(expression: Json) -> tuple[str, Json]:
    """The one key of ``{"payload": …}`` and what is under it; "" for a constant."""
    if isinstance(expression, dict) and len(expression) == 1:
        ((kind, body),) = expression.items()
        return kind, body
    return "", expression


def types_of(expression: Json, scene: Scene) -> tuple[str, ...]:
    """The data types of an expression's fields, which say how constants beside it are read."""
    kind, body = _single(expression)
    if kind == "concat":
        return tuple(t for part in body for t in types_of(part, scene))
    if kind in BINARY:
        return types_of(body[0], scene)
    if kind == "map":
        data = body["data"]
        if isinstance(data, str):
            return scene.named_set(data)[0].data
        return ("integer",)
    read = _TYPES.get(kind)
    return ("integer" if read is None else read(body, scene),)


_TYPES: Final[Mapping[str, Callable[[Json, Scene], str]]] = {
    "payload": lambda body, _: header.payload_type(body),
    "exthdr": lambda body, _: header.exthdr_type(body),
    "meta": lambda body, _: surroundings.meta_type(body),
    "ct": surroundings.ct_type,
    "fib": lambda body, _: surroundings.fib_type(body),
    "socket": lambda body, _: "mark" if body.get("key") == "mark" else "integer",
    "osf": lambda *_: "string",
}


def evaluate(expression: Json, scene: Scene, kinds: tuple[str, ...] = ()) -> tuple[Branch, ...]:
    """What an expression gives; `kinds` are the data types that a constant is read as.

    Raises `ValueError` for what is not understood; `KeyError` and `TypeError` for JSON of another
    shape.
    """
    kind, body = _single(expression)
    if kind == "concat":
        parts = [
            evaluate(part, scene, kinds[i : i + 1] if len(kinds) == len(body) else ())
            for i, part in enumerate(body)
        ]
        return combine(parts, fields)
    if kind in BINARY and not _constant(body):
        return _binary(kind, body, scene, kinds)
    if kind == "map":
        return _map(body, scene, kinds)
    if kind == "numgen":
        return _numgen(body)
    if kind in ("jhash", "symhash"):
        return _hash(kind, body, scene)
    read = _READERS.get(kind)
    if read is not None:
        return certain(read(body, scene))
    if kind in ("rt", "socket", "osf", "ipsec", "sctp chunk"):
        return not_known(f"{kind} {body.get('key') or body.get('name') or ''}".strip())
    if kind and kind not in ("|", "prefix", "range"):
        return not_known(f"the expression {kind} is not modelled")
    return certain(_read_constant(expression, kinds))


_READERS: Final[Mapping[str, Callable[[Json, Scene], Value]]] = {
    "payload": header.payload,
    "exthdr": header.exthdr,
    "tcp option": header.tcp_option,
    "ip option": header.ip_option,
    "meta": surroundings.meta,
    "ct": surroundings.ct,
    "fib": surroundings.fib,
}


def fields(values: tuple[Value, ...]) -> Value:
    """The fields of a concatenation; nested ones are laid flat."""
    flat: list[int | str | NotKnown] = []
    for value in values:
        if isinstance(value, tuple):
            flat += value
        elif value is not BREAK:
            flat.append(value)
    return tuple(flat)


def _constant(parts: Json) -> bool:
    return isinstance(parts, list) and all(isinstance(part, str | int) for part in parts)


def _read_constant(value: Json, kinds: tuple[str, ...]) -> Value:
    kind = kinds[0] if len(kinds) == 1 else "integer"
    if kind == "unsupported":
        raise ValueError(f"{value!r} is of a type that is not modelled")
    if isinstance(value, list):
        return read_flags(value, kind)
    read = read_pattern(value, kind)
    if isinstance(read, Span | Starts):
        raise ValueError(f"a range in place of a value: {value!r}")
    return read


def _binary(kind: str, body: Json, scene: Scene, kinds: tuple[str, ...]) -> tuple[Branch, ...]:
    """``a & b``; newer versions of nft list more than two operands."""
    own = types_of(body[0], scene)
    own = kinds if own == ("integer",) and kinds else own
    operate = BINARY[kind]
    width = _WIDTHS.get(own[0] if own else "", 128)

    def join(values: tuple[Value, ...]) -> Value:
        total = values[0]
        for value in values[1:]:
            if isinstance(total, NotKnown) or isinstance(value, NotKnown):
                if kind == "&" and 0 in (total, value):
                    total = 0
                    continue
                return total if isinstance(total, NotKnown) else value
            if not isinstance(total, int) or not isinstance(value, int):
                raise ValueError(f"{kind} of what is not a number")
            total = operate(total, value) & _MASK & ((1 << width) - 1)
        return total

    shift = kind in ("<<", ">>")
    parts = [
        evaluate(part, scene, ("integer",) if shift and index else own)
        for index, part in enumerate(body)
    ]
    return merged(combine(parts, join))


def _numgen(body: Json) -> tuple[Branch, ...]:
    modulus, offset = int(body["mod"]), int(body.get("offset", 0))
    if not 0 < modulus <= MAX_DRAW:
        return not_known(f"numgen {body['mode']} mod {modulus}")
    if modulus == 1:
        return certain(offset)
    if body["mode"] == "random":
        # nft_ng_random_gen(): reciprocal_scale() of 32 random bits.
        return tuple(
            Branch(
                offset + i, Fraction(1, modulus), f"numgen random mod {modulus} drew {offset + i}"
            )
            for i in range(modulus)
        )
    why = f"numgen inc mod {modulus} counts packets; if its count gives "
    return tuple(Branch(offset + i, None, f"{why}{offset + i}") for i in range(modulus))


def _hash(kind: str, body: Json, scene: Scene) -> tuple[Branch, ...]:
    modulus, offset = int(body["mod"]), int(body.get("offset") or 0)
    if kind == "jhash":
        broken = [b for b in evaluate(body["expr"], scene) if b.value is BREAK]
        if broken:
            return tuple(broken)
    if not 0 < modulus <= MAX_DRAW:
        return not_known(f"{kind} mod {modulus}")
    if modulus == 1:
        return certain(offset)
    why = f"the {kind} of the packet is not known; if it gives "
    return tuple(Branch(offset + i, None, f"{why}{offset + i}") for i in range(modulus))


def _map(body: Json, scene: Scene, kinds: tuple[str, ...]) -> tuple[Branch, ...]:
    """``KEY map DATA``: constants of an anonymous map are read as `kinds`."""

    def read(data: Json, declared: NftSet | None) -> Value:
        return evaluate(data, scene, kinds if declared is None else declared.data)[0].value

    keys = evaluate(body["key"], scene)
    return find_data(body, scene, keys, types_of(body["key"], scene), read)
