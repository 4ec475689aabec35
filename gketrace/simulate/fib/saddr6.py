"""IPv6 source selection: ipv6_dev_get_saddr (net/ipv6/addrconf.c), which is RFC 6724.

The label table is the kernel's default one (RFC 6724, section 2.1, as in net/ipv6/addrlabel.c).
"""

from __future__ import annotations

from typing import Final

from gketrace.packet import IPAddress
from gketrace.simulate.fib.address import LOOPBACK6, is_link_local6, is_multicast6
from gketrace.simulate.fib.view import NetView, NotKnown
from gketrace.snapshot import Address, Link

__all__ = ["select_address6"]

_SCOPE_GLOBAL: Final = 14
_SCOPE_SITE: Final = 5
_SCOPE_LINK: Final = 2
_SCOPE_INVALID: Final = -1

_LABELS: Final[tuple[tuple[int, int, int], ...]] = (
    (0x1, 128, 0),
    (0x0000_0000_0000_0000_0000_FFFF_0000_0000, 96, 4),
    (0x0, 96, 3),
    (0x2001 << 112, 32, 6),
    ((0x2001 << 112) | (0x10 << 96), 28, 7),
    (0x2002 << 112, 16, 2),
    (0x3FFE << 112, 16, 12),
    (0xFEC0 << 112, 10, 11),
    (0xFC00 << 112, 7, 5),
    (0x0, 0, 1),
)
"""(prefix, length, label), longest first where they overlap."""


def select_address6(view: NetView, device: Link | None, dst: int) -> IPAddress | None:
    """The source for a packet to `dst` through `device`.  None: there is no usable address.

    Raises `NotKnown` where two addresses of different interfaces are equally good: the kernel
    takes the one of the interface that it lists first, and does not show that order.
    """
    if device is None:
        return _best(view, view.links, None, dst)
    # Multicast and link-local destinations are reached from the link itself only.
    if is_multicast6(dst) or _scope(dst) <= _SCOPE_LINK:
        return _best(view, (device,), device, dst)
    everywhere = _best(view, view.links, device, dst)
    own_only = _best(view, (device,), device, dst)
    if everywhere == own_only:
        return everywhere
    return own_only if view.conf(6, device.name, "use_oif_addrs_only") else everywhere


def _best(
    view: NetView, devices: tuple[Link, ...], device: Link | None, dst: int
) -> IPAddress | None:
    scope = _scope(dst)
    best: tuple[int, ...] | None = None
    chosen: list[tuple[Link, Address]] = []
    for link in devices:
        for address in view.addresses_of.get((link.ifindex, 6), ()):
            if "tentative" in address.flags and "optimistic" not in address.flags:
                continue
            score = _score(view, link, address, device, dst, scope)
            if best is None or score > best:
                best, chosen = score, [(link, address)]
            elif score == best:
                chosen.append((link, address))
    if not chosen:
        return None
    first_link, first = chosen[0]
    rivals = {a.address for link, a in chosen if link.ifindex != first_link.ifindex}
    if first_link.ifindex != 1 and rivals - {first.address}:
        raise NotKnown(
            f"several addresses are equally good sources ({first.address} and "
            f"{', '.join(map(str, sorted(rivals)))}), and the kernel takes that of the interface "
            "that it lists first, in an order that it does not show"
        )
    return first.address


def _score(
    view: NetView, link: Link, address: Address, device: Link | None, dst: int, scope: int
) -> tuple[int, ...]:
    """ipv6_get_saddr_eval, rule by rule; a greater tuple is a better source."""
    number = int(address.address)
    source_scope = _scope(number)
    preferred = number == LOOPBACK6 or number >> 32 in (0, 0xFFFF)
    if not preferred:
        preferred = "deprecated" not in address.flags and "optimistic" not in address.flags
    temporary = "temporary" in address.flags
    common = 128 - (number ^ dst).bit_length()
    return (
        int(number == dst),
        -source_scope if source_scope >= scope else source_scope - 128,
        int(preferred),
        int("home" in address.flags),
        int(device is None or device.ifindex == link.ifindex),
        int(_label(number) == _label(dst)),
        # Whether temporary addresses are wanted is asked only where there are any.
        int(not temporary or view.conf(6, link.name, "use_tempaddr") >= 2),
        int(_is_orchid(number) == _is_orchid(dst)),
        min(common, address.prefixlen),
        int("optimistic" not in address.flags),
    )


def _scope(address: int) -> int:
    """__ipv6_addr_src_scope of the address's type."""
    if not address:
        return _SCOPE_INVALID
    if is_multicast6(address):
        return (address >> 112) & 0xF
    if address == LOOPBACK6 or is_link_local6(address):
        return _SCOPE_LINK
    if address >> 118 == 0xFEC0 >> 6:
        return _SCOPE_SITE
    return _SCOPE_GLOBAL


def _label(address: int) -> int:
    for prefix, length, label in _LABELS:
        if not (address ^ prefix) >> (128 - length):
            return label
    return 1


def _is_orchid(address: int) -> bool:
    """2001:10::/28 (RFC 4843)."""
    return address >> 100 == 0x2001001
