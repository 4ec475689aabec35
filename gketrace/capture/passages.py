"""One direction of a connection: the places that its packets pass, and each packet's way.

A `Station` is a place where packets of one direction were seen with one tuple: a tap, a way over
it (in or out), and the addresses as they are there.  Stations stand in the order in which packets
pass them.  That order is not taken from clocks of different nodes: routers count the TTL down, a
packet leaves one node before it comes into the next one, and on one node there is one clock.

A `Unit` is one packet that was sent once, and its passages.  It is found again at the next station
by what NAT leaves alone (`Sighting.key`); where an offload merged or cut segments, by its range of
sequence numbers.  A packet that is found at no station before is a unit that begins there: it was
made there, or the stations before did not see it.  One that comes by a station again with a smaller
TTL is in a routing loop: it is still one packet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple, TypeAlias

from gketrace.capture.packets import Direction, Tap
from gketrace.capture.segments import FIN, RST, SYN, FlowKey, Sighting
from gketrace.packet import Protocol

__all__ = ["GRACE", "Fate", "Flow", "Passage", "Repeat", "Station", "Unit", "Window", "follow"]

Slack: TypeAlias = Callable[[str, str], int]
"""(node, node) → nanoseconds that their corrected clocks may be apart."""
_MASK: Final = 0xFFFFFFFF
_HALF: Final = 1 << 31
GRACE: Final = 10**9
"""Nanoseconds that a packet may take to the next station before it counts as lost."""
_RECENT: Final = 256
"""Units that a piece of a segment is looked for in."""


class Fate(Enum):
    """What became of a packet, as far as was captured."""

    ARRIVED = "arrived"
    """It was seen at the last station that any packet of this direction was seen at."""
    LOST = "lost"
    """It was not seen at a later station, which was captured all the time and lost nothing."""
    UNKNOWN = "unknown"
    """It was not seen at a later station; the capture ended, or lost packets there."""


class Repeat(Enum):
    """What a packet repeats."""

    NOTHING = ""
    RETRANSMISSION = "retransmission"
    REORDERED = "out of order"
    """It fills a gap, and was not seen before: it was overtaken, or the first was lost earlier."""
    KEEPALIVE = "keep-alive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """When a tap was open."""

    begin: int
    """Nanoseconds since the epoch, corrected as the packets are."""
    end: int
    complete: bool = True
    """False: the kernel dropped packets at this tap."""


class Passage(NamedTuple):
    """A unit at a station."""

    station: int
    time: int
    number: int
    """Which of the packets."""
    merged: bool
    """It was merged with others, or cut, here or before."""


@dataclass(slots=True, kw_only=True)
class Station:
    """A place that packets of one direction pass."""

    tap: Tap
    direction: Direction
    flow: FlowKey
    ttl: int
    """That most of them have."""
    sightings: list[Sighting] = field(default_factory=list)

    @property
    def packets(self) -> int:
        return len(self.sightings)


@dataclass(slots=True, kw_only=True, eq=False)
class Unit:
    """One packet on its way."""

    first: Sighting
    passages: list[Passage]
    repeat: Repeat = Repeat.NOTHING
    fate: Fate = Fate.ARRIVED
    pieces: dict[int, int] = field(default_factory=dict)
    """Station → sequence number up to which pieces of it were seen."""
    laps: dict[int, int] = field(default_factory=dict)
    """Station → how often it saw it again, each time with a smaller TTL: a routing loop."""
    ttls: dict[int, int] = field(default_factory=dict)
    """Station → TTL with which it was seen there last."""

    @property
    def begin(self) -> int:
        return self.passages[0].time

    @property
    def last(self) -> Passage:
        return self.passages[-1]

    @property
    def rounds(self) -> int:
        """How often it came by one place, at most."""
        return 1 + max(self.laps.values(), default=0)

    @property
    def whole(self) -> bool:
        """Its times are those of one and the same packet."""
        return not any(passage.merged for passage in self.passages)


@dataclass(slots=True, kw_only=True)
class Flow:
    """One direction."""

    stations: tuple[Station, ...] = ()
    units: tuple[Unit, ...] = ()
    """In the order of their first passages."""

    @property
    def bytes(self) -> int:
        """Payload, without what was sent again."""
        fresh = (u for u in self.units if u.repeat in (Repeat.NOTHING, Repeat.REORDERED))
        return sum(unit.first.size for unit in fresh)

    @property
    def rounds(self) -> int:
        """How often a packet came by one place, at most; more than once in a routing loop."""
        return max((unit.rounds for unit in self.units), default=0)

    def count(self, repeat: Repeat) -> int:
        return sum(unit.repeat is repeat for unit in self.units)


def follow(
    seen: Iterable[Sighting],
    *,
    slack: Slack,
    windows: Mapping[Tap, Window],
    end: int,
) -> Flow:
    """`seen`: all sightings of one direction, in time order.  `end`: of the capture, for taps
    without a window."""
    stations = _stations(seen)
    matcher = _Matcher(stations, slack)
    for number, station in enumerate(stations):
        for sighting in station.sightings:
            matcher.place(number, sighting)
    units = sorted(matcher.units, key=lambda unit: unit.begin)
    _repeats(units)
    for unit in units:
        unit.fate = _fate(unit, stations, windows, end)
    return Flow(stations=tuple(stations), units=tuple(units))


def _stations(seen: Iterable[Sighting]) -> list[Station]:
    groups: dict[tuple[Tap, int, Direction, FlowKey], list[Sighting]] = {}
    for one in seen:
        groups.setdefault((one.tap, one.ifindex, one.direction, one.flow), []).append(one)
    made: list[Station] = []
    for (tap, _, direction, flow), members in groups.items():
        # A reset or an error that a node makes begins with a TTL of its own.
        counted = Counter(one.ttl for one in members if not one.flags & RST) or Counter(
            one.ttl for one in members
        )
        ttl = max(counted.items(), key=lambda item: (item[1], item[0]))[0]
        made.append(Station(tap=tap, direction=direction, flow=flow, ttl=ttl, sightings=members))
    return _ordered(made)


def _ordered(stations: list[Station]) -> list[Station]:
    times = _common_times(stations)

    def time(station: Station) -> int:
        return times.get(id(station), station.sightings[0].time)

    ordered: list[Station] = []
    for ttl in sorted({station.ttl for station in stations}, reverse=True):
        level = [station for station in stations if station.ttl == ttl]
        nodes: dict[str, list[Station]] = {}
        for station in level:
            nodes.setdefault(station.tap.node, []).append(station)
        for members in sorted(nodes.values(), key=lambda m: (_arrives(m), min(map(time, m)))):
            ordered += sorted(members, key=lambda s: (time(s), s.direction is Direction.OUT))
    return ordered


def _arrives(members: list[Station]) -> bool:
    """Packets come into the node with this TTL, and leave it with a smaller one."""
    return all(s.direction is Direction.IN for s in members if not s.tap.pod)


def _common_times(stations: list[Station]) -> dict[int, int]:
    """When the packet that was seen at most stations passed each of them, by id()."""
    if len(stations) < 2:
        return {}
    places: dict[tuple[int, ...], dict[int, int]] = {}
    for station in stations:
        for one in station.sightings[:64]:
            places.setdefault(one.key, {}).setdefault(id(station), one.time)
    return max(places.values(), key=len)


class _Matcher:
    """Puts sightings to units, station after station."""

    def __init__(self, stations: Sequence[Station], slack: Slack) -> None:
        self.units: list[Unit] = []
        self._stations = stations
        self._slack = slack
        self._exact: dict[tuple[int, ...], list[Unit]] = {}
        self._starts: dict[int, list[Unit]] = {}

    def place(self, station: int, one: Sighting) -> None:
        same = self._exact.get(one.key, ())
        for known in same:
            if known.ttls.get(station, 0) > one.ttl:
                known.ttls[station] = one.ttl
                known.laps[station] = known.laps.get(station, 0) + 1
                return
        unit = self._best(same, station, one)
        if unit is not None:
            unit.passages.append(Passage(station, one.time, one.number, bool(unit.pieces)))
            unit.ttls[station] = one.ttl
            return
        ranged = one.flow[0] == Protocol.TCP and one.size > 0
        if ranged and self._range(station, one):
            return
        first = Passage(station, one.time, one.number, False)
        unit = Unit(first=one, passages=[first], ttls={station: one.ttl})
        self.units.append(unit)
        self._exact.setdefault(one.key, []).append(unit)
        if ranged:
            self._starts.setdefault(one.seq, []).append(unit)

    def _best(self, candidates: Sequence[Unit], station: int, one: Sighting) -> Unit | None:
        """The nearest that was sent before, as far as clocks are known."""
        best: Unit | None = None
        nearest = 0
        for unit in candidates:
            last = unit.last
            if last.station >= station:
                continue
            node = self._stations[last.station].tap.node
            if last.time > one.time + self._slack(node, one.tap.node):
                continue
            apart = abs(one.time - last.time)
            if best is None or apart <= nearest:
                best, nearest = unit, apart
        return best

    def _range(self, station: int, one: Sighting) -> bool:
        """Units that a merged segment holds, or the one that it is a piece of."""
        at, found = one.seq, False
        end = (one.seq + one.size) & _MASK
        while _before(at, end):
            unit = self._best(self._starts.get(at, ()), station, one)
            if unit is None:
                break
            found = True
            self._pass(unit, station, one, end)
            at = (unit.first.seq + unit.first.size) & _MASK
        return found or self._piece(station, one, end)

    def _piece(self, station: int, one: Sighting, end: int) -> bool:
        for unit in reversed(self.units[-_RECENT:]):
            first = unit.first
            if not 0 < ((one.seq - first.seq) & _MASK) < first.size:
                continue
            if unit.last.station > station or (
                unit.last.station == station and unit.pieces.get(station) != one.seq
            ):
                continue
            self._pass(unit, station, one, end)
            return True
        return False

    def _pass(self, unit: Unit, station: int, one: Sighting, end: int) -> None:
        if unit.last.station < station:
            unit.passages.append(Passage(station, one.time, one.number, True))
        unit.pieces[station] = end


def _before(one: int, other: int) -> bool:
    """Of sequence numbers, modulo 2**32."""
    return 0 < ((other - one) & _MASK) < _HALF


def _repeats(units: Sequence[Unit]) -> None:
    """Which of them repeat others; for TCP only."""
    highest: int | None = None
    starts: set[tuple[int, int]] = set()
    for unit in units:
        one = unit.first
        if one.flow[0] != Protocol.TCP or one.flags & RST:
            continue
        length = one.size + bool(one.flags & SYN) + bool(one.flags & FIN)
        if length == 0:
            continue
        kind = one.flags & (SYN | FIN)
        if highest is not None and _before(one.seq, highest):
            if (one.seq, kind) in starts or (one.size > 0 and (one.seq, 0) in starts):
                unit.repeat = Repeat.RETRANSMISSION
            elif one.size <= 1 and (one.seq + 1) & _MASK == highest and not kind:
                unit.repeat = Repeat.KEEPALIVE
                continue
            else:
                unit.repeat = Repeat.REORDERED
        starts.add((one.seq, kind))
        if one.size:
            starts.add((one.seq, 0))
        if highest is None or _before(highest, one.end):
            highest = one.end


def _fate(unit: Unit, stations: Sequence[Station], windows: Mapping[Tap, Window], end: int) -> Fate:
    later = stations[unit.last.station + 1 :]
    if not later:
        return Fate.ARRIVED
    for station in later:
        window = windows.get(station.tap)
        closed = end if window is None else window.end
        opened = unit.begin if window is None else window.begin
        if unit.begin < opened or unit.last.time + GRACE > closed:
            return Fate.UNKNOWN
        if window is not None and not window.complete:
            return Fate.UNKNOWN
    return Fate.LOST
