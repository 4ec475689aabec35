"""IPv4 source addresses: inet_select_addr and who owns an address (net/ipv4/devinet.c)."""

from __future__ import annotations

from gketrace.packet import IPAddress
from gketrace.simulate.fib.view import (
    SCOPE_HOST,
    SCOPE_LINK,
    NetView,
    NotKnown,
    scope_number,
)
from gketrace.snapshot import Address, Link

__all__ = ["select_address"]


def select_address(view: NetView, device: Link, dst: int, scope: int) -> IPAddress | None:
    """inet_select_addr(device, dst, scope): the source for a packet through `device`.

    `dst` is the next hop as a number, 0 for none.  None: no interface has a usable address.
    Raises `NotKnown` where the kernel's order of interfaces decides, which it does not show.
    """
    own = view.addresses_of.get((device.ifindex, 4), ())
    # route_localnet is needed only where an address of host scope would make the difference.
    first: Address | None = None
    for address in own:
        if "secondary" in address.flags:
            continue
        if min(_scope(address), _localnet_scope(view, device, address)) > scope:
            continue
        if not dst or _on_link(address, dst):
            return address.address
        if first is None:
            first = address
    if first is not None:
        return first.address
    return _any_device(view, scope)


def _localnet_scope(view: NetView, device: Link, address: Address) -> int:
    if _scope(address) < SCOPE_HOST:
        return SCOPE_HOST
    return SCOPE_LINK if view.conf_or(4, device.name, "route_localnet") else SCOPE_HOST


def _scope(address: Address) -> int:
    return scope_number(address.scope)


def _on_link(address: Address, dst: int) -> bool:
    """inet_ifa_match: against the peer's prefix, where there is a peer (ifa_address)."""
    base = int(address.peer if address.peer is not None else address.address)
    return not (base ^ dst) >> (32 - address.prefixlen)


def _any_device(view: NetView, scope: int) -> IPAddress | None:
    """The search over all devices: the loopback first, the rest in order of registration.

    Where some device's place in that order is not shown, devices that disagree are not known.
    """
    candidates: list[tuple[Link, IPAddress]] = []
    for link in view.links:
        for address in view.addresses_of.get((link.ifindex, 4), ()):
            if "secondary" in address.flags:
                continue
            number = _scope(address)
            if number != SCOPE_LINK and number <= scope:
                if link.ifindex == 1:
                    return address.address
                candidates.append((link, address.address))
                break
    found = {address for _, address in candidates}
    ranks = [link.rank for link, _ in candidates]
    if len(found) > 1 and None not in ranks:
        return min(candidates, key=lambda candidate: candidate[0].rank or 0)[1]
    if len(found) > 1:
        names = ", ".join(f"{address} of {link.name}" for link, address in candidates)
        raise NotKnown(
            "the output interface has no address of its own, and the kernel takes the first of "
            f"another interface in an order that it does not show ({names})"
        )
    return found.pop() if found else None
