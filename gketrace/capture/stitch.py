"""Packets of many taps → connections: each printed as one, through every rewrite.

``segments``       what of a packet is the same at every hop
``conversations``  what each tap saw, and which of it is one connection
``passages``       each packet's way over the taps
``clock``          the nodes' clocks against each other

Here they are put together, with what a plan knows: which rule rewrites between two taps, and where
packets should have been seen next.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from gketrace.capture.clock import Clocks
from gketrace.capture.conversations import (
    Conversation,
    Evidence,
    Joined,
    Tracked,
    conversations,
    join_conversations,
)
from gketrace.capture.layers import address
from gketrace.capture.packets import CapturedPacket, Direction, Tap
from gketrace.capture.passages import GRACE, Flow, Station, Unit, Window, follow
from gketrace.capture.plan import Crossing, Rewrite, Route, Spot
from gketrace.capture.segments import (
    ACK,
    FIN,
    RST,
    SYN,
    ErrorSighting,
    FlowKey,
    Sighting,
    reverse_key,
    sightings,
    tuple5_of,
)
from gketrace.packet import Packet, Protocol, Tuple5

__all__ = [
    "Ending",
    "IcmpError",
    "StitchedConnection",
    "Stitched",
    "stitch_packets",
]

_UNKNOWN_SLACK: Final = 5 * 10**9
"""Nanoseconds between clocks that nothing is known of."""
_INITIAL_TTLS: Final = frozenset({64, 128, 255})


@dataclass(frozen=True, slots=True, kw_only=True)
class IcmpError:
    """An ICMP error about a connection."""

    about: Tuple5
    """The packet that it quotes, as it looked where the error was first seen."""
    source: str
    """Who sent it, as first seen."""
    type: int
    code: int
    rest: int
    family: int
    seen: tuple[tuple[Tap, Direction, int, int], ...]
    """Tap, direction, time and packet number, in time order."""

    @property
    def mtu(self) -> int | None:
        """Of "fragmentation needed" and "packet too big"."""
        if self.family == 6:
            return self.rest if self.type == 2 else None
        return self.rest & 0xFFFF if (self.type, self.code) == (3, 4) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """A FIN or RST, and who sent it."""

    reset: bool
    by_client: bool
    """Which direction it goes."""
    station: Station
    """Where it was first seen."""
    early: bool
    """There are stations before, which did not see it: the node of `station` made it, unless the
    capture lost it there."""
    ttl: int
    time: int


@dataclass(slots=True, kw_only=True, eq=False)
class StitchedConnection:
    """One connection."""

    there: Flow
    back: Flow
    client_known: bool
    evidence: frozenset[Evidence]
    contested: bool
    errors: tuple[IcmpError, ...] = ()
    route: Route | None = None
    expected: tuple[Crossing, ...] = ()
    """Where its packets should have passed next, by the plan, and did not at all, though the taps
    there were open from its beginning until after its end and lost nothing."""
    expected_back: tuple[Crossing, ...] = ()
    watched: frozenset[Spot] = frozenset()
    """Taps that were open from its beginning until after its end, and lost nothing."""
    entries: tuple[Tracked, ...] = ()
    """Connection-tracking entries that translate it."""
    ended_early: bool = False
    """The capture ended so soon after its last packet that an answer could still come."""

    @property
    def first(self) -> Tuple5:
        """As the client sends it, as far out as was captured."""
        return tuple5_of(self._flows()[0])

    @property
    def last(self) -> Tuple5:
        """As it arrives, as far in as was captured."""
        return tuple5_of(self._flows()[1])

    def _flows(self) -> tuple[FlowKey, FlowKey]:
        if self.there.stations:
            return self.there.stations[0].flow, self.there.stations[-1].flow
        return reverse_key(self.back.stations[-1].flow), reverse_key(self.back.stations[0].flow)

    @property
    def protocol(self) -> int:
        return self._flows()[0][0]

    @property
    def begin(self) -> int:
        return min(unit.begin for flow in (self.there, self.back) for unit in flow.units)

    @property
    def end(self) -> int:
        flows = (self.there, self.back)
        return max(unit.last.time for flow in flows for unit in flow.units)

    @property
    def opening(self) -> Unit | None:
        """The first SYN."""
        syns = (u for u in self.there.units if u.first.flags & (SYN | ACK) == SYN)
        return next(syns, None)

    @property
    def answer(self) -> Unit | None:
        """The SYN's answer; without TCP, the first packet back."""
        if self.protocol != Protocol.TCP:
            return self.back.units[0] if self.back.units else None
        return next((u for u in self.back.units if u.first.flags & SYN), None)

    @property
    def answered_in(self) -> int | None:
        """Nanoseconds from the first packet to its answer, where both are seen first."""
        begun = self.opening or (self.there.units[0] if self.there.units else None)
        answer = self.answer
        if begun is None or answer is None or not self.there.stations:
            return None
        outermost = self.there.stations[0]
        for passage in reversed(answer.passages):
            if self.back.stations[passage.station].tap == outermost.tap:
                return passage.time - begun.begin
        return None

    @property
    def endings(self) -> tuple[Ending, ...]:
        """FINs and RSTs that are not repeated ones, in time order."""
        found: list[Ending] = []
        for flow, by_client in ((self.there, True), (self.back, False)):
            fins: set[int] = set()
            for unit in flow.units:
                one = unit.first
                if not one.flags & (FIN | RST) or (one.flags & FIN and one.end in fins):
                    continue
                fins.add(one.end)
                place = unit.passages[0].station
                found.append(
                    Ending(
                        reset=bool(one.flags & RST),
                        by_client=by_client,
                        station=flow.stations[place],
                        early=place > 0,
                        ttl=one.ttl,
                        time=unit.begin,
                    )
                )
        return tuple(sorted(found, key=lambda ending: ending.time))

    def rewrites(self, flow: Flow, station: int) -> tuple[Rewrite, ...]:
        """The rules that rewrote packets between this station and the one before, by the plan;
        empty: there is no plan, or it expects another rewrite than was seen."""
        if self.route is None or station == 0:
            return ()
        here, before = flow.stations[station], flow.stations[station - 1]
        if here.flow == before.flow:
            return ()
        way = self.route.there if flow is self.there else self.route.back
        places = [_place(way, one) for one in (before, here)]
        if None in places:
            return ()
        first, last = places
        assert first is not None
        assert last is not None
        done = tuple(r for crossing in way[first + 1 : last + 1] for r in crossing.rewrites)
        if done or way[last].also is None:
            return done
        # With br_netfilter a bridge's own device has a packet behind PREROUTING already.
        behind = way[last + 1].rewrites if last + 1 < len(way) else ()
        return tuple(
            r for r in behind if r.kind != "SNAT" and r.after.dst == _packet(here.flow).dst
        )

    def made_at(self, ending: Ending) -> bool:
        """Whether its node made it, and did not forward it: by its TTL no router has had it, and
        the taps before, which all were open, have not seen it."""
        if ending.ttl not in _INITIAL_TTLS:
            return False
        if ending.early:
            return True
        way = (
            () if self.route is None else self.route.there if ending.by_client else self.route.back
        )
        place = _place(way, ending.station)
        return place is not None and all(c.spot in self.watched for c in way[:place])


