"""What the nodes' agents read, for findings: all nodes at the same time.

Each node is asked once for its namespaces (Snapshot), then for connections of its own namespace up
to a bound, and at the end for the connection-tracking statistics once more: what rose is rising.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from gketrace.conntrack import ConntrackEntry
from gketrace.errors import GketraceError, ParseError
from gketrace.findings.world import Sight, TableState
from gketrace.ruleset import Ruleset
from gketrace.snapshot import Maybe, NetnsSnapshot, Unavailable
from gketrace.trace import Missing
from gketrace_cli.conntrack_reading import Place, Reading
from gketrace_cli.podref import pod_ref
from gketrace_proto.codec import snapshot_from_proto
from gketrace_proto.v1alpha1 import agent_pb2 as pb

if TYPE_CHECKING:
    from gketrace.objects import Pod
    from gketrace_cli.agents import Fleet
    from gketrace_cli.session import Session

__all__ = ["NodeReading", "Sights", "make_rulesets", "read_sights"]

CONNECTIONS: Final = 20_000
"""Connections of each node that are looked at."""
_HOST: Final = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sights:
    """By node, and what was not seen."""

    by_node: Mapping[str, Sight]
    missing: tuple[Missing, ...]


@dataclass(slots=True)
class NodeReading:
    """One node's Snapshot replies, put together as they come."""

    node: str
    snapshots: dict[str, NetnsSnapshot] = field(default_factory=dict)
    """Pod, or "" for the node itself → its snapshot, without rules."""
    texts: dict[str, dict[tuple[str, int, str, str], pb.GetRulesReply]] = field(
        default_factory=dict
    )
    absent: dict[str, str] = field(default_factory=dict)
    handlers: dict[str, str] = field(default_factory=dict)
    table: Maybe[TableState] = field(default_factory=lambda: Unavailable(reason="not sent"))
    _last: str = _HOST

    def take(self, reply: pb.SnapshotReply) -> None:
        """One reply.  Raises `GketraceError` for what this side cannot read."""
        pod = f"{reply.pod.namespace}/{reply.pod.name}" if reply.HasField("pod") else _HOST
        if reply.unavailable:
            self.absent[pod] = reply.unavailable
        elif reply.HasField("snapshot"):
            self._last = pod
            self.snapshots[pod] = snapshot_from_proto(reply.snapshot)
            if reply.runtime_handler not in ("", "runc"):
                self.handlers[pod] = reply.runtime_handler
            if reply.HasField("conntrack"):
                self.table = table_state(reply.conntrack)
            elif why := reply.snapshot.unavailable.get("conntrack"):
                self.table = Unavailable(reason=why)
        elif reply.HasField("rules"):
            rules = reply.rules
            key = (rules.backend, rules.family, rules.table, rules.unavailable)
            known = self.texts.setdefault(self._last, {})
            if key in known:
                known[key].text += rules.text
            else:
                known[key] = rules

    def sight(self, info: Any) -> Sight:
        """Raises: `GketraceError` when the node's own namespace did not come."""
        if _HOST not in self.snapshots:
            raise GketraceError(f"node {self.node} sent no snapshot of itself")
        whole: dict[str, NetnsSnapshot] = {
            pod: replace(shot, rulesets=make_rulesets(self.texts.get(pod, {}).values()))
            for pod, shot in self.snapshots.items()
        }
        pods: dict[str, Maybe[NetnsSnapshot]] = {
            pod: shot for pod, shot in whole.items() if pod != _HOST
        }
        pods |= {pod: Unavailable(reason=why) for pod, why in self.absent.items()}
        return Sight(
            node=self.node,
            host=whole[_HOST],
            pods=pods,
            handlers=self.handlers,
            plane=info.data_plane if info is not None else "",
            plane_reason=info.data_plane_reason if info is not None else "",
            table=self.table,
        )


def make_rulesets(texts: Iterable[pb.GetRulesReply]) -> tuple[Maybe[Ruleset], ...]:
    """Rule sets as they were sent → as walks read them."""
    from gketrace.ruleset.iptables_save import parse_iptables_save
    from gketrace.ruleset.nft_json import parse_nft_json

    made: list[Maybe[Ruleset]] = []
    for one in texts:
        if one.unavailable:
            made.append(Unavailable(reason=one.unavailable))
            continue
        try:
            if one.backend == "nftables":
                tables = parse_nft_json(one.text, source=one.source, taken_at=one.taken_at)
                made += tables.rulesets
                made += [Unavailable(reason=why) for why in tables.unmodelled]
            else:
                made.append(
                    parse_iptables_save(
                        one.text,
                        source=one.source,
                        backend=one.backend,
                        family=one.family,
                        taken_at=one.taken_at,
                        empty_ok=True,
                    )
                )
        except ParseError as error:
            made.append(Unavailable(reason=str(error)))
    return tuple(made)


