"""What connection-tracking entries are joined by: one direction's header, as bytes and numbers.

They say what `Tuple5` says, and are made from records without an object for each address.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Final, TypeAlias

from gketrace.conntrack import ConntrackEntry
from gketrace.conntrack_records import Record
from gketrace.packet import ICMP_REPLY, PORT_PROTOCOLS, IPAddress, Protocol, Tuple5

__all__ = ["TupleKey", "entry_keys", "inverted_key", "key_address", "key_tuple", "record_keys"]

TupleKey: TypeAlias = tuple[bytes, bytes, int, int, int, int]
"""Source, destination, protocol, source port, destination port, ICMP type: what is on the wire."""
_ICMP: Final = frozenset({Protocol.ICMP, Protocol.ICMPV6})


def inverted_key(key: TupleKey) -> TupleKey:
    """The tuple of the answers, as `Tuple5.inverted`."""
    src, dst, protocol, sport, dport, kind = key
    if protocol in _ICMP:
        return dst, src, protocol, sport, dport, ICMP_REPLY.get((protocol, kind), kind)
    return dst, src, protocol, dport, sport, kind


def record_keys(seen: Record) -> tuple[TupleKey, TupleKey]:
    """What it takes in, what it lets out."""
    size = 4 if seen.family == 4 else 16
    protocol = seen.protocol
    taken = (
        seen.orig_src[:size],
        seen.orig_dst[:size],
        protocol,
        seen.orig_sport,
        seen.orig_dport,
        seen.orig_icmp_type,
    )
    reply = (
        seen.reply_src[:size],
        seen.reply_dst[:size],
        protocol,
        seen.reply_sport,
        seen.reply_dport,
        seen.reply_icmp_type,
    )
    return taken, inverted_key(reply)


def entry_keys(seen: ConntrackEntry) -> tuple[TupleKey, TupleKey]:
    """As `record_keys`.  GRE's keys stand for ports."""
    keys = seen.gre_keys or (0, 0, 0, 0)
    gre = seen.orig.protocol == Protocol.GRE
    orig = _half_key(seen.orig, keys[:2] if gre else None)
    return orig, inverted_key(_half_key(seen.reply, keys[2:] if gre else None))


def _half_key(half: Tuple5, keys: tuple[int, ...] | None) -> TupleKey:
    sport, dport = keys or (half.sport or 0, half.dport or 0)
    src, dst = half.src.packed, half.dst.packed
    return src, dst, half.protocol, sport, dport, half.icmp_type or 0


def key_address(raw: bytes) -> IPAddress:
    return IPv4Address(raw) if len(raw) == 4 else IPv6Address(raw)


def key_tuple(key: TupleKey) -> Tuple5:
    """Without GRE's keys, which a `Tuple5` has no place for."""
    src, dst, protocol, sport, dport, kind = key
    icmp, ports = protocol in _ICMP, protocol in PORT_PROTOCOLS
    return Tuple5(
        src=key_address(src),
        dst=key_address(dst),
        protocol=protocol,
        sport=sport if ports or icmp else None,
        dport=dport if ports else None,
        icmp_type=kind if icmp else None,
    )
