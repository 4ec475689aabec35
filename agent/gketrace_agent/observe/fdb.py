"""Forwarding databases of bridges (RTM_NEWNEIGH of family AF_BRIDGE).

Source: kernel net/bridge/br_fdb.c fdb_fill_info(), net/core/rtnetlink.c ndo_dflt_fdb_dump().
"""

from __future__ import annotations

import os
import struct
from typing import Final

from gketrace.snapshot import FdbEntry
from gketrace_agent.kernel.netlink import attributes, u16, u32
from gketrace_agent.kernel.reader import KernelReader
from gketrace_agent.kernel.rtnetlink import NEIGHBOUR_HEADER, dump_fdb

__all__ = ["observe_fdb"]

_NDA_LLADDR: Final = 2
_NDA_CACHEINFO: Final = 3
_NDA_VLAN: Final = 5
_NDA_MASTER: Final = 9
_STATES: Final = ((0x80, "permanent"), (0x40, "static"), (0x04, "stale"))
_FLAGS: Final = (
    (0x02, "self"),
    (0x04, "master"),
    (0x10, "extern_learn"),
    (0x20, "offload"),
    (0x40, "sticky"),
    (0x80, "router"),
)
_CACHEINFO: Final = struct.Struct("=IIII")
"""struct nda_cacheinfo: confirmed, used, updated (clock ticks ago), reference count."""


def observe_fdb(reader: KernelReader) -> tuple[FdbEntry, ...]:
    """The entries of every bridge, and those that devices keep themselves (``self``)."""
    # The kernel converts to USER_HZ (jiffies_delta_to_clock_t), which is what sysconf tells.
    ticks = os.sysconf("SC_CLK_TCK")
    found = []
    for message in reader.messages("fdb", dump_fdb(reader.rtnl)):
        _, ifindex, state, flags, _ = NEIGHBOUR_HEADER.unpack_from(message.body)
        values = attributes(message.body, NEIGHBOUR_HEADER.size)
        used = updated = None
        if _NDA_CACHEINFO in values:
            _, used_ticks, updated_ticks, _ = _CACHEINFO.unpack(values[_NDA_CACHEINFO])
            used, updated = used_ticks / ticks, updated_ticks / ticks
        names = [name for bit, name in _FLAGS if flags & bit]
        names += [name for bit, name in _STATES if state & bit]
        found.append(
            FdbEntry(
                mac=values.get(_NDA_LLADDR, b"").hex(":"),
                ifindex=ifindex,
                master=u32(values[_NDA_MASTER]) if _NDA_MASTER in values else None,
                vlan=u16(values[_NDA_VLAN]) if _NDA_VLAN in values else None,
                flags=tuple(names),
                used=used,
                updated=updated,
            )
        )
    return tuple(found)
