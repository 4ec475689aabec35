"""What stands on a hook."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from gketrace.ruleset.model import BaseChain, Ruleset

__all__ = ["Station", "StationKind"]


class StationKind(IntEnum):
    """What stands on a hook; the numbers order stations of one priority."""

    CONNTRACK = 0
    """nf_conntrack_in."""
    CHAIN = 1
    """A base chain that filters or mangles."""
    NAT_CHAIN = 2
    """A base chain of type nat: asked until one of them has settled this side's NAT."""
    NAT = 3
    """nf_nat_packet: what was settled is carried out."""
    CONFIRM = 4
    """nf_conntrack_confirm: the entry enters the table."""
    TIE = 5
    """Several of the above, in an order that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """One thing that a packet meets on a hook."""

    kind: StationKind
    priority: int
    """enum nf_ip_hook_priorities; for chains of type nat that of the nat hook itself."""
    order: int = 0
    """For NAT_CHAIN: the chain's own priority, which orders it among them."""
    ruleset: Ruleset | None = None
    chain: BaseChain | None = None
    orders: tuple[tuple[Station, ...], ...] = ()
    """For TIE: the orders that are possible."""
