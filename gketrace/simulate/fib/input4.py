"""IPv4 packets received: ip_route_input_slow, fib_validate_source, ip_forward's checks."""

from __future__ import annotations

from dataclasses import dataclass

from gketrace.packet import Packet
from gketrace.simulate.evolve import evolve
from gketrace.simulate.fib.address import is_broadcast, is_loopback, is_multicast, is_zeronet
from gketrace.simulate.fib.decision import RouteDecision, RouteKind
from gketrace.simulate.fib.ipv4 import Choice, Ipv4Tables
from gketrace.simulate.fib.merge import assumed, evidence, failure, finish
from gketrace.simulate.fib.rules import Flow, RuleOutcome
from gketrace.simulate.fib.view import LOOPBACK, NetView, NotKnown, kernel_check
from gketrace.snapshot import Link, Route, RouteType
from gketrace.trace import Citation

__all__ = ["input4", "received_flow"]

_SLOW = "ip_route_input_slow"


def received_flow(tables: Ipv4Tables, packet: Packet, iif: str) -> Flow:
    """The look-up key of a received packet; ports count only if some rule looks at them."""
    flow = Flow(
        family=4,
        dst=int(packet.dst),
        src=int(packet.src),
        iif=iif,
        mark=packet.mark,
        tos=packet.dscp << 2,
    )
    if tables.rules.dissects:
        flow.protocol = packet.protocol
        if packet.has_ports:
            flow.sport, flow.dport = packet.sport, packet.dport
    return flow


def input4(tables: Ipv4Tables, packet: Packet, iif: str) -> tuple[RouteDecision, ...]:
    """What becomes of a packet received through `iif`.  Raises `NotKnown`."""
    view = tables.view
    device = view.link(iif)
    src, dst = int(packet.src), int(packet.dst)
    if is_multicast(dst):
        return (
            RouteDecision(
                kind=RouteKind.MULTICAST,
                interface=iif,
                citations=(kernel_check("ip_route_input_rcu: multicast"),),
                detail="a group address; which groups are joined here is not looked into",
            ),
        )
    if is_multicast(src) or is_broadcast(src):
        return (_martian(f"{packet.src} is no source address"),)
    if is_broadcast(dst) or (not src and not dst):
        return (_broadcast(tables, packet, device, None),)
    if is_zeronet(src):
        return (_martian(f"{packet.src} is no source address"),)
    if is_zeronet(dst):
        return (_martian(f"{packet.dst} is no destination"),)
    if (is_loopback(dst) or is_loopback(src)) and not view.conf_or(4, iif, "route_localnet"):
        return (
            evolve(
                _martian("a loopback address came in from outside, and route_localnet is off"),
                citations=(
                    *view.conf_citations(4, "route_localnet", "all", iif),
                    kernel_check(f"{_SLOW}: loopback address"),
                ),
            ),
        )
    flow = received_flow(tables, packet, iif)
    decisions: list[RouteDecision] = []
    for outcome in tables.lookup(flow):
        decisions += _outcome(tables, packet, flow, device, outcome)
    return finish(decisions)


def _outcome(
    tables: Ipv4Tables, packet: Packet, flow: Flow, device: Link, outcome: RuleOutcome
) -> list[RouteDecision]:
    view, hit = tables.view, outcome.hit
    route = hit.route if hit is not None and not hit.error else None
    if hit is not None and route is not None and route.type is RouteType.BROADCAST:
        if not _forwards_broadcasts(view, device):
            return [_broadcast(tables, packet, device, outcome)]
    elif hit is not None and route is not None and route.type is RouteType.LOCAL:
        return [_local(tables, packet, device, outcome, hit.route)]
    elif not view.conf(4, device.name, "forwarding"):
        return [_not_forwarding(view, device, outcome)]
    elif hit is None or hit.error or route is None:
        return [failure(outcome)]
    elif route.type is not RouteType.UNICAST:
        return [assumed(_martian(f"{packet.dst} is {route.type.value}"), outcome)]
    return [
        assumed(_forward(tables, packet, flow, device, outcome, choice), outcome)
        for choice in tables.with_gateways(tables.choices(hit, 0))
    ]


