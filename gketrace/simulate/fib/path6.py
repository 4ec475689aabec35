"""IPv6 packets made here and received: ip6_route_output_flags, ip6_route_input, ip6_forward."""

from __future__ import annotations

from ipaddress import IPv6Address

from gketrace.packet import IPAddress, Packet
from gketrace.simulate.evolve import evolve
from gketrace.simulate.fib.address import LOOPBACK6, is_link_local6, is_multicast6
from gketrace.simulate.fib.decision import RouteDecision, RouteKind
from gketrace.simulate.fib.ipv4 import Choice
from gketrace.simulate.fib.ipv6 import Ipv6Tables
from gketrace.simulate.fib.merge import assumed, evidence, failure, finish
from gketrace.simulate.fib.rules import Flow, RuleOutcome
from gketrace.simulate.fib.saddr6 import select_address6
from gketrace.simulate.fib.view import LOOPBACK, NetView, kernel_check
from gketrace.simulate.state import CERTAIN
from gketrace.snapshot import Link, RouteType
from gketrace.trace import Citation

__all__ = ["input6", "needs_strict", "output6", "received_flow6", "route_source"]


def needs_strict(dst: int) -> bool:
    """rt6_need_strict: the interface is part of such addresses."""
    return is_multicast6(dst) or is_link_local6(dst) or dst == LOOPBACK6


def received_flow6(tables: Ipv6Tables, packet: Packet, iif: str) -> Flow:
    """The look-up key of a received packet; ports count only if some rule looks at them."""
    flow = Flow(
        family=6,
        dst=int(packet.dst),
        src=int(packet.src),
        iif=iif,
        mark=packet.mark,
        tos=packet.dscp << 2,
        protocol=packet.protocol,
    )
    if tables.rules.dissects and packet.has_ports:
        flow.sport, flow.dport = packet.sport, packet.dport
    return flow


def output6(tables: Ipv6Tables, flow: Flow) -> tuple[RouteDecision, ...]:
    """ip6_route_output_flags, then the source as ip6_route_get_saddr takes it."""
    view = tables.view
    if flow.oif and flow.oif not in view.link_by_name:
        return (
            RouteDecision(
                kind=RouteKind.NO_ROUTE,
                errno="ENODEV",
                citations=(kernel_check("ip6_route_output_flags: no such interface"),),
                detail=f"the interface {flow.oif} is not there",
            ),
        )
    strict = needs_strict(flow.dst) or bool(flow.oif and not flow.src)
    decisions: list[RouteDecision] = []
    for outcome in tables.lookup(flow, flow.oif, strict=strict):
        hit = outcome.hit
        if hit is None or hit.error or hit.route is None:
            decisions.append(failure(outcome))
            continue
        decisions += [
            assumed(_sent(tables, flow, outcome, choice), outcome)
            for choice in tables.choices(hit, flow.oif)
        ]
    return finish(decisions)


def route_source(tables: Ipv6Tables, choice: Choice, dst: int) -> IPAddress | None:
    """ip6_route_get_saddr."""
    if choice.route.prefsrc is not None:
        return choice.route.prefsrc
    return select_address6(tables.view, tables.view.device(choice.hop), dst)


def _sent(tables: Ipv6Tables, flow: Flow, outcome: RuleOutcome, choice: Choice) -> RouteDecision:
    source = IPv6Address(flow.src) if flow.src else route_source(tables, choice, flow.dst)
    decision = _towards(tables, outcome, choice)
    return evolve(decision, source=source)


def _towards(tables: Ipv6Tables, outcome: RuleOutcome, choice: Choice) -> RouteDecision:
    route, hop = choice.route, choice.hop
    link = tables.view.device(hop)
    kind = RouteKind.FORWARD
    if tables.over_loopback(route):
        kind, link = RouteKind.LOCAL, tables.view.link(LOOPBACK)
    elif route.type is RouteType.MULTICAST:
        kind = RouteKind.MULTICAST
    via = f"via {hop.gateway}" if hop.gateway is not None else "on its link"
    return RouteDecision(
        kind=kind,
        interface=link.name,
        next_hop=hop.gateway,
        route=route,
        rule=outcome.rule,
        mtu=route.mtu or _device_mtu(tables.view, link),
        chance=choice.chance,
        because=choice.because,
        citations=evidence(outcome),
        detail=(
            "an address of this namespace"
            if kind is RouteKind.LOCAL
            else f"out of {link.name}, {via}"
        ),
    )


def _device_mtu(view: NetView, link: Link) -> int:
    """The interface's IPv6 MTU, which a router advertisement may have lowered."""
    return view.conf(6, link.name, "mtu", link.mtu)


