"""Connection-tracking entries of many nodes and pods → connections, from first client to last pod.

What joins two entries is the packet between them.  An entry takes packets in by its original
tuple and lets them out as the inverse of its reply tuple; that is the tuple that the next node's
entry takes in, as nothing between the nodes changes it.  An entry without NAT lets out what it
took in: it is another sight of the same packets.

The join never guesses.  Where two translations lead into one tuple (a client that used its port
again, through another node, before the old entry expired), nothing in the entries says which one
the packets behind come from: they are left apart, and each names the others
(`Connection.contested`).  Nothing else than tuples joins: not the time, not the counters.  So when
of two such translations the right one was lost, the other one is joined; that one is old, and its
state disagrees with the others (`Connection.doubts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from gketrace.conntrack import ConntrackEntry, CtStatus
from gketrace.conntrack_records import Record, entry_from_record
from gketrace.packet import IPAddress, Tuple5
from gketrace.tuple_keys import (
    TupleKey,
    entry_keys,
    inverted_key,
    key_address,
    key_tuple,
    record_keys,
)

__all__ = [
    "Connection",
    "Doubt",
    "Half",
    "Place",
    "PlaceEntries",
    "TupleKey",
    "Unseen",
    "inverted_key",
    "join_connections",
    "record_keys",
]

_OPEN: Final = frozenset({"ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT"})
_OVER: Final = frozenset({"CLOSE", "TIME_WAIT", "LAST_ACK"})
_BEGINNING: Final = frozenset({"SYN_SENT", "SYN_SENT2"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an entry was seen: a network namespace."""

    node: str
    pod: str = ""
    """``namespace/name``; empty: the node's own network namespace."""

    def __str__(self) -> str:
        return f"{self.pod} on {self.node}" if self.pod else self.node


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceEntries:
    """All that was read in one place."""

    place: Place
    entries: Sequence[ConntrackEntry | Record]
    complete: bool = True
    """False: a filter, a limit or a loss left some out, or nothing is tracked here; that an entry
    is not among them then says nothing."""


@dataclass(frozen=True, slots=True)
class Half:
    """One entry of a connection."""

    place: Place
    seen: ConntrackEntry | Record
    reversed: bool = False
    """It was made by an answer, after the entry that the connection began with was lost: its
    original tuple is that of the answers."""

    @property
    def entry(self) -> ConntrackEntry:
        seen = self.seen
        return entry_from_record(seen) if isinstance(seen, Record) else seen


class Doubt(Enum):
    """What the halves of a connection disagree about."""

    STATE = "state"
    """One has it open, another one closed."""
    REPLIES = "replies"
    """One has seen answers, another one none."""
    REVERSED = "reversed"
    """One was made by an answer: an earlier entry was lost there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unseen:
    """A place that the packets must have passed, that was read, and has no entry of them."""

    node: str
    tuple5: Tuple5
    """The packets there, in the direction of the first one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """What is known of one connection."""

    halves: tuple[Half, ...]
    """In the order in which its packets pass; of those that see the same packets, the source's
    node is first and the destination's last."""
    unseen: tuple[Unseen, ...] = ()
    """Not empty: one-sided."""
    contested: tuple[Half, ...] = ()
    """Entries of other connections that could stand before or behind these just as well."""

    @property
    def first(self) -> Tuple5:
        """As the first client sends it."""
        half = self.halves[0]
        return half.entry.orig.inverted() if half.reversed else half.entry.orig

    @property
    def last(self) -> Tuple5:
        """As it arrives at the end."""
        half = self.halves[-1]
        return (half.entry.orig if half.reversed else half.entry.reply).inverted()

    @property
    def doubts(self) -> tuple[Doubt, ...]:
        """What the halves disagree about."""
        entries = [half.entry for half in self.halves]
        states = {entry.tcp_state for entry in entries}
        replied = {bool(entry.status & CtStatus.SEEN_REPLY) for entry in entries}
        found: list[Doubt] = []
        if (states & _OPEN and states & (_OVER | _BEGINNING)) or (
            states & _OVER and states & _BEGINNING
        ):
            found.append(Doubt.STATE)
        if len(replied) > 1:
            found.append(Doubt.REPLIES)
        if any(half.reversed for half in self.halves):
            found.append(Doubt.REVERSED)
        return tuple(found)


