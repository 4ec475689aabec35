"""Addresses of interfaces (RTM_NEWADDR).

Source: kernel net/ipv4/devinet.c inet_fill_ifaddr(), net/ipv6/addrconf.c inet6_fill_ifaddr().
"""

from __future__ import annotations

import socket
from ipaddress import ip_address
from typing import Final

from gketrace.snapshot import Address
from gketrace_agent.kernel.netlink import attributes, text, u32
from gketrace_agent.kernel.reader import KernelReader
from gketrace_agent.kernel.rtnetlink import ADDRESS_HEADER, dump_addresses
from gketrace_agent.observe.names import scope_name

__all__ = ["observe_addresses"]

_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
_IFA_LABEL: Final = 3
_IFA_FLAGS: Final = 8

_FLAGS: Final = (
    (0x01, "secondary"),
    (0x02, "nodad"),
    (0x04, "optimistic"),
    (0x08, "dadfailed"),
    (0x10, "home"),
    (0x20, "deprecated"),
    (0x40, "tentative"),
    (0x80, "permanent"),
    (0x100, "mngtmpaddr"),
    (0x200, "noprefixroute"),
    (0x400, "autojoin"),
    (0x800, "stable-privacy"),
)


def observe_addresses(reader: KernelReader) -> tuple[Address, ...]:
    """All addresses, both families, in the kernel's order."""
    found = []
    for message in reader.messages("addresses", dump_addresses(reader.rtnl)):
        family, prefixlen, flags, scope, ifindex = ADDRESS_HEADER.unpack_from(message.body)
        if family not in (socket.AF_INET, socket.AF_INET6):
            continue
        values = attributes(message.body, ADDRESS_HEADER.size)
        if _IFA_FLAGS in values:
            flags = u32(values[_IFA_FLAGS])
        # On a point-to-point link IFA_ADDRESS is the peer; without a peer both are equal, and
        # IPv6 leaves IFA_LOCAL out.
        far = ip_address(values[_IFA_ADDRESS])
        near = ip_address(values[_IFA_LOCAL]) if _IFA_LOCAL in values else far
        names = tuple(name for bit, name in _FLAGS if flags & bit)
        if family == socket.AF_INET6:
            names = tuple("temporary" if name == "secondary" else name for name in names)
        found.append(
            Address(
                ifindex=ifindex,
                address=near,
                prefixlen=prefixlen,
                scope=scope_name(scope),
                label=text(values.get(_IFA_LABEL, b"")),
                peer=far if far != near else None,
                flags=names,
            )
        )
    return tuple(found)
