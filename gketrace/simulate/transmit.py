"""Out of a namespace: the neighbour, the device, the bridge port, the other end of a veth."""

from __future__ import annotations

from typing import Final

from gketrace.citing import cite_link, cite_neighbour
from gketrace.packet import IPAddress
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
from gketrace.simulate.evolve import copier, evolve
from gketrace.simulate.namespace import Namespace
from gketrace.simulate.ports import PortChoice, choose_port, neighbour_of
from gketrace.simulate.routing import RouteKind
from gketrace.simulate.state import PacketState
from gketrace.snapshot import Link, Unavailable
from gketrace.trace import (
    Disposition,
    Hook,
    Ingress,
    Outcome,
    Step,
    StepAction,
    StepKind,
)

__all__ = ["bridge_steps", "leave", "through_port", "transmit"]

_TUNNELS: Final = frozenset(
    {"vxlan", "geneve", "gre", "gretap", "ipip", "sit", "ip6tnl", "ip6gre", "wireguard", "xfrm"}
)


def transmit(context: Context, cursor: Cursor) -> tuple[Way, ...]:
    """Out of POSTROUTING: ip_finish_output2 and the device."""
    decision = cursor.decision
    assert decision is not None
    name = decision.interface
    link = cursor.space.links.get(name)
    if link is None:
        return (unknown(cursor, f"the interface {name!r} is not known", what="links"),)
    if "LOOPBACK" in link.flags or name == "lo":
        return (_loop_back(cursor, link),)
    if (down := _down(cursor, link)) is not None:
        return (down,)
    target = decision.next_hop or cursor.packet.dst
    if decision.kind in (RouteKind.BROADCAST, RouteKind.MULTICAST):
        what = decision.kind.value
        return (unknown(cursor, f"a {what} leaves by {name}; who takes it is not looked into"),)
    if link.kind == "bridge":
        choice = choose_port(context, cursor.space, link, target)
        if choice.failed:
            return (_no_neighbour(cursor, link, target, choice),)
        if choice.port is None:
            return (unknown(cursor, choice.why, *bridge_steps(cursor, choice)),)
        steps = bridge_steps(cursor, choice)
        onward = evolve(cursor, bridge=link, port_out=choice.port, link_target=target)
        return (leave(context, onward, choice.port, steps),)
    near = neighbour_of(cursor.space, link, target)
    if near is not None and near.state == "FAILED":
        choice = PortChoice(failed=True, neighbour=near)
        return (_no_neighbour(cursor, link, target, choice),)
    if near is not None and near.state == "INCOMPLETE":
        # Who answers does so within a millisecond; who does not is FAILED after three seconds.
        why = f"{target} was asked for on {name} and has not answered yet"
        return (unknown(cursor, why, citation=cite_neighbour(near, name)),)
    steps = ()
    if near is not None and near.mac:
        steps = bridge_steps(cursor, PortChoice(neighbour=near))
    if link.kind in _TUNNELS:
        why = f"{name} is a {link.kind} tunnel; the packet that carries this one is not followed"
        return (unknown(cursor, why, *steps, citation=cite_link(link)),)
    return (leave(context, _towards(cursor, target), link, steps),)


_towards: Final = copier(Cursor, "link_target")


def through_port(context: Context, cursor: Cursor) -> tuple[Way, ...]:
    """Out of the bridge's POSTROUTING: through the port that was chosen."""
    assert cursor.port_out is not None
    return (leave(context, cursor, cursor.port_out, ()),)


