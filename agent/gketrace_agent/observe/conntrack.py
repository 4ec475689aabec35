"""Connection tracking of one namespace: one entry by its tuple, or the entries of a filter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from gketrace.conntrack import ConntrackEntry
from gketrace.errors import GketraceError
from gketrace.packet import IPAddress, Tuple5
from gketrace.ruleset import Ruleset
from gketrace.snapshot import IPNetwork, Maybe, Unavailable
from gketrace_agent.kernel.conntrack import (
    KernelFilter,
    decode_entries,
    dump_entries,
    get_entry,
)
from gketrace_agent.kernel.netlink import NetlinkSocket
from gketrace_agent.kernel.reader import KernelReader
from gketrace_agent.observe.iptables import IptablesDump, IptablesDumps
from gketrace_agent.observe.nftables import NftablesDump

__all__ = ["Conntrack", "ConntrackEntries", "ConntrackFilter", "observe_conntrack"]

_ASKS: Final = re.compile(
    rb"^\*nat|--ctstate|--ctstatus|--ctdir|--ctorig|--ctrepl|-m state|-m connmark|-j CONNMARK|"
    rb"-j CT |-m connlimit|-m connbytes|-m connlabel|-m helper|-j SYNPROXY|-m cluster",
    re.M,
)
"""Rules that make the kernel track connections (users of nf_ct_netns_get)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConntrackFilter:
    """Which entries are wanted; all of what is given must hold."""

    family: int = 0
    """4, 6, or 0 for both."""
    protocol: int | None = None
    orig_src: IPNetwork | None = None
    orig_dst: IPNetwork | None = None
    reply_src: IPNetwork | None = None
    reply_dst: IPNetwork | None = None
    orig_sport: int | None = None
    orig_dport: int | None = None
    reply_sport: int | None = None
    reply_dport: int | None = None
    mark: int | None = None
    mark_mask: int = 0xFFFFFFFF
    zone: int | None = None
    address: IPNetwork | None = None
    """Any of the four addresses of the entry is in it."""

    def kernel(self) -> KernelFilter:
        """The part that the kernel filters by: whole addresses, not prefixes."""
        given = [n for n in (self.orig_src, self.orig_dst) if n is not None]
        return KernelFilter(
            family=self.family or (given[0].version if given else 0),
            protocol=self.protocol,
            src=_host(self.orig_src),
            dst=_host(self.orig_dst),
            sport=self.orig_sport,
            dport=self.orig_dport,
            mark=self.mark,
            mark_mask=self.mark_mask,
        )

    def takes(self, entry: ConntrackEntry) -> bool:
        """True when `entry` is wanted."""
        orig, reply = entry.orig, entry.reply
        pairs = (
            (self.family or None, orig.src.version),
            (self.protocol, orig.protocol),
            (self.orig_sport, orig.sport),
            (self.orig_dport, orig.dport),
            (self.reply_sport, reply.sport),
            (self.reply_dport, reply.dport),
            (self.zone, entry.zone),
        )
        if any(wanted is not None and wanted != got for wanted, got in pairs):
            return False
        networks = (
            (self.orig_src, orig.src),
            (self.orig_dst, orig.dst),
            (self.reply_src, reply.src),
            (self.reply_dst, reply.dst),
        )
        if any(wanted is not None and got not in wanted for wanted, got in networks):
            return False
        if self.mark is not None and (entry.mark or 0) & self.mark_mask != self.mark:
            return False
        ends = (orig.src, orig.dst, reply.src, reply.dst)
        return self.address is None or any(end in self.address for end in ends)


def _host(network: IPNetwork | None) -> IPAddress | None:
    if network is None or network.prefixlen != network.max_prefixlen:
        return None
    return network.network_address


@dataclass(frozen=True, slots=True, kw_only=True)
class ConntrackEntries:
    """The entries that a filter let pass."""

    entries: tuple[ConntrackEntry, ...]
    truncated: bool
    """True: there are more than the limit that was set."""
    consistent: bool
    """False: the table changed under the dump (NLM_F_DUMP_INTR)."""


class Conntrack:
    """Implements `gketrace.snapshot.ConntrackView` over one namespace; usable from any thread."""

    def __init__(self, netfilter: NetlinkSocket, *, tracked: bool) -> None:
        self._netfilter = netfilter
        self.tracked: Final = tracked
        """False: nothing in this namespace asks for connection tracking, so that having no entry
        says nothing about traffic."""

    def lookup(self, tuple5: Tuple5) -> Maybe[ConntrackEntry | None]:
        """The entry with this tuple in either direction, zone 0; None: there is none."""
        return self.get(tuple5)

    def get(self, tuple5: Tuple5, *, zone: int = 0) -> Maybe[ConntrackEntry | None]:
        """As `lookup`, in any zone."""
        try:
            return get_entry(self._netfilter, tuple5, zone=zone)
        except ValueError as error:
            return Unavailable(reason=f"cannot ask for an incomplete tuple: {error}")
        except GketraceError as error:
            return Unavailable(reason=str(error))

    def entries(
        self, wanted: ConntrackFilter, *, limit: int | None = None
    ) -> Maybe[ConntrackEntries]:
        """The entries that `wanted` takes, at most `limit` of them."""
        try:
            dump = dump_entries(self._netfilter, wanted.kernel())
        except GketraceError as error:
            return Unavailable(reason=str(error))
        found: list[ConntrackEntry] = []
        truncated = False
        matching: Iterator[ConntrackEntry] = filter(wanted.takes, decode_entries(dump))
        for entry in matching:
            if limit is not None and len(found) >= limit:
                truncated = True
                break
            found.append(entry)
        return ConntrackEntries(
            entries=tuple(found), truncated=truncated, consistent=dump.consistent
        )

    def close(self) -> None:
        """May be called twice."""
        self._netfilter.close()


def observe_conntrack(
    reader: KernelReader,
    rulesets: Sequence[Maybe[Ruleset]],
    iptables: Maybe[IptablesDumps],
    nftables: Maybe[NftablesDump | None],
) -> Conntrack:
    """A view on the namespace's connection tracking.

    The kernel tracks in a namespace only when some rule there asks for it (nf_ct_netns_get); it
    does not tell in which namespaces that is so.  `Conntrack.tracked` is therefore False only when
    the table is empty, every rule was read, and none is in a nat table or needs tracking.
    """
    tracked = (
        _count(reader) != 0
        or any(isinstance(ruleset, Unavailable) for ruleset in rulesets)
        or isinstance(iptables, Unavailable)
        or any(_ASKS.search(dump.text) for dump in iptables.dumps if isinstance(dump, IptablesDump))
        or nftables is not None
    )
    return Conntrack(reader.netfilter, tracked=tracked)


def _count(reader: KernelReader) -> int:
    """net.netfilter.nf_conntrack_count; 0 where connection tracking is not loaded."""
    try:
        return int(reader.paths.sysctl("net.netfilter.nf_conntrack_count").read_text())
    except FileNotFoundError:
        return 0
