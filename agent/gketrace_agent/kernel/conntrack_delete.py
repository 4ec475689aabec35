"""Deletes single connection-tracking entries.

The kernel finds an entry by its original tuple and zone, and deletes it only when its id is the
one that is asked for.  The id is a hash of the entry's address in memory and its original tuple:
an entry that was made anew at the same address for the same tuple has the same one.  So the entry
is looked at first, and its reply tuple and start compared.

Source: kernel net/netfilter/nf_conntrack_netlink.c ctnetlink_del_conntrack(), nf_ct_get_id().
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from gketrace.conntrack import ConntrackEntry
from gketrace.packet import PORT_PROTOCOLS, Protocol
from gketrace_agent.kernel.conntrack import decode_entry
from gketrace_agent.kernel.netlink import NetlinkError, NetlinkSocket, attribute, nested
from gketrace_agent.kernel.nfnetlink import NFNL_HEADER, nfnl_type

__all__ = ["Deletion", "Outcome", "delete_entries"]

_SUBSYSTEM: Final = 1
_GET: Final = 1
_DELETE: Final = 2
_CTA_TUPLE_ORIG: Final = 1
_CTA_ID: Final = 12
_CTA_ZONE: Final = 18


class Outcome(IntEnum):
    """Numbered as ConntrackDeletion is on the wire."""

    DELETED = 1
    GONE = 2
    """There is no such entry any more."""
    REPLACED = 3
    """Another one has its original tuple and zone now; it was left alone."""
    FAILED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """What became of one entry."""

    outcome: Outcome
    error: str = ""
    """The kernel's, with FAILED."""


def delete_entries(
    netfilter: NetlinkSocket, entries: Iterable[ConntrackEntry]
) -> Iterator[Deletion]:
    """Deletes each of `entries` that the table still has, and says what became of it.

    Raises ValueError for an entry without an id.
    """
    return (_delete(netfilter, entry) for entry in entries)


def _delete(netfilter: NetlinkSocket, entry: ConntrackEntry) -> Deletion:
    if entry.id is None:
        raise ValueError(f"an entry without an id cannot be told from others: {entry}")
    body = _body(entry)
    try:
        found = netfilter.request(nfnl_type(_SUBSYSTEM, _GET), body, what="conntrack entry")
        if found is None or not _same(decode_entry(found.body), entry):
            return Deletion(outcome=Outcome.REPLACED)
        body += attribute(_CTA_ID, struct.pack("!I", entry.id))
        netfilter.request(nfnl_type(_SUBSYSTEM, _DELETE), body, what="conntrack entry")
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return Deletion(outcome=Outcome.GONE)
        return Deletion(outcome=Outcome.FAILED, error=error.message)
    return Deletion(outcome=Outcome.DELETED)


def _same(found: ConntrackEntry, entry: ConntrackEntry) -> bool:
    """Whether both are one entry: what of it never changes is the same."""
    return (found.id, found.orig, found.reply, found.gre_keys, found.started) == (
        entry.id,
        entry.orig,
        entry.reply,
        entry.gre_keys,
        entry.started,
    )


def _body(entry: ConntrackEntry) -> bytes:
    """struct nfgenmsg, the original tuple and the zone."""
    tuple5 = entry.orig
    version = tuple5.src.version
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    first = 1 if version == 4 else 3
    ip = nested(1, attribute(first, tuple5.src.packed), attribute(first + 1, tuple5.dst.packed))
    proto = [attribute(1, bytes((tuple5.protocol,)))]
    if tuple5.protocol in (Protocol.ICMP, Protocol.ICMPV6):
        kind = 4 if tuple5.protocol == Protocol.ICMP else 7
        proto += [
            attribute(kind, struct.pack("!H", tuple5.sport or 0)),
            attribute(kind + 1, bytes((tuple5.icmp_type or 0,))),
            attribute(kind + 2, bytes((tuple5.icmp_code or 0,))),
        ]
    elif tuple5.protocol in PORT_PROTOCOLS or tuple5.protocol == Protocol.GRE:
        keys = entry.gre_keys or (tuple5.sport or 0, tuple5.dport or 0)
        proto += [attribute(kind, struct.pack("!H", keys[kind - 2])) for kind in (2, 3)]
    parts = [ip, nested(2, *proto)]
    if entry.zone_orig:  # a zone of this direction alone
        parts.append(attribute(3, struct.pack("!H", entry.zone_orig)))
    body = NFNL_HEADER.pack(family, 0, 0) + nested(_CTA_TUPLE_ORIG, *parts)
    if entry.zone:
        body += attribute(_CTA_ZONE, struct.pack("!H", entry.zone))
    return body
