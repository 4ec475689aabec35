"""What netfilter asks the IPv6 FIB: -m addrtype, -m rpfilter, REDIRECT."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv6Address

from gketrace.packet import IPAddress, Packet
from gketrace.simulate.fib.address import LOOPBACK6, is_link_local6, is_multicast6
from gketrace.simulate.fib.ipv6 import Ipv6Tables
from gketrace.simulate.fib.path6 import needs_strict
from gketrace.simulate.fib.rules import Flow
from gketrace.simulate.fib.view import NotKnown
from gketrace.snapshot import Address, NextHop, Route, RouteType

__all__ = ["address_types", "redirect", "reverse_path"]


def address_types(tables: Ipv6Tables, address: int, interface: str | None) -> frozenset[str]:
    """match_type6 and match_lookup_rt6 (net/netfilter/xt_addrtype.c)."""
    if not address:
        return frozenset({"unspec"})
    if is_multicast6(address):
        return frozenset({"multicast"})
    view = tables.view
    found: set[str] = {"unicast"}
    oif = interface or ""
    if interface is not None:
        ifindex = view.link(interface).ifindex
        own = view.addresses_of.get((ifindex, 6), ())
        if any(int(a.address) == address and "tentative" not in a.flags for a in own):
            found.add("local")
    flow = Flow(family=6, dst=address, oif=oif, uid=None)
    strict = needs_strict(address) or bool(oif)
    answers: set[frozenset[str]] = set()
    for outcome in tables.lookup(flow, oif, strict=strict):
        hit = outcome.hit
        more: set[str] = set()
        if hit is None or hit.error or hit.route is None:
            more.add("unreachable")
        elif hit.route.type is RouteType.LOCAL and interface is None:
            more.add("local")
        elif _anycast(tables, hit.route, hit.hop, address):
            more.add("anycast")
        answers.add(frozenset(found | more))
    if len(answers) != 1:
        raise NotKnown("the type of the address hangs on a policy rule that is not decided")
    return answers.pop()


def _anycast(tables: Ipv6Tables, route: Route, hop: NextHop | None, address: int) -> bool:
    """ipv6_anycast_destination: an anycast route, or the subnet's own address on the link."""
    if route.type is RouteType.ANYCAST and tables.over_loopback(route):
        return True
    if hop is None or hop.gateway is not None or route.dst.prefixlen >= 127:
        return False
    return int(route.dst.network_address) == address


def reverse_path(
    tables: Ipv6Tables, packet: Packet, iif: str, loose: bool, accept_local: bool
) -> set[bool]:
    """rpfilter_mt (net/ipv6/netfilter/ip6t_rpfilter.c); two answers where it is not known."""
    view = tables.view
    device = view.link(iif)
    src, dst = int(packet.src), int(packet.dst)
    if "LOOPBACK" in device.flags or not src:
        return {True}
    link_local = is_link_local6(src)
    oif = iif if link_local or not loose else ""
    flow = Flow(
        family=6,
        dst=src,
        src=0 if is_multicast6(dst) else dst,
        oif=oif,
        mark=packet.mark,
        tos=packet.dscp << 2,
        protocol=packet.protocol,
    )
    answers: set[bool] = set()
    for outcome in tables.device_match(flow, oif, strict=link_local):
        hit = outcome.hit
        if (
            hit is None
            or hit.error
            or hit.route is None
            or hit.hop is None
            or hit.route.type is RouteType.ANYCAST
        ):
            answers.add(False)
        elif hit.route.type is RouteType.LOCAL:
            answers.add(accept_local)
        else:
            answers.add(loose or hit.hop.oif == device.ifindex)
    return answers


def redirect(addresses: Iterable[Address], dst: IPAddress | None) -> IPAddress | None:
    """nf_nat_redirect_ipv6_usable: the first address of the destination's scope."""
    number = int(dst) if isinstance(dst, IPv6Address) else 0
    for address in addresses:
        own = int(address.address)
        if own >> 32 == 0xFFFF:
            continue
        if "tentative" in address.flags and "optimistic" not in address.flags:
            continue
        if is_link_local6(number) and not is_link_local6(own):
            continue
        if number == LOOPBACK6 and own != LOOPBACK6:
            continue
        return address.address
    return None
