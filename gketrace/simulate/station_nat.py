"""NAT on a hook: the chains that settle a translation, and where it is carried out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from gketrace.packet import IPAddress
from gketrace.simulate import nat
from gketrace.simulate.cursor import Context, Cursor, Way, followed_by, on, step, unknown
from gketrace.simulate.evolve import copier, evolve
from gketrace.simulate.routes import reroute
from gketrace.simulate.state import Alternative, NatRequest, PacketState
from gketrace.simulate.station import Station
from gketrace.simulate.station_chain import onward_ways
from gketrace.simulate.station_conntrack import taken_by_others
from gketrace.trace import Citation, Hook, Source, StepAction, StepKind

__all__ = ["nat_chain_ways", "translate"]

_with_nat: Final = copier(Cursor, "state", "nat_citation", "nat_note")
_with_ct: Final = copier(PacketState, "ct")
_rewritten: Final = copier(PacketState, "packet", "ct")


def nat_chain_ways(
    context: Context, cursor: Cursor, found: tuple[Alternative, ...]
) -> tuple[Way, ...]:
    """nf_nat_inet_fn(): chains are asked until one has settled this side of the connection."""

    def onward(alternative: Alternative, after: Cursor, way: Way) -> Iterable[Way]:
        request = alternative.verdict.nat
        if request is None:
            return (way,)
        citation = request.citation or alternative.verdict.citation
        settled = _settle(context, after, request, citation)
        return [followed_by(way, further) for further in settled]

    return onward_ways(cursor, found, onward)


def _settle(context: Context, cursor: Cursor, request: NatRequest, citation: Citation) -> list[Way]:
    ct = cursor.state.ct
    assert ct is not None
    ways = []
    taken = taken_by_others(context, cursor)
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


def translate(context: Context, cursor: Cursor, station: Station) -> tuple[Way, ...]:
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
        bound = nat.null_binding(
            ct, manip, taken=taken_by_others(context, cursor) if hooked else None
        )
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
