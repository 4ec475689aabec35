"""Connection tracking: what it makes of a packet, before any NAT (nf_conntrack_in).

Entries that the same trace assumed are found first, then the kernel's.  A port that is not known
is not a wildcard: it equals only the unknown port of the same trace's own flow, and the kernel's
table is asked only for tuples that are known in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from gketrace.conntrack import ConntrackEntry, CtState, CtStatus
from gketrace.packet import PORT_PROTOCOLS, Packet, Protocol, TcpFlags, Tuple5
from gketrace.quick import quick
from gketrace.simulate.state import CERTAIN, CtInfo, Direction
from gketrace.snapshot import ConntrackView, Maybe, Unavailable
from gketrace.trace import Flow, NetnsRef

__all__ = [
    "Tracking",
    "complete_tuple",
    "find_flow",
    "new_flow",
    "opened_here",
    "opening",
    "template",
    "track",
    "tuple_taken",
]

_ICMP_REQUESTS: Final = frozenset({8, 13, 15, 17})
"""nf_conntrack_icmp_packet(): types that may open a connection."""
_ICMP_REPLIES: Final = frozenset({0, 14, 16, 18})
_ICMP_ERRORS: Final = frozenset({3, 4, 5, 11, 12})
_ICMPV6_REQUESTS: Final = frozenset({128, 139})
_ICMPV6_REPLIES: Final = frozenset({129, 140})
_ICMPV6_UNTRACKED: Final = frozenset({130, 131, 132, 133, 134, 135, 136, 137, 143})
"""nf_conntrack_icmpv6.c, noct_valid_new: MLD and neighbour discovery."""
_VALID_FLAGS: Final = frozenset(
    {
        TcpFlags.SYN,
        TcpFlags.SYN | TcpFlags.URG,
        TcpFlags.SYN | TcpFlags.ACK,
        TcpFlags.RST,
        TcpFlags.RST | TcpFlags.ACK,
        TcpFlags.FIN | TcpFlags.ACK,
        TcpFlags.FIN | TcpFlags.ACK | TcpFlags.URG,
        TcpFlags.ACK,
        TcpFlags.ACK | TcpFlags.URG,
    }
)
"""tcp_valid_flags of nf_conntrack_proto_tcp.c; PSH, ECE and CWR are not looked at."""
_IGNORED_FLAGS: Final = TcpFlags.PSH | TcpFlags.ECE | TcpFlags.CWR
# Plain numbers: an operation on a member of an enum costs ten times as much.
_CONFIRMED: Final = int(CtStatus.CONFIRMED)
_UNTRACKED: Final = int(CtStatus.UNTRACKED)
_SEEN_REPLY: Final = int(CtStatus.SEEN_REPLY)
_CLOSED: Final = frozenset({"TIME_WAIT", "CLOSE"})
_ANSWERABLE: Final = frozenset({"SYN_RECV", "SYN_SENT2"})
_REOPENABLE: Final = frozenset({"SYN_SENT", "SYN_SENT2", "TIME_WAIT"})
_OPENING: Final = frozenset({"SYN_SENT", "SYN_SENT2"})


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Tracking:
    """One way that tracking can see the packet."""

    ct: CtInfo
    flow: Flow | None = None
    """The entry that it found; None: there was none."""
    note: str = ""
    """Why it is INVALID, UNTRACKED or RELATED; empty for a plain new connection."""
    chance: Fraction | None = CERTAIN
    because: str = ""
    unavailable: str = ""
    """Why the kernel's table could not be asked, where it would have mattered."""


def track(
    packet: Packet,
    *,
    netns: NetnsRef,
    flows: Sequence[Flow],
    conntrack: Maybe[ConntrackView] | None,
    zone: int = 0,
    tcp_loose: bool = True,
) -> tuple[Tracking, ...]:
    """What connection tracking of `netns` attaches to `packet`, which is in `zone`.

    `conntrack` None: the kernel's table is not to be asked.  More than one answer where the
    packet lacks what decides (an ICMP error whose inner packet is not known).
    """
    if (refused := _malformed(packet)) is not None:
        return (refused,)
    tuple5 = packet.tuple5
    unavailable = ""
    flow = find_flow(tuple5, netns, flows, zone)
    if flow is None and conntrack is not None and complete_tuple(tuple5):
        if isinstance(conntrack, Unavailable):
            unavailable = conntrack.reason
        else:
            entry = conntrack.lookup(tuple5, zone)
            if isinstance(entry, Unavailable):
                unavailable = entry.reason
            elif entry is not None:
                flow = Flow(netns=netns, entry=entry, assumed=False)
    if flow is not None and not _reopened(packet, flow.entry):
        known = _existing(tuple5, flow)
        if why := _out_of_turn(packet, flow.entry, known.ct.direction):
            return (_invalid(why),)
        return (known,)
    return _first(packet, tcp_loose=tcp_loose, unavailable=unavailable)


