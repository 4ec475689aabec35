"""How many entries a namespace has, and what each CPU counted.

Source: kernel net/netfilter/nf_conntrack_netlink.c ctnetlink_stat_ct(),
ctnetlink_ct_stat_cpu_dump().
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gketrace_agent.kernel.netlink import NetlinkSocket, attributes
from gketrace_agent.kernel.nfnetlink import NFNL_HEADER, nfnl_type

__all__ = ["COUNTERS", "CpuStatistics", "TableSize", "cpu_statistics", "table_size"]

_SUBSYSTEM: Final = 1
_STATS_CPU: Final = 4
_STATS: Final = 5
COUNTERS: Final[Mapping[int, str]] = {
    2: "found",
    4: "invalid",
    8: "insert",
    9: "insert_failed",
    10: "drop",
    11: "early_drop",
    12: "error",
    13: "search_restart",
    14: "clash_resolve",
    15: "chain_toolong",
}
"""CTA_STATS_*: attribute → the kernel's name.  The others are no longer used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSize:
    """Of one namespace."""

    entries: int
    limit: int | None
    """net.netfilter.nf_conntrack_max, which holds for each namespace; None before Linux 4.18."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuStatistics:
    """What one CPU counted in this namespace since the namespace was made."""

    cpu: int
    counters: Mapping[str, int]
    """32 bits each; they wrap."""


def table_size(netfilter: NetlinkSocket) -> TableSize:
    """Costs nothing, however large the table is.  Raises `NetlinkError`."""
    body = NFNL_HEADER.pack(socket.AF_UNSPEC, 0, 0)
    answer = netfilter.request(nfnl_type(_SUBSYSTEM, _STATS), body, what="conntrack count")
    found = {} if answer is None else attributes(answer.body, NFNL_HEADER.size)
    return TableSize(
        entries=int.from_bytes(found.get(1, b""), "big"),
        limit=int.from_bytes(found[2], "big") if 2 in found else None,
    )


def cpu_statistics(netfilter: NetlinkSocket) -> tuple[CpuStatistics, ...]:
    """One for each possible CPU.  Raises `NetlinkError`."""
    body = NFNL_HEADER.pack(socket.AF_UNSPEC, 0, 0)
    dump = netfilter.dump(nfnl_type(_SUBSYSTEM, _STATS_CPU), body, what="conntrack statistics")
    made: list[CpuStatistics] = []
    for message in dump.messages:
        _, _, cpu = NFNL_HEADER.unpack_from(message.body)
        found = attributes(message.body, NFNL_HEADER.size)
        made.append(
            CpuStatistics(
                cpu=cpu,
                counters={
                    name: int.from_bytes(found[kind], "big")
                    for kind, name in COUNTERS.items()
                    if kind in found
                },
            )
        )
    return tuple(made)