def table_state(stats: pb.GetConntrackStatsReply) -> TableState:
    """The statistics of all CPUs, added up."""
    counters: dict[str, int] = {}
    for cpu in stats.cpus:
        for name, count in cpu.counters.items():
            counters[name] = counters.get(name, 0) + count
    return TableState(entries=stats.entries, limit=stats.limit, counters=counters)


def read_sights(
    session: Session,
    pods: Mapping[str, Sequence[Pod]],
    *,
    connections: int = CONNECTIONS,
) -> Sights:
    """The nodes named in `pods`, each with those of its pods.

    Raises: `GketraceError` when no node at all could be read.
    """
    fleet = session.fleet
    fleet.greet(pods)
    missing: list[Missing] = [*fleet.missing(pods)]
    there = [node for node in pods if node in fleet.nodes]
    readings = {node: NodeReading(node) for node in there}
    broken: dict[str, GketraceError] = {}
    requests = {
        node: (
            node,
            "Snapshot",
            pb.SnapshotRequest(pods=[pod_ref(pod) for pod in pods[node] if not pod.host_network]),
        )
        for node in there
    }
    for node, reply in fleet.stream(requests):
        if isinstance(reply, GketraceError):
            broken[node] = reply
        elif reply is not None and node not in broken:
            try:
                readings[node].take(reply)
            except GketraceError as error:  # a newer agent: said, like all that is not understood
                broken[node] = error
    if broken and len(broken) == len(readings):
        raise next(iter(broken.values()))
    missing += [Missing(what="agent", why=e.message, node=node) for node, e in broken.items()]
    sights = {
        node: reading.sight(fleet.agent(node).info)
        for node, reading in readings.items()
        if node not in broken
    }
    entries, gaps = _connections(fleet, tuple(sights), connections)
    missing += gaps
    later = _statistics(fleet, tuple(sights))
    for node, sight in sights.items():
        missing += _gaps(sight)
        sights[node] = replace(
            sight,
            entries=entries.get(node, Unavailable(reason="the connections could not be read")),
            table_later=later[node],
        )
    return Sights(by_node=sights, missing=tuple(dict.fromkeys(missing)))


def _gaps(sight: Sight) -> list[Missing]:
    """What the agent could not read."""
    gaps = [*sight.host.missing]
    for pod, shot in sight.pods.items():
        if isinstance(shot, Unavailable):
            gaps.append(Missing(what="pod", why=shot.reason, node=sight.node, netns=f"pod {pod}"))
        else:
            gaps += shot.missing
    return gaps


def _connections(
    fleet: Fleet, nodes: tuple[str, ...], limit: int
) -> tuple[dict[str, tuple[ConntrackEntry, ...]], tuple[Missing, ...]]:
    places = [Place(node=node) for node in nodes]
    reading = Reading(
        fleet=fleet,
        places=places,
        filters={place: (pb.ConntrackFilter(),) for place in places},
        limit=limit,
    )
    found: dict[str, list[ConntrackEntry]] = {node: [] for node in nodes}
    try:
        for place, entry in reading.entries():
            found[place.node].append(entry)
    except GketraceError as error:
        return {}, tuple(Missing(what="conntrack", why=error.message, node=n) for n in nodes)
    failed = {end.place.node for end in reading.ends.values() if end.error is not None}
    cut = tuple(
        Missing(
            what="conntrack",
            why=f"only {limit} connections were looked at",
            node=end.place.node,
        )
        for end in reading.ends.values()
        if end.received >= limit
    )
    whole = {node: tuple(entries) for node, entries in found.items() if node not in failed}
    return whole, (*reading.missing, *cut)


def _statistics(fleet: Fleet, nodes: tuple[str, ...]) -> dict[str, Maybe[TableState]]:
    request = pb.GetConntrackStatsRequest(target=pb.Target(host=True))
    answers = fleet.ask({node: (node, "GetConntrackStats", request) for node in nodes})
    return {
        node: Unavailable(reason=answer.message)
        if isinstance(answer, GketraceError)
        else table_state(answer)
        for node, answer in answers.items()
    }
