"""All nodes' tables → connections, with names, and what is doubtful about each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, Final

from gketrace.connections import Connection, Doubt, PlaceEntries, join_connections
from gketrace.connections import Place as JoinPlace
from gketrace.conntrack import ConntrackEntry
from gketrace.conntrack_records import Record, records_from_bytes
from gketrace.errors import GketraceError
from gketrace.packet import IPAddress, Protocol
from gketrace.trace import Missing
from gketrace_cli.addressbook import AddressBook
from gketrace_cli.agreement import Agreement, Comparison, compare_entries
from gketrace_cli.conntrack_filter import door_filters, endpoint_filters
from gketrace_cli.conntrack_reading import RECORDS, Place, Reading
from gketrace_cli.conntrack_show import read_book
from gketrace_cli.liveness import Standing, door_of, judge_entry
from gketrace_proto.codec import decode
from gketrace_proto.v1alpha1 import agent_pb2 as pb

if TYPE_CHECKING:
    from gketrace.objects import Endpoint, Pod, Service
    from gketrace_cli.session import Session

__all__ = ["Joined", "JoinedReading", "Modelled", "read_connections"]

_DOUBTS: Final = {
    Doubt.STATE: "its nodes disagree: one has it open, another closed",
    Doubt.REPLIES: "its nodes disagree: one has seen answers, another none",
    Doubt.REVERSED: "an answer made one of its entries: an earlier entry was lost there",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Modelled:
    """How a connection stands to the rules: of its entries, the one that agrees least."""

    node: str
    comparison: Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """One connection."""

    connection: Connection
    client: str
    """Whose address it begins at; empty: nobody's in the cluster."""
    door: str
    end: str
    strangers: tuple[str, str, str]
    """What those of the three are that are nobody's (`AddressBook.stranger`)."""
    standing: Standing | None
    """Beside its Service's EndpointSlices; None: no Service was asked for."""
    remarks: tuple[str, ...]
    """What is doubtful, one sentence each."""
    age: float | None = None
    """Seconds since its oldest entry was made, by that node's clock; None: not known."""
    model: Modelled | None = None
    """Its entries beside the rules; None: no Service was asked for, or it is over."""

    @property
    def breaks(self) -> bool:
        stale = self.standing in (Standing.STALE, Standing.UNTRANSLATED)
        return stale and self.connection.first.protocol == Protocol.UDP


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedReading:
    """What was read."""

    connections: tuple[Joined, ...]
    nodes: tuple[str, ...]
    missing: tuple[Missing, ...]
    no_accounting: tuple[str, ...]
    """Nodes on which packets and bytes are not known."""
    no_timestamps: tuple[str, ...] = ()
    """Nodes on which ages are not known."""


