"""What netfilter asks the IPv4 FIB: -m addrtype and -m rpfilter."""

from __future__ import annotations

from gketrace.packet import Packet
from gketrace.simulate.fib.address import (
    is_broadcast,
    is_local_multicast,
    is_multicast,
    is_zeronet,
)
from gketrace.simulate.fib.ipv4 import Ipv4Tables
from gketrace.simulate.fib.rules import Flow
from gketrace.snapshot import RouteType

__all__ = ["address_type", "reverse_path"]


def address_type(tables: Ipv4Tables, address: int, interface: str | None) -> str:
    """inet_dev_addr_type: the local table alone decides (net/ipv4/fib_frontend.c)."""
    if is_zeronet(address) or is_broadcast(address):
        return "broadcast"
    if is_multicast(address):
        return "multicast"
    hit = tables.local(address)
    if hit is None or hit.route is None:
        return "unicast"
    if interface is not None:
        first = hit.route.next_hops[0] if hit.route.next_hops else None
        if first is None or first.oif != tables.view.link(interface).ifindex:
            return "unicast"
    return hit.route.type.value


def reverse_path(
    tables: Ipv4Tables, packet: Packet, iif: str, loose: bool, accept_local: bool
) -> set[bool]:
    """rpfilter_mt (net/ipv4/netfilter/ipt_rpfilter.c); two answers where it is not known."""
    view = tables.view
    device = view.link(iif)
    src, dst = int(packet.src), int(packet.dst)
    if "LOOPBACK" in device.flags:
        return {True}
    if is_multicast(dst) and is_zeronet(src):
        return {is_local_multicast(dst)}
    if is_multicast(dst) or is_broadcast(dst) or is_zeronet(dst):
        dst = 0
    flow = Flow(family=4, dst=src, src=dst, mark=packet.mark, tos=packet.dscp << 2)
    answers: set[bool] = set()
    for outcome in tables.lookup(flow, ignore_linkstate=True):
        hit = outcome.hit
        if (
            hit is None
            or hit.error
            or hit.route is None
            or (
                hit.route.type is not RouteType.UNICAST
                and not (hit.route.type is RouteType.LOCAL and accept_local)
            )
        ):
            answers.add(False)
        else:
            answers.add(loose or tables.uses_device(hit.route, device.ifindex))
    return answers
