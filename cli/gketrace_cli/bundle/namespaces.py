"""A node as a bundle has it, for walks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Final, TypeAlias

from gketrace.conntrack import ConntrackEntry
from gketrace.packet import PORT_PROTOCOLS, Packet, Protocol, Tuple5
from gketrace.simulate.here import AbsentPod, walk_from
from gketrace.snapshot import Maybe, NetnsSnapshot, Unavailable
from gketrace.trace import Flow, NetnsKind, NetnsRef, Walk
from gketrace_cli.bundle.model import HOST, NodeRecord, Table
from gketrace_cli.checking.sights import NodeReading
from gketrace_cli.conntrack_reading import entries_of

__all__ = ["SavedConntrack", "SavedNode"]

_Key: TypeAlias = tuple[object, ...]


class SavedConntrack:
    """Implements `gketrace.snapshot.ConntrackView` over the entries of one namespace."""

    def __init__(self, table: Table | None) -> None:
        self._table = table

    @cached_property
    def entries(self) -> tuple[ConntrackEntry, ...]:
        replies = self._table.entries if self._table is not None else ()
        return tuple(entry for reply in replies for entry in entries_of(reply))

    @cached_property
    def _by_tuple(self) -> Mapping[_Key, ConntrackEntry]:
        found: dict[_Key, ConntrackEntry] = {}
        for entry in self.entries:
            # Walks know no keys, as version 0 of GRE has none.
            if any(entry.gre_keys or ()):
                continue
            found[_key(entry.orig, entry.zone or entry.zone_orig)] = entry
            found[_key(entry.reply, entry.zone or entry.zone_reply)] = entry
        return found

    def lookup(self, tuple5: Tuple5, zone: int = 0) -> Maybe[ConntrackEntry | None]:
        """As the kernel's own search, by either direction."""
        if self._table is None:
            return Unavailable(reason="its connections are not in this bundle")
        if self._table.entries_error is not None:
            return Unavailable(reason=self._table.entries_error.message)
        if why := _incomplete(tuple5):
            return Unavailable(reason=f"cannot ask for an incomplete tuple: {tuple5} has {why}")
        entry = self._by_tuple.get(_key(tuple5, zone))
        if entry is None and not self._whole:
            return Unavailable(reason="this bundle does not have all connections")
        return entry

    @property
    def _whole(self) -> bool:
        replies = self._table.entries if self._table is not None else ()
        ends = [reply.summary for reply in replies if reply.HasField("summary")]
        return bool(ends) and ends[-1].consistent and not ends[-1].truncated


def _incomplete(tuple5: Tuple5) -> str:
    if tuple5.protocol in (Protocol.ICMP, Protocol.ICMPV6):
        lacks = tuple5.icmp_type is None or tuple5.sport is None
        return "no ICMP type or identifier" if lacks else ""
    if tuple5.protocol in PORT_PROTOCOLS and None in (tuple5.sport, tuple5.dport):
        return "an unknown port"
    return ""


def _key(one: Tuple5, zone: int) -> _Key:
    ports: _Key = (one.sport, one.dport) if one.protocol in PORT_PROTOCOLS else ()
    if one.protocol in (Protocol.ICMP, Protocol.ICMPV6):
        ports = (one.sport, one.icmp_type, one.icmp_code or 0)
    return one.src, one.dst, one.protocol, zone, *ports


class _View:
    """A `gketrace.snapshot.NodeView` for one walk."""

    def __init__(self, node: str, known: Mapping[str, Maybe[NetnsSnapshot]]) -> None:
        self.node: Final = node
        self._known = known
        self.given: dict[str, NetnsSnapshot] = {}

    def snapshot(self, netns: NetnsRef) -> Maybe[NetnsSnapshot]:
        key = HOST if netns.kind is NetnsKind.HOST else netns.pod or str(netns.inode)
        found = self._known.get(key)
        if found is None or netns.kind is NetnsKind.OTHER:
            return Unavailable(reason=f"{netns} is not a namespace that this agent knows")
        if isinstance(found, NetnsSnapshot):
            self.given[key] = found
        return found


class SavedNode:
    """The namespaces of one node; rules are parsed and connections unpacked when first needed."""

    def __init__(self, record: NodeRecord) -> None:
        self.record: Final = record
        self._conntrack: dict[str, SavedConntrack] = {}

    def conntrack(self, key: str) -> SavedConntrack:
        """Of the node's own namespace (`HOST`) or a pod's."""
        if key not in self._conntrack:
            self._conntrack[key] = SavedConntrack(self.record.tables.get(key))
        return self._conntrack[key]

    @cached_property
    def _reading(self) -> NodeReading:
        reading = NodeReading(self.record.node)
        for reply in self.record.replies:
            reading.take(reply)
        return reading

    @cached_property
    def snapshots(self) -> Mapping[str, Maybe[NetnsSnapshot]]:
        sight = self._reading.sight(self.record.info)
        found: dict[str, Maybe[NetnsSnapshot]] = {HOST: sight.host, **sight.pods}
        return {
            key: replace(shot, conntrack=self.conntrack(key))
            if isinstance(shot, NetnsSnapshot)
            else shot
            for key, shot in found.items()
        }

    def walk(
        self,
        packet: Packet,
        *,
        pod: str,
        pods: Mapping[str, tuple[str, ...]],
        interface: str,
        arrives: bool,
        flows: tuple[Flow, ...],
        use_conntrack: bool,
    ) -> tuple[Walk, str]:
        """`pod`: where it begins, empty for the node itself; `pods`: those that it may meet, with
        their addresses.  Raises: `GketraceError`."""
        known = {
            key: shot
            for key, shot in self.snapshots.items()
            if isinstance(shot, NetnsSnapshot) and (key in (HOST, pod) or key in pods)
        }
        view = _View(self.record.node, known)
        return walk_from(
            view,
            known[pod].netns,
            packet,
            interface=interface,
            arrives=arrives,
            flows=flows,
            use_conntrack=use_conntrack,
            seen=view.given.values,
            absent=list(self._absent(pods)),
        )

    def _absent(self, pods: Mapping[str, tuple[str, ...]]) -> Iterable[AbsentPod]:
        for key, addresses in pods.items():
            shot = self.snapshots.get(key)
            if shot is None:
                yield AbsentPod(pod_ips=addresses, why=f"pod {key} is not in this bundle")
            elif isinstance(shot, Unavailable):
                yield AbsentPod(pod_ips=addresses, why=shot.reason)
