"""Small namespaces for the routing tests, written down rather than read from a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address, ip_network

from gketrace.packet import Packet, Protocol
from gketrace.snapshot import (
    Address,
    FdbEntry,
    Link,
    Neighbour,
    NetnsSnapshot,
    NextHop,
    PolicyRule,
    Route,
    RouteType,
    Unavailable,
)
from gketrace.trace import NetnsRef

LINKS = (
    Link(ifindex=1, name="lo", mtu=65536, flags=("LOOPBACK", "UP", "LOWER_UP")),
    Link(ifindex=2, name="eth0", mtu=1460, flags=("UP", "LOWER_UP")),
    Link(ifindex=3, name="veth1", kind="veth", flags=("UP", "LOWER_UP")),
)
ADDRESSES = (
    Address(ifindex=1, address=ip_address("127.0.0.1"), prefixlen=8, scope="host"),
    Address(ifindex=2, address=ip_address("10.142.0.6"), prefixlen=32),
    Address(ifindex=3, address=ip_address("10.40.0.1"), prefixlen=32),
)


def route(
    dst: str,
    oif: int | None = None,
    via: str = "",
    *,
    table: int = 254,
    kind: RouteType = RouteType.UNICAST,
    **more: object,
) -> Route:
    net = ip_network("0.0.0.0/0" if dst == "default" else dst)
    hops = () if oif is None else (NextHop(oif=oif, gateway=ip_address(via) if via else None),)
    more.setdefault("next_hops", hops)
    more.setdefault("protocol", 2)
    return Route(family=net.version, table=table, dst=net, type=kind, **more)  # type: ignore[arg-type]


ROUTES = (
    route("127.0.0.0/8", 1, table=255, kind=RouteType.LOCAL, scope="host"),
    route("10.142.0.6/32", 2, table=255, kind=RouteType.LOCAL, scope="host"),
    route("10.40.0.1/32", 3, table=255, kind=RouteType.LOCAL, scope="host"),
    route("default", 2, "10.142.0.1"),
    route("10.142.0.1/32", 2, scope="link"),
    route("10.40.0.7/32", 3, scope="host"),
)
RULES = tuple(
    PolicyRule(family=family, priority=priority, table=table)
    for family in (4, 6)
    for priority, table in ((0, 255), (32766, 254), (32767, 253))[: 3 if family == 4 else 2]
)


def sysctls(**changed: int) -> dict[str, str]:
    """Every switch that routing reads; `changed`: ``eth0__rp_filter=1``."""
    values = {"net.ipv4.ip_forward": "1", "net.ipv4.fib_multipath_use_neigh": "0"}
    for name in ("all", "lo", "eth0", "veth1"):
        for key in (
            "rp_filter",
            "accept_local",
            "src_valid_mark",
            "send_redirects",
            "route_localnet",
            "bc_forwarding",
            "ignore_routes_with_linkdown",
        ):
            values[f"net.ipv4.conf.{name}.{key}"] = "0"
        values[f"net.ipv4.conf.{name}.forwarding"] = "1"
        values[f"net.ipv6.conf.{name}.forwarding"] = "1"
        values[f"net.ipv6.conf.{name}.disable_ipv6"] = "0"
        values[f"net.ipv6.conf.{name}.mtu"] = "1500"
        values[f"net.ipv6.conf.{name}.use_oif_addrs_only"] = "0"
    for name, value in changed.items():
        interface, _, key = name.partition("__")
        values[f"net.ipv4.conf.{interface}.{key}"] = str(value)
    return values


def network(
    *,
    links: tuple[Link, ...] | Unavailable = LINKS,
    addresses: tuple[Address, ...] | Unavailable = ADDRESSES,
    routes: tuple[Route, ...] | Unavailable = ROUTES,
    rules: tuple[PolicyRule, ...] | Unavailable = RULES,
    neighbours: tuple[Neighbour, ...] | Unavailable = (),
    fdb: tuple[FdbEntry, ...] | Unavailable = (),
    values: Mapping[str, str] | Unavailable | None = None,
) -> NetnsSnapshot:
    return NetnsSnapshot(
        netns=NetnsRef(node="node"),
        links=links,
        addresses=addresses,
        routes=routes,
        rules=rules,
        neighbours=neighbours,
        fdb=fdb,
        sysctls=sysctls() if values is None else values,
        sockets=(),
        rulesets=(),
        conntrack=Unavailable(reason="not asked for"),
    )


def packet(src: str, dst: str, **more: object) -> Packet:
    more.setdefault("protocol", Protocol.TCP)
    more.setdefault("sport", 40000)
    more.setdefault("dport", 80)
    return Packet(src=ip_address(src), dst=ip_address(dst), **more)  # type: ignore[arg-type]
