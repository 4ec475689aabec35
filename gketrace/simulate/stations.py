"""What a packet meets on a hook: base chains, connection tracking, NAT, confirmation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gketrace.conntrack import CtState, CtStatus
from gketrace.packet import IPAddress, Tuple5
from gketrace.ruleset.model import ChainType
from gketrace.simulate import nat, tracking
from gketrace.simulate.cursor import (
    Context,
    Cursor,
    Way,
    end,
    followed_by,
    joined,
    on,
    step,
    unknown,
)
from gketrace.simulate.evolve import copier, evolve
from gketrace.simulate.namespace import Namespace
from gketrace.simulate.routes import reroute
from gketrace.simulate.state import (
    CERTAIN,
    Alternative,
    CtInfo,
    Direction,
    NatRequest,
    PacketState,
    VerdictKind,
)
from gketrace.simulate.station import Station, StationKind
from gketrace.simulate.ties import run_tie
from gketrace.simulate.traversal import traverse
from gketrace.snapshot import Unavailable
from gketrace.trace import (
    Citation,
    Disposition,
    Flow,
    Hook,
    Missing,
    Source,
    Step,
    StepAction,
    StepKind,
)

__all__ = ["run_stations"]

_CONFIRMED: Final = int(CtStatus.CONFIRMED)


def run_stations(context: Context, cursor: Cursor) -> tuple[tuple[Step, ...], tuple[Way, ...]]:
    """The ways on from the cursor's hook: past it, or past the station that changed the cursor.

    The steps before them are of all these ways.
    """
    unread = cursor.space.unread
    if unread and cursor.stations and not cursor.guessed_rules:
        return (), _without(cursor, unread)
    state, stations = cursor.state, cursor.stations
    manip = nat.MANIP_AT.get(state.hook)
    steps: tuple[Step, ...] = ()
    for position, station in enumerate(stations, 1):
        kind = station.kind
        if _idle(kind, state.ct, manip):
            continue
        found: tuple[Alternative, ...] = ()
        if kind is StationKind.CHAIN or kind is StationKind.NAT_CHAIN:
            found = _through(cursor.space, station, state)
            only = found[0]
            if len(found) == 1 and _passes(only, station, state):
                # Most chains have one way through them: it needs no cursor of its own.
                state = only.state
                steps += only.steps
                continue
        rest = _before(cursor, state, stations[position:])
        if kind is StationKind.CHAIN:
            ways = _chain_ways(rest, station, found)
        elif kind is StationKind.NAT_CHAIN:
            ways = _nat_chain_ways(context, rest, found)
        else:
            ways = _RUN[kind](context, rest, station)
        onward = _onward(ways)
        if onward is None:
            return steps, ways
        cursor, state = onward, onward.state
        steps += ways[0].steps
    return steps, (Way(cursor=_past(cursor, state, (), cursor.then)),)


def _onward(ways: tuple[Way, ...]) -> Cursor | None:
    """Where the packet is on the hook, when it just goes on and all that is left are the steps."""
    way = ways[0]
    if len(ways) > 1 or way.chance is not CERTAIN or way.because or way.flows or way.missing:
        return None
    return way.cursor


_before: Final = copier(Cursor, "state", "stations")
_past: Final = copier(Cursor, "state", "stations", "stage")
_with_nat: Final = copier(Cursor, "state", "nat_citation", "nat_note")
_confirmed: Final = copier(Cursor, "state", "flow", "flows")
_with_ct: Final = copier(PacketState, "ct")
_rewritten: Final = copier(PacketState, "packet", "ct")


def _passes(alternative: Alternative, station: Station, state: PacketState) -> bool:
    """Whether the packet just goes on behind a chain that has no other way through it."""
    return (
        alternative.chance is CERTAIN
        and not alternative.because
        and alternative.verdict.kind is VerdictKind.ACCEPT
        and alternative.verdict.nat is None
        and not _routes_anew(station, state, alternative.state)
    )


def _idle(kind: StationKind, ct: CtInfo | None, manip: nat.Manip | None) -> bool:
    """Whether a station has nothing to do with a packet that is tracked so."""
    if kind is StationKind.CHAIN or kind is StationKind.TIE:
        return False
    if kind is StationKind.CONNTRACK:
        # nf_conntrack_in(): "Previously seen (loopback or untracked)? Ignore."
        return ct is not None and not ct.template
    if ct is None:
        return True
    if kind is StationKind.NAT:
        return ct.orig is None and ct.state is not CtState.RELATED
    if ct.orig is None or kind is StationKind.CONFIRM:
        return ct.orig is None or ct.existing
    return manip is None or nat.initialized(ct, manip)


def _without(cursor: Cursor, unread: tuple[Unavailable, ...]) -> tuple[Way, ...]:
    """A rule set was not read: it may stop or change the packet, or do nothing to it."""
    why = "; ".join(gap.reason for gap in unread)
    netns = cursor.space.netns
    missing = Missing(what="rules", why=why, node=netns.node, netns=str(netns))
    return (
        Way(
            cursor=evolve(cursor, guessed_rules=True),
            missing=(missing,),
            chance=None,
            because=f"if rules that could not be read do nothing to it: {why}",
        ),
        unknown(
            cursor,
            f"rules could not be read: {why}",
            what="rules",
            chance=None,
            because="if rules that could not be read stop or change it",
        ),
    )


def _chain(context: Context, cursor: Cursor, station: Station) -> tuple[Way, ...]:
    return _chain_ways(cursor, station, _through(cursor.space, station, cursor.state))


def _chain_ways(
    cursor: Cursor, station: Station, found: tuple[Alternative, ...]
) -> tuple[Way, ...]:
    ways: list[Way] = []
    for alternative in found:
        after = _with_state(cursor, alternative.state)
        if alternative.verdict.kind is not VerdictKind.ACCEPT:
            ways += _stopped(after, alternative)
            continue
        way = Way(
            cursor=after,
            steps=alternative.steps,
            chance=alternative.chance,
            because=alternative.because,
        )
        if _routes_anew(station, cursor.state, alternative.state):
            ways += [followed_by(way, further) for further in reroute(after)]
        else:
            ways.append(way)
    return tuple(ways)


def _through(space: Namespace, station: Station, state: PacketState) -> tuple[Alternative, ...]:
    """All ways through a station's chain."""
    ruleset, chain, recall = station.ruleset, station.chain, space.recall
    assert ruleset is not None
    assert chain is not None
    if recall is None:
        return traverse(ruleset, chain, state, space)
    return recall.chain(chain, state, lambda seen: traverse(ruleset, chain, seen, space, recall))