def read_connections(
    session: Session,
    places: Sequence[Place],
    gaps: tuple[Missing, ...],
    *,
    service: Service | None,
    endpoints: Sequence[Endpoint],
    pod: Pod | None,
    clients: IPv4Network | IPv6Network | None,
    all_pods: bool = False,
) -> JoinedReading:
    """`all_pods`: also the tables of all pods' own network namespaces.

    Raises: `GketraceError` when no table at all can be read."""
    node_ips = [
        str(ip)
        for node in session.nodes
        for ip in (
            *node.internal_ips,
            *node.external_ips,
            *(seen.address for seen in session.fleet.addresses(node.name)),
        )
    ]
    filters: tuple[pb.ConntrackFilter, ...] = (pb.ConntrackFilter(),)
    if service is not None:
        doors = door_filters(service, node_ips)
        first = Reading(fleet=session.fleet, places=places, filters=dict.fromkeys(places, doors))
        # Behind the translation an entry has only the endpoint, which may be one that is gone.
        ends = dict.fromkeys(
            (str(entry.reply.src), entry.reply.sport or 0, entry.orig.protocol)
            for _, entry in first.entries()
            if entry.dst_nat
        )
        gone = tuple(
            pb.ConntrackFilter(reply_src=ip, reply_sport=port, protocol=protocol)
            for ip, port, protocol in ends
        )
        filters = (*doors, *endpoint_filters(endpoints), *gone)
    if all_pods:
        of_pods, unread = _tracking_pods(session, places)
        places, gaps = [*places, *of_pods], (*gaps, *unread)
    elif pod is not None and not pod.host_network:
        places = [*places, Place(node=pod.node, pod=pod)]
    reading = Reading(fleet=session.fleet, places=places, filters=dict.fromkeys(places, filters))
    held: dict[Place, list[ConntrackEntry | Record]] = {place: [] for place in places}
    for place, reply in reading.replies(RECORDS):
        held[place] += records_from_bytes(reply.records)
        held[place] += (decode(ConntrackEntry, one) for one in reply.entries)
    tables = [
        PlaceEntries(
            place=JoinPlace(node=place.node, pod=place.pod.key if place.pod else ""),
            entries=held[place],
            complete=not end.missing(0) and not end.not_tracked,
        )
        for place in places
        if (end := reading.ends.get(place)) is not None
    ]
    book, unnamed = read_book(session)
    owners = _owners(session)
    joined = []
    for one in join_connections(tables, lambda address: owners.get(str(address), "")):
        if clients is not None and one.first.src not in clients:
            continue
        if pod is not None and not _touches(one, set(pod.pod_ips)):
            continue
        made = _joined(one, book, service, endpoints, node_ips)
        if made is not None:
            joined.append(made)
    clocks = {
        JoinPlace(node=place.node, pod=place.pod.key if place.pod else ""): end.summary.at
        for place, end in reading.ends.items()
        if end.summary is not None
    }
    joined = [replace(one, age=_age(one.connection, clocks)) for one in joined]
    if service is not None:
        session.progress.say("asking what the rules would do now")
        joined = _with_model(session, joined)
    joined.sort(key=lambda one: (one.connection.first.protocol, _key(one.connection)))
    summaries = {
        place.node: end.summary
        for place in places
        if place.pod is None
        and (end := reading.ends.get(place)) is not None
        and end.summary is not None
    }
    return JoinedReading(
        connections=tuple(joined),
        nodes=tuple(place.node for place in places if place.pod is None),
        missing=(*gaps, *reading.missing, *unnamed),
        no_accounting=tuple(node for node, said in summaries.items() if not said.accounting),
        no_timestamps=tuple(node for node, said in summaries.items() if not said.timestamps),
    )


def _age(connection: Connection, clocks: Mapping[JoinPlace, float]) -> float | None:
    """By the clock of the node that made each entry."""
    ages = [
        clocks[half.place] - half.entry.started / 1e9
        for half in connection.halves
        if half.entry.started is not None and half.place in clocks
    ]
    return max(ages, default=None)


def _with_model(session: Session, joined: Sequence[Joined]) -> list[Joined]:
    """Each live connection's entries in nodes' own tables, held against those nodes' rules."""
    asked = [
        (number, half.place.node, half.entry)
        for number, one in enumerate(joined)
        if one.standing is not Standing.OVER
        for half in one.connection.halves
        if not half.place.pod and not half.reversed
    ]
    entries = [(node, entry) for _, node, entry in asked]
    compared = compare_entries(session, entries, at_most=_WALKS)
    found: dict[int, Modelled] = {}
    for (number, node, _), comparison in zip(asked, compared, strict=True):
        known = found.get(number)
        if known is None or _SEVERITY[comparison.agreement] > _SEVERITY[known.comparison.agreement]:
            found[number] = Modelled(node=node, comparison=comparison)
    made = []
    for number, one in enumerate(joined):
        model = found.get(number)
        remarks = one.remarks
        if model is not None and model.comparison.why:
            agreement = model.comparison.agreement.value
            if model.comparison.differs:
                agreement = f"differs from the rules of {model.node}"
            remarks = (*remarks, f"{agreement}: {model.comparison.why}")
        made.append(replace(one, model=model, remarks=remarks))
    return made


