"""What expressions see: the packet, the namespace, the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from gketrace.packet import Packet
from gketrace.ruleset.nft import NftRuleset, NftSet
from gketrace.simulate.nft.sets import Elements, index_elements
from gketrace.simulate.state import Environment, PacketState
from gketrace.snapshot import Link

__all__ = ["NftEnvironment", "Scene"]

Json: TypeAlias = Any


class NftEnvironment(Environment, Protocol):
    """What nftables' expressions need to know beside what iptables' matches do."""

    @property
    def links(self) -> Mapping[str, Link]:
        """The namespace's interfaces by name; empty when they are not known."""


@dataclass(slots=True)
class Scene:
    """One packet before one expression.  Not frozen only because that takes twice as long."""

    state: PacketState
    env: NftEnvironment
    ruleset: NftRuleset

    @property
    def packet(self) -> Packet:
        return self.state.packet

    def named_set(self, reference: str) -> tuple[NftSet, Elements]:
        """``@NAME`` → the set and its indexed elements.  Raises `ValueError`."""
        name = reference.removeprefix("@")
        found = self.ruleset.set(name)
        if found is None:
            raise ValueError(f"no set {name} in table {self.ruleset.table}")
        return found, self._indexed(found.elements, found.types, is_map=found.is_map)

    def anonymous(self, items: Json, types: tuple[str, ...], *, is_map: bool) -> Elements:
        """The elements of ``{"set": items}`` in a rule, whose key has `types`."""
        listed = items if isinstance(items, list) else [items]
        return self._indexed(items, types, is_map=is_map, listed=listed)

    def _indexed(
        self, piece: Json, types: tuple[str, ...], *, is_map: bool, listed: Json = None
    ) -> Elements:
        memo = self.ruleset.memo
        known = memo.get(id(piece))
        if known is not None and isinstance(known[1], Elements) and known[1].types == types:
            return known[1]
        made = index_elements(piece if listed is None else listed, types, is_map=is_map)
        memo[id(piece)] = (piece, made)
        return made
