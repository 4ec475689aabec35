"""Routes of every table, both families (RTM_NEWROUTE).

Source: kernel net/ipv4/fib_semantics.c fib_dump_info(), net/ipv6/route.c rt6_fill_node(),
net/ipv4/nexthop.c; the text follows iproute2 ip/iproute.c print_route().
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Final

from gketrace.packet import IPAddress
from gketrace.snapshot import IPNetwork, NextHop, Route, RouteType
from gketrace_agent.kernel.netlink import attributes, u16, u32
from gketrace_agent.kernel.reader import KernelReader
from gketrace_agent.kernel.rtnetlink import ROUTE_HEADER, dump_routes
from gketrace_agent.observe.names import scope_name
from gketrace_agent.observe.route_text import RouteDetails, route_text

__all__ = ["network", "observe_routes"]

_RTA_DST: Final = 1
_RTA_SRC: Final = 2
_RTA_OIF: Final = 4
_RTA_GATEWAY: Final = 5
_RTA_PRIORITY: Final = 6
_RTA_PREFSRC: Final = 7
_RTA_METRICS: Final = 8
_RTA_MULTIPATH: Final = 9
_RTA_FLOW: Final = 11
_RTA_CACHEINFO: Final = 12
_RTA_TABLE: Final = 15
_RTA_MARK: Final = 16
_RTA_VIA: Final = 18
_RTA_PREF: Final = 20
_RTA_ENCAP_TYPE: Final = 21
_RTA_NH_ID: Final = 30
_RTAX_MTU: Final = 2

_TYPES: Final = (
    None,
    RouteType.UNICAST,
    RouteType.LOCAL,
    RouteType.BROADCAST,
    RouteType.ANYCAST,
    RouteType.MULTICAST,
    RouteType.BLACKHOLE,
    RouteType.UNREACHABLE,
    RouteType.PROHIBIT,
    RouteType.THROW,
    RouteType.NAT,
)
_NEXTHOP: Final = struct.Struct("=HBBi")
"""struct rtnexthop: length, flags, weight - 1, ifindex."""
_NEXTHOP_FLAGS: Final = (
    (0x01, "dead"),
    (0x04, "onlink"),
    (0x02, "pervasive"),
    (0x08, "offload"),
    (0x40, "trap"),
    (0x10, "linkdown"),
    (0x20, "unresolved"),
)
"""RTNH_F_* in the order in which ip prints them (print_rt_flags)."""
_IPV6_HZ: Final = 100
"""USER_HZ: the unit of rta_expires in struct rta_cacheinfo."""


_KEPT: Final = 4096
"""Messages whose routes are kept; less than 2 KB each."""
_known: Final[dict[tuple[int, bytes], tuple[Route | None, dict[int, str]]]] = {}
"""Family and message → its route, and the interfaces' names that its text has.

A node's routes are read for each packet that is walked, and are nearly always the same bytes: to
read these again is most of what a walk's reading takes.  What a message says hangs on its bytes
and those names alone.  Shared by threads: an entry is made whole before it is put in.
"""


def observe_routes(reader: KernelReader, link_name: Callable[[int], str]) -> tuple[Route, ...]:
    """All routes in the kernel's order: IPv4 first.  `link_name` is for the text."""
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        for message in reader.messages("routes", dump_routes(reader.rtnl, family)):
            route = _recalled(family, bytes(message.body), link_name)
            if route is not None:
                found.append(route)
    return tuple(found)


def _recalled(family: int, body: bytes, link_name: Callable[[int], str]) -> Route | None:
    known = _known.get((family, body))
    if known is not None and all(link_name(index) == name for index, name in known[1].items()):
        return known[0]
    names: dict[int, str] = {}

    def named(index: int) -> str:
        names[index] = link_name(index)
        return names[index]

    route = _route(family, body, named)
    if len(_known) >= _KEPT:
        _known.clear()
    _known[family, body] = route, names
    return route


def network(family: int, raw: bytes | None, length: int) -> IPNetwork:
    """Address bytes (or none, for default) and a prefix length → network."""
    if family == socket.AF_INET:
        return IPv4Network((raw or b"\0\0\0\0", length), strict=False)
    return IPv6Network((raw or bytes(16), length), strict=False)


