"""Network address translation: nf_nat_setup_info() and nf_nat_packet() over tuples.

A connection's NAT is the difference between its original tuple and its inverted reply tuple.
`set_up` changes the reply tuple for a request of a nat rule; `rewrite` applies the difference to
a packet at one hook.  A port that only the kernel can know is None afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from ipaddress import ip_address
from typing import Final

from gketrace.conntrack import CtStatus
from gketrace.packet import PORT_PROTOCOLS, IPAddress, Packet, Protocol, Tuple5
from gketrace.quick import quick
from gketrace.simulate.evolve import copier, evolve
from gketrace.simulate.state import CERTAIN, CtInfo, Direction, NatRequest
from gketrace.trace import Hook

__all__ = [
    "MANIP_AT",
    "Manip",
    "NatSetup",
    "has_choice",
    "initialized",
    "null_binding",
    "rewrite",
    "set_up",
]

MAX_MEMBERS: Final = 16
"""Ranges up to this many addresses or ports are followed one by one."""


class Manip(Enum):
    """Which side of the packet changes (enum nf_nat_manip_type)."""

    # Members are compared by identity; Enum's own hash is a call for each look-up.
    __hash__ = object.__hash__

    SRC = "source"
    DST = "destination"


MANIP_AT: Final[dict[Hook, Manip]] = {
    Hook.PREROUTING: Manip.DST,
    Hook.OUTPUT: Manip.DST,
    Hook.INPUT: Manip.SRC,
    Hook.POSTROUTING: Manip.SRC,
}
"""HOOK2MANIP of nf_nat_core.c."""

# Plain numbers: an operation on a member of an enum costs ten times as much.
_DONE: Final = {Manip.SRC: int(CtStatus.SRC_NAT_DONE), Manip.DST: int(CtStatus.DST_NAT_DONE)}
_CHANGED: Final = {Manip.SRC: int(CtStatus.SRC_NAT), Manip.DST: int(CtStatus.DST_NAT)}
_OTHER: Final = {Manip.SRC: Manip.DST, Manip.DST: Manip.SRC}


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class NatSetup:
    """One way that a request can be carried out."""

    ct: CtInfo
    chance: Fraction | None = CERTAIN
    because: str = ""
    note: str = ""
    """What is not known about the choice; empty when nothing."""
    problem: str = ""
    """Why the result is not known at all; `ct` is then unchanged."""


def initialized(ct: CtInfo, manip: Manip) -> bool:
    """nf_nat_initialized(): this side's NAT is settled, no nat rule is consulted."""
    return ct.existing or bool(ct.status & _DONE[manip])


def has_choice(tuple5: Tuple5) -> bool:
    """Whether the protocol has a port or identifier that NAT may change to be unique."""
    return tuple5.protocol in (*PORT_PROTOCOLS, Protocol.ICMP, Protocol.ICMPV6)


def null_binding(ct: CtInfo, manip: Manip, *, taken: Callable[[Tuple5], bool] | None) -> NatSetup:
    """nf_nat_alloc_null_binding(): nothing changes, and the side is settled.

    But where the answer would already belong to another connection, the source port does change
    (get_unique_tuple).
    """
    if manip is Manip.SRC and ct.reply is not None and taken is not None:
        current = ct.reply.inverted()
        if has_choice(current) and taken(current):
            return set_up(ct, NatRequest(source=True), address=None, taken=lambda _: True)[0]
    return NatSetup(ct=evolve(ct, status=ct.status | _DONE[manip]))


def rewrite(packet: Packet, ct: CtInfo, manip: Manip) -> Packet:
    """The packet after nf_nat_packet() at a hook of `manip`; the same object if nothing changes."""
    if ct.orig is None or ct.reply is None:
        return packet
    original = ct.direction is Direction.ORIGINAL
    if not ct.status & _CHANGED[manip if original else _OTHER[manip]]:
        return packet
    target = (ct.reply if original else ct.orig).inverted()
    if manip is Manip.SRC:
        sport = target.sport if packet.has_ports else packet.sport
        same = packet.src == target.src and packet.sport == sport
        after = packet if same else evolve(packet, src=target.src, sport=sport)
    else:
        dport = target.dport if packet.has_ports else packet.dport
        same = packet.dst == target.dst and packet.dport == dport
        after = packet if same else evolve(packet, dst=target.dst, dport=dport)
    if packet.protocol in (Protocol.ICMP, Protocol.ICMPV6) and packet.icmp_id != target.sport:
        after = evolve(after, icmp_id=target.sport)
    return after


