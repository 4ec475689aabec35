"""Sightings → conversations at one place, and which of them are one connection.

A conversation is what one tap saw with one pair of tuples: both directions, between the SYN that
opened it and the next one (ports are used again).  Conversations at several taps are one
connection when something in the packets themselves says so:

* they have the same tuples, and nothing contradicts (`Evidence.TUPLES`);
* both directions' first sequence numbers are the same, or one's with the timestamp of its SYN:
  NAT does not touch them (`Evidence.SEQUENCE`);
* a connection-tracking entry translates one's tuples into the other's (`Evidence.CONNTRACK`);
* they share a packet: sequence and acknowledgement numbers, timestamp and IP identification, or
  identification and payload (`Evidence.PACKET`).

Where one packet could be of several conversations at one place, nothing is joined by it: the
connection says that it is `contested`.  Connections that are known to be two, since both were seen
with that packet at one place, do not contest it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import combinations
from typing import Final, TypeAlias

from gketrace.capture.packets import Tap
from gketrace.capture.segments import ACK, SYN, FlowKey, Sighting, reverse_key
from gketrace.conntrack import ConntrackEntry
from gketrace.packet import Protocol, Tuple5

__all__ = [
    "Conversation",
    "Evidence",
    "Joined",
    "Tracked",
    "conversations",
    "join_conversations",
]

_UDP_IDLE: Final = 120 * 10**9
"""Nanoseconds after which the same tuples are another conversation, without a SYN to tell: as
nf_conntrack_udp_timeout_stream."""
_TOGETHER: Final = 5 * 10**9
"""Nanoseconds between two sightings of one packet, at most; clocks are corrected before."""

Place: TypeAlias = tuple[Tap, FlowKey]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracked:
    """A connection-tracking entry, and whose."""

    node: str
    entry: ConntrackEntry


class Evidence(Enum):
    """What says that two conversations are one connection."""

    TUPLES = "tuples"
    SEQUENCE = "sequence numbers"
    CONNTRACK = "conntrack"
    PACKET = "packets"


@dataclass(slots=True, eq=False)
class Conversation:
    """At one tap."""

    tap: Tap
    client: FlowKey
    """The asking direction; see `client_known`."""
    client_known: bool
    """False: no SYN and no request was seen; the first packet is taken to be the client's."""
    sightings: list[Sighting] = field(default_factory=list)
    first_seq: dict[bool, int] = field(default_factory=dict)
    """Direction (True: the client's) → the SYN's sequence number."""
    first_stamp: dict[bool, int] = field(default_factory=dict)

    @property
    def begin(self) -> int:
        return self.sightings[0].time

    @property
    def end(self) -> int:
        return self.sightings[-1].time

    def add(self, one: Sighting) -> None:
        self.sightings.append(one)
        if one.flags & SYN:
            forth = one.flow == self.client
            self.first_seq.setdefault(forth, one.seq)
            self.first_stamp.setdefault(forth, one.stamp)

    def continues(self, one: Sighting) -> bool:
        """Whether a packet with these tuples belongs to it and not to the next one."""
        if one.flow[0] != Protocol.TCP:
            return one.time - self.end < _UDP_IDLE
        if one.flags & SYN and not self.client_known:
            return False
        if one.flags & (SYN | ACK) == SYN:
            forth = one.flow == self.client
            return self.first_seq.get(forth) == one.seq
        if one.flags & SYN:
            forth = one.flow == self.client
            known = self.first_seq.get(forth)
            answered = self.first_seq.get(not forth)
            if answered is not None and one.ack != (answered + 1) & 0xFFFFFFFF:
                return False
            return known is None or known == one.seq
        return True

    def agrees(self, other: Conversation) -> bool:
        """No first sequence number says that they are two connections."""
        return all(other.first_seq.get(forth, seq) == seq for forth, seq in self.first_seq.items())

    @property
    def place(self) -> Place:
        """Where it was seen: two of one connection are not in the same."""
        return self.tap, min(self.client, reverse_key(self.client))

    def apart(self, other: Conversation) -> int:
        """Nanoseconds between them; 0: they overlap."""
        return max(self.begin - other.end, other.begin - self.end, 0)