def _route(family: int, body: bytes, link_name: Callable[[int], str]) -> Route | None:
    _, dst_length, src_length, tos, table, protocol, scope, kind, flags = ROUTE_HEADER.unpack_from(
        body
    )
    if kind >= len(_TYPES) or (route_type := _TYPES[kind]) is None:
        return None
    values = attributes(body, ROUTE_HEADER.size)
    table = u32(values[_RTA_TABLE]) if _RTA_TABLE in values else table
    metrics = attributes(values.get(_RTA_METRICS, b""))
    single, hops = _next_hops(values, flags)
    prefsrc = ip_address(values[_RTA_PREFSRC]) if _RTA_PREFSRC in values else None
    route = Route(
        family=4 if family == socket.AF_INET else 6,
        table=table,
        dst=network(family, values.get(_RTA_DST), dst_length),
        type=route_type,
        next_hops=hops,
        src=network(family, values[_RTA_SRC], src_length) if _RTA_SRC in values else None,
        tos=tos,
        priority=u32(values.get(_RTA_PRIORITY, b"")),
        scope=scope_name(scope),
        protocol=protocol,
        prefsrc=prefsrc,
        mtu=u32(metrics[_RTAX_MTU]) if _RTAX_MTU in metrics else None,
    )
    details = RouteDetails(
        has_dst=_RTA_DST in values,
        scope=scope,
        flags=_flag_names(flags),
        single=single,
        metric=u32(values[_RTA_PRIORITY]) if _RTA_PRIORITY in values else None,
        metrics=metrics,
        nhid=u32(values[_RTA_NH_ID]) if _RTA_NH_ID in values else None,
        mark=u32(values[_RTA_MARK]) if _RTA_MARK in values else None,
        realm=u32(values[_RTA_FLOW]) if _RTA_FLOW in values else None,
        pref=values[_RTA_PREF][0] if _RTA_PREF in values else None,
        encap=u16(values[_RTA_ENCAP_TYPE]) if _RTA_ENCAP_TYPE in values else None,
        expires=_expires(values) if family == socket.AF_INET6 else None,
        error=_error(values) if family == socket.AF_INET6 else 0,
    )
    return replace(route, text=route_text(route, details, link_name))


def _next_hops(values: dict[int, bytes], flags: int) -> tuple[bool, tuple[NextHop, ...]]:
    """Whether the route has its next hop in its own attributes; and all of its next hops."""
    if _RTA_MULTIPATH not in values:
        oif = u32(values[_RTA_OIF]) if _RTA_OIF in values else None
        gateway = _gateway(values)
        if oif is None and gateway is None:
            return True, ()
        return True, (NextHop(oif=oif, gateway=gateway, flags=_flag_names(flags)),)
    raw = values[_RTA_MULTIPATH]
    hops: list[NextHop] = []
    offset = 0
    while offset + _NEXTHOP.size <= len(raw):
        length, hop_flags, weight, ifindex = _NEXTHOP.unpack_from(raw, offset)
        if length < _NEXTHOP.size:
            raise ValueError(f"a next hop of {length} bytes")
        inner = attributes(raw[: offset + length], offset + _NEXTHOP.size)
        hops.append(
            NextHop(
                oif=ifindex or None,
                gateway=_gateway(inner),
                weight=weight + 1,
                flags=_flag_names(hop_flags),
            )
        )
        offset += (length + 3) & ~3
    return False, tuple(hops)


def _gateway(values: dict[int, bytes]) -> IPAddress | None:
    if _RTA_GATEWAY in values:
        return ip_address(values[_RTA_GATEWAY])
    if _RTA_VIA in values:  # struct rtvia: family, then the address
        return ip_address(values[_RTA_VIA][2:])
    return None


def _flag_names(flags: int) -> tuple[str, ...]:
    return tuple(name for bit, name in _NEXTHOP_FLAGS if flags & bit)


def _expires(values: dict[int, bytes]) -> int | None:
    """Seconds until an IPv6 route (from a router advertisement) expires."""
    info = values.get(_RTA_CACHEINFO, b"")
    if len(info) < 12:
        return None
    ticks = struct.unpack_from("=i", info, 8)[0]
    return int(ticks / _IPV6_HZ) if ticks else None


def _error(values: dict[int, bytes]) -> int:
    """The error number that an IPv6 reject route answers with."""
    info = values.get(_RTA_CACHEINFO, b"")
    return int(struct.unpack_from("=i", info, 12)[0]) if len(info) >= 16 else 0
