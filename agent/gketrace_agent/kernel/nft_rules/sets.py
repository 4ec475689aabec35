"""Names of ipsets: a rule holds only a set's index.

Source: kernel net/netfilter/ipset/ip_set_core.c ip_set_byindex().
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Final

from gketrace_agent.kernel.netlink import NetlinkError, NetlinkSocket, attribute, attributes
from gketrace_agent.kernel.nfnetlink import NFNL_HEADER, nfnl_type
from gketrace_agent.kernel.nft_rules.words import NotRendered, string

__all__ = ["SetNames", "ask_for_name"]

_NFNL_SUBSYS_IPSET: Final = 6
_IPSET_CMD_GET_BYINDEX: Final = 15
_PROTOCOL: Final = 7
"""The first of ipset's protocol versions that has the question."""
_ATTR_PROTOCOL, _ATTR_SETNAME, _ATTR_INDEX = 1, 2, 11
_NLA_F_NET_BYTEORDER: Final = 0x4000


class SetNames:
    """The names of the sets that one namespace's rules use, each asked for once."""

    def __init__(self, ask: Callable[[int], str]) -> None:
        self._ask = ask
        self._names: dict[int, str] = {}

    def match(self, index: int, dimension: int, flags: int) -> str:
        """``name src,dst``.  Bit n of `flags` says that dimension n is of the source."""
        if index not in self._names:
            self._names[index] = self._ask(index)
        sides = ",".join("src" if flags & 1 << n else "dst" for n in range(1, dimension + 1))
        return f"{self._names[index]} {sides}" if sides else self._names[index]


def ask_for_name(netfilter: NetlinkSocket, index: int) -> str:
    """The name of the set with `index`.  Raises `NotRendered` when the kernel does not tell."""
    body = NFNL_HEADER.pack(socket.AF_INET, 0, 0) + attribute(_ATTR_PROTOCOL, bytes((_PROTOCOL,)))
    body += attribute(_ATTR_INDEX | _NLA_F_NET_BYTEORDER, struct.pack("!H", index))
    kind = nfnl_type(_NFNL_SUBSYS_IPSET, _IPSET_CMD_GET_BYINDEX)
    try:
        answer = netfilter.request(kind, body, what="name of an ipset")
    except NetlinkError as error:
        raise NotRendered(f"ipset {index} has no name: {error.message}") from None
    found = attributes(answer.body, NFNL_HEADER.size) if answer else {}
    name = string(found.get(_ATTR_SETNAME, b""))
    if not name:
        raise NotRendered(f"ipset {index} has no name")
    return name