def input6(tables: Ipv6Tables, packet: Packet, iif: str) -> tuple[RouteDecision, ...]:
    """What becomes of a packet received through `iif`.  Raises `NotKnown`."""
    view = tables.view
    device = view.link(iif)
    refused = _martian(view, packet, device)
    if refused is not None:
        return (refused,)
    if is_multicast6(int(packet.dst)):
        return (
            RouteDecision(
                kind=RouteKind.MULTICAST,
                interface=iif,
                citations=(kernel_check("ip6_mc_input: multicast"),),
                detail="a group address; which groups are joined here is not looked into",
            ),
        )
    flow = received_flow6(tables, packet, iif)
    decisions: list[RouteDecision] = []
    for outcome in tables.lookup(flow, iif, strict=needs_strict(flow.dst)):
        hit = outcome.hit
        if hit is not None and not hit.error and hit.route is not None:
            decisions += [
                assumed(_received(tables, packet, device, outcome, choice), outcome)
                for choice in tables.choices(hit, iif)
            ]
        else:
            decisions.append(failure(outcome))
    return finish(decisions)


def _received(
    tables: Ipv6Tables, packet: Packet, device: Link, outcome: RuleOutcome, choice: Choice
) -> RouteDecision:
    view = tables.view
    decision = _towards(tables, outcome, choice)
    if choice.route.type in (RouteType.LOCAL, RouteType.ANYCAST):
        decision = evolve(decision, kind=RouteKind.LOCAL, detail="an address of this namespace")
        return evolve(decision, interface=device.name, next_hop=None, mtu=None)
    return _forward(view, packet, device, decision)


def _forward(view: NetView, packet: Packet, device: Link, decision: RouteDecision) -> RouteDecision:
    """ip6_forward up to the FORWARD hook."""
    switches: tuple[Citation, ...] = view.conf_citations(6, "forwarding", "all")
    if not view.conf(6, "all", "forwarding"):
        # force_forwarding came with 6.17; without the name there is no such switch.
        if not view.conf(6, device.name, "force_forwarding", 0):
            return evolve(
                decision,
                kind=RouteKind.NOT_FORWARDING,
                citations=(*decision.citations, *switches),
                detail="IPv6 forwarding is off",
            )
        switches = view.conf_citations(6, "force_forwarding", device.name)
    decision = evolve(decision, citations=(*decision.citations, *switches))
    if packet.ttl is not None and packet.ttl <= 1:
        return evolve(
            decision,
            kind=RouteKind.TTL_EXCEEDED,
            citations=(*decision.citations, kernel_check("ip6_forward: hop limit")),
            detail=f"the hop limit is {packet.ttl}: ICMPv6 time exceeded",
        )
    src = int(packet.src)
    if not src or src == LOOPBACK6 or is_link_local6(src):
        return evolve(
            decision,
            kind=RouteKind.MARTIAN,
            citations=(*decision.citations, kernel_check("ip6_forward: scope of the source")),
            detail=f"packets from {packet.src} are not forwarded",
        )
    mtu = decision.mtu
    if packet.length is not None and mtu is not None and packet.length > mtu:
        return evolve(
            decision,
            kind=RouteKind.FRAG_NEEDED,
            citations=(*decision.citations, kernel_check("ip6_forward: ip6_pkt_too_big")),
            detail=f"{packet.length} bytes do not fit the MTU of {mtu}",
        )
    return decision


def _martian(view: NetView, packet: Packet, device: Link) -> RouteDecision | None:
    """What ip6_rcv_core refuses before any look-up."""
    src, dst = int(packet.src), int(packet.dst)
    why = ""
    cited: tuple[Citation, ...] = (kernel_check("ip6_rcv_core"),)
    if view.conf(6, device.name, "disable_ipv6", 0):
        why = f"IPv6 is disabled on {device.name}"
        cited = view.conf_citations(6, "disable_ipv6", device.name)
    elif LOOPBACK6 in (src, dst) and "LOOPBACK" not in device.flags:
        why = "the loopback address came in from outside"
    elif is_multicast6(src):
        why = f"{packet.src} is no source address"
    elif src >> 32 == 0xFFFF:
        why = "the source is an IPv4-mapped address"
    elif is_multicast6(dst) and (dst >> 112) & 0xF == 0:
        why = f"{packet.dst} is of reserved scope"
    if not why:
        return None
    return RouteDecision(kind=RouteKind.MARTIAN, chance=CERTAIN, citations=cited, detail=why)
