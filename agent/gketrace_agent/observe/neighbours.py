"""The neighbour tables: ARP and NDP (RTM_NEWNEIGH).

Source: kernel net/core/neighbour.c neigh_fill_info().
"""

from __future__ import annotations

import socket
from ipaddress import ip_address
from typing import Final

from gketrace.snapshot import Neighbour
from gketrace_agent.kernel.netlink import attributes
from gketrace_agent.kernel.reader import KernelReader
from gketrace_agent.kernel.rtnetlink import NEIGHBOUR_HEADER, dump_neighbours

__all__ = ["observe_neighbours"]

_NDA_DST: Final = 1
_NDA_LLADDR: Final = 2
_NTF_ROUTER: Final = 0x80
_STATES: Final = {
    0x01: "INCOMPLETE",
    0x02: "REACHABLE",
    0x04: "STALE",
    0x08: "DELAY",
    0x10: "PROBE",
    0x20: "FAILED",
    0x40: "NOARP",
    0x80: "PERMANENT",
    0x00: "NONE",
}


def observe_neighbours(reader: KernelReader) -> tuple[Neighbour, ...]:
    """Both families; NOARP entries too, which ``ip neigh`` leaves out unless asked."""
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        for message in reader.messages("neighbours", dump_neighbours(reader.rtnl, family)):
            _, ifindex, state, flags, _ = NEIGHBOUR_HEADER.unpack_from(message.body)
            values = attributes(message.body, NEIGHBOUR_HEADER.size)
            if _NDA_DST not in values:
                continue
            found.append(
                Neighbour(
                    ifindex=ifindex,
                    address=ip_address(values[_NDA_DST]),
                    mac=values.get(_NDA_LLADDR, b"").hex(":"),
                    state=_STATES.get(state, f"{state:#x}"),
                    router=bool(flags & _NTF_ROUTER),
                )
            )
    return tuple(found)
