"""Routing decisions in a walk: what each means, where it leads, and the steps that cite it."""

from __future__ import annotations

from typing import Final

from gketrace.packet import Packet
from gketrace.simulate.cursor import Cursor, Stage, Way, end, enter_hook, step, unknown
from gketrace.simulate.evolve import copier, evolve
from gketrace.simulate.routing import RouteDecision, RouteKind
from gketrace.simulate.state import PacketState
from gketrace.snapshot import PolicyRule
from gketrace.trace import (
    Citation,
    Disposition,
    Hook,
    NetnsKind,
    Source,
    Step,
    StepAction,
    StepKind,
)

__all__ = ["decision_steps", "reroute", "route_input", "routed_input", "send"]

_FAILURES: Final = {
    RouteKind.UNREACHABLE: Disposition.UNREACHABLE,
    RouteKind.BLACKHOLE: Disposition.UNREACHABLE,
    RouteKind.PROHIBIT: Disposition.UNREACHABLE,
    RouteKind.NO_ROUTE: Disposition.UNREACHABLE,
    RouteKind.MARTIAN: Disposition.UNREACHABLE,
    RouteKind.RP_FILTER: Disposition.UNREACHABLE,
    RouteKind.NOT_FORWARDING: Disposition.UNREACHABLE,
    RouteKind.FRAG_NEEDED: Disposition.UNREACHABLE,
    RouteKind.TTL_EXCEEDED: Disposition.UNREACHABLE,
    RouteKind.BAD_SOURCE: Disposition.UNREACHABLE,
}
_DETAILS: Final = {
    RouteKind.UNREACHABLE: "an unreachable route",
    RouteKind.BLACKHOLE: "a blackhole route drops it",
    RouteKind.PROHIBIT: "a prohibit route",
    RouteKind.NO_ROUTE: "no route",
    RouteKind.MARTIAN: "its addresses may not come in this way (martian)",
    RouteKind.RP_FILTER: "the reverse-path filter drops it",
    RouteKind.NOT_FORWARDING: "forwarding is off",
    RouteKind.FRAG_NEEDED: "longer than the MTU and may not be fragmented",
    RouteKind.TTL_EXCEEDED: "its TTL is used up",
    RouteKind.BAD_SOURCE: "a local sender may not use this source address",
}


def send(cursor: Cursor) -> tuple[Way, ...]:
    """A local process sends: the output route first (it selects the source), then OUTPUT."""
    packet = cursor.packet
    ways: list[Way] = []
    for decision in _output(cursor, source=not packet.src.is_unspecified):
        sent = packet
        if packet.src.is_unspecified and decision.source is not None:
            sent = evolve(packet, src=decision.source)
        from_here = evolve(cursor, state=evolve(cursor.state, packet=sent))
        first = step(
            from_here,
            StepKind.SEND,
            StepAction.CONTINUE,
            citation=Citation(source=Source.KERNEL, text="ip_route_output_key"),
            note=f"sent by a process in {cursor.space.netns}",
        )
        if _bad(decision):
            ways.append(_failed(from_here, decision, first))
        elif sent.src.is_unspecified:
            why = decision.detail or "the source address that the kernel selects is not known"
            ways.append(unknown(from_here, why, first))
        else:
            state = evolve(from_here.state, out_iface=decision.interface)
            ways.append(
                Way(
                    cursor=enter_hook(
                        evolve(from_here, state=state, decision=decision),
                        Hook.OUTPUT,
                        Stage.POST,
                    ),
                    steps=(first, *decision_steps(from_here, decision)),
                    chance=decision.chance,
                    because=decision.because,
                )
            )
    return tuple(ways)


def reroute(cursor: Cursor) -> tuple[Way, ...]:
    """ip_route_me_harder(): OUTPUT changed what routing looks at.

    The rest of OUTPUT still sees the old output interface (nf_hook_state is not updated).
    """
    old = cursor.decision
    ways = []
    for decision in _output(cursor, source=True, any_source=True):
        if _bad(decision):
            ways.append(_failed(cursor, decision))
            continue
        same = old is not None and (old.route, old.interface, old.next_hop) == (
            decision.route,
            decision.interface,
            decision.next_hop,
        )
        ways.append(
            Way(
                cursor=evolve(cursor, decision=decision),
                steps=() if same else decision_steps(cursor, decision),
                chance=decision.chance,
                because=decision.because,
            )
        )
    return tuple(ways)


def route_input(cursor: Cursor) -> tuple[Way, ...]:
    """Out of PREROUTING: the input look-up, and on to INPUT or FORWARD."""
    decisions = cursor.space.fib.input(cursor.packet, cursor.state.in_iface)
    return tuple(routed_input(cursor, decision) for decision in decisions)


_routed: Final = copier(Cursor, "decision")
_forwarded: Final = copier(PacketState, "packet", "out_iface")