def find_flow(tuple5: Tuple5, netns: NetnsRef, flows: Sequence[Flow], zone: int = 0) -> Flow | None:
    """The latest assumed entry of `netns` and `zone` that has `tuple5` in one of its directions."""
    for flow in reversed(flows):
        entry = flow.entry
        if (flow.netns, entry.zone) != (netns, zone) or entry.status & _UNTRACKED:
            continue
        if _same(entry.orig, tuple5) or _same(entry.reply, tuple5):
            return flow
    return None


def opened_here(packet: Packet, netns: NetnsRef, flows: Sequence[Flow]) -> Flow | None:
    """The flow whose opener in `netns` waits for exactly this packet as its answer."""
    wanted = packet.tuple5
    for flow in reversed(flows):
        if flow.netns == netns and flow.entry.orig.inverted() == wanted:
            return flow
    return None


def opening(packet: Packet, netns: NetnsRef) -> Flow:
    """The sender's own connection, in a namespace that does not track it (status UNTRACKED)."""
    entry = ConntrackEntry(
        orig=packet.tuple5, reply=packet.tuple5.inverted(), status=CtStatus.UNTRACKED
    )
    return Flow(netns=netns, entry=entry)


def new_flow(ct: CtInfo, netns: NetnsRef) -> Flow:
    """The entry that a new connection leaves when it is confirmed (__nf_conntrack_confirm)."""
    if ct.orig is None or ct.reply is None:
        raise ValueError("only a tracked packet makes an entry")
    entry = ConntrackEntry(
        orig=ct.orig,
        reply=ct.reply,
        status=ct.status | _CONFIRMED,
        mark=ct.mark,
        zone=ct.zone,
        tcp_state="SYN_SENT" if ct.orig.protocol == Protocol.TCP else "",
    )
    return Flow(netns=netns, entry=entry)


def template(family: int, zone: int = 0) -> CtInfo:
    """What a CT target attaches to a packet that tracking has not seen yet (nf_ct_tmpl_alloc).

    Rules up to nf_conntrack_in() take it for a connection: NEW, confirmed, all its addresses,
    ports and its protocol 0.
    """
    nowhere = IPv4Address(0) if family == 4 else IPv6Address(0)
    zeros = Tuple5(src=nowhere, dst=nowhere, protocol=0, sport=0, dport=0)
    return CtInfo(
        state=CtState.NEW,
        orig=zeros,
        reply=zeros,
        status=CtStatus.TEMPLATE | CtStatus.CONFIRMED,
        zone=zone,
        template=True,
    )


def tuple_taken(
    tuple5: Tuple5,
    netns: NetnsRef,
    flows: Sequence[Flow],
    conntrack: Maybe[ConntrackView] | None,
    zone: int = 0,
) -> bool:
    """Whether an answer to `tuple5` would already belong to some entry (nf_nat_used_tuple).

    False where that cannot be known: the port is then the one that the kernel would keep.
    """
    back = tuple5.inverted()
    if not complete_tuple(back):
        return False
    if find_flow(back, netns, flows, zone) is not None:
        return True
    if conntrack is None or isinstance(conntrack, Unavailable):
        return False
    return isinstance(conntrack.lookup(back, zone), ConntrackEntry)


def complete_tuple(tuple5: Tuple5) -> bool:
    """True when all that keys the entry is known."""
    if tuple5.src.is_unspecified or tuple5.dst.is_unspecified:
        return False
    if tuple5.protocol in (Protocol.ICMP, Protocol.ICMPV6):
        return tuple5.sport is not None and tuple5.icmp_type is not None
    if tuple5.protocol not in PORT_PROTOCOLS:
        return True
    return tuple5.sport is not None and tuple5.dport is not None


def _existing(tuple5: Tuple5, flow: Flow) -> Tracking:
    entry = flow.entry
    original = _same(entry.orig, tuple5) or not _same(entry.reply, tuple5)
    answered = bool(entry.status & _SEEN_REPLY) or not original
    ct = CtInfo(
        state=CtState.ESTABLISHED if answered else CtState.NEW,
        direction=Direction.ORIGINAL if original else Direction.REPLY,
        orig=entry.orig,
        reply=entry.reply,
        status=entry.status | (0 if original else CtStatus.SEEN_REPLY),
        mark=entry.mark or 0,
        zone=entry.zone,
        existing=True,
    )
    return Tracking(ct=ct, flow=flow)


def _same(entry: Tuple5, asked: Tuple5) -> bool:
    """Whether they are one tuple; what the protocol does not have (GRE: ports) does not count."""
    if (entry.src, entry.dst, entry.protocol) != (asked.src, asked.dst, asked.protocol):
        return False
    ports = entry.protocol in PORT_PROTOCOLS or asked.icmp_type is not None
    return not ports or (entry.sport, entry.dport, entry.icmp_type) == (
        asked.sport,
        asked.dport,
        asked.icmp_type,
    )


