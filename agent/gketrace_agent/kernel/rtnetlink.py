"""What is asked of rtnetlink, and the fixed headers of what it answers.

Source: kernel net/core/rtnetlink.c, net/core/net_namespace.c, net/core/neighbour.c,
net/ipv4/fib_frontend.c, net/ipv6/route.c, include/uapi/linux/rtnetlink.h.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from gketrace_agent.kernel.netlink import (
    Dump,
    Message,
    NetlinkSocket,
    attribute,
    attributes,
)

__all__ = [
    "ADDRESS_HEADER",
    "LINK_HEADER",
    "NEIGHBOUR_HEADER",
    "ROUTE_HEADER",
    "dump_addresses",
    "dump_fdb",
    "dump_links",
    "dump_neighbours",
    "dump_routes",
    "dump_rules",
    "get_link",
    "netns_id",
]

_RTM_GETLINK: Final = 18
_RTM_GETADDR: Final = 22
_RTM_GETROUTE: Final = 26
_RTM_GETNEIGH: Final = 30
_RTM_GETRULE: Final = 34
_RTM_GETNSID: Final = 90

_IFLA_EXT_MASK: Final = 29
_IFLA_TARGET_NETNSID: Final = 46
_RTEXT_FILTER_SKIP_STATS: Final = 1 << 3
_NETNSA_NSID: Final = 1
_NETNSA_FD: Final = 3

LINK_HEADER: Final = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, ARPHRD type, ifindex, flags, change mask."""
ADDRESS_HEADER: Final = struct.Struct("=BBBBI")
"""struct ifaddrmsg: family, prefix length, flags, scope, ifindex."""
ROUTE_HEADER: Final = struct.Struct("=BBBBBBBBI")
"""struct rtmsg: family, dst length, src length, tos, table, protocol, scope, type, flags.
struct fib_rule_hdr is the same: …, table, -, -, action, flags."""
NEIGHBOUR_HEADER: Final = struct.Struct("=BxxxiHBB")
"""struct ndmsg: family, ifindex, state, flags, type."""


def dump_links(rtnl: NetlinkSocket) -> Dump:
    """Every link of the namespace, without its counters."""
    body = LINK_HEADER.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    mask = attribute(_IFLA_EXT_MASK, struct.pack("=I", _RTEXT_FILTER_SKIP_STATS))
    return rtnl.dump(_RTM_GETLINK, body + mask, what="links")


def get_link(rtnl: NetlinkSocket, ifindex: int, *, netns_id: int | None = None) -> Message | None:
    """One link, of this namespace or of the one that has `netns_id` here.

    Asking across namespaces needs NET_ADMIN over the other one (rtnl_get_net_ns_capable).
    Raises `NetlinkError`: ENODEV when there is no such link.
    """
    body = LINK_HEADER.pack(socket.AF_UNSPEC, 0, ifindex, 0, 0)
    body += attribute(_IFLA_EXT_MASK, struct.pack("=I", _RTEXT_FILTER_SKIP_STATS))
    if netns_id is not None:
        body += attribute(_IFLA_TARGET_NETNSID, struct.pack("=i", netns_id))
    return rtnl.request(_RTM_GETLINK, body, what=f"link {ifindex}")


def netns_id(rtnl: NetlinkSocket, fd: int) -> int | None:
    """The number that the socket's namespace has given to the one open as `fd`; None: none yet.

    It is this number that IFLA_LINK_NETNSID speaks of.
    """
    body = struct.pack("=Bxxx", socket.AF_UNSPEC) + attribute(_NETNSA_FD, struct.pack("=i", fd))
    answer = rtnl.request(_RTM_GETNSID, body, what="namespace id")
    if answer is None:
        return None
    raw = attributes(answer.body, 4).get(_NETNSA_NSID, b"\xff\xff\xff\xff")
    (number,) = struct.unpack("=i", raw)
    return int(number) if number >= 0 else None


def dump_addresses(rtnl: NetlinkSocket) -> Dump:
    """Every address, IPv4 and IPv6."""
    return rtnl.dump(
        _RTM_GETADDR, ADDRESS_HEADER.pack(socket.AF_UNSPEC, 0, 0, 0, 0), what="addresses"
    )


def dump_routes(rtnl: NetlinkSocket, family: int) -> Dump:
    """Every route of every table of AF_INET or AF_INET6."""
    body = ROUTE_HEADER.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
    return rtnl.dump(_RTM_GETROUTE, body, what="routes")


def dump_rules(rtnl: NetlinkSocket, family: int) -> Dump:
    """Every policy rule of AF_INET or AF_INET6."""
    body = ROUTE_HEADER.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
    return rtnl.dump(_RTM_GETRULE, body, what="rules")


def dump_neighbours(rtnl: NetlinkSocket, family: int) -> Dump:
    """The ARP table (AF_INET) or the NDP table (AF_INET6)."""
    return rtnl.dump(_RTM_GETNEIGH, NEIGHBOUR_HEADER.pack(family, 0, 0, 0, 0), what="neighbours")


def dump_fdb(rtnl: NetlinkSocket) -> Dump:
    """The forwarding databases of every bridge and of the devices that have one of their own."""
    return rtnl.dump(_RTM_GETNEIGH, NEIGHBOUR_HEADER.pack(socket.AF_BRIDGE, 0, 0, 0, 0), what="fdb")
