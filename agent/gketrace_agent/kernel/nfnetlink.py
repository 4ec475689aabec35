"""Small questions to nfnetlink: nf_tables' generation and tables, whether ipsets exist.

Source: kernel net/netfilter/nfnetlink.c, nf_tables_api.c, ipset/ip_set_core.c.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass
from typing import Final

from gketrace_agent.kernel.netlink import NetlinkError, NetlinkSocket, attribute, attributes, text

__all__ = ["NFNL_HEADER", "NftTable", "ipset_names", "nfnl_type", "nft_generation", "nft_tables"]

NFNL_HEADER: Final = struct.Struct("!BBH")
"""struct nfgenmsg: family, version 0, resource id."""
NFNL_SUBSYS_NFTABLES: Final = 10
_NFNL_SUBSYS_IPSET: Final = 6
_IPSET_CMD_LIST: Final = 7
_IPSET_PROTOCOL: Final = 6
_IPSET_ATTR_PROTOCOL: Final = 1
_IPSET_ATTR_SETNAME: Final = 2
_IPSET_ATTR_FLAGS: Final = 6
_IPSET_FLAG_LIST_SETNAME: Final = 1 << 1
_NFT_MSG_GETTABLE: Final = 1
_NFT_MSG_GETGEN: Final = 16
_NFTA_TABLE_NAME: Final = 1
_NFTA_GEN_ID: Final = 1
_NLA_F_NET_BYTEORDER: Final = 0x4000
_FAMILIES: Final = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NftTable:
    """An nf_tables table, iptables-nft's ones included."""

    family: str
    """``ip``, ``ip6``, ``inet``, ``arp``, ``bridge``, ``netdev``."""
    name: str

    def __str__(self) -> str:
        return f"{self.family} {self.name}"


def nfnl_type(subsystem: int, message: int) -> int:
    """nlmsg_type of a subsystem's message."""
    return subsystem << 8 | message


def nft_generation(netfilter: NetlinkSocket) -> int | None:
    """The number that changes with every change of the rules; None: this kernel has no nf_tables.

    It counts transactions of the namespace (nft_net->base_seq).  Counters and elements that
    packets add to dynamic sets do not change it.
    """
    body = NFNL_HEADER.pack(socket.AF_UNSPEC, 0, 0)
    try:
        answer = netfilter.request(
            nfnl_type(NFNL_SUBSYS_NFTABLES, _NFT_MSG_GETGEN), body, what="nf_tables generation"
        )
    except NetlinkError as error:
        # nfnetlink answers EINVAL for a subsystem that nobody registered.
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT):
            return None
        raise
    if answer is None:
        return None
    raw = attributes(answer.body, NFNL_HEADER.size).get(_NFTA_GEN_ID, b"")
    return int.from_bytes(raw, "big")


def nft_tables(netfilter: NetlinkSocket) -> tuple[NftTable, ...]:
    """All nf_tables tables of the namespace.  Raises `NetlinkError` without nf_tables."""
    dump = netfilter.dump(
        nfnl_type(NFNL_SUBSYS_NFTABLES, _NFT_MSG_GETTABLE),
        NFNL_HEADER.pack(socket.AF_UNSPEC, 0, 0),
        what="nf_tables tables",
    )
    return tuple(
        NftTable(
            family=_FAMILIES.get(message.body[0], str(message.body[0])),
            name=text(attributes(message.body, NFNL_HEADER.size).get(_NFTA_TABLE_NAME, b"")),
        )
        for message in dump.messages
    )


def ipset_names(netfilter: NetlinkSocket) -> tuple[str, ...]:
    """The names of the namespace's ipsets.  Asks for the subsystem's module: see that it is loaded
    first (/sys/module/ip_set)."""
    body = NFNL_HEADER.pack(socket.AF_INET, 0, 0)
    body += attribute(_IPSET_ATTR_PROTOCOL, bytes((_IPSET_PROTOCOL,)))
    body += attribute(
        _IPSET_ATTR_FLAGS | _NLA_F_NET_BYTEORDER, struct.pack("!I", _IPSET_FLAG_LIST_SETNAME)
    )
    dump = netfilter.dump(nfnl_type(_NFNL_SUBSYS_IPSET, _IPSET_CMD_LIST), body, what="ipsets")
    return tuple(
        text(attributes(message.body, NFNL_HEADER.size).get(_IPSET_ATTR_SETNAME, b""))
        for message in dump.messages
    )
