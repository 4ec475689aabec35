"""IPv4 packets made here: ip_route_output_key_hash_rcu (net/ipv4/route.c)."""

from __future__ import annotations

from ipaddress import IPv4Address

from gketrace.packet import IPAddress, Protocol
from gketrace.simulate.evolve import evolve
from gketrace.simulate.fib.address import (
    is_broadcast,
    is_local_multicast,
    is_loopback,
    is_multicast,
    is_zeronet,
)
from gketrace.simulate.fib.decision import RouteDecision, RouteKind
from gketrace.simulate.fib.ipv4 import Choice, Ipv4Tables
from gketrace.simulate.fib.merge import assumed, evidence, failure, finish
from gketrace.simulate.fib.rules import Flow, RuleOutcome
from gketrace.simulate.fib.saddr4 import select_address
from gketrace.simulate.fib.table import route_citation
from gketrace.simulate.fib.view import LOOPBACK, SCOPE_HOST, SCOPE_LINK, kernel_check
from gketrace.simulate.state import CERTAIN
from gketrace.snapshot import Link, RouteType

__all__ = ["output4"]

_FUNCTION = "ip_route_output_key_hash_rcu"


def output4(tables: Ipv4Tables, flow: Flow) -> tuple[RouteDecision, ...]:
    """Where a locally made packet goes.  Raises `NotKnown`."""
    view = tables.view
    src, dst = flow.src, flow.dst
    if src:
        if is_multicast(src) or is_broadcast(src):
            return (_bad_source(src, "EINVAL", "a multicast or broadcast address"),)
        by_source = not flow.oif and (is_multicast(dst) or is_broadcast(dst))
        owner = None if flow.any_source and not by_source else tables.owner(src)
        if owner is None and not (flow.any_source and not by_source):
            return (_bad_source(src, "ENETUNREACH", "not an address of this namespace"),)
        if owner is not None and by_source:
            return (_make(tables, flow, owner, None, None),)
    device: Link | None = None
    if flow.oif:
        device = view.link_by_name.get(flow.oif)
        if device is None or not device.up:
            return (_no_device(flow.oif, device),)
        if is_local_multicast(dst) or is_broadcast(dst) or flow.protocol == Protocol.IGMP:
            src = src or _number(select_address(view, device, 0, SCOPE_LINK))
            return (_make(tables, evolve(flow, src=src), device, None, None),)
        if not src and is_multicast(dst):
            src = _number(select_address(view, device, 0, flow.scope))
        elif not src and not dst:
            src = _number(select_address(view, device, 0, SCOPE_HOST))
    if not dst:
        return (
            RouteDecision(
                kind=RouteKind.LOCAL,
                interface=LOOPBACK,
                source=IPv4Address(src or 0x7F000001),
                citations=(kernel_check(f"{_FUNCTION}: 0.0.0.0 is this host"),),
                detail="0.0.0.0 as a destination means this host",
            ),
        )
    flow = evolve(flow, src=src)
    decisions: list[RouteDecision] = []
    for outcome in tables.lookup(flow):
        decisions += _outcome(tables, flow, outcome, device)
    return finish(decisions)


def _outcome(
    tables: Ipv4Tables, flow: Flow, outcome: RuleOutcome, device: Link | None
) -> list[RouteDecision]:
    view, hit = tables.view, outcome.hit
    if hit is None or hit.error or hit.route is None or hit.hop is None:
        if device is None:
            return [failure(outcome)]
        # Told the interface, the kernel takes the destination to be on its link.
        src = flow.src or _number(select_address(view, device, 0, SCOPE_LINK))
        return [_make(tables, evolve(flow, src=src), device, outcome, None)]
    if hit.route.type is RouteType.LOCAL:
        source = flow.src or int(hit.route.prefsrc or flow.dst)
        choice = Choice(hit.route, hit.hop)
        made = _make(tables, evolve(flow, src=source), view.link(LOOPBACK), outcome, choice)
        return [made]
    if flow.oif:
        choices = [Choice(hit.route, hit.hop)]
    elif len(hit.route.next_hops) > 1:
        choices = tables.choices(hit, flow.src)
    else:
        choices = tables.default_choices(hit)
    decisions: list[RouteDecision] = []
    for choice in tables.with_gateways(choices):
        src = flow.src or _number(tables.prefsrc(choice.route, choice.hop))
        chosen = evolve(flow, src=src)
        decisions.append(_make(tables, chosen, view.device(choice.hop), outcome, choice))
    return decisions


