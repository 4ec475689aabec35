"""What a look-up reads of a `NetnsSnapshot`, indexed once; and how "not known" travels."""

from __future__ import annotations

from functools import cached_property

from gketrace.packet import IPAddress
from gketrace.snapshot import (
    Address,
    Link,
    Neighbour,
    NetnsSnapshot,
    NextHop,
    PolicyRule,
    Route,
    Unavailable,
)
from gketrace.trace import Citation, Source

__all__ = [
    "LOOPBACK",
    "SCOPE_HOST",
    "SCOPE_LINK",
    "SCOPE_NOWHERE",
    "SCOPE_UNIVERSE",
    "NetView",
    "NotKnown",
    "kernel_check",
    "scope_number",
]

LOOPBACK = "lo"
"""Locally made packets have LOOPBACK_IFINDEX as their input interface."""

SCOPE_UNIVERSE = 0
SCOPE_LINK = 253
SCOPE_HOST = 254
SCOPE_NOWHERE = 255

_SCOPES = {
    "": SCOPE_UNIVERSE,
    "global": SCOPE_UNIVERSE,
    "universe": SCOPE_UNIVERSE,
    "site": 200,
    "link": SCOPE_LINK,
    "host": SCOPE_HOST,
    "nowhere": SCOPE_NOWHERE,
}


class NotKnown(Exception):
    """Something that decides could not be read; ``str()`` is the reason, one sentence."""


def scope_number(name: str) -> int:
    """rt_scope_t for its iproute2 name or digits.  Raises `NotKnown`."""
    number = _SCOPES.get(name)
    if number is None:
        if not name.isdigit():
            raise NotKnown(f"the scope {name!r} is not understood")
        number = int(name)
    return number


def kernel_check(text: str) -> Citation:
    """Cites behaviour built into the kernel."""
    return Citation(source=Source.KERNEL, text=text)


class NetView:
    """Indexed access to one namespace.  Every property raises `NotKnown` for `Unavailable`."""

    def __init__(self, snapshot: NetnsSnapshot) -> None:
        self.snapshot = snapshot

    @cached_property
    def links(self) -> tuple[Link, ...]:
        links = self.snapshot.links
        if isinstance(links, Unavailable):
            raise NotKnown(f"the interfaces could not be read: {links.reason}")
        return links

    @cached_property
    def link_by_index(self) -> dict[int, Link]:
        return {link.ifindex: link for link in self.links}

    @cached_property
    def link_by_name(self) -> dict[str, Link]:
        return {link.name: link for link in self.links}

    @cached_property
    def has_vrf(self) -> bool:
        return any(link.kind == "vrf" for link in self.links)

    @cached_property
    def addresses(self) -> tuple[Address, ...]:
        addresses = self.snapshot.addresses
        if isinstance(addresses, Unavailable):
            raise NotKnown(f"the addresses could not be read: {addresses.reason}")
        return addresses

    @cached_property
    def addresses_of(self) -> dict[tuple[int, int], tuple[Address, ...]]:
        """(ifindex, family) → addresses, in the kernel's order."""
        found: dict[tuple[int, int], list[Address]] = {}
        for address in self.addresses:
            key = (address.ifindex, address.address.version)
            found.setdefault(key, []).append(address)
        return {key: tuple(value) for key, value in found.items()}

    @cached_property
    def own(self) -> dict[IPAddress, Address]:
        """Address → the first interface address that is it (inet_lookup_ifaddr_rcu)."""
        found: dict[IPAddress, Address] = {}
        for address in self.addresses:
            found.setdefault(address.address, address)
        return found

    @cached_property
    def routes(self) -> tuple[Route, ...]:
        routes = self.snapshot.routes
        if isinstance(routes, Unavailable):
            raise NotKnown(f"the routes could not be read: {routes.reason}")
        return routes

    def policy_rules(self, family: int) -> tuple[PolicyRule, ...]:
        rules = self.snapshot.rules
        if isinstance(rules, Unavailable):
            raise NotKnown(f"the routing policy rules could not be read: {rules.reason}")
        mine = [rule for rule in rules if rule.family == family]
        return tuple(sorted(mine, key=lambda rule: rule.priority))

    @cached_property
    def neighbour_of(self) -> dict[tuple[int, IPAddress], Neighbour]:
        neighbours = self.snapshot.neighbours
        if isinstance(neighbours, Unavailable):
            raise NotKnown(f"the neighbours could not be read: {neighbours.reason}")
        return {(n.ifindex, n.address): n for n in neighbours}

    def link(self, name: str) -> Link:
        found = self.link_by_name.get(name)
        if found is None:
            raise NotKnown(f"there is no interface {name!r} in this namespace")
        return found

    def device(self, hop: NextHop) -> Link:
        if hop.oif is None or (link := self.link_by_index.get(hop.oif)) is None:
            raise NotKnown(f"a route names the interface with index {hop.oif}, which is not here")
        return link

    def sysctl(self, name: str, default: int | None = None) -> int:
        """The value of ``net.…``.  Raises `NotKnown` when it was not read and has no `default`.

        `default` is for names that kernels may lack, and gives the behaviour of such kernels.
        """
        values = self.snapshot.sysctls
        if isinstance(values, Unavailable):
            raise NotKnown(f"the sysctls could not be read: {values.reason}")
        text = values.get(name)
        if text is None:
            if default is None:
                raise NotKnown(f"the sysctl {name} was not read")
            return default
        try:
            return int(text.split()[0])
        except (ValueError, IndexError):
            raise NotKnown(f"the sysctl {name} has the value {text!r}") from None

    def conf(self, family: int, interface: str, key: str, default: int | None = None) -> int:
        return self.sysctl(conf_name(family, interface, key), default)

    def conf_or(self, family: int, interface: str, key: str, default: int | None = None) -> bool:
        """IN_DEV_ORCONF: set for ``all`` or for the interface."""
        if self.conf(family, "all", key, default):
            return True
        return bool(self.conf(family, interface, key, default))

    def conf_citations(self, family: int, key: str, *interfaces: str) -> tuple[Citation, ...]:
        """``net.ipv4.conf.eth0.rp_filter = 1``, for each interface that has a value."""
        return tuple(
            citation
            for interface in interfaces
            if (citation := self.sysctl_citation(conf_name(family, interface, key))) is not None
        )

    def sysctl_citation(self, name: str) -> Citation | None:
        values = self.snapshot.sysctls
        if isinstance(values, Unavailable) or (text := values.get(name)) is None:
            return None
        return Citation(source=Source.SYSCTL, text=f"{name} = {text.strip()}")


def conf_name(family: int, interface: str, key: str) -> str:
    """Dotted name of a per-interface sysctl, with the interface's name as it is."""
    return f"net.ipv{family}.conf.{interface}.{key}"
