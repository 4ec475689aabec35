"""By which interface a packet from the network comes into a node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gketrace.errors import UnavailableError, UnsupportedError
from gketrace.packet import Packet
from gketrace.simulate.routing import Fib, RouteKind
from gketrace.snapshot import Link, NetnsSnapshot, Route, RouteType, Unavailable
from gketrace.trace import NetnsKind

__all__ = ["Arrival", "find_arrival"]

_MAIN: Final = 254


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """The interface that a packet from the network comes in by."""

    interface: str
    because: str
    """One sentence with the route that says so."""


def find_arrival(host: NetnsSnapshot, packet: Packet) -> Arrival:
    """The interface by which `packet` comes in from the network.

    That of the route back to its source, unless this leads to this node's own pods or addresses:
    then that of the default route, as only the network can have brought it.  Raises
    `UnsupportedError` when there is none or more than one, `UnavailableError` when the links could
    not be read.
    """
    if isinstance(host.links, Unavailable):
        raise UnavailableError(f"links: {host.links.reason}")
    links = {link.name: link for link in host.links}
    fib = Fib(host)
    tried: list[str] = []
    back = f"route to {packet.src}"
    ways = fib.output(packet.src)
    names = {w.interface if w.kind is RouteKind.FORWARD else w.kind.value for w in ways}
    if len(names) == 1 and ways[0].kind is RouteKind.FORWARD:
        name = ways[0].interface
        if not _leads_inside(links.get(name)):
            return _arrival(name, back, ways[0].route)
        tried.append(f"{back}: {name}, which leads into this node")
    else:
        tried.append(f"{back}: {' or '.join(sorted(names))}")
    default = _default_route(host, packet.family)
    if default is not None:
        devices = {hop.oif for hop in default.next_hops}
        uplinks = [link.name for link in host.links if link.ifindex in devices]
        if len(uplinks) == 1:
            return _arrival(uplinks[0], "default route", default)
        tried.append(f"default route: {' or '.join(uplinks)}")
    raise UnsupportedError(
        f"cannot tell by which interface {packet} comes in: {'; '.join(tried)}",
        hint="name the interface",
    )


def _arrival(interface: str, what: str, route: Route | None) -> Arrival:
    cited = f" ({route.text})" if route is not None and route.text else ""
    return Arrival(interface=interface, because=f"{interface}: the {what} goes out of it{cited}")


def _default_route(host: NetnsSnapshot, family: int) -> Route | None:
    """The main table's, of the lowest metric."""
    if isinstance(host.routes, Unavailable):
        return None
    defaults = (
        route
        for route in host.routes
        if route.family == family
        and route.table == _MAIN
        and route.dst.prefixlen == 0
        and route.type is RouteType.UNICAST
    )
    return min(defaults, key=lambda route: route.priority, default=None)


def _leads_inside(link: Link | None) -> bool:
    """Nothing comes from the network through a bridge of pods, a dummy, or a veth of the node."""
    if link is None:
        return False
    if link.kind in ("bridge", "dummy"):
        return True
    return (
        link.peer is not None
        and link.peer.netns is not None
        and link.peer.netns.kind in (NetnsKind.POD, NetnsKind.HOST)
    )
