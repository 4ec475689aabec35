"""Netlink attributes with their places: what a rule's bytes say, and where.

Source: include/uapi/linux/netfilter/nf_tables.h (NFTA_LIST_ELEM, NFTA_EXPR_NAME, NFTA_EXPR_DATA,
NFTA_DATA_VALUE).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final, NamedTuple, TypeAlias

from gketrace_agent.kernel.nft_rules.words import NotRendered, string

__all__ = [
    "Place",
    "Places",
    "expressions",
    "number",
    "numbers",
    "places",
    "value_of",
    "value_place",
]

_ATTRIBUTE: Final = struct.Struct("=HH")
_TYPE_MASK: Final = 0x3FFF


class Place(NamedTuple):
    """A payload: bytes `start` to `end`."""

    start: int
    end: int


Places: TypeAlias = Mapping[int, Place]
"""Attribute number → its payload."""


def places(data: bytes, start: int, end: int) -> dict[int, Place]:
    """The attributes from `start` to `end`.  Raises ValueError when lengths do not fit or one comes
    twice."""
    found: dict[int, Place] = {}
    while start + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        kind &= _TYPE_MASK
        if length < 4 or start + length > end or kind in found:
            raise ValueError(f"netlink attribute {kind} of {length} bytes at {start} of {end}")
        found[kind] = Place(start + 4, start + length)
        start += (length + 3) & ~3
    return found


def expressions(data: bytes, start: int, end: int) -> list[tuple[str, dict[int, Place]]]:
    """(name, attributes) of each expression of a rule.  Raises ValueError."""
    found = []
    while start + 4 <= end:
        length, _ = _ATTRIBUTE.unpack_from(data, start)
        if length < 4 or start + length > end:
            raise ValueError(f"an nf_tables expression of {length} bytes at {start}")
        parts = places(data, start + 4, start + length)
        if 1 not in parts:
            raise ValueError("an nf_tables expression without a name")
        inner = places(data, *parts[2]) if 2 in parts else {}
        found.append((string(data[slice(*parts[1])]), inner))
        start += (length + 3) & ~3
    return found


def number(data: bytes, attribute: Place) -> int:
    """Big-endian, as all numbers of nf_tables' own."""
    return int.from_bytes(data[attribute.start : attribute.end], "big")


def numbers(data: bytes, attributes: Places, known: set[int], what: str) -> dict[int, int]:
    """All of `attributes` as numbers.  Raises NotRendered when there are others than `known`."""
    if set(attributes) - known:
        raise NotRendered(f"{what} with attributes {sorted(attributes)}")
    return {key: number(data, attribute) for key, attribute in attributes.items()}


def value_place(data: bytes, attribute: Place) -> Place:
    """Where the plain value is that an attribute holds (NFTA_DATA_VALUE)."""
    inner = places(data, *attribute)
    if set(inner) != {1}:
        raise NotRendered("a comparison with something else than a value")
    return inner[1]


def value_of(data: bytes, attribute: Place) -> bytes:
    """The plain value itself."""
    return data[slice(*value_place(data, attribute))]