def _make(
    tables: Ipv4Tables,
    flow: Flow,
    device: Link,
    outcome: RuleOutcome | None,
    choice: Choice | None,
) -> RouteDecision:
    """__mkroute_output.  `choice` None: on the link of `device`, without a route."""
    view = tables.view
    loopback = "LOOPBACK" in device.flags
    if (
        is_loopback(flow.src)
        and not loopback
        and not view.conf_or(4, device.name, "route_localnet")
    ):
        return assumed(
            RouteDecision(
                kind=RouteKind.MARTIAN,
                errno="EINVAL",
                interface=device.name,
                source=IPv4Address(flow.src),
                citations=(
                    *view.conf_citations(4, "route_localnet", "all", device.name),
                    kernel_check("__mkroute_output: loopback source on another interface"),
                ),
                detail=f"a loopback source may not leave through {device.name}",
            ),
            outcome,
        )
    if is_zeronet(flow.dst) and flow.dst:
        return assumed(
            RouteDecision(
                kind=RouteKind.MARTIAN,
                errno="EINVAL",
                citations=(kernel_check("__mkroute_output: destination in 0.0.0.0/8"),),
                detail="0.0.0.0/8 is no destination",
            ),
            outcome,
        )
    route = choice.route if choice is not None else None
    gateway = choice.gateway if choice is not None else None
    kind = RouteKind.FORWARD
    if is_broadcast(flow.dst) or (route is not None and route.type is RouteType.BROADCAST):
        kind = RouteKind.BROADCAST
        gateway = None if is_broadcast(flow.dst) else gateway
    elif is_multicast(flow.dst) or (route is not None and route.type is RouteType.MULTICAST):
        kind = RouteKind.MULTICAST
        if route is not None and is_multicast(flow.dst) and route.dst.prefixlen < 4:
            gateway = None
    elif route is not None and route.type is RouteType.LOCAL:
        kind, gateway = RouteKind.LOCAL, None
    citations = evidence(outcome)
    if choice is not None and outcome is not None and outcome.hit is not None:
        if choice.route is not outcome.hit.route:
            citations = (*citations[:-1], route_citation(choice.route))
    elif choice is None:
        citations = (kernel_check(f"{_FUNCTION}: bound to {device.name}, so on its link"),)
    return assumed(
        RouteDecision(
            kind=kind,
            interface=device.name,
            next_hop=gateway,
            source=IPv4Address(flow.src) if flow.src else None,
            route=route,
            rule=outcome.rule if outcome is not None and route is not None else None,
            mtu=(route.mtu if route is not None else None) or device.mtu,
            chance=choice.chance if choice is not None else CERTAIN,
            because=choice.because if choice is not None else "",
            citations=citations,
            detail=_detail(kind, device, gateway),
        ),
        outcome,
    )


def _detail(kind: RouteKind, device: Link, gateway: IPAddress | None) -> str:
    if kind is RouteKind.LOCAL:
        return "an address of this namespace"
    return f"out of {device.name}, " + (f"via {gateway}" if gateway else "on its link")


def _number(address: IPAddress | None) -> int:
    return int(address) if address is not None else 0


def _bad_source(src: int, errno: str, why: str) -> RouteDecision:
    address = IPv4Address(src)
    return RouteDecision(
        kind=RouteKind.BAD_SOURCE,
        errno=errno,
        source=address,
        citations=(kernel_check(f"{_FUNCTION}: source address check"),),
        detail=f"{address} is {why}",
    )


def _no_device(name: str, device: Link | None) -> RouteDecision:
    return RouteDecision(
        kind=RouteKind.NO_ROUTE,
        errno="ENODEV" if device is None else "ENETUNREACH",
        citations=(kernel_check(f"{_FUNCTION}: the bound interface must be up"),),
        detail=f"the interface {name} is {'not there' if device is None else 'down'}",
    )