def _forwards_broadcasts(view: NetView, device: Link) -> bool:
    """IN_DEV_BFORWARD: directed broadcasts are sent on, whatever ``forwarding`` says."""
    return bool(view.conf(4, "all", "bc_forwarding") and view.conf(4, device.name, "bc_forwarding"))


def _local(
    tables: Ipv4Tables, packet: Packet, device: Link, outcome: RuleOutcome, route: Route | None
) -> RouteDecision:
    check = _validate(tables, packet, int(packet.dst), device, None)
    if check.refused is not None:
        return assumed(check.refused, outcome)
    return assumed(
        RouteDecision(
            kind=RouteKind.LOCAL,
            interface=device.name,
            route=route,
            rule=outcome.rule,
            citations=(*evidence(outcome), *check.citations),
            detail=f"{packet.dst} is an address of this namespace",
        ),
        outcome,
    )


def _forward(
    tables: Ipv4Tables,
    packet: Packet,
    flow: Flow,
    device: Link,
    outcome: RuleOutcome,
    choice: Choice,
) -> RouteDecision:
    """ip_mkroute_input, then what ip_forward checks before the FORWARD hook."""
    view = tables.view
    out = view.device(choice.hop)
    check = _validate(tables, packet, flow.dst, device, out)
    if check.refused is not None:
        return evolve(check.refused, chance=choice.chance, because=choice.because)
    mtu = choice.route.mtu or out.mtu
    gateway = choice.gateway
    forwarding = (
        *view.conf_citations(4, "forwarding", device.name),
        *check.citations,
    )
    decision = RouteDecision(
        kind=RouteKind.FORWARD,
        interface=out.name,
        next_hop=gateway,
        route=choice.route,
        rule=outcome.rule,
        mtu=mtu,
        chance=choice.chance,
        because=choice.because,
        citations=(*evidence(outcome), *forwarding),
        detail=f"out of {out.name}, " + (f"via {gateway}" if gateway else "on its link"),
    )
    if packet.ttl is not None and packet.ttl <= 1:
        return evolve(
            decision,
            kind=RouteKind.TTL_EXCEEDED,
            citations=(*decision.citations, kernel_check("ip_forward: TTL")),
            detail=f"the TTL is {packet.ttl}: ICMP time exceeded",
        )
    if packet.length is not None and packet.length > mtu and packet.dont_fragment:
        return evolve(
            decision,
            kind=RouteKind.FRAG_NEEDED,
            citations=(*decision.citations, kernel_check("ip_forward: ip_exceeds_mtu")),
            detail=f"{packet.length} bytes do not fit the MTU of {mtu} and DF is set",
        )
    return decision


@dataclass(slots=True)
class _Check:
    """The answer of the source check: `refused`, or what speaks for it."""

    refused: RouteDecision | None = None
    citations: tuple[Citation, ...] = ()


def _validate(
    tables: Ipv4Tables, packet: Packet, dst: int, device: Link, out: Link | None
) -> _Check:
    """fib_validate_source.  `dst` 0: broadcast; `out`: the output device when forwarding."""
    view, iif = tables.view, device.name
    mode = max(view.conf(4, "all", "rp_filter"), view.conf(4, iif, "rp_filter"))
    if mode:
        return _full_check(tables, packet, dst, device, out, mode)
    full = _full_check(tables, packet, dst, device, out, mode)
    if out is not None and out.ifindex == device.ifindex and view.conf_or(4, iif, "send_redirects"):
        return full
    if view.conf_or(4, iif, "accept_local"):
        return _Check()
    if tables.custom:
        return full
    # Without rules and local routes of the user's the kernel only asks whether the source is one
    # of its own addresses.  Whether there ever were any is not shown; it matters for sources that
    # are broadcast addresses.
    quick = packet.src in view.own
    if quick == (full.refused is not None):
        return full
    raise NotKnown(
        f"whether the source {packet.src} is refused hangs on whether policy rules or local routes "
        "were ever changed in this namespace, which the kernel does not show"
    )


