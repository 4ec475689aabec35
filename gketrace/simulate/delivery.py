"""The end of a packet that reached its namespace: which socket takes it, or who refuses it.

TCP as inet_lookup_listener() scores listeners, UDP as udp4_lib_lookup2(): an address that is
bound to beats the wildcard, an IPv6 wildcard takes IPv4 unless it is v6only, a socket that is
bound to a device takes only what comes in by it.

A raw socket takes a copy of each packet of its protocol (raw_local_deliver, raw6_local_deliver).
That decides where the kernel itself has no such protocol: often SCTP's case, whose stacks then
are libraries in the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Final

from gketrace.citing import cite_socket
from gketrace.packet import PORT_PROTOCOLS, Packet, Protocol, TcpFlags, protocol_name
from gketrace.simulate.tracking import opened_here
from gketrace.snapshot import Maybe, NetnsSnapshot, Socket, Unavailable
from gketrace.trace import (
    Citation,
    Disposition,
    Flow,
    Missing,
    Outcome,
    Source,
    Step,
    StepAction,
    StepKind,
)

__all__ = ["Delivery", "deliver", "find_socket"]

_ECHO: Final = {
    Protocol.ICMP: (8, "net.ipv4.icmp_echo_ignore_all"),
    Protocol.ICMPV6: (128, "net.ipv6.icmp.echo_ignore_all"),
}
_LISTED: Final = frozenset({Protocol.TCP, Protocol.UDP, Protocol.SCTP})
"""Protocols whose sockets the agent lists in full."""
_SCTP_LOADED: Final = "net.sctp.max_burst"
"""A sysctl that is there when the kernel's own SCTP is."""
_ANSWERS: Final = {Protocol.TCP: "RST", Protocol.SCTP: "ABORT"}
"""What a protocol answers where nothing listens; UDP leaves it to ICMP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How the packet's way ends here."""

    outcome: Outcome
    steps: tuple[Step, ...]
    missing: tuple[Missing, ...] = ()


def deliver(
    packet: Packet, *, snapshot: NetnsSnapshot, in_iface: str, flows: Sequence[Flow]
) -> Delivery:
    """Who takes `packet` in `snapshot`'s namespace, after INPUT let it pass."""
    if (flow := opened_here(packet, snapshot.netns, flows)) is not None:
        note = "the answer to the connection that was opened here"
        citation = Citation(source=Source.CONNTRACK, text=str(flow.entry))
        return _end(snapshot, packet, Disposition.DELIVERED, note, citation)
    if packet.protocol in (Protocol.ICMP, Protocol.ICMPV6):
        return _icmp(snapshot, packet)
    name = protocol_name(packet.protocol)
    raw = _raw_socket(packet, snapshot.sockets)
    if packet.protocol not in PORT_PROTOCOLS:
        if raw is not None:
            return _to_raw(snapshot, packet, raw)
        why = f"{name} is taken by a kernel module, if at all; those are not seen"
        return _unobservable(snapshot, packet, why)
    if packet.dport is None:
        why = "the destination port is not known, and it answers no connection that is known here"
        return _end(snapshot, packet, Disposition.UNKNOWN, why, None)
    if isinstance(snapshot.sockets, Unavailable):
        return _unobservable(snapshot, packet, snapshot.sockets.reason)
    syn_ack = TcpFlags.SYN | TcpFlags.ACK
    if packet.protocol == Protocol.TCP and packet.tcp_flags & syn_ack == syn_ack:
        # A listener answers it with a RST; only a connecting socket takes it.
        why = "answers no connection that is known here, and connecting sockets are not listed"
        return _end(snapshot, packet, Disposition.UNKNOWN, why, None)
    found, doubt = find_socket(packet, snapshot.sockets, in_iface)
    if found is not None:
        citation = cite_socket(found)
        if doubt:
            return _unobservable(snapshot, packet, doubt, citation)
        note = f"a socket{_of(found)} takes it"
        return _end(snapshot, packet, Disposition.DELIVERED, note, citation)
    if packet.protocol == Protocol.SCTP:
        if isinstance(snapshot.sysctls, Unavailable):
            why = "whether this kernel has SCTP of its own is not known"
            return _unobservable(snapshot, packet, f"{why}: {snapshot.sysctls.reason}")
        if _SCTP_LOADED not in snapshot.sysctls:
            return _without_sctp(snapshot, packet, raw)
    if raw is not None and packet.protocol not in (Protocol.TCP, Protocol.UDP):
        return _to_raw(snapshot, packet, raw)
    if packet.protocol not in _LISTED:
        return _unobservable(snapshot, packet, f"{name} sockets are not listed")
    if packet.protocol == Protocol.TCP and packet.tcp_flags & TcpFlags.ACK:
        why = "not the first packet of a connection, and connected sockets are not listed"
        return _end(snapshot, packet, Disposition.UNKNOWN, why, None)
    answer = _ANSWERS.get(Protocol(packet.protocol), "ICMP port unreachable")
    note = f"nothing listens on {name} port {packet.dport}: the kernel answers {answer}"
    citation = Citation(
        source=Source.SOCKET,
        text=f"no {name} socket is bound to {_end_text(packet)} ({_summary(snapshot, packet)})",
    )
    return _end(snapshot, packet, Disposition.REFUSED, note, citation)


