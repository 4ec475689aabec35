"""Frames that come in through a port of a bridge, and br_netfilter's detour through iptables.

Source: br_handle_frame_finish (net/bridge/br_input.c), br_nf_pre_routing, br_nf_forward_ip and
br_nf_post_routing (net/bridge/br_netfilter_hooks.c).
"""

from __future__ import annotations

from gketrace.citing import cite_link
from gketrace.packet import IPAddress
from gketrace.simulate.cursor import Context, Cursor, Stage, Way, end, enter_hook, step, unknown
from gketrace.simulate.evolve import evolve
from gketrace.simulate.ports import choose_port
from gketrace.simulate.routes import decision_steps, routed_input
from gketrace.simulate.routing import RouteKind
from gketrace.simulate.transmit import bridge_steps, leave
from gketrace.snapshot import Link, Unavailable
from gketrace.trace import Disposition, Hook, StepAction, StepKind

__all__ = ["bridge_in", "off_prerouting"]


def bridge_in(context: Context, cursor: Cursor, port: Link, bridge: Link) -> Way:
    """A frame arrives at `port`: to the bridge itself, or across it."""
    if port.port is not None and port.port.state not in ("forwarding", ""):
        why = f"the bridge port {port.name} is {port.port.state}"
        failed = step(
            cursor,
            StepKind.BRIDGE,
            StepAction.FAIL,
            citation=cite_link(port),
            note=why,
            interface=port.name,
        )
        return end(cursor, Disposition.UNREACHABLE, why, failed, citation=cite_link(port))
    mine = _for_bridge(cursor, bridge)
    if mine is None:
        return unknown(cursor, f"whether the frame is for {bridge.name} itself is not known")
    netfilter = cursor.space.bridge_netfilter(bridge, cursor.packet.family)
    if isinstance(netfilter, Unavailable):
        why = f"whether bridged frames pass iptables is not known: {netfilter.reason}"
        return unknown(cursor, why, what="sysctls")
    state = evolve(
        cursor.state,
        in_iface=bridge.name,
        physdev_in=port.name if netfilter is not None else "",
    )
    inside = evolve(
        cursor,
        state=state,
        bridge=bridge,
        port_in=port,
        arrived=cursor.packet,
        for_bridge=mine,
    )
    if netfilter is None:
        if mine:
            return Way(cursor=enter_hook(inside, Hook.PREROUTING, Stage.ROUTE))
        return _across(context, inside, _target(inside), netfilter=False)
    way = Way(cursor=enter_hook(inside, Hook.PREROUTING, Stage.BRIDGED))
    if mine:
        return way
    through = step(
        cursor,
        StepKind.CHECK,
        StepAction.CONTINUE,
        citation=netfilter,
        note=f"bridged by {bridge.name}, and iptables sees it",
        interface=bridge.name,
    )
    return evolve(way, steps=(through,))


def off_prerouting(context: Context, cursor: Cursor) -> tuple[Way, ...]:
    """br_nf_pre_routing_finish(): translated frames are routed, perhaps back onto the bridge."""
    bridge, arrived = cursor.bridge, cursor.arrived
    assert bridge is not None
    assert arrived is not None
    if cursor.packet.dst == arrived.dst:
        if cursor.for_bridge:
            return (Way(cursor=evolve(cursor, stage=Stage.ROUTE)),)
        return (_across(context, cursor, _target(cursor), netfilter=True),)
    ways: list[Way] = []
    for decision in cursor.space.fib.input(cursor.packet, bridge.name):
        if decision.kind is RouteKind.NOT_FORWARDING:
            # Bridged and translated traffic does not need forwarding to be on.
            for out in cursor.space.fib.output(cursor.packet.dst, mark=cursor.packet.mark):
                if out.kind is RouteKind.FORWARD and out.interface == bridge.name:
                    decision = evolve(out, citations=(*out.citations,))
        if decision.kind is RouteKind.FORWARD and decision.interface == bridge.name:
            target = decision.next_hop or cursor.packet.dst
            way = _across(context, evolve(cursor, decision=decision), target, netfilter=True)
            ways.append(
                evolve(
                    way,
                    steps=decision_steps(cursor, decision) + way.steps,
                    chance=decision.chance,
                    because=decision.because,
                )
            )
        else:
            ways.append(routed_input(cursor, decision))
    return tuple(ways)