def conversations(seen: Iterable[Sighting]) -> list[Conversation]:
    """In the order of their first packets.  `seen` must be in time order for each tap."""
    made: list[Conversation] = []
    current: dict[tuple[Tap, FlowKey], Conversation] = {}
    for one in seen:
        key = (one.tap, min(one.flow, reverse_key(one.flow)))
        known = current.get(key)
        if known is None or not known.continues(one):
            answer = one.flags & SYN and one.flags & ACK
            client = reverse_key(one.flow) if answer else one.flow
            sure = bool(one.flags & SYN) or one.query or one.flow[0] == Protocol.UDP
            if one.flow[0] in (Protocol.ICMP, Protocol.ICMPV6) and not one.query:
                client, sure = reverse_key(one.flow), True
            known = current[key] = Conversation(one.tap, client, sure)
            made.append(known)
        known.add(one)
    return made


@dataclass(slots=True, kw_only=True)
class Joined:
    """The conversations of one connection."""

    members: list[Conversation]
    evidence: frozenset[Evidence]
    contested: bool = False
    """A packet of it could also be one of another connection."""
    entries: tuple[Tracked, ...] = ()
    """Those that translate one of its tuples into another, whatever it was joined by."""


class _Union:
    """Disjoint sets of conversations, none with two of one place."""

    def __init__(self, found: Sequence[Conversation]) -> None:
        self.parent = list(range(len(found)))
        self.places = [{one.place} for one in found]
        self.evidence: list[tuple[int, Evidence]] = []

    def root(self, number: int) -> int:
        while self.parent[number] != number:
            self.parent[number] = self.parent[self.parent[number]]
            number = self.parent[number]
        return number

    def fits(self, one: int, other: int) -> bool:
        """False: both have a conversation of one place, so they are two connections."""
        first, second = self.root(one), self.root(other)
        return first == second or not self.places[first] & self.places[second]

    def join(self, one: int, other: int, why: Evidence) -> None:
        first, second = sorted((self.root(one), self.root(other)))
        if first != second and self.fits(first, second):
            self.parent[second] = first
            self.places[first] |= self.places[second]
            self.evidence.append((one, why))


def join_conversations(
    found: Sequence[Conversation], entries: Iterable[Tracked] = ()
) -> list[Joined]:
    """Which conversations are one connection.  Each is in exactly one."""
    union = _Union(found)
    _by_sequence(found, union)
    _by_tuples(found, union)
    translating = _by_entries(found, union, entries)
    contested = _by_packets(found, union)
    groups: dict[int, list[int]] = {}
    for number in range(len(found)):
        groups.setdefault(union.root(number), []).append(number)
    reasons: dict[int, set[Evidence]] = {}
    for one, why in union.evidence:
        reasons.setdefault(union.root(one), set()).add(why)
    tracked: dict[int, dict[Tracked, None]] = {}
    for number, other, entry in translating:
        if union.root(number) == union.root(other):
            tracked.setdefault(union.root(number), {})[entry] = None
    return [
        Joined(
            members=[found[number] for number in members],
            evidence=frozenset(reasons.get(root, ())),
            contested=any(number in contested for number in members),
            entries=tuple(tracked.get(root, ())),
        )
        for root, members in groups.items()
    ]


def _by_sequence(found: Sequence[Conversation], union: _Union) -> None:
    """First sequence numbers: 64 bits with both directions, or one's with its timestamp."""
    known: dict[tuple[object, ...], int] = {}
    for number, one in enumerate(found):
        forth, back = one.first_seq.get(True), one.first_seq.get(False)
        keys: list[tuple[object, ...]] = []
        if forth is not None and back is not None:
            keys.append(("both", forth, back))
        if forth is not None:
            keys.append(("forth", forth, one.first_stamp[True]))
        if back is not None:
            keys.append(("back", back, one.first_stamp[False]))
        for key in keys:
            other = known.setdefault(key, number)
            theirs = found[other]
            if other != number and one.agrees(theirs) and one.apart(theirs) < _TOGETHER:
                same = one.client == theirs.client
                union.join(other, number, Evidence.TUPLES if same else Evidence.SEQUENCE)