def find_socket(
    packet: Packet, sockets: Sequence[Socket], in_iface: str
) -> tuple[Socket | None, str]:
    """The socket that the kernel would choose, and what is in doubt about it ("" when nothing)."""
    best: Socket | None = None
    best_score = 0
    doubt = ""
    for socket in sockets:
        score, unsure = _score(socket, packet, in_iface)
        if score > best_score:
            best, best_score, doubt = socket, score, unsure
    return best, doubt


def _score(socket: Socket, packet: Packet, in_iface: str) -> tuple[int, str]:
    """compute_score() of inet_hashtables.c and udp.c; 0: the socket does not take the packet."""
    if (socket.protocol, socket.port) != (packet.protocol, packet.dport) or socket.state == "RAW":
        return 0, ""
    score, doubt = 1, ""
    address = socket.address
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.version != packet.family:
        if packet.family != 4 or not address.is_unspecified or socket.v6only:
            return 0, ""
        if socket.v6only is None:
            doubt = "it is not known whether the IPv6 socket takes IPv4 (IPV6_V6ONLY)"
    elif not address.is_unspecified:
        if address != packet.dst:
            return 0, ""
        score += 4
    if address.version == packet.family:
        score += 1
    if socket.interface:
        if socket.interface != in_iface:
            return 0, ""
        score += 4
    return score, doubt


def _raw_socket(packet: Packet, sockets: Maybe[tuple[Socket, ...]]) -> Socket | None:
    """A raw socket that takes a copy of `packet`: raw_v4_match(), raw_v6_match()."""
    if isinstance(sockets, Unavailable):
        return None
    for socket in sockets:
        mine = (socket.state, socket.protocol, socket.family)
        if mine == ("RAW", packet.protocol, packet.family) and (
            socket.address.is_unspecified or socket.address == packet.dst
        ):
            return socket
    return None


def _to_raw(snapshot: NetnsSnapshot, packet: Packet, raw: Socket) -> Delivery:
    """Taken by a raw socket where the kernel's own part, if there is one, may take it too."""
    if packet.protocol == Protocol.SCTP:
        why = "no SCTP socket listens, so the kernel answers ABORT; a raw socket takes it as well"
        return _unobservable(snapshot, packet, why, cite_socket(raw))
    note = f"a raw socket{_of(raw)} takes every {protocol_name(packet.protocol)} packet"
    return _end(snapshot, packet, Disposition.DELIVERED, note, cite_socket(raw))


def _without_sctp(snapshot: NetnsSnapshot, packet: Packet, raw: Socket | None) -> Delivery:
    """The kernel has no SCTP: what a process has of it stands on a raw socket."""
    absent = f"{_SCTP_LOADED} is absent: this kernel has no SCTP of its own"
    if raw is not None:
        note = f"a raw socket{_of(raw)} takes every SCTP packet, on any port ({absent})"
        return _end(snapshot, packet, Disposition.DELIVERED, note, cite_socket(raw))
    answer = "protocol unreachable" if packet.family == 4 else "parameter problem (next header)"
    note = f"nobody takes SCTP here: the kernel answers ICMP {answer}"
    citation = Citation(source=Source.SYSCTL, text=f"{absent}, and no raw socket is bound to it")
    return _end(snapshot, packet, Disposition.REFUSED, note, citation)