def leave(context: Context, cursor: Cursor, link: Link, steps: tuple[Step, ...]) -> Way:
    """Through `link`: into the namespace at the other end of a veth, or off the node."""
    if (down := _down(cursor, link)) is not None:
        return evolve(down, steps=steps + down.steps)
    target, cited = cursor.link_target, cursor.space.cite(link)
    gateway = target if target != cursor.packet.dst else None
    peer = link.peer.netns if link.peer is not None else None
    where = f"into {peer}" if peer is not None else "off this node"
    last = step(
        cursor,
        StepKind.TRANSMIT,
        StepAction.FORWARD,
        citation=cited,
        note=f"out of {link.name}, {where}",
        interface=link.name,
        next_hop=gateway,
    )
    if peer is None or link.peer is None:
        outcome = Outcome(
            disposition=Disposition.TRANSMITTED,
            packet=cursor.packet,
            netns=cursor.space.netns,
            detail=f"left through {link.name}" + (f" via {gateway}" if gateway else ""),
            interface=link.name,
            next_hop=gateway,
            citation=cited,
        )
        return Way(outcome=outcome, steps=(*steps, last))
    space = context.space(peer)
    if isinstance(space, Unavailable):
        why = f"{peer} could not be looked into: {space.reason}"
        return unknown(cursor, why, *steps, last, what="netns")
    far = space.by_index.get(link.peer.ifindex) or space.links.get(link.peer.name)
    if far is None:
        why = f"the other end of {link.name} was not found in {peer}"
        return unknown(cursor, why, *steps, last, what="links")
    same = space.netns == cursor.space.netns
    return Way(
        cursor=_arrive(cursor, space, far.name, keep_mark=same),
        steps=(*steps, last),
        enters=True,
    )


def _arrive(cursor: Cursor, space: Namespace, interface: str, *, keep_mark: bool) -> Cursor:
    """What __dev_forward_skb() leaves of the packet's state: its header, and within one namespace
    its mark (skb_scrub_packet); tracking forgets it."""
    packet = cursor.packet if keep_mark else evolve(cursor.packet, mark=0)
    return Cursor(
        stage=Stage.RECEIVE,
        space=space,
        ingress=Ingress(netns=space.netns, interface=interface),
        state=PacketState(packet=packet, hook=Hook.PREROUTING, ct=None, in_iface=interface),
        flows=cursor.flows,
        visited=cursor.visited,
        link_target=cursor.link_target,
        guessed_rules=cursor.guessed_rules and space.netns == cursor.space.netns,
    )


def _loop_back(cursor: Cursor, link: Link) -> Way:
    """loopback_xmit(): the packet comes in again with its mark, entry and route."""
    state = evolve(
        cursor.state,
        in_iface=link.name,
        out_iface="",
        physdev_in="",
        physdev_out="",
        bridged=False,
    )
    around = step(
        cursor,
        StepKind.TRANSMIT,
        StepAction.FORWARD,
        citation=cite_link(link),
        note="comes back in through the loopback",
        interface=link.name,
    )
    onward = enter_hook(evolve(cursor, state=state), Hook.PREROUTING, Stage.INPUT)
    return Way(cursor=onward, steps=(around,))


def _down(cursor: Cursor, link: Link) -> Way | None:
    if link.up and (link.carrier or link.operstate in ("UP", "UNKNOWN")):
        return None
    why = f"{link.name} is {'without carrier' if link.up else 'down'}"
    citation = cite_link(link)
    failed = step(
        cursor,
        StepKind.TRANSMIT,
        StepAction.FAIL,
        citation=citation,
        note=why,
        interface=link.name,
    )
    return end(cursor, Disposition.NO_NEIGHBOUR, why, failed, citation=citation)


def _no_neighbour(cursor: Cursor, link: Link, target: IPAddress, choice: PortChoice) -> Way:
    why = choice.why or f"{target} does not answer on {link.name}"
    citation = choice.neighbour_citation(link) or cite_link(link)
    failed = step(
        cursor,
        StepKind.NEIGHBOUR,
        StepAction.FAIL,
        citation=citation,
        note=why,
        interface=link.name,
        next_hop=target,
    )
    return end(cursor, Disposition.NO_NEIGHBOUR, why, failed, citation=citation)


def bridge_steps(cursor: Cursor, choice: PortChoice) -> tuple[Step, ...]:
    """The neighbour entry and the bridge's port, where they were used."""
    steps: list[Step] = []
    decision = cursor.decision
    if choice.neighbour is not None:
        name = decision.interface if decision is not None else ""
        steps.append(
            step(
                cursor,
                StepKind.NEIGHBOUR,
                StepAction.CONTINUE,
                citation=choice.neighbour_citation(cursor.space.links.get(name)),
                interface=name,
                next_hop=choice.neighbour.address,
            )
        )
    if choice.port is not None:
        steps.append(
            step(
                cursor,
                StepKind.BRIDGE,
                StepAction.FORWARD,
                citation=choice.port_citation(),
                note=choice.why,
                interface=choice.port.name,
            )
        )
    return tuple(steps)