def _by_tuples(found: Sequence[Conversation], union: _Union) -> None:
    groups: dict[FlowKey, list[int]] = {}
    for number, one in enumerate(found):
        groups.setdefault(one.place[1], []).append(number)
    for members in groups.values():
        for place, number in enumerate(members):
            mine = found[number]
            best: tuple[int, int] | None = None
            for other in members[:place]:
                apart = mine.apart(found[other])
                # Ports are used again: it is the one that it shares time with.
                if mine.agrees(found[other]) and union.fits(other, number):
                    best = min(best or (apart, other), (apart, other))
            if best is not None and best[0] < _TOGETHER:
                union.join(best[1], number, Evidence.TUPLES)


def _by_entries(
    found: Sequence[Conversation], union: _Union, entries: Iterable[Tracked]
) -> list[tuple[int, int, Tracked]]:
    """→ which two conversations each entry translates into one another.

    An entry is of its node: one of the two was seen there."""
    by_key: dict[FlowKey, list[int]] = {}
    for number, one in enumerate(found):
        by_key.setdefault(one.client, []).append(number)
        if not one.client_known:
            by_key.setdefault(reverse_key(one.client), []).append(number)
    translating: list[tuple[int, int, Tracked]] = []
    for tracked in entries:
        entry = tracked.entry
        before, after = _key_of(entry.orig), _key_of(entry.reply.inverted())
        if before == after:
            continue
        for number in by_key.get(before, ()):
            for other in by_key.get(after, ()):
                one, two = found[number], found[other]
                if tracked.node not in (one.tap.node, two.tap.node):
                    continue
                if one.apart(two) < _TOGETHER and one.agrees(two):
                    union.join(number, other, Evidence.CONNTRACK)
                    translating.append((number, other, tracked))
    return translating


def _key_of(half: Tuple5) -> FlowKey:
    sport = half.sport or 0
    dport = half.dport or 0
    if half.protocol in (Protocol.ICMP, Protocol.ICMPV6):
        dport = sport
    return half.protocol, half.src.packed, sport, half.dst.packed, dport


def _by_packets(found: Sequence[Conversation], union: _Union) -> set[int]:
    """Joins what shares a packet that nothing else could be; → those that were contested."""
    holders: dict[tuple[int, ...], list[tuple[int, Sighting]]] = {}
    for number, one in enumerate(found):
        for sighting in one.sightings:
            if _telling(sighting):
                holders.setdefault(sighting.key, []).append((number, sighting))
    contested: set[int] = set()
    for holding in holders.values():
        numbers = list(dict.fromkeys(number for number, _ in holding))
        if len({union.root(number) for number in numbers}) < 2:
            continue
        times = [sighting.time for _, sighting in holding]
        if max(times) - min(times) > _TOGETHER:
            continue
        places: dict[int, set[tuple[Tap, int, object]]] = {}
        for number, sighting in holding:
            place = (sighting.tap, sighting.ifindex, sighting.direction)
            places.setdefault(union.root(number), set()).add(place)
        pairs = list(combinations(places, 2))
        apart = [pair for pair in pairs if places[pair[0]] & places[pair[1]]]
        if len(apart) == len(pairs):
            continue  # each is known to be another one: no packet is to be given to anybody
        if apart or not all(
            found[one].agrees(found[other]) and union.fits(one, other)
            for one, other in combinations(numbers, 2)
        ):
            open_roots = {root for pair in pairs if pair not in apart for root in pair}
            contested.update(number for number in numbers if union.root(number) in open_roots)
            continue
        for other in numbers[1:]:
            union.join(numbers[0], other, Evidence.PACKET)
    return contested


def _telling(one: Sighting) -> bool:
    """Whether it has something random in it that another packet would not have."""
    if one.flow[0] == Protocol.TCP:
        return one.stamp >= 0 or one.identity > 0 or one.size > 0 or bool(one.flags & SYN)
    return one.size > 0 or one.identity > 0