def routed_input(cursor: Cursor, decision: RouteDecision) -> Way:
    """Where one input decision leads."""
    if _bad(decision):
        return _failed(cursor, decision)
    steps = decision_steps(cursor, decision)
    if decision.kind is RouteKind.FORWARD:
        packet = cursor.packet
        if packet.ttl is not None:
            packet = evolve(packet, ttl=packet.ttl - 1)
        state = _forwarded(cursor.state, packet, decision.interface)
        onward = enter_hook(_routed(cursor, decision), Hook.FORWARD, Stage.POST, state)
    else:
        onward = enter_hook(_routed(cursor, decision), Hook.INPUT, Stage.DELIVER)
    return Way(cursor=onward, steps=steps, chance=decision.chance, because=decision.because)


def decision_steps(cursor: Cursor, decision: RouteDecision) -> tuple[Step, ...]:
    """One step for each thing that routing looked at and that is worth a line."""
    steps: list[Step] = []
    for citation in decision.citations:
        if citation.source is Source.POLICY_RULE:
            if decision.rule is not None and not _selective(decision.rule):
                continue
            steps.append(step(cursor, StepKind.ROUTE, StepAction.CONTINUE, citation=citation))
        elif citation.source is Source.ROUTE:
            steps.append(_route_step(cursor, decision, citation))
        else:
            action = StepAction.FAIL if decision.kind in _FAILURES else StepAction.CONTINUE
            steps.append(
                step(
                    cursor,
                    StepKind.CHECK,
                    action,
                    citation=citation,
                    note=decision.detail if action is StepAction.FAIL else "",
                )
            )
    if not any(s.kind is StepKind.ROUTE and s.interface for s in steps) and (
        decision.kind not in _FAILURES
    ):
        text = decision.route.text if decision.route is not None else decision.detail
        steps.append(_route_step(cursor, decision, Citation(source=Source.ROUTE, text=text)))
    return tuple(steps)


def _route_step(cursor: Cursor, decision: RouteDecision, citation: Citation) -> Step:
    local = decision.kind in (RouteKind.LOCAL, RouteKind.BROADCAST, RouteKind.MULTICAST)
    action = StepAction.DELIVER if local else StepAction.FORWARD
    if decision.kind in _FAILURES:
        action = StepAction.FAIL
    return step(
        cursor,
        StepKind.ROUTE,
        action,
        citation=citation,
        note=decision.detail,
        interface=decision.interface,
        next_hop=decision.next_hop,
    )


def _selective(rule: PolicyRule) -> bool:
    """False for the three rules that every namespace has, which select nothing."""
    return any(
        (
            rule.src is not None and rule.src.prefixlen,
            rule.dst is not None and rule.dst.prefixlen,
            rule.iif,
            rule.oif,
            rule.fwmark is not None,
            rule.tos,
            rule.ip_protocol is not None,
            rule.sport is not None,
            rule.dport is not None,
            rule.uid_range is not None,
            rule.invert,
            rule.suppress_prefixlength is not None,
            rule.suppress_ifgroup is not None,
            rule.l3mdev,
            rule.tun_id is not None,
        )
    )


def _bad(decision: RouteDecision) -> bool:
    return decision.kind in _FAILURES or decision.kind is RouteKind.UNKNOWN


def _decisive(decision: RouteDecision) -> Citation | None:
    """The check that stopped it, where one did; else the last thing that was looked at."""
    checks = (Source.SYSCTL, Source.KERNEL)
    last = decision.citations[-1] if decision.citations else None
    return next((c for c in decision.citations if c.source in checks), last)


def _failed(cursor: Cursor, decision: RouteDecision, *first: Step) -> Way:
    citation = _decisive(decision)
    if decision.kind is RouteKind.UNKNOWN:
        return unknown(
            cursor,
            decision.detail or "the route is not known",
            *first,
            citation=citation,
            chance=decision.chance,
            because=decision.because,
        )
    if citation is None:
        citation = Citation(source=Source.KERNEL, text=f"no route to {cursor.packet.dst}")
        last = step(
            cursor,
            StepKind.ROUTE,
            StepAction.FAIL,
            citation=citation,
            note=_DETAILS[decision.kind],
        )
        first = (*first, last)
    detail = decision.detail or _DETAILS[decision.kind]
    if decision.kind is RouteKind.NOT_FORWARDING and cursor.space.netns.kind is NetnsKind.POD:
        # No pod is meant to forward: it lacks the address.
        detail = f"{cursor.packet.dst} is no local address there, and {detail}"
    return end(
        cursor,
        _FAILURES[decision.kind],
        detail,
        *first,
        *decision_steps(cursor, decision),
        citation=citation,
        chance=decision.chance,
        because=decision.because,
    )


def _output(cursor: Cursor, *, source: bool, any_source: bool = False) -> tuple[RouteDecision, ...]:
    packet: Packet = cursor.packet
    ports = packet.has_ports
    return cursor.space.fib.output(
        packet.dst,
        src=packet.src if source else None,
        mark=packet.mark,
        tos=packet.dscp << 2,
        protocol=packet.protocol,
        sport=packet.sport if ports else None,
        dport=packet.dport if ports else None,
        uid=cursor.state.uid,
        any_source=any_source,
    )
