"""A packet as the simulator sees it, and the connection-tracking tuples made from it.

Only the header fields that some rule, route or NAT can look at are here.  A field that is
``None`` is *not known* (a source port that the kernel will pick, say) and whatever depends on it
is unknown too; it is never a wildcard.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, TypeAlias

from gketrace.errors import UsageError
from gketrace.quick import quick

__all__ = [
    "ICMP_REPLY",
    "PORT_PROTOCOLS",
    "IPAddress",
    "Packet",
    "Protocol",
    "TcpFlags",
    "Tuple5",
    "parse_address",
    "protocol_name",
    "protocol_number",
]

IPAddress: TypeAlias = IPv4Address | IPv6Address


class Protocol(IntEnum):
    """IANA protocol numbers that the simulator treats specially."""

    ICMP = 1
    IGMP = 2
    IPIP = 4
    TCP = 6
    UDP = 17
    DCCP = 33
    IPV6 = 41
    GRE = 47
    ESP = 50
    AH = 51
    ICMPV6 = 58
    SCTP = 132
    UDPLITE = 136


_NAMES: Final[dict[int, str]] = {
    **{p.value: p.name.lower() for p in Protocol},
    Protocol.ICMPV6: "icmpv6",
}
_NUMBERS: Final[dict[str, int]] = {
    **{name: number for number, name in _NAMES.items()},
    "ipv6-icmp": Protocol.ICMPV6,
    "icmp6": Protocol.ICMPV6,
    "ipencap": Protocol.IPIP,
}


def protocol_name(number: int) -> str:
    """``6`` → ``"tcp"``; a number without a name comes back as its digits."""
    return _NAMES.get(number, str(number))


def protocol_number(name: str) -> int:
    """``"tcp"``, ``"TCP"`` or ``"6"`` → ``6``.  Raises `UsageError`."""
    text = name.strip().lower()
    if text in _NUMBERS:
        return _NUMBERS[text]
    if re.fullmatch(r"[0-9]{1,3}", text) and int(text) <= 255:
        return int(text)
    raise UsageError(f"no such protocol: {name!r}", hint="use tcp, udp, sctp, icmp or a number")


class TcpFlags(IntEnum):
    """Bits of the TCP flags byte (RFC 9293, section 3.1)."""

    FIN = 0x01
    SYN = 0x02
    RST = 0x04
    PSH = 0x08
    ACK = 0x10
    URG = 0x20
    ECE = 0x40
    CWR = 0x80


PORT_PROTOCOLS: Final = frozenset(
    {Protocol.TCP, Protocol.UDP, Protocol.SCTP, Protocol.DCCP, Protocol.UDPLITE}
)


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Tuple5:
    """One direction of a connection, as connection tracking keys it (struct nf_conntrack_tuple).

    For ICMP, `sport` is the echo identifier, and `icmp_type`/`icmp_code` are set.
    """

    src: IPAddress
    dst: IPAddress
    protocol: int
    sport: int | None = None
    dport: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None

    def inverted(self) -> Tuple5:
        """The tuple of a packet that answers this one (ports and addresses swapped).

        ICMP types are inverted as nf_conntrack_invert_icmp_tuple() does: request ↔ reply; the
        identifier stays where it is.
        """
        if self.protocol in (Protocol.ICMP, Protocol.ICMPV6):
            kind = self.icmp_type
            return replace(
                self,
                src=self.dst,
                dst=self.src,
                icmp_type=None if kind is None else ICMP_REPLY.get((self.protocol, kind), kind),
            )
        # Not `replace`, which takes three times as long: a walk inverts dozens.
        return Tuple5(
            src=self.dst,
            dst=self.src,
            protocol=self.protocol,
            sport=self.dport,
            dport=self.sport,
            icmp_type=self.icmp_type,
            icmp_code=self.icmp_code,
        )

    def __str__(self) -> str:
        return _flow_text(self.src, self.sport, self.dst, self.dport, self.protocol)


ICMP_REPLY: Final[dict[tuple[int, int], int]] = {
    (Protocol.ICMP, 8): 0,
    (Protocol.ICMP, 0): 8,
    (Protocol.ICMP, 13): 14,
    (Protocol.ICMP, 14): 13,
    (Protocol.ICMP, 15): 16,
    (Protocol.ICMP, 16): 15,
    (Protocol.ICMP, 17): 18,
    (Protocol.ICMP, 18): 17,
    (Protocol.ICMPV6, 128): 129,
    (Protocol.ICMPV6, 129): 128,
    (Protocol.ICMPV6, 139): 140,
    (Protocol.ICMPV6, 140): 139,
}
"""The type of the answer (invmap of nf_conntrack_proto_icmp.c and nf_conntrack_proto_icmpv6.c)."""


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """The header fields of one packet, and its mark.  NAT and MARK return a new one."""

    src: IPAddress
    dst: IPAddress
    protocol: int
    """IANA number, `Protocol`."""
    sport: int | None = None
    """Source port, 0-65535; None: not known, or the protocol has none."""
    dport: int | None = None
    """Destination port, 0-65535; None: not known, or the protocol has none."""
    icmp_type: int | None = None
    icmp_code: int | None = None
    icmp_id: int | None = None
    tcp_flags: int = TcpFlags.SYN
    """`TcpFlags` bits; only meaningful for TCP.  The first packet of a connection is a bare SYN."""
    tcp_options: tuple[int, ...] | None = None
    """TCP option kinds present; None: not known."""
    mark: int = 0
    """skb->mark (fwmark), 32 bits.  Not on the wire: it is 0 on each node's ingress."""
    length: int | None = None
    """Total length in bytes, IP header included; None: not known."""
    ttl: int | None = None
    """IPv4 TTL or IPv6 hop limit; None: not known."""
    dscp: int = 0
    """6 bits."""
    ecn: int = 0
    """2 bits."""
    dont_fragment: bool = True
    fragment: bool = False
    """True for a second or later fragment, which has no ports."""
    src_mac: str | None = None
    """Source MAC of the frame that brought it, lower case with colons; None: not known."""

    def __post_init__(self) -> None:
        if self.src.version != self.dst.version:
            raise UsageError(f"{self.src} and {self.dst} are not of one address family")

    @property
    def family(self) -> int:
        """4 or 6."""
        return self.src.version

    @property
    def has_ports(self) -> bool:
        return self.protocol in PORT_PROTOCOLS and not self.fragment

    @property
    def tuple5(self) -> Tuple5:
        """The tuple that connection tracking makes of this packet."""
        if self.protocol in (Protocol.ICMP, Protocol.ICMPV6):
            return Tuple5(
                src=self.src,
                dst=self.dst,
                protocol=self.protocol,
                sport=self.icmp_id,
                icmp_type=self.icmp_type,
                icmp_code=self.icmp_code,
            )
        return Tuple5(
            src=self.src, dst=self.dst, protocol=self.protocol, sport=self.sport, dport=self.dport
        )

    def reply(self) -> Packet:
        """The first packet of the answer, as the receiver would send it: mark cleared, SYN+ACK."""
        back = self.tuple5.inverted()
        return replace(
            self,
            src=back.src,
            dst=back.dst,
            sport=back.sport if self.has_ports else None,
            dport=back.dport if self.has_ports else None,
            icmp_type=back.icmp_type,
            tcp_flags=TcpFlags.SYN | TcpFlags.ACK,
            mark=0,
            length=None,
            ttl=None,
            src_mac=None,
        )

    def __str__(self) -> str:
        return _flow_text(self.src, self.sport, self.dst, self.dport, self.protocol)


def _flow_text(
    src: IPAddress, sport: int | None, dst: IPAddress, dport: int | None, protocol: int
) -> str:
    def end(address: IPAddress, port: int | None) -> str:
        if protocol not in PORT_PROTOCOLS:
            return str(address)
        shown = "*" if port is None else str(port)
        return f"[{address}]:{shown}" if address.version == 6 else f"{address}:{shown}"

    return f"{end(src, sport)} → {end(dst, dport)} {protocol_name(protocol)}"


def parse_address(text: str) -> IPAddress:
    """``"10.0.0.1"`` or ``"[fd00::1]"`` → address.  Raises `UsageError`."""
    try:
        return ip_address(text.strip().removeprefix("[").removesuffix("]"))
    except ValueError:
        raise UsageError(f"not an IP address: {text!r}") from None
