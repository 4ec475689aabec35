"""Live connections of a Service against its EndpointSlices: is the endpoint that a connection is
pinned to still one of the Service's?  Pure, but for `read_live`.

Connection tracking decides before any rule, so an entry outlives the rule that made it.  kube-proxy
deletes UDP entries of endpoints that are gone (pkg/proxy/conntrack, CleanStaleEntries); where it
did not, each later datagram of that client still goes to the old address.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from gketrace.conntrack import ConntrackEntry
from gketrace.errors import GketraceError
from gketrace.objects import Endpoint, Service, ServicePort
from gketrace.packet import Protocol, protocol_number
from gketrace_cli.agreement import Agreement, Comparison
from gketrace_cli.conntrack_filter import door_filters

if TYPE_CHECKING:
    from gketrace_cli.conntrack_reading import Place
    from gketrace_cli.session import Session

__all__ = [
    "Live",
    "LiveReading",
    "Standing",
    "door_of",
    "judge_entry",
    "live_document",
    "read_live",
]

_OVER: Final = frozenset({"CLOSE", "TIME_WAIT", "LAST_ACK", "CLOSED"})
_AT_MOST: Final = 10_000
"""Entries of one node that `read_live` looks at."""


class Standing(str, Enum):
    """What an entry's endpoint is now."""

    CURRENT = "current"
    """In an EndpointSlice, and ready."""
    DRAINING = "draining"
    """In an EndpointSlice, but not ready: new connections go elsewhere."""
    STALE = "stale"
    """In no EndpointSlice of this port: it is gone, or has moved."""
    UNTRANSLATED = "untranslated"
    """The entry has no translation: it was made when no rule led from the front door anywhere."""
    OVER = "over"
    """Closed; the entry only waits to expire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """One entry of a connection to a front door."""

    place: Place
    entry: ConntrackEntry
    standing: Standing
    why: str
    """One sentence; empty for what is as it should be."""
    comparison: Comparison | None = None
    """Beside the rules of its node; None: not asked."""
    absent_on: str = ""
    """The endpoint's node, when that has no entry of these packets."""

    @property
    def stale(self) -> bool:
        return self.standing in (Standing.STALE, Standing.UNTRANSLATED)

    @property
    def breaks(self) -> bool:
        """True: it should not be there.  A TCP connection may go on with a pod that has left the
        Service; UDP entries are kube-proxy's to delete."""
        return self.stale and self.entry.orig.protocol == Protocol.UDP


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveReading:
    """All that was found, and what was not seen."""

    found: tuple[Live, ...] = ()
    nodes: tuple[str, ...] = ()
    """Whose tables were read."""
    missing: tuple[str, ...] = ()

    @property
    def stale(self) -> tuple[Live, ...]:
        return tuple(one for one in self.found if one.stale)

    @property
    def differing(self) -> tuple[Live, ...]:
        """Those that the rules of now would not make."""
        return tuple(one for one in self.found if one.comparison and one.comparison.differs)

    @property
    def one_sided(self) -> tuple[Live, ...]:
        return tuple(one for one in self.found if one.absent_on)

    def in_agreement(self, *which: Agreement) -> int:
        """How many compared as any of these."""
        return sum(1 for one in self.found if one.comparison and one.comparison.agreement in which)


def door_of(service: Service, entry: ConntrackEntry, node_ips: Iterable[str]) -> ServicePort | None:
    """The Service's port that the first packet was sent to; None: it went to none of its doors."""
    address, number = str(entry.orig.dst), entry.orig.dport
    direct = {*service.cluster_ips, *service.external_ips, *(e.ip for e in service.ingress)}
    for port in service.ports:
        if protocol_number(port.protocol) != entry.orig.protocol:
            continue
        if number == port.port and address in direct:
            return port
        if port.node_port and number == port.node_port and address in node_ips:
            return port
    return None


