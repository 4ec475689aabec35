"""What a walk is asked."""

from __future__ import annotations

from dataclasses import dataclass

from gketrace.packet import Packet
from gketrace.trace import Flow, Ingress

__all__ = ["WalkQuery"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkQuery:
    """One packet, and where it is."""

    ingress: Ingress
    """The namespace it is in, and the interface that receives it; without an interface, a local
    process sends it (an unspecified `Packet.src` is then selected as the kernel selects it)."""
    packet: Packet
    flows: tuple[Flow, ...] = ()
    """Entries that earlier parts of the same trace have made, in any namespace of this node.
    They are found before the kernel's own."""
    use_conntrack: bool = True
    """False: the kernel's entries are not looked up; only new connections are of interest."""