def _full_check(
    tables: Ipv4Tables, packet: Packet, dst: int, device: Link, out: Link | None, mode: int
) -> _Check:
    """__fib_validate_source; one answer for all ways through the rules, else `NotKnown`."""
    view, iif = tables.view, device.name
    flow = received_flow(tables, packet, out.name if out is not None else LOOPBACK)
    flow.dst, flow.src = flow.src, dst
    flow.sport, flow.dport = flow.dport, flow.sport
    if flow.mark and not view.conf_or(4, iif, "src_valid_mark"):
        flow.mark = 0
    # The higher of the two counts: it is the one to cite first.
    counts = ("all", iif) if view.conf(4, "all", "rp_filter") == mode else (iif, "all")
    cited = view.conf_citations(4, "rp_filter", *counts) if mode else ()
    answers = [
        _reverse(tables, packet, device, mode, outcome, cited) for outcome in tables.lookup(flow)
    ]
    first = answers[0]
    kinds = {answer.refused.kind if answer.refused else None for answer in answers}
    if len(kinds) > 1:
        raise NotKnown(f"the way back to {packet.src} hangs on a policy rule that is not decided")
    return first


def _reverse(
    tables: Ipv4Tables,
    packet: Packet,
    device: Link,
    mode: int,
    outcome: RuleOutcome,
    cited: tuple[Citation, ...],
) -> _Check:
    view, iif = tables.view, device.name
    hit = outcome.hit
    route = hit.route if hit is not None and not hit.error else None
    passed = _Check(citations=cited)
    if route is not None and route.type is not RouteType.UNICAST:
        local = route.type is RouteType.LOCAL
        if not local or not view.conf_or(4, iif, "accept_local"):
            return _Check(refused=_bad_source(view, packet, iif, outcome, route))
    if route is not None:
        if tables.uses_device(route, device.ifindex):
            return passed
        if route.type is RouteType.LOCAL and iif == LOOPBACK:
            return passed
        # A device without addresses is held to the loose check's rule, as without a route.
        if mode != 1 and view.addresses_of.get((device.ifindex, 4)):
            return passed
    if not mode:
        return passed
    why = "does not exist" if route is None else f"is not through {iif}"
    return _Check(
        refused=RouteDecision(
            kind=RouteKind.RP_FILTER,
            errno="EINVAL",
            interface=iif,
            route=route,
            rule=outcome.rule,
            citations=(
                *cited,
                *evidence(outcome),
                kernel_check("__fib_validate_source: reverse path"),
            ),
            detail=f"rp_filter {mode} on {iif}: the way back to {packet.src} {why}",
        )
    )


def _bad_source(
    view: NetView, packet: Packet, iif: str, outcome: RuleOutcome, route: Route
) -> RouteDecision:
    local = route.type is RouteType.LOCAL
    why = "an address of this namespace" if local else route.type.value
    martian = _martian(f"the source {packet.src} is {why}")
    switch = view.conf_citations(4, "accept_local", "all", iif) if local else ()
    return evolve(
        martian,
        route=route,
        rule=outcome.rule,
        citations=(*evidence(outcome), *switch, *martian.citations),
    )


def _broadcast(
    tables: Ipv4Tables, packet: Packet, device: Link, outcome: RuleOutcome | None
) -> RouteDecision:
    if not is_zeronet(int(packet.src)):
        check = _validate(tables, packet, 0, device, None)
        if check.refused is not None:
            return assumed(check.refused, outcome)
    hit = outcome.hit if outcome is not None else None
    return assumed(
        RouteDecision(
            kind=RouteKind.BROADCAST,
            interface=device.name,
            route=hit.route if hit is not None else None,
            rule=outcome.rule if outcome is not None else None,
            citations=evidence(outcome) or (kernel_check(f"{_SLOW}: broadcast"),),
            detail=f"{packet.dst} is a broadcast address here",
        ),
        outcome,
    )


def _not_forwarding(view: NetView, device: Link, outcome: RuleOutcome) -> RouteDecision:
    main = view.sysctl_citation("net.ipv4.ip_forward")
    return assumed(
        RouteDecision(
            kind=RouteKind.NOT_FORWARDING,
            errno="EHOSTUNREACH",
            interface=device.name,
            citations=(
                *evidence(outcome),
                *view.conf_citations(4, "forwarding", device.name),
                *((main,) if main is not None else ()),
            ),
            detail=f"IPv4 forwarding is off on {device.name}",
        ),
        outcome,
    )


def _martian(why: str) -> RouteDecision:
    return RouteDecision(
        kind=RouteKind.MARTIAN,
        errno="EINVAL",
        citations=(kernel_check(f"{_SLOW}: martian"),),
        detail=why,
    )
