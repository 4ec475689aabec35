"""Where a walk is: one packet at one point of one namespace, and the ways on from there."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import Final, TypeAlias

from gketrace.packet import IPAddress, Packet
from gketrace.quick import quick
from gketrace.simulate.evolve import copier
from gketrace.simulate.namespace import Namespace
from gketrace.simulate.routing import RouteDecision
from gketrace.simulate.state import CERTAIN, PacketState
from gketrace.simulate.station import Station
from gketrace.snapshot import ConntrackView, Link, Maybe, NodeView, Unavailable
from gketrace.trace import (
    Citation,
    Disposition,
    Flow,
    Hook,
    Ingress,
    Missing,
    NetnsRef,
    Outcome,
    Step,
    StepAction,
    StepKind,
)

__all__ = [
    "Context",
    "Cursor",
    "Stage",
    "Visit",
    "Way",
    "end",
    "enter_hook",
    "followed_by",
    "joined",
    "on",
    "step",
    "unknown",
]


class Stage(Enum):
    """What happens to the packet next."""

    # Members are compared by identity; Enum's own hash is a call for each look-up.
    __hash__ = object.__hash__

    SEND = "send"
    """A local process sends it: route, then OUTPUT."""
    RECEIVE = "receive"
    """An interface receives it: bridge, then PREROUTING."""
    HOOK = "hook"
    """The next of `Cursor.stations`."""
    BRIDGED = "bridged"
    """Out of PREROUTING, still on the bridge: to its address, or translated away from it."""
    BRIDGE_OUT = "bridge-out"
    """Out of POSTROUTING on a bridge: through the port."""
    ROUTE = "route"
    """Out of PREROUTING: the input route look-up."""
    POST = "post"
    """Out of OUTPUT or FORWARD: to POSTROUTING."""
    TRANSMIT = "transmit"
    """Out of POSTROUTING: the neighbour, the device."""
    INPUT = "input"
    """Back from the loopback: to INPUT, with the route that it has."""
    DELIVER = "deliver"
    """Out of INPUT: the socket."""


Visit: TypeAlias = tuple[NetnsRef, str, IPAddress | None, Packet]
"""Namespace, interface, link target, packet without its TTL: to be there twice is a loop."""


class Context:
    """What all cursors of one walk share."""

    def __init__(self, view: NodeView, *, use_conntrack: bool) -> None:
        self.use_conntrack: Final = use_conntrack
        self._view = view
        self._spaces: dict[NetnsRef, Maybe[Namespace]] = {}

    def space(self, netns: NetnsRef) -> Maybe[Namespace]:
        """The namespace, read once in a walk."""
        known = self._spaces.get(netns)
        if known is None:
            snapshot = self._view.snapshot(netns)
            known = snapshot if isinstance(snapshot, Unavailable) else Namespace(snapshot)
            self._spaces[netns] = known
        return known

    def conntrack(self, space: Namespace) -> Maybe[ConntrackView] | None:
        """The kernel's entries there; None: they are not to be asked for."""
        return space.snapshot.conntrack if self.use_conntrack else None


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """One packet at one point of its way.  Immutable: each way on is a new one."""

    stage: Stage
    space: Namespace
    ingress: Ingress
    """How it came into this namespace."""
    state: PacketState
    stations: tuple[Station, ...] = ()
    """What is left of the current hook."""
    then: Stage = Stage.SEND
    """The stage after the current hook."""
    decision: RouteDecision | None = None
    """The route that the packet carries (skb_dst)."""
    flow: Flow | None = None
    """The entry that tracking found for it."""
    flows: tuple[Flow, ...] = ()
    """All entries that are known at this point, in any namespace."""
    visited: frozenset[Visit] = frozenset()
    nat_citation: Citation | None = None
    """The rule that settled the NAT that is carried out next."""
    nat_note: str = ""
    bridge: Link | None = None
    """The bridge that the frame is on."""
    arrived: Packet | None = None
    """The packet as it came onto the bridge, before PREROUTING."""
    for_bridge: bool = True
    """The frame carries the bridge's own link address, not that of another port."""
    port_in: Link | None = None
    """The bridge port that the frame came in by."""
    port_out: Link | None = None
    """The bridge port that the frame goes out by."""
    link_target: IPAddress | None = None
    """Whose link address the frame carries: the sender's next hop; None: not known."""
    guessed_rules: bool = False
    """True once the branch assumed what an unread rule set does in this namespace."""

    @property
    def packet(self) -> Packet:
        return self.state.packet


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way on from a cursor: a new cursor, or an end."""

    cursor: Cursor | None = None
    outcome: Outcome | None = None
    steps: tuple[Step, ...] = ()
    flows: tuple[Flow, ...] = ()
    missing: tuple[Missing, ...] = ()
    chance: Fraction | None = CERTAIN
    because: str = ""
    enters: bool = False
    """True: the cursor is in another namespace, or came into the same one again."""


def on(cursor: Cursor, *steps: Step) -> tuple[Way, ...]:
    """The only way on."""
    return (Way(cursor=cursor, steps=steps),)


def followed_by(first: Way, then: Way) -> Way:
    """`then` as it follows on `first`."""
    chance: Fraction | None = None
    if then.chance is CERTAIN:
        chance = first.chance
    elif first.chance is not None and then.chance is not None:
        chance = first.chance * then.chance
    return _way_of(
        then,
        first.steps + then.steps,
        first.flows + then.flows,
        first.missing + then.missing,
        chance,
        joined(first.because, then.because),
    )


_way_of: Final = copier(Way, "steps", "flows", "missing", "chance", "because")


def joined(*parts: str) -> str:
    """What was drawn or assumed, one thing after the other."""
    return ", ".join(part for part in parts if part)


_at_hook: Final = copier(Cursor, "stage", "then", "state", "stations")
_state_at: Final = copier(PacketState, "hook")


def enter_hook(cursor: Cursor, hook: Hook, then: Stage, state: PacketState | None = None) -> Cursor:
    """The cursor at the beginning of `hook`, with `state` if that is another one."""
    if state is None:
        state = cursor.state
    return _at_hook(
        cursor,
        Stage.HOOK,
        then,
        _state_at(state, hook),
        cursor.space.stations(hook, state.packet.family),
    )


def step(
    cursor: Cursor,
    kind: StepKind,
    action: StepAction,
    *,
    citation: Citation | None,
    note: str = "",
    after: Packet | None = None,
    interface: str = "",
    next_hop: IPAddress | None = None,
    in_hook: bool = False,
) -> Step:
    """A step about the cursor's packet."""
    return Step(
        kind=kind,
        action=action,
        before=cursor.packet,
        after=cursor.packet if after is None else after,
        note=note,
        hook=cursor.state.hook if in_hook else None,
        citation=citation,
        interface=interface,
        next_hop=next_hop,
    )


