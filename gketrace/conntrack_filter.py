"""Which connection-tracking entries are wanted."""

from __future__ import annotations

from dataclasses import dataclass

from gketrace.conntrack import ConntrackEntry, CtStatus
from gketrace.snapshot import IPNetwork

__all__ = ["ConntrackFilter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConntrackFilter:
    """Which entries are wanted; all of what is given must hold."""

    family: int = 0
    """4, 6, or 0 for both."""
    protocol: int | None = None
    orig_src: IPNetwork | None = None
    orig_dst: IPNetwork | None = None
    reply_src: IPNetwork | None = None
    reply_dst: IPNetwork | None = None
    orig_sport: int | None = None
    orig_dport: int | None = None
    reply_sport: int | None = None
    reply_dport: int | None = None
    mark: int | None = None
    mark_mask: int = 0xFFFFFFFF
    zone: int | None = None
    address: IPNetwork | None = None
    """Any of the four addresses of the entry is in it."""
    tcp_state: str = ""
    """Of TCP, SCTP or DCCP; empty: any."""
    status: int = 0
    """Wanted are entries with ``(status & status_mask) == status``."""
    status_mask: int = 0
    src_nat: IPNetwork | None = None
    """The source's address is translated, to one in it: as conntrack(8)'s ``--src-nat ADDRESS``
    (NFCT_GOPT_IS_SNAT), a translation of the port alone does not count."""
    dst_nat: IPNetwork | None = None
    src_nat_port: int | None = None
    """The source's port is translated, to this one (NFCT_GOPT_IS_SPAT)."""
    dst_nat_port: int | None = None

    def takes(self, entry: ConntrackEntry) -> bool:
        """True when `entry` is wanted."""
        orig, reply = entry.orig, entry.reply
        pairs = (
            (self.family or None, orig.src.version),
            (self.protocol, orig.protocol),
            (self.orig_sport, orig.sport),
            (self.orig_dport, orig.dport),
            (self.reply_sport, reply.sport),
            (self.reply_dport, reply.dport),
            (self.zone, entry.zone),
            (self.tcp_state or None, entry.tcp_state),
        )
        if any(wanted is not None and wanted != got for wanted, got in pairs):
            return False
        ends = (orig.src, orig.dst, reply.src, reply.dst)
        if any(
            wanted is not None and got not in wanted
            for wanted, got in zip(self.networks(), ends, strict=True)
        ):
            return False
        if self.mark is not None and (entry.mark or 0) & self.mark_mask != self.mark:
            return False
        if entry.status & self.status_mask != self.status:
            return False
        if entry.status & self.nat_bits() != self.nat_bits():
            return False
        if not all(
            wanted is None or (new != old and new in wanted)
            for wanted, new, old in (
                (self.src_nat, reply.dst, orig.src),
                (self.dst_nat, reply.src, orig.dst),
            )
        ):
            return False
        if not all(
            wanted is None or (new != old and new == wanted)
            for wanted, new, old in (
                (self.src_nat_port, reply.dport, orig.sport),
                (self.dst_nat_port, reply.sport, orig.dport),
            )
        ):
            return False
        return self.address is None or any(end in self.address for end in ends)

    def nat_bits(self) -> int:
        """Of the status, that the wanted translations have."""
        source = self.src_nat is not None or self.src_nat_port is not None
        destination = self.dst_nat is not None or self.dst_nat_port is not None
        bits = CtStatus.SRC_NAT if source else CtStatus.NONE
        return int(bits | CtStatus.DST_NAT if destination else bits)

    def networks(self) -> tuple[IPNetwork | None, ...]:
        """Of both directions: source, destination."""
        return self.orig_src, self.orig_dst, self.reply_src, self.reply_dst