def _with_state(cursor: Cursor, state: PacketState) -> Cursor:
    """Most chains leave the packet as it is."""
    return cursor if state is cursor.state else evolve(cursor, state=state)


def _routes_anew(station: Station, before: PacketState, after: PacketState) -> bool:
    """ipt_mangle_out() and nf_route_table_hook4(): what makes them call ip_route_me_harder()."""
    chain = station.chain
    if chain is None or chain.type is not ChainType.ROUTE or chain.hook is not Hook.OUTPUT:
        return False
    old, new = before.packet, after.packet
    return (old.src, old.dst, old.mark, old.dscp) != (new.src, new.dst, new.mark, new.dscp)


_STOPS: Final = {
    VerdictKind.DROP: Disposition.DROPPED,
    VerdictKind.REJECT: Disposition.REJECTED,
}


def _stopped(cursor: Cursor, alternative: Alternative) -> list[Way]:
    """What comes of a verdict that is not ACCEPT."""
    verdict = alternative.verdict
    chance, because = alternative.chance, alternative.because
    disposition = _STOPS.get(verdict.kind)
    if disposition is not None:
        stop = end(
            cursor,
            disposition,
            verdict.detail,
            *alternative.steps,
            citation=verdict.citation,
            reject_with=verdict.reject_with,
            chance=chance,
            because=because,
        )
        return [stop]
    ways: list[Way] = []
    if verdict.kind is VerdictKind.QUEUE:
        # nf_reinject(): accepted packets go on with the next thing on the hook.
        accepted = "if the program that it is queued to lets it pass unchanged"
        onward = Way(cursor=cursor, steps=alternative.steps, chance=chance, because=because)
        ways.append(evolve(onward, chance=None, because=joined(because, accepted)))
        chance, because = None, joined(because, "if that program does something else with it")
    detail = verdict.detail or {
        VerdictKind.QUEUE: "handed to a program in user space; what that does is not known",
        VerdictKind.STOLEN: "taken by the rule's target; what becomes of it is not known",
    }.get(verdict.kind, "the rule is not understood")
    ways.append(
        unknown(
            cursor,
            detail,
            *alternative.steps,
            citation=verdict.citation,
            chance=chance,
            because=because,
        )
    )
    return ways