def end(
    cursor: Cursor,
    disposition: Disposition,
    detail: str,
    *steps: Step,
    citation: Citation | None = None,
    interface: str = "",
    next_hop: IPAddress | None = None,
    reject_with: str = "",
    missing: tuple[Missing, ...] = (),
    chance: Fraction | None = CERTAIN,
    because: str = "",
) -> Way:
    """The packet's way ends here."""
    outcome = Outcome(
        disposition=disposition,
        packet=cursor.packet,
        netns=cursor.space.netns,
        detail=detail,
        interface=interface,
        next_hop=next_hop,
        reject_with=reject_with,
        citation=citation,
    )
    return Way(outcome=outcome, steps=steps, missing=missing, chance=chance, because=because)


def unknown(
    cursor: Cursor,
    detail: str,
    *steps: Step,
    citation: Citation | None = None,
    what: str = "",
    chance: Fraction | None = CERTAIN,
    because: str = "",
) -> Way:
    """The packet's way cannot be followed further; `what` names what was not seen."""
    netns = cursor.space.netns
    missing: tuple[Missing, ...] = ()
    if what:
        missing = (Missing(what=what, why=detail, node=netns.node, netns=str(netns)),)
    last = step(cursor, StepKind.UNKNOWN, StepAction.UNKNOWN, citation=citation, note=detail)
    return end(
        cursor,
        Disposition.UNKNOWN,
        detail,
        *steps,
        last,
        citation=citation,
        missing=missing,
        chance=chance,
        because=because,
    )