class _Entries:
    """All entries, by the tuples that they take in and let out."""

    def __init__(self, tables: Iterable[PlaceEntries]) -> None:
        self.halves: list[tuple[Place, ConntrackEntry | Record]] = []
        self.keys: list[tuple[TupleKey, TupleKey]] = []
        self.same: dict[TupleKey, list[int]] = {}
        """Entries without NAT, by the tuple that they see."""
        self.into: dict[TupleKey, list[int]] = {}
        """Entries with NAT, by what they take in."""
        self.out_of: dict[TupleKey, list[int]] = {}
        """Entries with NAT, by what they let out."""
        for table in tables:
            for seen in table.entries:
                self._add(table.place, seen)
        self.turned = self._turn()
        """Entries without NAT that answers made, and are under the tuple of the first packet."""

    def _add(self, place: Place, seen: ConntrackEntry | Record) -> None:
        number = len(self.halves)
        taken, let_out = record_keys(seen) if isinstance(seen, Record) else entry_keys(seen)
        self.halves.append((place, seen))
        self.keys.append((taken, let_out))
        if taken == let_out:
            self.same.setdefault(taken, []).append(number)
        else:
            self.into.setdefault(taken, []).append(number)
            self.out_of.setdefault(let_out, []).append(number)

    def _turn(self) -> frozenset[int]:
        """Puts entries that answers made to those of the first packets.

        Which direction was first is known where there is a translation; else it is taken to be
        that of the older entry, or of more entries: `Doubt.REVERSED` says that it was turned.
        """
        turned: set[int] = set()
        for key in list(self.same):
            back = inverted_key(key)
            if back == key or key not in self.same:
                continue
            forth = key in self.into or key in self.out_of
            reverse = back in self.into or back in self.out_of
            here, there = self.same[key], self.same.get(back, [])
            if reverse and not forth:
                turn = True
            elif forth or reverse or not there:
                turn = False
            else:
                turn = self._rank(there, back) > self._rank(here, key)
            if turn:
                self.same.setdefault(back, []).extend(here)
                del self.same[key]
                turned.update(here)
        return frozenset(turned)

    def _rank(self, numbers: list[int], key: TupleKey) -> tuple[int, int, TupleKey]:
        """The larger, the likelier these have the direction of the first packet."""
        starts = [self.halves[number][1].started or 0 for number in numbers]
        return -min(starts), len(numbers), key

    def half(self, number: int) -> Half:
        place, seen = self.halves[number]
        return Half(place, seen, number in self.turned)


def join_connections(
    tables: Iterable[PlaceEntries], owner: Callable[[IPAddress], str] = lambda _: ""
) -> list[Connection]:
    """Joins what was read in any number of places.

    `owner` names the node that an address belongs to (its own or one of its pods'), ``""`` where
    that is not known; it orders the halves, and says where a half ought to be.  Needs about 20 µs
    for each entry.
    """
    tables = list(tables)
    entries = _Entries(tables)
    whole = _complete_nodes(tables)
    owners: dict[bytes, str] = {}

    def node_of(address: bytes) -> str:
        if address not in owners:
            owners[address] = owner(key_address(address))
        return owners[address]

    made: list[Connection] = []
    placed: set[TupleKey] = set()
    for chain in _chains(entries):
        made.append(_connection(entries, chain, node_of, whole, placed))
    for key, seen in entries.same.items():
        if key not in placed:
            made += _lone(entries, key, seen, node_of, whole)
    return made


def _complete_nodes(tables: Sequence[PlaceEntries]) -> frozenset[str]:
    """Nodes whose own namespace was read whole."""
    return frozenset(table.place.node for table in tables if table.complete and not table.place.pod)


def _chains(entries: _Entries) -> list[list[int]]:
    """Translations one behind the other; each is in exactly one chain."""
    following: dict[int, int] = {}
    for key, before in entries.out_of.items():
        behind = entries.into.get(key, ())
        if len(before) == 1 and len(behind) == 1 and before[0] != behind[0]:
            following[before[0]] = behind[0]
    preceded = set(following.values())
    chains: list[list[int]] = []
    done: set[int] = set()

    def follow(number: int) -> None:
        chain = [number]
        done.add(number)
        while (number := following.get(number, -1)) >= 0 and number not in done:
            chain.append(number)
            done.add(number)
        chains.append(chain)

    translations = [number for numbers in entries.into.values() for number in numbers]
    for number in translations:
        if number not in preceded:
            follow(number)
    for number in translations:  # a ring, which no real network has, is cut somewhere
        if number not in done:
            follow(number)
    return chains