def _across(context: Context, cursor: Cursor, target: IPAddress, *, netfilter: bool) -> Way:
    """br_forward(): from one port to another."""
    bridge, port_in = cursor.bridge, cursor.port_in
    assert bridge is not None
    assert port_in is not None
    choice = choose_port(context, cursor.space, bridge, target)
    if choice.port is None:
        if choice.failed:
            failed = step(
                cursor,
                StepKind.BRIDGE,
                StepAction.FAIL,
                citation=choice.neighbour_citation(bridge) or cite_link(bridge),
                note=choice.why,
                interface=bridge.name,
            )
            return end(
                cursor,
                Disposition.NO_NEIGHBOUR,
                choice.why,
                failed,
                citation=failed.citation,
            )
        return unknown(cursor, choice.why)
    port = choice.port
    if port.ifindex == port_in.ifindex and port.port is None:
        return unknown(cursor, f"whether {port.name} is in hairpin mode is not known")
    if port.ifindex == port_in.ifindex and port.port is not None and not port.port.hairpin:
        if "PROMISC" in bridge.flags:
            note = f"{bridge.name} is promiscuous: it takes the frame itself and routes it"
            taken = step(
                cursor,
                StepKind.BRIDGE,
                StepAction.CONTINUE,
                citation=cite_link(bridge),
                note=note,
                interface=bridge.name,
            )
            return Way(cursor=evolve(cursor, stage=Stage.ROUTE), steps=(taken,))
        why = f"a bridge sends no frame back out of its port, and hairpin is off on {port.name}"
        return _refused(cursor, port, why)
    both_isolated = (
        port.port is not None
        and port.port.isolated
        and port_in.port is not None
        and port_in.port.isolated
    )
    if both_isolated:
        return _refused(cursor, port, f"{port_in.name} and {port.name} are isolated ports")
    if port.port is not None and port.port.state not in ("forwarding", ""):
        return _refused(cursor, port, f"the bridge port {port.name} is {port.port.state}")
    steps = bridge_steps(evolve(cursor, decision=None), evolve(choice, neighbour=None))
    onward = evolve(cursor, port_out=port, link_target=target)
    if not netfilter:
        return leave(context, onward, port, steps)
    state = evolve(
        cursor.state,
        in_iface=bridge.name,
        out_iface=bridge.name,
        physdev_out=port.name,
        bridged=True,
    )
    return Way(
        cursor=enter_hook(evolve(onward, state=state), Hook.FORWARD, Stage.POST), steps=steps
    )


def _refused(cursor: Cursor, port: Link, why: str) -> Way:
    citation = cite_link(port)
    failed = step(
        cursor,
        StepKind.BRIDGE,
        StepAction.FAIL,
        citation=citation,
        note=why,
        interface=port.name,
    )
    return end(cursor, Disposition.UNREACHABLE, why, failed, citation=citation)


def _for_bridge(cursor: Cursor, bridge: Link) -> bool | None:
    """Whether the frame carries the bridge's own address.

    The sender asked for the link address of `Cursor.link_target`; any local address is answered
    with the bridge's (arp_ignore = 0).  Without it, of what the route to the destination says.
    """
    space = cursor.space
    target = _target(cursor)
    kind = space.fib.address_type(target)
    if kind is None:
        return None
    if kind == "local":
        return True
    if cursor.link_target is not None:
        return False
    routes = space.fib.output(target)
    if any(r.kind is RouteKind.UNKNOWN for r in routes):
        return None
    return not any(
        r.kind is RouteKind.FORWARD and r.interface == bridge.name and r.next_hop is None
        for r in routes
    )


def _target(cursor: Cursor) -> IPAddress:
    return cursor.link_target or (cursor.arrived or cursor.packet).dst