_WALKS: Final = 200
"""Of each node, at most: some milliseconds each."""
_SEVERITY: Final = {
    Agreement.AGREES: 0,
    Agreement.UNCOMPARED: 1,
    Agreement.UNKNOWN: 2,
    Agreement.SOURCE: 3,
    Agreement.REFUSED: 4,
    Agreement.DESTINATION: 5,
}


def _tracking_pods(
    session: Session, places: Sequence[Place]
) -> tuple[list[Place], tuple[Missing, ...]]:
    """The pods of these nodes in whose own namespace there are entries; most track nothing."""
    asked = [
        Place(node=place.node, pod=pod)
        for place in places
        for pod in session.pods.of_node(place.node)
        if not pod.host_network
    ]
    calls = {
        place: (place.node, "GetConntrackStats", pb.GetConntrackStatsRequest(target=place.target))
        for place in asked
    }
    session.progress.say(f"asking which of {len(asked)} pods track connections")
    found: list[Place] = []
    missing: list[Missing] = list(session.pods.missing)
    for place, answer in session.fleet.ask(calls).items():
        if isinstance(answer, GketraceError):
            why = answer.message
            missing.append(Missing(what="conntrack", why=why, node=place.node, netns=place.netns))
        elif answer.entries:
            found.append(place)
    return found, tuple(missing)


def _owners(session: Session) -> dict[str, str]:
    """Address → node, for nodes and the pods that are known."""
    owners = {ip: pod.node for pod in session.pods.known for ip in pod.pod_ips}
    for node in session.nodes:
        owners.update(dict.fromkeys((*node.internal_ips, *node.external_ips), node.name))
        seen = session.fleet.addresses(node.name)
        owners.update((str(one.address), node.name) for one in seen)
    return owners


def _touches(connection: Connection, addresses: set[str]) -> bool:
    ends = (connection.first.src, connection.first.dst, connection.last.src, connection.last.dst)
    return any(str(end) in addresses for end in ends)


def _joined(
    one: Connection,
    book: AddressBook,
    service: Service | None,
    endpoints: Sequence[Endpoint],
    node_ips: Iterable[str],
) -> Joined | None:
    """None: it is none of the Service's."""
    remarks = [_DOUBTS[doubt] for doubt in one.doubts]
    remarks += [f"one-sided: {unseen.node} has no entry of it" for unseen in one.unseen]
    if one.contested:
        remarks.append("other entries could belong to it just as well")
    standing = None
    if service is not None:
        doors = [
            (half.entry, port)
            for half in one.halves
            if (port := door_of(service, half.entry, node_ips)) is not None
        ]
        if not doors:
            return None
        # Before the node that translates, an entry has the front door and no translation.
        entry, port = next((d for d in doors if d[0].dst_nat), doors[-1])
        standing, why = judge_entry(entry, port, endpoints)
        if why:
            owner = book.host(entry.reply.src) if standing is Standing.STALE else ""
            now = f"; the address is {owner}'s now" if owner else ""
            remarks.insert(0, f"{standing.value}: {why}{now}")
    first, last = one.first, one.last
    ends = one.halves[0].place, one.halves[-1].place
    client = _itself(first.src, ends[0]) or book.host(first.src)
    door = _itself(first.dst, ends[0]) or book.door(first.dst, first.dport, first.protocol)
    end = _itself(last.dst, ends[1]) or book.host(last.dst)
    return Joined(
        connection=one,
        client=client,
        door=door,
        end=end,
        strangers=(
            "" if client else book.stranger(first.src),
            "" if door else book.stranger(first.dst),
            "" if end else book.stranger(last.dst),
        ),
        standing=standing,
        remarks=tuple(remarks),
    )


def _itself(address: IPAddress, place: JoinPlace) -> str:
    """Whose loopback address it is that an entry of `place` has; empty: it is none."""
    if not address.is_loopback:
        return ""
    return f"pod/{place.pod}" if place.pod else f"node/{place.node}"


def _key(connection: Connection) -> tuple[int, int, int, int, int]:
    first = connection.first
    ports = first.dport or 0, first.sport or 0
    return first.src.version, int(first.dst), ports[0], int(first.src), ports[1]