def _connection(
    entries: _Entries,
    chain: list[int],
    node_of: Callable[[bytes], str],
    whole: frozenset[str],
    placed: set[TupleKey],
) -> Connection:
    halves: list[int] = []
    contested: list[int] = []
    unseen: list[Unseen] = []
    keys = [entries.keys[chain[0]][0], *(entries.keys[number][1] for number in chain)]
    for index, key in enumerate(keys):
        around = {*entries.into.get(key, ()), *entries.out_of.get(key, ())}
        rivals = around.difference(chain)
        seen = entries.same.get(key, [])
        doubled = _doubled(entries, seen)
        if rivals or doubled:
            contested += sorted({*rivals, *seen})
        elif seen:
            placed.add(key)
            halves += _ordered(entries, key, seen, node_of)
        if not rivals:
            unseen += _unseen(entries, key, around | set(seen), node_of, whole)
        if index < len(chain):
            halves.append(chain[index])
    return Connection(
        halves=tuple(map(entries.half, halves)),
        unseen=tuple(unseen),
        contested=tuple(map(entries.half, dict.fromkeys(contested))),
    )


def _lone(
    entries: _Entries,
    key: TupleKey,
    seen: list[int],
    node_of: Callable[[bytes], str],
    whole: frozenset[str],
) -> list[Connection]:
    """Entries without NAT that no one chain of translations has."""
    around = {*entries.into.get(key, ()), *entries.out_of.get(key, ())}
    if not _doubled(entries, seen):
        unseen = () if around else _unseen(entries, key, set(seen), node_of, whole)
        return [
            Connection(
                halves=tuple(map(entries.half, _ordered(entries, key, seen, node_of))),
                unseen=tuple(unseen),
                contested=tuple(map(entries.half, sorted(around))),
            )
        ]
    return [
        Connection(
            halves=(entries.half(number),),
            contested=tuple(map(entries.half, sorted({*around, *seen} - {number}))),
        )
        for number in seen
    ]


def _doubled(entries: _Entries, seen: list[int]) -> bool:
    """Whether one place has several of them: zones with the same addresses."""
    return len(seen) > 1 and len({entries.halves[number][0] for number in seen}) < len(seen)


def _ordered(
    entries: _Entries, key: TupleKey, seen: list[int], node_of: Callable[[bytes], str]
) -> list[int]:
    """The source's node first, the destination's last; pods outside of their node."""
    if len(seen) < 2:
        return seen
    source, destination = node_of(key[0]), node_of(key[1])

    def rank(number: int) -> tuple[int, str, str]:
        place = entries.halves[number][0]
        inner = 1 if place.pod else 0
        if place.node == source and place.node == destination:
            return 0, place.node, place.pod
        if place.node == source:
            return -1 - inner, place.node, place.pod
        if place.node == destination:
            return 1 + inner, place.node, place.pod
        return 0, place.node, place.pod

    return sorted(seen, key=rank)


def _unseen(
    entries: _Entries,
    key: TupleKey,
    around: set[int],
    node_of: Callable[[bytes], str],
    whole: frozenset[str],
) -> list[Unseen]:
    """Which end's node was read whole and has nothing of these packets."""
    if _may_stay_inside(entries, key, node_of):
        return []
    nodes = {entries.halves[number][0].node for number in around if not _pod(entries, number)}
    wanted = dict.fromkeys((node_of(key[0]), node_of(key[1])))
    return [
        Unseen(node=node, tuple5=key_tuple(key))
        for node in wanted
        if node and node in whole and node not in nodes
    ]


def _may_stay_inside(entries: _Entries, key: TupleKey, node_of: Callable[[bytes], str]) -> bool:
    """Whether these packets may never have left one network namespace, so that the node's own has
    no entry of them: over loopback, or between a program in a pod and a translation of that pod's
    own, as the REDIRECT to a service mesh's proxy is."""
    source, destination = key[0], key[1]
    if source == destination or _loopback(source) or _loopback(destination):
        return True
    before, behind = entries.out_of.get(key, ()), entries.into.get(key, ())
    if before and behind:
        return False

    def inside(number: int, end: bytes) -> bool:
        place = entries.halves[number][0]
        return bool(place.pod) and node_of(end) == place.node

    return any(inside(number, destination) for number in before) or any(
        inside(number, source) for number in behind
    )


def _loopback(raw: bytes) -> bool:
    return raw[0] == 127 if len(raw) == 4 else key_address(raw).is_loopback


def _pod(entries: _Entries, number: int) -> bool:
    return bool(entries.halves[number][0].pod)
