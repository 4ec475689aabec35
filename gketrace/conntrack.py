"""A connection-tracking entry, as the kernel keeps it (struct nf_conn)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntFlag

from gketrace.packet import Tuple5, protocol_name
from gketrace.quick import quick

__all__ = ["ConntrackEntry", "CtState", "CtStatus"]


class CtState(Enum):
    """How connection tracking sees one packet (enum ip_conntrack_info)."""

    NEW = "NEW"
    """First packet of a connection."""
    ESTABLISHED = "ESTABLISHED"
    """A packet of a connection that has been answered, or the answer itself."""
    RELATED = "RELATED"
    """First packet of an expected connection, or an ICMP error about a known one."""
    INVALID = "INVALID"
    """Tracking refused it (out of window, malformed, no room in the table)."""
    UNTRACKED = "UNTRACKED"
    """NOTRACK: tracking and NAT do not see it."""


class CtStatus(IntFlag):
    """enum ip_conntrack_status (include/uapi/linux/netfilter/nf_conntrack_common.h)."""

    NONE = 0
    EXPECTED = 1 << 0
    SEEN_REPLY = 1 << 1
    ASSURED = 1 << 2
    CONFIRMED = 1 << 3
    SRC_NAT = 1 << 4
    """The reply tuple's destination was changed."""
    DST_NAT = 1 << 5
    """The reply tuple's source was changed."""
    SEQ_ADJUST = 1 << 6
    SRC_NAT_DONE = 1 << 7
    DST_NAT_DONE = 1 << 8
    DYING = 1 << 9
    FIXED_TIMEOUT = 1 << 10
    TEMPLATE = 1 << 11
    UNTRACKED = 1 << 12
    HELPER = 1 << 13
    OFFLOAD = 1 << 14
    HW_OFFLOAD = 1 << 15


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class ConntrackEntry:
    """One tracked connection.  Fields that the kernel did not send are None."""

    orig: Tuple5
    """The tuple of the first packet, before any NAT."""
    reply: Tuple5
    """The tuple that an answer must have; what NAT did is the difference from ``orig`` inverted."""
    status: int = 0
    """`CtStatus` bits."""
    tcp_state: str = ""
    """``SYN_SENT``, ``ESTABLISHED``, …; SCTP and DCCP states likewise; empty without one."""
    timeout: int | None = None
    """Seconds until it expires."""
    mark: int | None = None
    zone: int = 0
    id: int | None = None
    """CTA_ID."""
    orig_packets: int | None = None
    """None: accounting is off (net.netfilter.nf_conntrack_acct)."""
    orig_bytes: int | None = None
    reply_packets: int | None = None
    reply_bytes: int | None = None
    zone_orig: int = 0
    """The zone of the original direction alone (``CT --zone-orig``)."""
    zone_reply: int = 0
    use: int | None = None
    """References that the kernel holds to it."""
    started: int | None = None
    """Nanoseconds since the epoch; None: net.netfilter.nf_conntrack_timestamp is off."""
    stopped: int | None = None
    """Nanoseconds since the epoch; only in the event of its end."""
    helper: str = ""
    secctx: str = ""
    labels: str = ""
    """The label bits as the kernel sends them, in hexadecimal."""
    gre_keys: tuple[int, ...] | None = None
    """GRE's keys: source and destination of ``orig``, then of ``reply``."""

    @property
    def dst_nat(self) -> bool:
        return bool(self.status & CtStatus.DST_NAT)

    @property
    def src_nat(self) -> bool:
        return bool(self.status & CtStatus.SRC_NAT)

    def __str__(self) -> str:
        def half(t: Tuple5) -> str:
            ports = "" if t.dport is None and t.sport is None else _ports(t)
            return f"src={t.src} dst={t.dst}{ports}"

        state = f" {self.tcp_state}" if self.tcp_state else ""
        unreplied = "" if self.status & CtStatus.SEEN_REPLY else " [UNREPLIED]"
        assured = " [ASSURED]" if self.status & CtStatus.ASSURED else ""
        name = protocol_name(self.orig.protocol)
        return f"{name}{state} {half(self.orig)}{unreplied} {half(self.reply)}{assured}"


def _ports(t: Tuple5) -> str:
    def show(port: int | None) -> str:
        return "*" if port is None else str(port)

    if t.icmp_type is not None:
        return f" type={t.icmp_type} code={t.icmp_code or 0} id={show(t.sport)}"
    return f" sport={show(t.sport)} dport={show(t.dport)}"