def _of(socket: Socket) -> str:
    return f" of {socket.process}" if socket.process else ""


def _icmp(snapshot: NetnsSnapshot, packet: Packet) -> Delivery:
    echo, sysctl = _ECHO[Protocol(packet.protocol)]
    if packet.icmp_type is not None and packet.icmp_type != echo:
        why = f"{protocol_name(packet.protocol)} type {packet.icmp_type} is for the kernel itself"
        citation = Citation(source=Source.KERNEL, text="icmp_rcv / icmpv6_rcv")
        return _end(snapshot, packet, Disposition.DELIVERED, why, citation)
    if isinstance(snapshot.sysctls, Unavailable):
        return _unobservable(snapshot, packet, snapshot.sysctls.reason)
    value = snapshot.sysctls.get(sysctl)
    citation = Citation(source=Source.SYSCTL, text=f"{sysctl} = {value if value else 0}")
    if value not in (None, "0"):
        note = "echo requests are ignored"
        return _end(snapshot, packet, Disposition.DROPPED, note, citation)
    if value is None:
        citation = Citation(source=Source.KERNEL, text="icmp_echo / icmpv6_echo_reply")
    return _end(snapshot, packet, Disposition.DELIVERED, "the kernel answers the echo", citation)


def _unobservable(
    snapshot: NetnsSnapshot, packet: Packet, why: str, citation: Citation | None = None
) -> Delivery:
    netns = snapshot.netns
    missing = Missing(what="sockets", why=why, node=netns.node, netns=str(netns))
    ended = _end(
        snapshot, packet, Disposition.DELIVERED, f"listener not observable: {why}", citation
    )
    return Delivery(outcome=ended.outcome, steps=ended.steps, missing=(missing,))


_ACTIONS: Final = {
    Disposition.DELIVERED: StepAction.DELIVER,
    Disposition.REFUSED: StepAction.REJECT,
    Disposition.DROPPED: StepAction.DROP,
    Disposition.UNKNOWN: StepAction.UNKNOWN,
}


def _end(
    snapshot: NetnsSnapshot,
    packet: Packet,
    disposition: Disposition,
    note: str,
    citation: Citation | None,
) -> Delivery:
    if citation is None:
        citation = Citation(source=Source.KERNEL, text=f"sockets of {snapshot.netns}")
    step = Step(
        kind=StepKind.SOCKET,
        action=_ACTIONS[disposition],
        before=packet,
        after=packet,
        note=note,
        citation=citation,
    )
    outcome = Outcome(
        disposition=disposition,
        packet=packet,
        netns=snapshot.netns,
        detail=note,
        citation=citation,
    )
    return Delivery(outcome=outcome, steps=(step,))


def _end_text(packet: Packet) -> str:
    address = f"[{packet.dst}]" if packet.family == 6 else str(packet.dst)
    return f"{address}:{packet.dport}"


def _summary(snapshot: NetnsSnapshot, packet: Packet) -> str:
    """What does listen there, so that the reader sees the near miss."""
    if isinstance(snapshot.sockets, Unavailable):
        return snapshot.sockets.reason
    mine = [s for s in snapshot.sockets if s.protocol == packet.protocol and s.state != "RAW"]
    if not mine:
        return "none of this protocol at all"
    # The kernel lists them by a hash.
    mine.sort(key=lambda s: (s.port, s.address.version, int(s.address)))
    same_port = [s for s in mine if s.port == packet.dport]
    shown = ", ".join(
        f"[{s.address}]:{s.port}" if s.address.version == 6 else f"{s.address}:{s.port}"
        for s in (same_port or mine)[:5]
    )
    return f"bound are {shown}" + (", …" if len(same_port or mine) > 5 else "")
