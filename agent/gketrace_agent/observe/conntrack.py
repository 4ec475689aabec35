"""Connection tracking of one namespace: one entry by its tuple, and whether anything is tracked.

The whole table: `gketrace_agent.observe.conntrack_table`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from gketrace.conntrack import ConntrackEntry
from gketrace.errors import GketraceError
from gketrace.packet import Tuple5
from gketrace.ruleset import Ruleset
from gketrace.snapshot import Maybe, Unavailable
from gketrace_agent.kernel.conntrack import get_entry
from gketrace_agent.kernel.netlink import NetlinkSocket
from gketrace_agent.kernel.reader import KernelReader
from gketrace_agent.observe.iptables import IptablesDump, IptablesDumps
from gketrace_agent.observe.nftables import NftablesDump

__all__ = ["Conntrack", "observe_conntrack"]

_ASKS: Final = re.compile(
    rb"^\*nat|--ctstate|--ctstatus|--ctdir|--ctorig|--ctrepl|-m state|-m connmark|-j CONNMARK|"
    rb"-j CT |-m connlimit|-m connbytes|-m connlabel|-m helper|-j SYNPROXY|-m cluster",
    re.M,
)
"""Rules that make the kernel track connections (users of nf_ct_netns_get)."""


class Conntrack:
    """Implements `gketrace.snapshot.ConntrackView` over one namespace; usable from any thread."""

    def __init__(self, netfilter: NetlinkSocket, *, tracked: bool) -> None:
        self._netfilter = netfilter
        self.tracked: Final = tracked
        """False: nothing in this namespace asks for connection tracking, so that having no entry
        says nothing about traffic."""

    def lookup(self, tuple5: Tuple5, zone: int = 0) -> Maybe[ConntrackEntry | None]:
        """The entry of `zone` with this tuple in either direction; None: there is none."""
        try:
            return get_entry(self._netfilter, tuple5, zone=zone)
        except ValueError as error:
            return Unavailable(reason=f"cannot ask for an incomplete tuple: {error}")
        except GketraceError as error:
            return Unavailable(reason=str(error))

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
