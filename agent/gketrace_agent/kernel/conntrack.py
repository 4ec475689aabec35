"""One connection-tracking entry by its tuple, over nfnetlink.

pyroute2 encodes the question, our own socket carries it: see `gketrace_agent.kernel.netlink`.
pyroute2 takes 0.2 s to import and is imported when it is first needed; `preload` does it
beforehand.  Reading many entries: `gketrace_agent.kernel.conntrack_dump`.

Source: kernel net/netfilter/nf_conntrack_netlink.c ctnetlink_get_conntrack();
include/uapi/linux/netfilter/.
"""

from __future__ import annotations

import errno
import functools
import socket
import struct
from typing import Any, Final

from gketrace.conntrack import ConntrackEntry
from gketrace.packet import PORT_PROTOCOLS, Protocol, Tuple5
from gketrace_agent.kernel.conntrack_layout import entry_of, layout_of
from gketrace_agent.kernel.netlink import NetlinkError, NetlinkSocket

__all__ = ["decode_entry", "get_entry", "preload"]

_NFNL_SUBSYS_CTNETLINK: Final = 1
_IPCTNL_MSG_CT_GET: Final = 1
_TYPE: Final = _NFNL_SUBSYS_CTNETLINK << 8 | _IPCTNL_MSG_CT_GET
_HEADER: Final = struct.Struct("=IHHII")


@functools.cache
def _pyroute2() -> Any:  # pyroute2 has no type hints for its messages
    from pyroute2.netlink.nfnetlink import nfctsocket

    return nfctsocket


def preload() -> None:
    """Imports pyroute2 now, rather than at the first lookup."""
    _pyroute2()


def _body(family: int, **attributes: Any) -> bytes:
    message = _pyroute2().nfct_msg.create_from(**attributes)
    message["nfgen_family"] = family
    message.encode()
    return bytes(message.data[_HEADER.size :])


def _af(version: int) -> int:
    return {4: socket.AF_INET, 6: socket.AF_INET6, 0: socket.AF_UNSPEC}[version]


def get_entry(netfilter: NetlinkSocket, tuple5: Tuple5, *, zone: int = 0) -> ConntrackEntry | None:
    """The entry that has `tuple5` in either direction; None when there is none.

    Ports, or for ICMP type, code and identifier, must be known: raises ValueError otherwise, as
    the kernel would take them for 0.  Raises `NetlinkError` for what the kernel refuses.
    """
    family = _af(tuple5.src.version)
    values: dict[str, Any] = {"saddr": str(tuple5.src), "daddr": str(tuple5.dst)}
    if tuple5.protocol in (Protocol.ICMP, Protocol.ICMPV6):
        if tuple5.icmp_type is None or tuple5.sport is None:
            raise ValueError(f"{tuple5} has no ICMP type or identifier")
        values |= {
            "icmp_id": tuple5.sport,
            "icmp_type": tuple5.icmp_type,
            "icmp_code": tuple5.icmp_code or 0,
        }
    elif tuple5.protocol in PORT_PROTOCOLS:
        if tuple5.sport is None or tuple5.dport is None:
            raise ValueError(f"{tuple5} has an unknown port")
        values |= {"sport": tuple5.sport, "dport": tuple5.dport}
    elif tuple5.protocol == Protocol.GRE:
        # Version 0 has no keys: gre_pkt_to_tuple() leaves them 0, and ctnetlink wants them.
        values |= {"sport": 0, "dport": 0}
    wanted = _pyroute2().NFCTAttrTuple(family=family, proto=tuple5.protocol, **values)
    # The kernel looks in one hash that holds the tuples of both directions, whichever attribute
    # the tuple comes in (ctnetlink_get_conntrack, nf_conntrack_find_get).
    body = _body(family, tuple_orig=wanted, zone=zone or None)
    try:
        answer = netfilter.request(_TYPE, body, what=f"conntrack entry {tuple5}")
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return None if answer is None else decode_entry(answer.body)


def decode_entry(body: bytes) -> ConntrackEntry:
    """One IPCTNL_MSG_CT_NEW message (without its header) → entry."""
    header = _HEADER.pack(_HEADER.size + len(body), _NFNL_SUBSYS_CTNETLINK << 8, 0, 0, 0)
    message = header + body
    return entry_of(message, layout_of(message))