def set_up(
    ct: CtInfo,
    request: NatRequest,
    *,
    address: IPAddress | None,
    taken: Callable[[Tuple5], bool],
) -> tuple[NatSetup, ...]:
    """Carry out `request` on a connection whose side is not settled (nf_nat_setup_info).

    `address` is the one that MASQUERADE or REDIRECT selected; `taken` says whether a tuple's
    answer already belongs to another connection.  Several answers: the kernel picks one address
    of a range by a hash.
    """
    if ct.orig is None or ct.reply is None:
        raise ValueError("only a tracked packet can be translated")
    manip = Manip.SRC if request.source else Manip.DST
    current = ct.reply.inverted()
    old = current.src if manip is Manip.SRC else current.dst
    addresses = _addresses(request, old, address)
    if isinstance(addresses, str):
        return (NatSetup(ct=ct, problem=addresses),)
    setups: list[NatSetup] = []
    for new in addresses:
        several = len(addresses) > 1
        wanted = _with(current, manip, new)
        ports = _ports(request, wanted, current, manip, taken)
        for port, note in ports:
            because = []
            if several:
                because.append(f"address {new} of the range")
            if len(ports) > 1:
                because.append(f"port {port} of the range")
            forked = several or len(ports) > 1
            setups.append(
                NatSetup(
                    ct=_bound(ct, current, wanted, port, request, manip),
                    chance=None if forked else CERTAIN,
                    because=", ".join(because),
                    note=note,
                )
            )
    return tuple(setups)


def _with(current: Tuple5, manip: Manip, address: IPAddress) -> Tuple5:
    return _from(current, address) if manip is Manip.SRC else _to(current, address)


_from: Final = copier(Tuple5, "src")
_to: Final = copier(Tuple5, "dst")
_sport: Final = copier(Tuple5, "sport")
_dport: Final = copier(Tuple5, "dport")
_replied: Final = copier(CtInfo, "reply", "status")


def _addresses(
    request: NatRequest, old: IPAddress, selected: IPAddress | None
) -> tuple[IPAddress, ...] | str:
    if request.masquerade or request.redirect:
        if selected is None:
            what = "MASQUERADE" if request.masquerade else "REDIRECT"
            return f"the address that {what} selects is not known"
        return (selected,)
    if request.addresses is None:
        return (old,)
    low, high = request.addresses
    if low == high and not request.netmap:
        return (low,)
    if request.netmap:
        bits = 32 if low.version == 4 else 128
        if request.prefixlen is not None:
            host = (1 << (bits - request.prefixlen)) - 1
        else:
            host = int(low) ^ int(high)
        return (_address((int(old) & host) | (int(low) & ~host), low.version),)
    size = int(high) - int(low) + 1
    if size > MAX_MEMBERS:
        return f"the kernel picks one of the {size} addresses {low}-{high} by a hash"
    return tuple(_address(value, low.version) for value in range(int(low), int(high) + 1))


def _address(value: int, version: int) -> IPAddress:
    size = 4 if version == 4 else 16
    return ip_address(value.to_bytes(size, "big"))


def _ports(
    request: NatRequest,
    wanted: Tuple5,
    current: Tuple5,
    manip: Manip,
    taken: Callable[[Tuple5], bool],
) -> tuple[tuple[int | None, str], ...]:
    """The port on the side of `manip` (nf_nat_l4proto_unique_tuple), and what is not known."""
    icmp = current.protocol in (Protocol.ICMP, Protocol.ICMPV6)
    if not icmp and current.protocol not in PORT_PROTOCOLS:
        return ((None, ""),)
    own = current.sport if manip is Manip.SRC or icmp else current.dport
    random = request.random or request.random_fully
    if request.ports is None:
        if manip is Manip.DST:
            # get_unique_tuple(): without a port range a destination port is never changed.
            return ((own, ""),)
        if random:
            return ((None, "the kernel picks a random source port"),)
        if own is not None and taken(wanted):
            return ((None, f"port {own} is taken by another connection; the kernel picks one"),)
        return ((own, ""),)
    low, high = request.ports
    if low == high:
        return ((low, ""),)
    if not random and own is not None and low <= own <= high and not taken(wanted):
        return ((own, ""),)
    if manip is Manip.SRC:
        return ((None, f"the kernel picks a free port of {low}-{high}"),)
    if not random:
        # For destinations the search begins at a fixed offset: 0, or that of a shifted map.
        offset = 0 if request.base_port is None or own is None else own - request.base_port
        first = low + offset % (high - low + 1)
        if not taken(evolve(wanted, dport=first)):
            return ((first, ""),)
    if high - low + 1 <= MAX_MEMBERS:
        return tuple((port, "") for port in range(low, high + 1))
    return ((None, f"the kernel picks a port of {low}-{high}"),)


def _bound(
    ct: CtInfo,
    current: Tuple5,
    wanted: Tuple5,
    port: int | None,
    request: NatRequest,
    manip: Manip,
) -> CtInfo:
    icmp = current.protocol in (Protocol.ICMP, Protocol.ICMPV6)
    if icmp or manip is Manip.SRC:
        new = wanted if wanted.sport == port else _sport(wanted, port)
    else:
        new = wanted if wanted.dport == port else _dport(wanted, port)
    random = manip is Manip.SRC and (request.random or request.random_fully)
    status = ct.status | _DONE[manip]
    if new != current or (random and port is None and current.protocol in PORT_PROTOCOLS):
        status |= _CHANGED[manip]
    return _replied(ct, new.inverted(), status)