@dataclass(frozen=True, slots=True, kw_only=True)
class Stitched:
    """All connections, in the order of their first packets."""

    connections: tuple[StitchedConnection, ...]
    stray_errors: tuple[IcmpError, ...]
    """ICMP errors about packets that were not captured."""
    others: int
    """Packets that belong to no conversation: ARP, later fragments, other link layers."""


def stitch_packets(
    packets: Sequence[CapturedPacket],
    *,
    entries: Iterable[Tracked] = (),
    routes: Sequence[Route] = (),
    windows: Mapping[Tap, Window] | None = None,
    clocks: Clocks | None = None,
) -> Stitched:
    """`packets` have corrected times; `clocks` says how good the correction is (None: all are
    by one clock).  `entries` are connection-tracking entries, `routes` a plan's."""
    seen, errors, others = sightings(packets)
    seen.sort(key=lambda one: one.time)
    slack = _slack(clocks)
    end = max((one.time for one in seen), default=0)
    made: list[StitchedConnection] = []
    for joined in join_conversations(conversations(seen), entries):
        made.append(_connection(joined, slack, windows or {}, end, routes))
    made.sort(key=lambda connection: connection.begin)
    stray = _attach(made, errors)
    return Stitched(connections=tuple(made), stray_errors=tuple(stray), others=others)


def _slack(clocks: Clocks | None) -> Callable[[str, str], int]:
    if clocks is None:
        return lambda _one, _other: 0

    def between(one: str, other: str) -> int:
        width = clocks.width(one, other)
        return _UNKNOWN_SLACK if width is None else width

    return between


