"""What every node's agent says of itself and of its node, read all at once."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from gketrace.errors import GketraceError
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1 import target_pb2

if TYPE_CHECKING:
    from gketrace_cli.agents import Fleet

__all__ = ["NodeStatus", "Reading", "read_status"]

_AT_ONCE: Final = 32
_DROPS: Final = ("insert_failed", "drop", "early_drop")
"""Counters of packets and entries that connection tracking lost."""
_CLOCK_SECONDS: Final = 1.0
"""A clock that is off by more is said."""
_FULL: Final = 0.9
_HOST: Final = target_pb2.Target(host=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """One node."""

    node: str
    how: str = ""
    """How its agent is reached; empty: it is not."""
    info: pb.GetInfoReply | None = None
    conntrack: pb.GetConntrackStatsReply | None = None
    clock: float | None = None
    """Seconds that the node's clock is ahead of this machine's."""
    clock_error: float = 0.0
    """Seconds, either way."""
    problems: tuple[str, ...] = ()
    """What is not seen or not right, a sentence each."""

    @property
    def drops(self) -> int | None:
        """Packets and entries that connection tracking dropped since the node's start."""
        if self.conntrack is None:
            return None
        return sum(int(cpu.counters.get(name, 0)) for cpu in self.conntrack.cpus for name in _DROPS)

    @property
    def fill(self) -> float | None:
        """Of the connection-tracking table, 0 to 1."""
        if self.conntrack is None or not self.conntrack.limit:
            return None
        return self.conntrack.entries / self.conntrack.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Of a cluster."""

    client: str
    """This program's version."""
    nodes: tuple[NodeStatus, ...]

    @property
    def versions(self) -> dict[str, int]:
        """Agents' versions, and how many of each."""
        found: dict[str, int] = {}
        for one in self.nodes:
            if one.info is not None:
                found[one.info.version] = found.get(one.info.version, 0) + 1
        return found

    @property
    def whole(self) -> bool:
        return bool(self.nodes) and not any(one.problems for one in self.nodes)


def read_status(fleet: Fleet, names: Iterable[str], client: str) -> Reading:
    """Of the nodes of these names, in their order."""
    listed = list(names)
    with ThreadPoolExecutor(min(_AT_ONCE, max(1, len(listed)))) as pool:
        return Reading(
            client=client, nodes=tuple(pool.map(lambda n: _one(fleet, n, client), listed))
        )


def _one(fleet: Fleet, node: str, client: str) -> NodeStatus:
    error = fleet.failure(node)
    if error is not None:
        return NodeStatus(node=node, problems=(error.message,))
    how = fleet.agent(node).how
    problems: list[str] = []
    started = time.time()
    info: Any = None
    stats: Any = None
    clock, clock_error = None, 0.0
    try:
        info = fleet.call(node, "GetInfo", pb.GetInfoRequest())
        ended = time.time()
        clock, clock_error = info.now - (started + ended) / 2, (ended - started) / 2
        problems += _of_info(info, client)
        if abs(clock) - clock_error > _CLOCK_SECONDS:
            way = "ahead of" if clock > 0 else "behind"
            problems.append(f"its clock is {abs(clock):.1f} s {way} this machine's")
    except GketraceError as failed:
        problems.append(failed.message)
    try:
        stats = fleet.call(node, "GetConntrackStats", pb.GetConntrackStatsRequest(target=_HOST))
    except GketraceError as failed:
        problems.append(f"connection tracking is not seen: {failed.message}")
    found = NodeStatus(
        node=node,
        how=how,
        info=info,
        conntrack=stats,
        clock=clock,
        clock_error=clock_error,
    )
    if found.fill is not None and found.fill > _FULL:
        problems.append(f"its connection-tracking table is {found.fill:.0%} full")
    return replace(found, problems=tuple(problems))


def _of_info(info: pb.GetInfoReply, client: str) -> list[str]:
    problems = []
    if info.version != client:
        problems.append(f"its agent is of version {info.version}, this program of {client}")
    if info.data_plane in ("", "unknown", "dataplane-v2"):
        name = info.data_plane or "unknown"
        problems.append(f"data plane {name}: {info.data_plane_reason or 'no reason given'}")
    problems += [
        f"{rules.backend} rules{f' of IPv{rules.family}' if rules.family else ''} are not seen:"
        f" {rules.unavailable}"
        for rules in info.rulesets
        if rules.unavailable
    ]
    problems += [f"{one.what} is not seen: {one.why}" for one in info.missing]
    if not info.runtime:
        problems.append("no container runtime answers: pods are found by their cgroups only")
    return problems
