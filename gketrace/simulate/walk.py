"""The walk of one packet through one node: hooks, tracking, NAT, routing, bridges, veth pairs.

`walk` is pure.  It follows every way that the packet can take, as far as this node's snapshots
reach, and returns them as a flat tree.  Nothing recurses: open ways wait on a stack, so neither
many endpoints nor long chains of namespaces do harm.

The order of things, per namespace::

    received   bridge → PREROUTING → route ─┬→ INPUT → socket
                                            └→ FORWARD → POSTROUTING → neighbour → device
    sent here  route → OUTPUT → POSTROUTING → neighbour → device (or the loopback, and INPUT)

What stands on each hook is data: `gketrace.simulate.namespace.BUILT_IN` and the rule sets' base
chains, by priority.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gketrace.citing import cite_link
from gketrace.simulate.bridging import bridge_in, off_prerouting
from gketrace.simulate.cursor import (
    Context,
    Cursor,
    Stage,
    Way,
    end,
    enter_hook,
    step,
    unknown,
)
from gketrace.simulate.delivery import deliver
from gketrace.simulate.evolve import copier, evolve
from gketrace.simulate.query import WalkQuery
from gketrace.simulate.routes import route_input, send
from gketrace.simulate.routing import RouteKind
from gketrace.simulate.state import CERTAIN, PacketState
from gketrace.simulate.stations import run_stations
from gketrace.simulate.transmit import through_port, transmit
from gketrace.snapshot import NodeView, Unavailable
from gketrace.trace import (
    Branch,
    Citation,
    Disposition,
    Hook,
    Ingress,
    Missing,
    Outcome,
    Source,
    Step,
    StepAction,
    StepKind,
    Walk,
)

__all__ = ["MAX_BRANCHES", "WalkQuery", "walk"]

MAX_BRANCHES: Final = 20_000
"""Beyond this many branches the rest of the tree is one UNKNOWN each."""
_CROWDED: Final = f"more than {MAX_BRANCHES} branches"
_MAX_VISITS: Final = 64
"""Namespaces that one packet may pass on one node; a TTL is at most 255, real paths pass three."""


@dataclass(frozen=True, slots=True)
class _Open:
    """A branch that is still to be followed."""

    parent: int | None
    ingress: Ingress
    """Where the parent is."""
    way: Way


def walk(view: NodeView, query: WalkQuery) -> Walk:
    """All that can become of ``query.packet`` on the node that `view` reads."""
    context = Context(view, use_conntrack=query.use_conntrack)
    space = context.space(query.ingress.netns)
    if isinstance(space, Unavailable):
        return _unreadable(query, space)
    received = bool(query.ingress.interface)
    ingress = Ingress(netns=space.netns, interface=query.ingress.interface)
    first = Cursor(
        stage=Stage.RECEIVE if received else Stage.SEND,
        space=space,
        ingress=ingress,
        state=PacketState(
            packet=query.packet,
            hook=Hook.PREROUTING if received else Hook.OUTPUT,
            ct=None,
            in_iface=ingress.interface,
        ),
        flows=query.flows,
    )
    branches: list[Branch] = []
    missing: dict[Missing, None] = {}
    waiting = [_Open(None, ingress, Way(cursor=first, enters=True))]
    while waiting:
        begun = waiting.pop()
        index = len(branches)
        branch, forks, gaps = _follow(context, begun, crowded=index >= MAX_BRANCHES)
        branches.append(branch)
        missing.update(dict.fromkeys(gaps))
        waiting += [_Open(index, branch.ingress, way) for way in reversed(forks)]
        if len(forks) > 1:
            for way in forks:
                if way.cursor is not None:
                    way.cursor.space.forks()
    return Walk(branches=tuple(branches), missing=tuple(missing))


def _follow(
    context: Context, begun: _Open, *, crowded: bool
) -> tuple[Branch, tuple[Way, ...], list[Missing]]:
    """One branch: on until the packet ends, forks or enters a namespace.

    Also returns the ways that fork from it, and what was not seen.
    """
    way = begun.way
    begins = way.enters and not way.steps
    ingress = way.cursor.ingress if begins and way.cursor is not None else begun.ingress
    steps, flows, missing = list(way.steps), list(way.flows), list(way.missing)
    cursor, outcome = way.cursor, way.outcome
    forks: tuple[Way, ...] = ()
    if cursor is not None and way.enters and not begins:
        # The last steps before a namespace are still in the old one.
        forks, cursor = (Way(cursor=cursor, enters=True),), None
    while cursor is not None:
        if crowded:
            ways: tuple[Way, ...] = (unknown(cursor, _CROWDED, what="branches"),)
        else:
            lead, ways = _advance(context, cursor)
            steps += lead
        only = ways[0]
        if len(ways) > 1 or only.because or (only.chance is not CERTAIN and only.chance != 1):
            forks = ways
            break
        steps += only.steps
        flows += only.flows
        missing += only.missing
        cursor, outcome = only.cursor, only.outcome
        if only.enters:
            forks, cursor = (Way(cursor=cursor, enters=True),), None
    branch = Branch(
        parent=begun.parent,
        ingress=ingress,
        enters=begins,
        chance=way.chance,
        because=way.because,
        steps=tuple(steps),
        outcome=outcome,
        flows=tuple(flows),
    )
    return branch, forks, missing


def _advance(context: Context, cursor: Cursor) -> tuple[tuple[Step, ...], tuple[Way, ...]]:
    """One thing happens to the packet; at least one way on, and the steps that come before all."""
    if cursor.stage is Stage.HOOK:
        return run_stations(context, cursor)
    return (), _STAGES[cursor.stage](context, cursor)


def _send(context: Context, cursor: Cursor) -> tuple[Way, ...]:
    return _hidden(cursor) or send(cursor)


def _hidden(cursor: Cursor) -> tuple[Way, ...]:
    """Where eBPF programs forward, the rules and routes below do not decide."""
    link = cursor.space.hidden_by
    if link is None:
        return ()
    why = f"{link.name} shows that Cilium's eBPF programs forward here; they are not visible"
    return (unknown(cursor, why, citation=cite_link(link), what="dataplane"),)


def _receive(context: Context, cursor: Cursor) -> tuple[Way, ...]:
    name = cursor.ingress.interface
    link = cursor.space.links.get(name)
    if link is None:
        links = cursor.space.snapshot.links
        why = links.reason if isinstance(links, Unavailable) else f"no interface {name!r} here"
        return (unknown(cursor, why, what="links"),)
    received = step(
        cursor,
        StepKind.RECEIVE,
        StepAction.CONTINUE,
        citation=cite_link(link),
        interface=name,
    )
    if not link.up:
        why = f"{name} is down"
        return (end(cursor, Disposition.NO_NEIGHBOUR, why, received, citation=cite_link(link)),)
    if hidden := _hidden(cursor):
        return (evolve(hidden[0], steps=(received, *hidden[0].steps)),)
    here = (cursor.space.netns, name, cursor.link_target, evolve(cursor.packet, ttl=None))
    if here in cursor.visited or len(cursor.visited) >= _MAX_VISITS:
        why = f"it came to {name} before, with the same header"
        return (end(cursor, Disposition.LOOPED, why, received, citation=cite_link(link)),)
    cursor = evolve(cursor, visited=cursor.visited | {here})
    master = cursor.space.by_index.get(link.master) if link.master is not None else None
    if link.master is None:
        way = Way(cursor=enter_hook(cursor, Hook.PREROUTING, Stage.ROUTE))
    elif master is None or master.kind not in ("bridge", "bond", "team"):
        kind = master.kind if master is not None else "unknown interface"
        way = unknown(cursor, f"{name} belongs to a {kind}; what that does is not simulated")
    elif master.kind == "bridge":
        way = bridge_in(context, cursor, link, master)
    else:
        state = evolve(cursor.state, in_iface=master.name)
        way = Way(cursor=enter_hook(evolve(cursor, state=state), Hook.PREROUTING, Stage.ROUTE))
    return (evolve(way, steps=(received, *way.steps)),)


def _route(context: Context, cursor: Cursor) -> tuple[Way, ...]:
    return route_input(cursor)


def _post(context: Context, cursor: Cursor) -> tuple[Way, ...]:
    if cursor.state.bridged:
        return (Way(cursor=enter_hook(cursor, Hook.POSTROUTING, Stage.BRIDGE_OUT)),)
    decision = cursor.decision
    if decision is None:
        raise AssertionError("POSTROUTING without a route")
    state = _leaving(cursor.state, decision.interface)
    return (Way(cursor=enter_hook(cursor, Hook.POSTROUTING, Stage.TRANSMIT, state)),)


_leaving: Final = copier(PacketState, "out_iface")


def _input(context: Context, cursor: Cursor) -> tuple[Way, ...]:
    return (Way(cursor=enter_hook(cursor, Hook.INPUT, Stage.DELIVER)),)


def _deliver(context: Context, cursor: Cursor) -> tuple[Way, ...]:
    decision = cursor.decision
    if decision is not None and decision.kind is RouteKind.MULTICAST:
        citation = decision.citations[-1] if decision.citations else None
        return (unknown(cursor, "who has joined the group is not looked into", citation=citation),)
    if (server := cursor.space.virtual_server(cursor.packet.dst)) is not None:
        why = f"{cursor.packet.dst} is an IPVS virtual server's; how IPVS forwards is not simulated"
        return (unknown(cursor, why, citation=cite_link(server), what="ipvs"),)
    flows = cursor.flows if cursor.flow is None else (*cursor.flows, cursor.flow)
    ended = deliver(
        cursor.packet,
        snapshot=cursor.space.snapshot,
        in_iface=cursor.state.in_iface,
        flows=flows,
    )
    return (Way(outcome=ended.outcome, steps=ended.steps, missing=ended.missing),)


_STAGES: Final[dict[Stage, Callable[[Context, Cursor], tuple[Way, ...]]]] = {
    Stage.SEND: _send,
    Stage.RECEIVE: _receive,
    Stage.BRIDGED: off_prerouting,
    Stage.BRIDGE_OUT: through_port,
    Stage.ROUTE: _route,
    Stage.POST: _post,
    Stage.TRANSMIT: transmit,
    Stage.INPUT: _input,
    Stage.DELIVER: _deliver,
}


def _unreadable(query: WalkQuery, gap: Unavailable) -> Walk:
    """Not even the first namespace could be read."""
    netns = query.ingress.netns
    citation = Citation(source=Source.KERNEL, text=str(netns))
    last = Step(
        kind=StepKind.UNKNOWN,
        action=StepAction.UNKNOWN,
        before=query.packet,
        after=query.packet,
        note=gap.reason,
        citation=citation,
    )
    outcome = Outcome(
        disposition=Disposition.UNKNOWN,
        packet=query.packet,
        netns=netns,
        detail=gap.reason,
        citation=citation,
    )
    branch = Branch(parent=None, ingress=query.ingress, enters=True, steps=(last,), outcome=outcome)
    missing = Missing(what="netns", why=gap.reason, node=netns.node, netns=str(netns))
    return Walk(branches=(branch,), missing=(missing,))
