"""Routing of one namespace, as the kernel does it, over a `NetnsSnapshot`.

`Fib` answers what the kernel's FIB look-ups answer: `output` for locally made packets
(ip_route_output_key_hash_rcu, ip6_route_output_flags), `input` for received ones
(ip_route_input_slow, ip6_route_input_lookup).  What is not known is `RouteKind.UNKNOWN` with the
reason, never a guess.
"""

from __future__ import annotations

from gketrace.packet import IPAddress, Packet
from gketrace.simulate.fib.decision import RouteDecision, RouteKind
from gketrace.simulate.state import Ternary
from gketrace.snapshot import NetnsSnapshot

__all__ = ["Fib", "RouteDecision", "RouteKind"]

_PENDING = RouteDecision(kind=RouteKind.UNKNOWN, detail="routing is not simulated by this build")


class Fib:
    """The routing of one namespace.  Indexes are built on first use and kept."""

    def __init__(self, snapshot: NetnsSnapshot) -> None:
        self._snapshot = snapshot

    def output(
        self,
        dst: IPAddress,
        *,
        src: IPAddress | None = None,
        oif: str = "",
        mark: int = 0,
        tos: int = 0,
        protocol: int | None = None,
        sport: int | None = None,
        dport: int | None = None,
        uid: int | None = None,
    ) -> tuple[RouteDecision, ...]:
        """Where a locally made packet goes, and its source address when `src` is None.

        `oif` is the device that the socket is bound to.  `tos` is the whole TOS byte.  None for
        `protocol`, a port or `uid` means not known: a policy rule that looks at it gives both
        continuations, each with chance None.  Multipath gives one decision per next hop.
        """
        return (_PENDING,)

    def input(self, packet: Packet, iif: str) -> tuple[RouteDecision, ...]:
        """What becomes of a packet received through interface `iif` (checks included)."""
        return (_PENDING,)

    def address_type(self, address: IPAddress, interface: str | None = None) -> str | None:
        """``unicast``, ``local``, ``broadcast`` … as xt_addrtype sees it; None: not known.

        With `interface`, as with ``--limit-iface-in/out``: types hold for that interface only.
        """
        return None

    def reverse_path(
        self,
        packet: Packet,
        iif: str,
        *,
        loose: bool = False,
        validmark: bool = False,
        accept_local: bool = False,
    ) -> Ternary:
        """Whether ``-m rpfilter`` (without --invert) matches: the reverse path is fine."""
        return Ternary.UNKNOWN

    def masquerade_address(
        self, oif: str, packet: Packet, next_hop: IPAddress | None
    ) -> IPAddress | None:
        """The address that MASQUERADE puts in (nf_nat_masquerade_ipv4/6); None: not known.

        `next_hop` is the gateway of the packet's route, None when the destination is on the link.
        """
        return None

    def redirect_address(self, family: int, iif: str) -> IPAddress | None:
        """The address that REDIRECT puts in: `iif`'s primary one, or the loopback's for ``""``.

        None: not known, or `iif` has none (the kernel then drops the packet).
        """
        return None
