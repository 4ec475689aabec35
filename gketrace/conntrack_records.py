"""Connection-tracking entries packed into records of one size, for reading many of them fast.

The agent fills a column of records at a time; a reader unpacks a record in about a microsecond and
makes a `ConntrackEntry` only of those that it wants.  A record has no room for text: an entry with
a helper, a security context or labels travels by itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

from gketrace.conntrack import ConntrackEntry
from gketrace.errors import GketraceError
from gketrace.packet import PORT_PROTOCOLS, IPAddress, Protocol, Tuple5

__all__ = [
    "FIELDS",
    "HAS_COUNTERS",
    "HAS_ID",
    "HAS_MARK",
    "HAS_STARTED",
    "HAS_TIMEOUT",
    "HAS_USE",
    "RECORD",
    "STATE_NAMES",
    "Record",
    "entry_from_record",
    "record_of",
    "records_from_bytes",
]

HAS_TIMEOUT: Final = 1 << 0
HAS_MARK: Final = 1 << 1
HAS_ID: Final = 1 << 2
HAS_USE: Final = 1 << 3
HAS_COUNTERS: Final = 1 << 4
"""Accounting is on: all four counters are there."""
HAS_STARTED: Final = 1 << 5
"""Bits of ``has``: which of the fields that may be absent are there."""

STATE_NAMES: Final = (
    "",
    *"NONE SYN_SENT SYN_RECV ESTABLISHED FIN_WAIT CLOSE_WAIT LAST_ACK TIME_WAIT CLOSE".split(),
    *"SYN_SENT2 CLOSED COOKIE_WAIT COOKIE_ECHOED SHUTDOWN_SENT SHUTDOWN_RECD".split(),
    *"SHUTDOWN_ACK_SENT HEARTBEAT_SENT HEARTBEAT_ACKED REQUEST RESPOND PARTOPEN OPEN".split(),
    *"CLOSEREQ CLOSING TIMEWAIT IGNORE INVALID".split(),
)
"""``state`` is an index into this; a state that is not here travels by itself."""

FIELDS: Final[tuple[tuple[str, str], ...]] = (
    ("orig_src", "16s"),
    ("orig_dst", "16s"),
    ("reply_src", "16s"),
    ("reply_dst", "16s"),
    ("orig_packets", "Q"),
    ("orig_bytes", "Q"),
    ("reply_packets", "Q"),
    ("reply_bytes", "Q"),
    ("started", "Q"),
    ("status", "I"),
    ("timeout", "I"),
    ("mark", "I"),
    ("id", "I"),
    ("use", "I"),
    ("orig_sport", "H"),
    ("orig_dport", "H"),
    ("reply_sport", "H"),
    ("reply_dport", "H"),
    ("zone", "H"),
    ("zone_orig", "H"),
    ("zone_reply", "H"),
    ("has", "B"),
    ("family", "B"),
    ("protocol", "B"),
    ("state", "B"),
    ("orig_icmp_type", "B"),
    ("orig_icmp_code", "B"),
    ("reply_icmp_type", "B"),
    ("reply_icmp_code", "B"),
)
"""Name and struct format of each field, in order; little-endian, without padding.