def _reopened(packet: Packet, entry: ConntrackEntry) -> bool:
    """A SYN on a closed connection makes tracking forget it and begin anew (RFC 1122, 4.2.2.13)."""
    return (
        packet.protocol == Protocol.TCP
        and entry.tcp_state in _CLOSED
        and packet.tcp_flags & (TcpFlags.SYN | TcpFlags.ACK | TcpFlags.RST) == TcpFlags.SYN
        and _same(entry.orig, packet.tuple5)
    )


def _out_of_turn(packet: Packet, entry: ConntrackEntry, direction: Direction) -> str:
    """Why TCP tracking refuses a segment in the entry's state; "" when it does not.

    What the table tcp_conntracks of nf_conntrack_proto_tcp.c maps to sIV.  Sequence numbers are
    not part of the question, so the window is taken to be kept.
    """
    if packet.protocol != Protocol.TCP or not entry.tcp_state:
        return ""
    flags, state = packet.tcp_flags, entry.tcp_state
    original = direction is Direction.ORIGINAL
    if flags & TcpFlags.RST:
        return ""
    if flags & TcpFlags.SYN and flags & TcpFlags.ACK:
        what, bad = "a SYN+ACK from the opener", original and state not in _ANSWERABLE
    elif flags & TcpFlags.SYN:
        what, bad = "a SYN from the answerer", not original and state not in _REOPENABLE
    elif flags & TcpFlags.FIN:
        what, bad = "a FIN", state in _OPENING
    else:
        what, bad = "an ACK from the opener", original and state in _OPENING
    return f"{what} in the state {state}" if bad else ""


def _malformed(packet: Packet) -> Tracking | None:
    if packet.protocol == Protocol.TCP and not packet.fragment:
        flags = packet.tcp_flags & ~_IGNORED_FLAGS
        if flags not in _VALID_FLAGS:
            return _invalid(f"no TCP segment has the flags {flags:#04x} (tcp_valid_flags)")
    return None


def _invalid(note: str, unavailable: str = "") -> Tracking:
    return Tracking(ct=CtInfo(state=CtState.INVALID), note=note, unavailable=unavailable)


def _first(packet: Packet, *, tcp_loose: bool, unavailable: str) -> tuple[Tracking, ...]:
    """A packet that belongs to no entry (init_conntrack and the protocols' ``new`` checks)."""
    if packet.protocol == Protocol.TCP:
        why = _tcp_refuses(packet.tcp_flags, tcp_loose)
        if why:
            return (_invalid(why, unavailable),)
    elif packet.protocol == Protocol.ICMP:
        if packet.icmp_type in _ICMP_ERRORS:
            return _icmp_error(packet, unavailable)
        if packet.icmp_type in _ICMP_REPLIES:
            return (_invalid("an ICMP reply to no known request", unavailable),)
        if packet.icmp_type is not None and packet.icmp_type not in _ICMP_REQUESTS:
            return (_invalid(f"ICMP type {packet.icmp_type} opens no connection", unavailable),)
    elif packet.protocol == Protocol.ICMPV6:
        kind = packet.icmp_type
        if kind in _ICMPV6_UNTRACKED:
            note = f"ICMPv6 type {kind} is never tracked (nf_conntrack_icmpv6_error)"
            return (Tracking(ct=CtInfo(state=CtState.UNTRACKED), note=note),)
        if kind is not None and kind < 128:
            return _icmp_error(packet, unavailable)
        if kind in _ICMPV6_REPLIES:
            return (_invalid("an ICMPv6 reply to no known request", unavailable),)
        if kind is not None and kind not in _ICMPV6_REQUESTS:
            return (_invalid(f"ICMPv6 type {kind} opens no connection", unavailable),)
    tuple5 = packet.tuple5
    ct = CtInfo(state=CtState.NEW, orig=tuple5, reply=tuple5.inverted())
    return (Tracking(ct=ct, unavailable=unavailable),)


def _tcp_refuses(flags: int, loose: bool) -> str:
    """tcp_new(): the tcp_conntracks table from state NONE, original direction."""
    if flags & TcpFlags.RST:
        return "a RST of no known connection"
    if flags & TcpFlags.SYN:
        return "a SYN+ACK of no known connection" if flags & TcpFlags.ACK else ""
    if flags & TcpFlags.FIN:
        return "a FIN of no known connection"
    if not loose:
        return "mid-stream, and net.netfilter.nf_conntrack_tcp_loose = 0"
    return ""


def _icmp_error(packet: Packet, unavailable: str) -> tuple[Tracking, ...]:
    """The packet inside the error is not part of the question, so both answers stand."""
    what = f"ICMP error (type {packet.icmp_type})"
    return (
        Tracking(
            ct=CtInfo(state=CtState.RELATED),
            note=f"{what} about a known connection",
            chance=None,
            because=f"if the {what} quotes a packet of a known connection",
            unavailable=unavailable,
        ),
        Tracking(
            ct=CtInfo(state=CtState.INVALID),
            note=f"{what} about no known connection",
            chance=None,
            because=f"if the {what} quotes a packet of no known connection",
            unavailable=unavailable,
        ),
    )