def _conntrack(context: Context, cursor: Cursor, station: Station) -> tuple[Way, ...]:
    space, state = cursor.space, cursor.state
    local = state.hook is Hook.OUTPUT
    if not space.tracks(cursor.packet.family):
        return (_opened(cursor) if local else Way(cursor=cursor),)
    if state.notrack:
        ct = CtInfo(state=CtState.UNTRACKED)
        after = evolve(cursor, state=evolve(state, ct=ct))
        return (_opened(after) if local else Way(cursor=after),)
    loose = space.sysctl("net.netfilter.nf_conntrack_tcp_loose")
    zone = state.zone or 0
    if zone < 0:
        # nf_ct_zone_tmpl(): the mark as it is now.
        zone = state.packet.mark & 0xFFFF
    ways = []
    for seen in tracking.track(
        cursor.packet,
        netns=space.netns,
        flows=cursor.flows,
        conntrack=context.conntrack(space),
        zone=zone,
        tcp_loose=loose != "0",
    ):
        ct = evolve(seen.ct, zone=zone)
        after = evolve(cursor, state=evolve(state, ct=ct, zone=zone), flow=seen.flow)
        way = _opened(after) if local and seen.ct.orig is None else Way(cursor=after)
        ways.append(
            evolve(
                way,
                steps=_tracking_steps(cursor, seen),
                flows=way.flows + _kernel_flow(seen.flow),
                missing=_conntrack_missing(cursor, seen),
                chance=seen.chance,
                because=seen.because,
            )
        )
    return tuple(ways)


def _opened(cursor: Cursor) -> Way:
    """A local process begins a connection that is not tracked here: remember who waits for it."""
    flow = tracking.opening(cursor.packet, cursor.space.netns)
    return Way(cursor=evolve(cursor, flows=(*cursor.flows, flow)), flows=(flow,))


def _kernel_flow(flow: Flow | None) -> tuple[Flow, ...]:
    return () if flow is None or flow.assumed else (flow,)


def _tracking_steps(cursor: Cursor, seen: tracking.Tracking) -> tuple[Step, ...]:
    """A plain new connection is not worth a step; all else is."""
    if seen.flow is not None:
        way = "answer" if seen.ct.direction is Direction.REPLY else "packet"
        whose = "that this trace makes" if seen.flow.assumed else "in the kernel's table"
        note = f"{way} of a connection {whose}: no nat rule is consulted"
        citation = Citation(source=Source.CONNTRACK, text=str(seen.flow.entry))
    elif seen.note:
        note = f"{seen.ct.state.value}: {seen.note}"
        citation = Citation(source=Source.KERNEL, text="nf_conntrack_in")
    else:
        return ()
    return (
        step(
            cursor,
            StepKind.CONNTRACK,
            StepAction.CONTINUE,
            citation=citation,
            note=note,
            in_hook=True,
        ),
    )


def _conntrack_missing(cursor: Cursor, seen: tracking.Tracking) -> tuple[Missing, ...]:
    if not seen.unavailable:
        return ()
    netns = cursor.space.netns
    why = f"an existing connection would decide before the rules: {seen.unavailable}"
    return (Missing(what="conntrack", why=why, node=netns.node, netns=str(netns)),)


def _nat_chain(context: Context, cursor: Cursor, station: Station) -> tuple[Way, ...]:
    return _nat_chain_ways(context, cursor, _through(cursor.space, station, cursor.state))


def _nat_chain_ways(
    context: Context, cursor: Cursor, found: tuple[Alternative, ...]
) -> tuple[Way, ...]:
    """nf_nat_inet_fn(): chains are asked until one has settled this side of the connection."""
    ways: list[Way] = []
    for alternative in found:
        after = _with_state(cursor, alternative.state)
        if alternative.verdict.kind is not VerdictKind.ACCEPT:
            ways += _stopped(after, alternative)
            continue
        way = Way(
            cursor=after,
            steps=alternative.steps,
            chance=alternative.chance,
            because=alternative.because,
        )
        request = alternative.verdict.nat
        if request is None:
            ways.append(way)
        else:
            citation = request.citation or alternative.verdict.citation
            ways += [
                followed_by(way, further) for further in _settle(context, after, request, citation)
            ]
    return tuple(ways)


def _settle(context: Context, cursor: Cursor, request: NatRequest, citation: Citation) -> list[Way]:
    ct = cursor.state.ct
    assert ct is not None
    ways = []
    taken = _taken(context, cursor)
    for setup in nat.set_up(ct, request, address=_selected(cursor, request), taken=taken):
        if setup.problem:
            ways.append(unknown(cursor, setup.problem, citation=citation))
            continue
        ways.append(
            Way(
                cursor=_with_nat(cursor, _with_ct(cursor.state, setup.ct), citation, setup.note),
                chance=setup.chance,
                because=setup.because,
            )
        )
    return ways