Addresses: 16 bytes, of which an IPv4 address fills the first four.  Ports: of GRE the keys, of
ICMP the identifier as ``sport``.
"""
RECORD: Final = struct.Struct("<" + "".join(code for _, code in FIELDS))


class Record(NamedTuple):
    """One record, unpacked.  Addresses are 16 bytes as in `FIELDS`."""

    orig_src: bytes
    orig_dst: bytes
    reply_src: bytes
    reply_dst: bytes
    orig_packets: int
    orig_bytes: int
    reply_packets: int
    reply_bytes: int
    started: int
    status: int
    timeout: int
    mark: int
    id: int
    use: int
    orig_sport: int
    orig_dport: int
    reply_sport: int
    reply_dport: int
    zone: int
    zone_orig: int
    zone_reply: int
    has: int
    family: int
    protocol: int
    state: int
    orig_icmp_type: int
    orig_icmp_code: int
    reply_icmp_type: int
    reply_icmp_code: int


def records_from_bytes(data: bytes) -> Iterator[Record]:
    """Whole records, back to back.  Raises `GketraceError` for what has another size."""
    if len(data) % RECORD.size:
        raise GketraceError(f"{len(data)} bytes are no conntrack records of {RECORD.size}")
    return map(Record._make, RECORD.iter_unpack(data))


def entry_from_record(record: Record) -> ConntrackEntry:
    """The entry.  Raises `GketraceError` for a state that is newer than this program."""
    has = record.has
    counters = bool(has & HAS_COUNTERS)
    if record.state >= len(STATE_NAMES):
        raise GketraceError(f"conntrack state {record.state} is newer than this program")
    gre = record.protocol == Protocol.GRE
    return ConntrackEntry(
        orig=_tuple(
            record,
            record.orig_src,
            record.orig_dst,
            record.orig_sport,
            record.orig_dport,
            record.orig_icmp_type,
            record.orig_icmp_code,
        ),
        reply=_tuple(
            record,
            record.reply_src,
            record.reply_dst,
            record.reply_sport,
            record.reply_dport,
            record.reply_icmp_type,
            record.reply_icmp_code,
        ),
        status=record.status,
        tcp_state=STATE_NAMES[record.state],
        timeout=record.timeout if has & HAS_TIMEOUT else None,
        mark=record.mark if has & HAS_MARK else None,
        zone=record.zone,
        id=record.id if has & HAS_ID else None,
        orig_packets=record.orig_packets if counters else None,
        orig_bytes=record.orig_bytes if counters else None,
        reply_packets=record.reply_packets if counters else None,
        reply_bytes=record.reply_bytes if counters else None,
        zone_orig=record.zone_orig,
        zone_reply=record.zone_reply,
        use=record.use if has & HAS_USE else None,
        started=record.started if has & HAS_STARTED else None,
        gre_keys=(record.orig_sport, record.orig_dport, record.reply_sport, record.reply_dport)
        if gre
        else None,
    )


def record_of(entry: ConntrackEntry) -> Record | None:
    """The inverse; None for an entry that has more than a record holds."""
    whole = (entry.orig_packets, entry.orig_bytes, entry.reply_packets, entry.reply_bytes)
    if (
        entry.helper
        or entry.secctx
        or entry.labels
        or entry.stopped is not None
        or entry.tcp_state not in STATE_NAMES
        or len({count is None for count in whole}) > 1
    ):
        return None
    orig, reply = entry.orig, entry.reply
    keys = entry.gre_keys or (0, 0, 0, 0)
    gre = orig.protocol == Protocol.GRE
    optional = (
        (entry.timeout, HAS_TIMEOUT),
        (entry.mark, HAS_MARK),
        (entry.id, HAS_ID),
        (entry.use, HAS_USE),
        (entry.orig_packets, HAS_COUNTERS),
        (entry.started, HAS_STARTED),
    )
    return Record(
        orig_src=_packed(orig.src),
        orig_dst=_packed(orig.dst),
        reply_src=_packed(reply.src),
        reply_dst=_packed(reply.dst),
        orig_packets=entry.orig_packets or 0,
        orig_bytes=entry.orig_bytes or 0,
        reply_packets=entry.reply_packets or 0,
        reply_bytes=entry.reply_bytes or 0,
        started=entry.started or 0,
        status=entry.status,
        timeout=entry.timeout or 0,
        mark=entry.mark or 0,
        id=entry.id or 0,
        use=entry.use or 0,
        orig_sport=keys[0] if gre else orig.sport or 0,
        orig_dport=keys[1] if gre else orig.dport or 0,
        reply_sport=keys[2] if gre else reply.sport or 0,
        reply_dport=keys[3] if gre else reply.dport or 0,
        zone=entry.zone,
        zone_orig=entry.zone_orig,
        zone_reply=entry.zone_reply,
        has=sum(bit for value, bit in optional if value is not None),
        family=orig.src.version,
        protocol=orig.protocol,
        state=STATE_NAMES.index(entry.tcp_state),
        orig_icmp_type=orig.icmp_type or 0,
        orig_icmp_code=orig.icmp_code or 0,
        reply_icmp_type=reply.icmp_type or 0,
        reply_icmp_code=reply.icmp_code or 0,
    )


def _packed(address: IPAddress) -> bytes:
    return address.packed.ljust(16, b"\0")


def _address(family: int, raw: bytes) -> IPAddress:
    return IPv4Address(raw[:4]) if family == 4 else IPv6Address(raw)


def _tuple(
    record: Record, src: bytes, dst: bytes, sport: int, dport: int, kind: int, code: int
) -> Tuple5:
    icmp = record.protocol in (Protocol.ICMP, Protocol.ICMPV6)
    ports = record.protocol in PORT_PROTOCOLS
    return Tuple5(
        src=_address(record.family, src),
        dst=_address(record.family, dst),
        protocol=record.protocol,
        sport=sport if ports or icmp else None,
        dport=dport if ports else None,
        icmp_type=kind if icmp else None,
        icmp_code=code if icmp else None,
    )
