"""Connection tracking on a hook: where it looks a packet up, and where it confirms a connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gketrace.conntrack import CtState, CtStatus
from gketrace.packet import Tuple5
from gketrace.simulate import nat, tracking
from gketrace.simulate.cursor import Context, Cursor, Way, end, step
from gketrace.simulate.evolve import copier, evolve
from gketrace.simulate.state import CtInfo, Direction, PacketState
from gketrace.simulate.station import Station
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

__all__ = ["confirm", "look_up", "taken_by_others"]

_CONFIRMED: Final = int(CtStatus.CONFIRMED)
_confirmed: Final = copier(Cursor, "state", "flow", "flows")
_with_ct: Final = copier(PacketState, "ct")


def look_up(context: Context, cursor: Cursor, station: Station) -> tuple[Way, ...]:
    """nf_conntrack_in()."""
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


def confirm(context: Context, cursor: Cursor, station: Station) -> tuple[Way, ...]:
    """__nf_conntrack_confirm()."""
    ct = cursor.state.ct
    assert ct is not None
    assert ct.reply is not None
    flow = tracking.new_flow(ct, cursor.space.netns)
    answer = ct.reply.inverted()
    # Where NAT has looked, the port is another one; without ports there is nothing to change.
    unique = nat.has_choice(answer) and cursor.space.translates(cursor.packet.family)
    if not unique and taken_by_others(context, cursor)(answer):
        why = f"the answer to it would belong to another connection ({ct.reply})"
        citation = Citation(source=Source.KERNEL, text="__nf_conntrack_confirm")
        last = step(
            cursor, StepKind.CONNTRACK, StepAction.DROP, citation=citation, note=why, in_hook=True
        )
        return (end(cursor, Disposition.DROPPED, why, last, citation=citation),)
    settled = evolve(ct, status=ct.status | _CONFIRMED, existing=True)
    after = _confirmed(cursor, _with_ct(cursor.state, settled), flow, (*cursor.flows, flow))
    return (Way(cursor=after, flows=(flow,)),)


def taken_by_others(context: Context, cursor: Cursor) -> Callable[[Tuple5], bool]:
    """Whether the answer to a tuple would belong to another connection here."""
    space = cursor.space

    def taken(tuple5: Tuple5) -> bool:
        return tracking.tuple_taken(
            tuple5, space.netns, cursor.flows, context.conntrack(space), cursor.state.zone or 0
        )

    return taken
