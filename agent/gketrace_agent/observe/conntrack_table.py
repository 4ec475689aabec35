"""The whole connection-tracking table of one namespace: its size, its settings, its entries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from gketrace.conntrack import ConntrackEntry
from gketrace_agent.kernel.conntrack_delete import Deletion, delete_entries
from gketrace_agent.kernel.conntrack_dump import BulkSocket, TableReading
from gketrace_agent.kernel.conntrack_events import EventKind, EventSocket
from gketrace_agent.kernel.conntrack_request import KernelFilter
from gketrace_agent.kernel.conntrack_stats import (
    CpuStatistics,
    TableSize,
    cpu_statistics,
    table_size,
)
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netlink import NETLINK_NETFILTER, NetlinkSocket
from gketrace_agent.kernel.netns import NetnsHandle, run_in_netns
from gketrace_agent.observe.conntrack_filter import ConntrackFilters
from gketrace_agent.observe.conntrack_follow import Follower

__all__ = ["ConntrackSettings", "ConntrackTable", "open_conntrack"]

_DUMPS: Final = 32
"""Of one reading: to be sent the whole table costs less than to have it walked more often."""
_PREFIX: Final = "net.netfilter.nf_conntrack_"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConntrackSettings:
    """net.netfilter.nf_conntrack_*, of the namespace."""

    accounting: bool
    """False: entries have no counters."""
    events: int
    """0: none are sent; 1: of every entry; 2: of entries that were made while somebody
    listened."""
    timestamps: bool
    """False: entries that are made now have no start."""


class ConntrackTable:
    """An open table.  Any thread may use it; one reading at a time.

    The namespace's handle stays the caller's, and open.
    """

    def __init__(
        self,
        handle: NetnsHandle,
        paths: HostPaths,
        netfilter: NetlinkSocket,
        settings: ConntrackSettings,
        active: Callable[[], bool],
    ) -> None:
        self._handle = handle
        self._paths = paths
        self._netfilter = netfilter
        self._bulk = BulkSocket()
        self._active = active
        self.settings: Final = settings

    def size(self) -> TableSize:
        return table_size(self._netfilter)

    def limit(self) -> int:
        """net.netfilter.nf_conntrack_max, which holds for each namespace."""
        told = self.size().limit
        if told is None:
            return int(self._paths.sysctl(f"{_PREFIX}max").read_text())
        return told

    def statistics(self) -> tuple[CpuStatistics, ...]:
        return cpu_statistics(self._netfilter)

    def buckets(self) -> int:
        """Of the hash table, which all namespaces share."""
        return int(self._paths.sysctl(f"{_PREFIX}buckets").read_text())

    def read(self, wanted: ConntrackFilters) -> TableReading:
        """A reading that has not begun: iterate over its `batches`."""
        filters = wanted.kernel()
        if len(filters) > _DUMPS:
            families = {one.family for one in filters}
            filters = (KernelFilter(family=families.pop() if len(families) == 1 else 0),)
        return TableReading(
            socket=self._bulk,
            filters=filters,
            take=wanted.mask,
            buckets=self.buckets,
            active=self._active,
        )

    def delete(self, entries: Iterable[ConntrackEntry]) -> Iterator[Deletion]:
        """Deletes those of the entries that are still there; what became of each."""
        return delete_entries(self._netfilter, entries)

    def follow(
        self,
        wanted: ConntrackFilters,
        kinds: frozenset[EventKind],
        *,
        existing: bool,
        poll_seconds: float,
    ) -> Follower:
        """Listens from now on; `close` it."""
        socket = run_in_netns(self._handle, lambda: EventSocket(kinds, wanted.kernel()))
        return Follower(
            events=socket,
            setting=self.settings.events,
            kinds=kinds,
            wanted=wanted,
            reading=lambda: self.read(wanted),
            existing=existing,
            poll_seconds=poll_seconds,
        )

    def close(self) -> None:
        """May be called twice."""
        self._bulk.close()
        self._netfilter.close()

    def __enter__(self) -> ConntrackTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_conntrack(
    handle: NetnsHandle, paths: HostPaths, *, active: Callable[[], bool] = lambda: True
) -> ConntrackTable:
    """Opens the table of a namespace.  Raises `UnavailableError` without connection tracking.

    `active`: whether somebody still waits for what is read; a reading for nobody ends.
    """

    def opened() -> ConntrackTable:
        netfilter = NetlinkSocket(NETLINK_NETFILTER)
        try:
            settings = ConntrackSettings(
                accounting=_setting(paths, "acct") == 1,
                events=_setting(paths, "events"),
                timestamps=_setting(paths, "timestamp") == 1,
            )
            return ConntrackTable(handle, paths, netfilter, settings, active)
        except BaseException:
            netfilter.close()
            raise

    return run_in_netns(handle, opened)


def _setting(paths: HostPaths, name: str) -> int:
    """0 where the kernel was built without it."""
    try:
        return int(paths.sysctl(f"{_PREFIX}{name}").read_text())
    except FileNotFoundError:
        return 0
