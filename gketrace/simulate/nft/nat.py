"""dnat, snat, masquerade, redirect: what they ask for (nft_nat.c, nft_masq.c, nft_redir.c)."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any, TypeAlias

from gketrace.packet import IPAddress
from gketrace.ruleset.nft import NftSet
from gketrace.simulate.nft.datatypes import Span, read_pattern
from gketrace.simulate.nft.expressions import evaluate, types_of
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
)
from gketrace.simulate.state import NatRequest

__all__ = ["NatWay", "nat_ways"]

Json: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class NatWay:
    """One thing that a nat statement may ask for."""

    branch: Branch
    """Its value is BREAK or `NotKnown` where there is no request."""
    request: NatRequest | None
    """None with another value: the statement is for the other family and does nothing."""


def nat_ways(kind: str, body: Json, scene: Scene) -> list[NatWay]:
    """Raises `ValueError` for what is not understood."""
    body = body or {}
    flags = _listed(body.get("flags", ()))
    source = kind in ("snat", "masquerade")
    family = {"ip": 4, "ip6": 6}.get(body.get("family", ""), scene.packet.family)
    if family != scene.packet.family:
        return [NatWay(Branch(1), None)]
    ways: list[NatWay] = []
    for branch in _targets(body, scene, family):
        if branch.value is BREAK or isinstance(branch.value, NotKnown):
            ways.append(NatWay(branch, None))
            continue
        assert isinstance(branch.value, tuple)
        low, high, first, last = (v if isinstance(v, int) else -1 for v in branch.value)
        addresses = None if low < 0 else (_address(low, family), _address(high, family))
        request = NatRequest(
            source=source,
            addresses=addresses,
            ports=None if first < 0 else (first, last),
            masquerade=kind == "masquerade",
            redirect=kind == "redirect",
            netmap="netmap" in flags,
            random="random" in flags,
            random_fully="fully-random" in flags,
            persistent="persistent" in flags,
        )
        ways.append(NatWay(branch, request))
    return ways


def _listed(value: Json) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _address(number: int, family: int) -> IPAddress:
    return IPv4Address(number) if family == 4 else IPv6Address(number)


def _targets(body: Json, scene: Scene, family: int) -> tuple[Branch, ...]:
    """Branches of ``(low address, high address, first port, last port)``; -1: none is given."""
    address = "ipv4_addr" if family == 4 else "ipv6_addr"
    parts = [
        _ranges(body.get("addr"), scene, (address, "inet_service"), 4),
        _ranges(body.get("port"), scene, ("inet_service",), 2),
    ]

    def join(values: tuple[Value, ...]) -> Value:
        where, port = values
        for value in values:
            if isinstance(value, NotKnown):
                return value
        assert isinstance(where, tuple)
        assert isinstance(port, tuple)
        # A concatenation ``address . port`` has given both already.
        return (*where[:2], *(port if port[0] != -1 else where[2:]))

    return merged(combine(parts, join))


def _ranges(value: Json, scene: Scene, kinds: tuple[str, ...], size: int) -> tuple[Branch, ...]:
    """`value` as pairs of lowest and highest, filled up with -1 to `size` numbers."""
    if value is None:
        return certain((-1,) * size)
    if isinstance(value, dict) and "map" in value:
        body = value["map"]

        def read(data: Json, declared: NftSet | None) -> Value:
            own = kinds if declared is None else declared.data
            return _constants(data, own, size)

        keys = evaluate(body["key"], scene)
        return find_data(body, scene, keys, types_of(body["key"], scene), read)
    if isinstance(value, dict) and not {"range", "prefix", "concat"} & set(value):
        found = []
        for branch in evaluate(value, scene, kinds[:1]):
            wide: Value = branch.value
            if isinstance(wide, int):
                wide = (wide, wide, *(-1,) * (size - 2))
            found.append(Branch(wide, branch.chance, branch.drawn, branch.note))
        return tuple(found)
    return certain(_constants(value, kinds, size))


def _constants(value: Json, kinds: tuple[str, ...], size: int) -> Value:
    parts = value["concat"] if isinstance(value, dict) and "concat" in value else [value]
    numbers: list[int] = []
    for part, kind in zip(parts, kinds, strict=False):
        pattern = read_pattern(part, kind)
        if isinstance(pattern, Span):
            numbers += (pattern.low, pattern.high)
        elif isinstance(pattern, int):
            numbers += (pattern, pattern)
        else:
            raise ValueError(f"{part!r} is no address or port")
    return tuple(numbers + [-1] * (size - len(numbers)))