def judge_entry(
    entry: ConntrackEntry, port: ServicePort, endpoints: Sequence[Endpoint]
) -> tuple[Standing, str]:
    """How the entry stands to the endpoints of `port`, and why."""
    if entry.tcp_state in _OVER:
        return Standing.OVER, ""
    text = f"{entry.reply.src}:{entry.reply.sport}"
    if not entry.dst_nat:
        return (
            Standing.UNTRANSLATED,
            "it is not translated: it began when no rule led to an endpoint, and keeps to that",
        )
    same = [
        end
        for end in endpoints
        if end.port_name == port.name
        and end.protocol == port.protocol
        and end.address == str(entry.reply.src)
        and end.port in (0, entry.reply.sport)
    ]
    if not same:
        return Standing.STALE, f"its endpoint {text} is in no EndpointSlice of the Service any more"
    if not any(end.ready for end in same):
        return Standing.DRAINING, f"its endpoint {text} is not ready; new connections go elsewhere"
    return Standing.CURRENT, ""


def read_live(
    session: Session, service: Service, endpoints: Sequence[Endpoint], nodes: Sequence[str]
) -> LiveReading:
    """The entries of connections to the Service's front doors, on these nodes.  Never raises for
    what agents answer: it is in `LiveReading.missing`."""
    from gketrace_cli.conntrack_reading import Place, Reading

    addresses = {
        node.name: (
            *node.internal_ips,
            *node.external_ips,
            *(str(seen.address) for seen in session.fleet.addresses(node.name)),
        )
        for node in session.nodes
    }
    places = [Place(node=name) for name in nodes]
    filters = {place: door_filters(service, addresses[place.node]) for place in places}
    if not any(filters.values()):
        return LiveReading()
    reading = Reading(fleet=session.fleet, places=places, filters=filters, limit=_AT_MOST)
    found = []
    try:
        for place, entry in reading.entries():
            port = door_of(service, entry, addresses[place.node])
            if port is not None:
                standing, why = judge_entry(entry, port, endpoints)
                found.append(Live(place=place, entry=entry, standing=standing, why=why))
    except GketraceError as error:
        # No table at all: each with its own reason, where there is one.
        unread = tuple(map(str, sorted(reading.missing, key=str)))
        return LiveReading(missing=unread or (error.message,))
    from gketrace_cli.liveness_model import hold_against_rules, look_at_the_other_end

    found = hold_against_rules(session, look_at_the_other_end(session, found, endpoints))
    cut = [str(end.place) for end in reading.ends.values() if end.received >= _AT_MOST]
    return LiveReading(
        found=tuple(found),
        nodes=tuple(p.node for p in places if p in reading.ends and not reading.ends[p].error),
        missing=(
            *map(str, sorted(reading.missing, key=str)),
            *(f"only {_AT_MOST} connections on {place} were looked at" for place in cut),
        ),
    )


def live_document(reading: LiveReading) -> dict[str, Any]:
    """``liveConnections``: counts, and each entry that is not as it should be."""
    counts = dict.fromkeys((standing.value for standing in Standing), 0)
    for one in reading.found:
        counts[one.standing.value] += 1
    agreements = {one.value: reading.in_agreement(one) for one in Agreement}
    return {
        "nodes": list(reading.nodes),
        "missing": list(reading.missing),
        "counts": counts,
        "agreement": agreements,
        "differing": [
            {
                "node": one.place.node,
                "agreement": one.comparison.agreement.value,
                "why": one.comparison.why,
                "entry": str(one.entry),
            }
            for one in reading.differing
            if one.comparison is not None
        ],
        "oneSided": [
            {"node": one.place.node, "absentOn": one.absent_on, "entry": str(one.entry)}
            for one in reading.one_sided
        ],
        "stale": [
            {
                "node": one.place.node,
                "standing": one.standing.value,
                "why": one.why,
                "entry": str(one.entry),
            }
            for one in reading.stale
        ],
    }
