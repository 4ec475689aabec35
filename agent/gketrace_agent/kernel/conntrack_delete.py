"""Deletes single connection-tracking entries.

The kernel finds an entry by its original tuple and zone, and deletes it only when its id is the
one that is asked for.  The id is a hash of the entry's address in memory and its original tuple:
an entry that was made anew at the same address for the same tuple has the same one.  So the entry
is looked at first, and its reply tuple and start compared.

pyroute2 encodes the messages, our own socket carries them: see `gketrace_agent.kernel.netlink`.  It
takes 0.2 s and 19 MiB to import, so that happens with the first deletion.

Source: kernel net/netfilter/nf_conntrack_netlink.c ctnetlink_del_conntrack(), nf_ct_get_id().
"""

from __future__ import annotations

import errno
import functools
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from gketrace.conntrack import ConntrackEntry
from gketrace.packet import PORT_PROTOCOLS, Protocol
from gketrace_agent.kernel.conntrack import decode_entry
from gketrace_agent.kernel.netlink import NetlinkError, NetlinkSocket
from gketrace_agent.kernel.nfnetlink import nfnl_type

__all__ = ["Deletion", "Outcome", "delete_entries"]

_SUBSYSTEM: Final = 1
_GET: Final = 1
_DELETE: Final = 2
_NLMSG_HEADER: Final = 16
"""Bytes of struct nlmsghdr, which the socket writes itself."""


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
    question, order = _encoded(entry), _encoded(entry, id=entry.id)
    try:
        found = netfilter.request(nfnl_type(_SUBSYSTEM, _GET), question, what="conntrack entry")
        if found is None or not _same(decode_entry(found.body), entry):
            return Deletion(outcome=Outcome.REPLACED)
        netfilter.request(nfnl_type(_SUBSYSTEM, _DELETE), order, what="conntrack entry")
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


@functools.cache
def _message() -> Any:  # pyroute2 has no type hints for its messages
    from pyroute2.netlink.nfnetlink.nfctsocket import nfct_msg

    class Tuple(nfct_msg.cta_tuple):  # type: ignore[misc]
        """With the zone of one direction alone, which pyroute2 0.9.7 does not have."""

        nla_map = (*nfct_msg.cta_tuple.nla_map, ("CTA_TUPLE_ZONE", "be16"))

    class Message(nfct_msg):  # type: ignore[misc]
        cta_tuple = Tuple

    return Message


def _encoded(entry: ConntrackEntry, **more: int) -> bytes:
    """struct nfgenmsg, the original tuple and the zone, and attributes such as `id`."""
    tuple5 = entry.orig
    four = tuple5.src.version == 4
    ip = "CTA_IP_V4" if four else "CTA_IP_V6"
    addresses = [[f"{ip}_SRC", str(tuple5.src)], [f"{ip}_DST", str(tuple5.dst)]]
    protocol: list[list[Any]] = [["CTA_PROTO_NUM", tuple5.protocol]]
    if tuple5.protocol in (Protocol.ICMP, Protocol.ICMPV6):
        kind = "CTA_PROTO_ICMP" if tuple5.protocol == Protocol.ICMP else "CTA_PROTO_ICMPV6"
        protocol += [
            [f"{kind}_ID", tuple5.sport or 0],
            [f"{kind}_TYPE", tuple5.icmp_type or 0],
            [f"{kind}_CODE", tuple5.icmp_code or 0],
        ]
    elif tuple5.protocol in PORT_PROTOCOLS or tuple5.protocol == Protocol.GRE:
        source, destination, *_ = entry.gre_keys or (tuple5.sport or 0, tuple5.dport or 0)
        protocol += [["CTA_PROTO_SRC_PORT", source], ["CTA_PROTO_DST_PORT", destination]]
    wanted: list[list[Any]] = [
        ["CTA_TUPLE_IP", {"attrs": addresses}],
        ["CTA_TUPLE_PROTO", {"attrs": protocol}],
    ]
    if entry.zone_orig:  # a zone of this direction alone
        wanted.append(["CTA_TUPLE_ZONE", entry.zone_orig])
    message = _message()()
    message["nfgen_family"] = socket.AF_INET if four else socket.AF_INET6
    message["attrs"] = [["CTA_TUPLE_ORIG", {"attrs": wanted}]]
    if entry.zone:
        message["attrs"].append(["CTA_ZONE", entry.zone])
    message["attrs"] += [[f"CTA_{name.upper()}", value] for name, value in more.items()]
    message.encode()
    return bytes(message.data[_NLMSG_HEADER:])