def _connection(
    joined: Joined,
    slack: Callable[[str, str], int],
    windows: Mapping[Tap, Window],
    end: int,
    routes: Sequence[Route],
) -> StitchedConnection:
    members = _oriented(joined.members)
    there: list[Sighting] = []
    back: list[Sighting] = []
    for member in members:
        for one in member.sightings:
            # On a loopback, or where it meets itself, a tuple may be its own answer's.
            (there if one.flow == member.client else back).append(one)
    there.sort(key=lambda one: one.time)
    back.sort(key=lambda one: one.time)
    made = StitchedConnection(
        there=follow(there, slack=slack, windows=windows, end=end),
        back=follow(back, slack=slack, windows=windows, end=end),
        client_known=any(member.client_known for member in joined.members),
        evidence=joined.evidence,
        contested=joined.contested,
        entries=joined.entries,
    )
    _expect(made, routes, windows)
    ends = [windows[tap].end for tap in _taps(made) if tap in windows] or [end]
    made.ended_early = made.end + GRACE > min(ends)
    return made


def _taps(connection: StitchedConnection) -> set[Tap]:
    return {s.tap for flow in (connection.there, connection.back) for s in flow.stations}


def _oriented(members: Sequence[Conversation]) -> list[Conversation]:
    """All with the client on the same side: those that did not see the beginning follow those that
    did, by their tuples or by a packet that both saw."""
    sure = [member for member in members if member.client_known] or [members[0]]
    forth = {member.client for member in sure}
    keys = {one.key: one.flow == member.client for member in sure for one in member.sightings}
    for member in members:
        if any(member is one for one in sure):
            continue
        if member.client in forth:
            continue
        if reverse_key(member.client) in forth:
            member.client = reverse_key(member.client)
            continue
        shared = (
            keys[one.key] == (one.flow == member.client)
            for one in member.sightings
            if one.key in keys
        )
        if not next(shared, True):
            member.client = reverse_key(member.client)
    return list(members)


def _place(way: Sequence[Crossing], station: Station) -> int | None:
    """Which crossing of a route a station is."""
    spot = _spot(station.tap)
    packet = _packet(station.flow)
    for number, crossing in enumerate(way):
        if crossing.spot != spot or crossing.direction is not station.direction:
            continue
        if crossing.term.takes(packet, back=crossing.back):
            return number
        if crossing.also is not None and crossing.also.takes(packet, back=crossing.back):
            return number
    return None


def _spot(tap: Tap) -> Spot:
    return Spot(node=tap.node, pod=tap.pod, interface=tap.interface)


def _packet(flow: FlowKey) -> Packet:
    half = tuple5_of(flow)
    return Packet(
        src=half.src, dst=half.dst, protocol=half.protocol, sport=half.sport, dport=half.dport
    )


def _expect(
    made: StitchedConnection, routes: Sequence[Route], windows: Mapping[Tap, Window]
) -> None:
    """The plan's route that fits most stations, and what it expects after the last of them."""
    best: tuple[int, Route] | None = None
    for route in routes:
        places = [_place(route.there, station) for station in made.there.stations]
        places += [_place(route.back, station) for station in made.back.stations]
        score = sum(place is not None for place in places)
        if score and (best is None or score > best[0]):
            best = score, route
    if best is None:
        return
    made.route = best[1]
    made.watched = frozenset(
        _spot(tap)
        for tap, window in windows.items()
        if window.complete and window.begin <= made.begin and made.end + GRACE <= window.end
    )
    made.expected = _rest(best[1].there, made.there, made.watched)
    made.expected_back = _rest(best[1].back, made.back, made.watched)


def _rest(way: tuple[Crossing, ...], flow: Flow, watched: Collection[Spot]) -> tuple[Crossing, ...]:
    places = [place for station in flow.stations if (place := _place(way, station)) is not None]
    rest = way[max(places) + 1 :] if places else ()
    return tuple(crossing for crossing in rest if crossing.spot in watched)


def _attach(made: Sequence[StitchedConnection], errors: Sequence[ErrorSighting]) -> list[IcmpError]:
    """Puts ICMP errors to the connections that they are about; → the others."""
    groups: dict[tuple[int, ...], list[ErrorSighting]] = {}
    for error in sorted(errors, key=lambda one: one.time):
        groups.setdefault(error.key, []).append(error)
    owners: dict[FlowKey, list[StitchedConnection]] = {}
    for connection in made:
        for flow in (connection.there, connection.back):
            for station in flow.stations:
                owners.setdefault(station.flow, []).append(connection)
    stray: list[IcmpError] = []
    for seen in groups.values():
        first = seen[0]
        found_error = IcmpError(
            about=tuple5_of(first.quoted),
            source=str(address(first.sender)),
            type=first.type,
            code=first.code,
            rest=first.rest,
            family=4 if len(first.sender) == 4 else 6,
            seen=tuple((one.tap, one.direction, one.time, one.number) for one in seen),
        )
        found = [c for one in seen for c in owners.get(one.quoted, ()) if c.begin <= first.time]
        if found:
            owner = max(found, key=lambda connection: connection.begin)
            owner.errors = (*owner.errors, found_error)
        else:
            stray.append(found_error)
    return stray
