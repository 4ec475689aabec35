"""Routing of one namespace, as the kernel does it, over a `NetnsSnapshot`.

`Fib` answers what the kernel's FIB look-ups answer: `output` for locally made packets
(ip_route_output_key_hash_rcu, ip6_route_output_flags), `input` for received ones
(ip_route_input_slow, ip6_route_input_lookup, and what ip_forward and ip6_forward check before
the FORWARD hook), and the questions that netfilter asks the FIB: `address_type`, `reverse_path`,
`masquerade_address`, `redirect_address`.  What is not known is `RouteKind.UNKNOWN` with the
reason, never a guess.

The parts are in `gketrace.simulate.fib`: rules.py (policy rules), table.py (longest prefix),
ipv4.py and ipv6.py (tables), output4.py, input4.py and path6.py (the two ways in), saddr4.py and
saddr6.py (source addresses), segments.py (destinations that are all routed alike).
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

from gketrace.packet import IPAddress, Packet
from gketrace.simulate.fib import netfilter4, netfilter6
from gketrace.simulate.fib.decision import RouteDecision, RouteKind
from gketrace.simulate.fib.ipv4 import Ipv4Tables
from gketrace.simulate.fib.ipv6 import Ipv6Tables
from gketrace.simulate.fib.output4 import output4
from gketrace.simulate.fib.path6 import input6, output6
from gketrace.simulate.fib.rules import Flow
from gketrace.simulate.fib.saddr4 import select_address
from gketrace.simulate.fib.saddr6 import select_address6
from gketrace.simulate.fib.segments import InputMemo
from gketrace.simulate.fib.view import SCOPE_UNIVERSE, NetView, NotKnown
from gketrace.simulate.state import Ternary
from gketrace.snapshot import NetnsSnapshot

__all__ = ["Fib", "RouteDecision", "RouteKind"]


class Fib:
    """The routing of one namespace.  Indexes are built on first use and kept."""

    def __init__(self, snapshot: NetnsSnapshot) -> None:
        self._view = NetView(snapshot)
        self._v4 = Ipv4Tables(self._view)
        self._v6 = Ipv6Tables(self._view)
        self._memo = InputMemo(self._v4)

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
        any_source: bool = False,
    ) -> tuple[RouteDecision, ...]:
        """Where a locally made packet goes, and its source address when `src` is None.

        `oif` is the device that the socket is bound to.  `tos` is the whole TOS byte.  None for
        `protocol`, a port or `uid` means not known: a policy rule that looks at it gives both
        continuations, each with chance None.  Multipath gives one decision per next hop.
        `any_source`: `src` is not checked, as when ip_route_me_harder() routes a packet again.
        """
        flow = Flow(
            family=dst.version,
            dst=int(dst),
            src=int(src) if src is not None else 0,
            oif=oif,
            mark=mark,
            tos=tos & 0xFC,
            protocol=protocol,
            sport=sport,
            dport=dport,
            uid=uid,
            any_source=any_source,
        )
        try:
            if dst.version == 4:
                return output4(self._v4, flow)
            return output6(self._v6, flow)
        except NotKnown as reason:
            return _unknown(reason)

    def input(self, packet: Packet, iif: str) -> tuple[RouteDecision, ...]:
        """What becomes of a packet received through interface `iif`, all checks included.

        FORWARD means that the packet reaches the FORWARD hook, LOCAL and BROADCAST the INPUT hook.
        """
        try:
            if packet.family == 6:
                return input6(self._v6, packet, iif)
            return self._memo.ask(packet, iif)
        except NotKnown as reason:
            return _unknown(reason)

    def address_type(self, address: IPAddress, interface: str | None = None) -> str | None:
        """``unicast``, ``local``, ``broadcast`` … as xt_addrtype sees it; None: not known.

        With `interface`, as with ``--limit-iface-in`` or ``-out``: only what that interface has.
        For IPv6 the answer is the most special type; `address_types` gives all that hold.
        """
        types = self.address_types(address, interface)
        if types is None:
            return None
        order = ("multicast", "local", "anycast", "unreachable", "broadcast", "unspec")
        return next((name for name in order if name in types), min(types))

    def address_types(
        self, address: IPAddress, interface: str | None = None
    ) -> frozenset[str] | None:
        """All names of xt_addrtype that match; None: not known.

        IPv4 has exactly one.  In IPv6 a local address is ``unicast`` too (match_type6).
        """
        try:
            if isinstance(address, IPv4Address):
                return frozenset({netfilter4.address_type(self._v4, int(address), interface)})
            return netfilter6.address_types(self._v6, int(address), interface)
        except NotKnown:
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
        if not validmark:
            packet = replace(packet, mark=0)
        try:
            if packet.family == 4:
                answers = netfilter4.reverse_path(self._v4, packet, iif, loose, accept_local)
            else:
                answers = netfilter6.reverse_path(self._v6, packet, iif, loose, accept_local)
        except NotKnown:
            return Ternary.UNKNOWN
        if len(answers) != 1:
            return Ternary.UNKNOWN
        return Ternary.YES if answers.pop() else Ternary.NO

    def masquerade_address(
        self, oif: str, packet: Packet, next_hop: IPAddress | None
    ) -> IPAddress | None:
        """The address that MASQUERADE puts in (nf_nat_masquerade_ipv4/6).

        `next_hop` is the gateway of the packet's route, None when the destination is on the link.
        None: not known, or there is none (the kernel then drops the packet).
        """
        try:
            device = self._view.link(oif)
            if packet.family == 6:
                return select_address6(self._view, device, int(packet.dst))
            gateway = next_hop if isinstance(next_hop, IPv4Address) else packet.dst
            return select_address(self._view, device, int(gateway), SCOPE_UNIVERSE)
        except NotKnown:
            return None

    def redirect_address(
        self, family: int, iif: str, dst: IPAddress | None = None
    ) -> IPAddress | None:
        """The address that REDIRECT puts in (nf_nat_redirect_ipv4/6).

        `iif` is the input interface, ``""`` for packets made here; `dst` the packet's destination,
        whose scope counts in IPv6.  None: not known, or there is none (the kernel then drops it).
        """
        if not iif:
            return IPv4Address("127.0.0.1") if family == 4 else IPv6Address("::1")
        try:
            device = self._view.link(iif)
            addresses = self._view.addresses_of.get((device.ifindex, family), ())
        except NotKnown:
            return None
        if family == 4:
            return addresses[0].address if addresses else None
        return netfilter6.redirect(addresses, dst)


def _unknown(reason: NotKnown) -> tuple[RouteDecision, ...]:
    return (RouteDecision(kind=RouteKind.UNKNOWN, chance=None, detail=str(reason)),)