def _taken(context: Context, cursor: Cursor) -> Callable[[Tuple5], bool]:
    """Whether the answer to a tuple would belong to another connection here."""
    space = cursor.space

    def taken(tuple5: Tuple5) -> bool:
        return tracking.tuple_taken(
            tuple5, space.netns, cursor.flows, context.conntrack(space), cursor.state.zone or 0
        )

    return taken


def _selected(cursor: Cursor, request: NatRequest) -> IPAddress | None:
    """The address that the kernel selects for MASQUERADE and REDIRECT; None: not known."""
    state = cursor.state
    if request.masquerade:
        gateway = cursor.decision.next_hop if cursor.decision is not None else None
        return cursor.space.fib.masquerade_address(state.out_iface, state.packet, gateway)
    if request.redirect:
        packet = state.packet
        return cursor.space.fib.redirect_address(packet.family, state.in_iface, packet.dst)
    return None


def _nat(context: Context, cursor: Cursor, station: Station) -> tuple[Way, ...]:
    """Carry out what is settled; a connection that no rule claimed is bound as it is."""
    state = cursor.state
    ct = state.ct
    assert ct is not None
    if ct.orig is None:
        return (
            unknown(
                cursor,
                "the translation of an ICMP error depends on the packet that it quotes",
                citation=Citation(source=Source.KERNEL, text="nf_nat_icmp_reply_translation"),
            ),
        )
    manip = nat.MANIP_AT[state.hook]
    if not nat.initialized(ct, manip):
        hooked = cursor.space.translates(cursor.packet.family)
        bound = nat.null_binding(ct, manip, taken=_taken(context, cursor) if hooked else None)
        ct = bound.ct
        if bound.note:
            source = Citation(source=Source.KERNEL, text="nf_nat_alloc_null_binding")
            cursor = evolve(cursor, nat_citation=source, nat_note=bound.note)
    packet = nat.rewrite(state.packet, ct, manip)
    after = _with_nat(cursor, _rewritten(state, packet, ct), None, "")
    if packet is state.packet:
        return on(after)
    citation = cursor.nat_citation
    if citation is None:
        entry = cursor.flow.entry if cursor.flow is not None else None
        text = f"orig {ct.orig}, reply {ct.reply}" if entry is None else str(entry)
        citation = Citation(source=Source.CONNTRACK, text=text)
    done = step(
        cursor,
        StepKind.NAT,
        StepAction.REWRITE,
        citation=citation,
        note=cursor.nat_note or f"{manip.value} rewritten",
        after=packet,
        in_hook=True,
    )
    way = Way(cursor=after, steps=(done,))
    if state.hook is Hook.OUTPUT and packet.dst != state.packet.dst:
        # nf_nat_ipv4_local_fn(): a new destination is routed anew.
        return tuple(followed_by(way, further) for further in reroute(after))
    return (way,)


def _confirm(context: Context, cursor: Cursor, station: Station) -> tuple[Way, ...]:
    ct = cursor.state.ct
    assert ct is not None
    assert ct.reply is not None
    flow = tracking.new_flow(ct, cursor.space.netns)
    answer = ct.reply.inverted()
    # Where NAT has looked, the port is another one; without ports there is nothing to change.
    unique = nat.has_choice(answer) and cursor.space.translates(cursor.packet.family)
    if not unique and _taken(context, cursor)(answer):
        why = f"the answer to it would belong to another connection ({ct.reply})"
        citation = Citation(source=Source.KERNEL, text="__nf_conntrack_confirm")
        last = step(
            cursor, StepKind.CONNTRACK, StepAction.DROP, citation=citation, note=why, in_hook=True
        )
        return (end(cursor, Disposition.DROPPED, why, last, citation=citation),)
    settled = evolve(ct, status=ct.status | _CONFIRMED, existing=True)
    after = _confirmed(cursor, _with_ct(cursor.state, settled), flow, (*cursor.flows, flow))
    return (Way(cursor=after, flows=(flow,)),)


def _tie(context: Context, cursor: Cursor, station: Station) -> tuple[Way, ...]:
    return run_tie(cursor, station, lambda here, one: _one(context, here, one))


def _one(context: Context, cursor: Cursor, station: Station) -> tuple[Way, ...]:
    if _idle(station.kind, cursor.state.ct, nat.MANIP_AT.get(cursor.state.hook)):
        return on(cursor)
    return _RUN[station.kind](context, cursor, station)


_RUN: Final[dict[StationKind, Callable[[Context, Cursor, Station], tuple[Way, ...]]]] = {
    StationKind.CONNTRACK: _conntrack,
    StationKind.CHAIN: _chain,
    StationKind.NAT_CHAIN: _nat_chain,
    StationKind.NAT: _nat,
    StationKind.CONFIRM: _confirm,
    StationKind.TIE: _tie,
}
