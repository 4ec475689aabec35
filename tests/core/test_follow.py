"""Connections followed live, over synthetic clusters whose connections are known."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from itertools import permutations, product

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gketrace.connections import Place, inverted_key, record_keys
from gketrace.conntrack import ConntrackEntry, CtStatus
from gketrace.conntrack_records import Record, record_of
from gketrace.follow.entries import EventKind
from gketrace.follow.joiner import Followed, Joiner, Limits, Phase
from gketrace.follow.outcome import Outcome
from gketrace.packet import Tuple5
from tests.core.test_connections import tuple5

NEW, UPDATE, DESTROY, EXISTING = EventKind
ANSWERED = CtStatus.SEEN_REPLY | CtStatus.CONFIRMED
A, B, C = (Place(node=name) for name in ("a", "b", "c"))
IP = {A: "10.142.0.1", B: "10.142.0.2", C: "10.142.0.3"}
POD = {A: "10.40.0.6", B: "10.40.1.6", C: "10.40.2.6"}
RECORDS = (Phase.CLOSED, Phase.STILL_OPEN)


NODES = {
    address: place.node
    for place in (A, B, C)
    for address in (IP[place], POD[place], POD[place].rsplit(".", 1)[0] + ".9")
}


def owner(address: object) -> str:
    return NODES.get(str(address), "")


def record(
    taken: Tuple5, let_out: Tuple5, state: str, *, id: int, replied: bool = True, timeout: int = 120
) -> Record:
    made = record_of(
        ConntrackEntry(
            orig=taken,
            reply=let_out.inverted(),
            status=ANSWERED if replied else CtStatus.CONFIRMED,
            tcp_state=state,
            timeout=timeout or None,
            id=id,
        )
    )
    assert made is not None
    return made


@dataclass
class Script:
    """What the kernels do, in true time."""

    events: dict[Place, list[tuple[float, EventKind, Record]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    truth: dict[tuple[Place, int], int] = field(default_factory=dict)
    """Place and CTA_ID → connection."""
    live: dict[tuple[Place, Tuple5], tuple[float, int, Record]] = field(default_factory=dict)
    connections: int = 0
    ids: int = 0
    delivered: set[tuple[Place, int]] = field(default_factory=set)
    """Entries that a joiner was told of, by `play`."""
    unheard: int = 0
    """Connections that it told without all that was to come."""

    def parts(self) -> list[frozenset[tuple[Place, int]]]:
        """What was delivered, as the tuples put it together: usually one part a connection."""
        keys = {
            (place, one.id): {min(key, inverted_key(key)) for key in record_keys(one)}
            for place, events in self.events.items()
            for _, _, one in events
        }
        parts: list[set[tuple[Place, int]]] = []
        for entry in sorted(self.delivered, key=str):
            near = [
                part
                for part in parts
                if any(
                    self.truth[entry] == self.truth[other] and keys[entry] & keys[other]
                    for other in part
                )
            ]
            parts = [part for part in parts if part not in near]
            parts.append({entry}.union(*near))
        return sorted((frozenset(part) for part in parts), key=_by_name)

    def connect(
        self,
        at: float,
        ways: list[tuple[Place, Tuple5, Tuple5]],
        fate: str = "closed",
        length: float = 0.05,
        died: int = 9,
    ) -> None:
        """`ways`: place, what it takes in, what it lets out; `died`: places that it reaches."""
        number = self.connections
        self.connections += 1
        for step, (place, taken, let_out) in enumerate(ways[:died]):
            self.ids += 1
            self.truth[place, self.ids] = number
            key = place, taken
            begin = at + 0.0002 * step
            if key in self.live:
                since, _, old = self.live.pop(key)
            else:
                since, old = -1000.0, None
            if old is not None and since + 120 > begin:
                gone = self.events[place]
                gone[:] = [e for e in gone if not (e[1] is DESTROY and e[2].id == old.id)]
                assert since < begin
                gone.append((begin - 0.00001, DESTROY, old))
            states = {
                "closed": "SYN_RECV ESTABLISHED FIN_WAIT LAST_ACK TIME_WAIT",
                "reset": "SYN_RECV ESTABLISHED CLOSE",
                "open": "SYN_RECV ESTABLISHED",
            }.get(fate, "").split()
            made = record(taken, let_out, "SYN_SENT", id=self.ids, replied=False)
            mine = [(begin, NEW, made)]
            for index, state in enumerate(states, 1):
                now = begin + (length if index > 2 else 0.001) + 0.0003 * index
                mine.append((now, UPDATE, record(taken, let_out, state, id=self.ids)))
            last = mine[-1]
            if fate == "refused":
                mine.append((begin + 0.0004, DESTROY, replace_timeout(last[2], 119)))
            elif fate != "open":
                self.live[key] = last[0], self.ids, replace_timeout(last[2], 0)
                mine.append((last[0] + 120, DESTROY, replace_timeout(last[2], 0)))
            self.events[place] += mine

    def ordered(self, place: Place) -> list[tuple[float, EventKind, Record]]:
        return sorted(self.events[place], key=lambda event: event[0])


def _by_name(part: frozenset[tuple[Place, int]]) -> list[str]:
    return sorted(map(str, part))


def replace_timeout(one: Record, timeout: int) -> Record:
    return one._replace(timeout=timeout, has=one.has if timeout else one.has & ~1)


def node_port(
    client: str, port: int, first: Place, last: Place
) -> list[tuple[Place, Tuple5, Tuple5]]:
    taken = tuple5(client, port, IP[first], 30080)
    hidden = tuple5(IP[first], port, POD[last], 8080)
    if first == last:
        return [(first, taken, tuple5(POD[last].rsplit(".", 1)[0] + ".1", port, POD[last], 8080))]
    return [(first, taken, hidden), (last, hidden, hidden)]


def cluster_ip(source: Place, port: int, last: Place) -> list[tuple[Place, Tuple5, Tuple5]]:
    client = POD[source].rsplit(".", 1)[0] + ".9"
    taken = tuple5(client, port, "10.43.0.1", 80)
    behind = tuple5(client, port, POD[last], 8080)
    return [(source, taken, behind)] + ([] if source == last else [(last, behind, behind)])


def from_node(
    source: Place, port: int, first: Place, last: Place
) -> list[tuple[Place, Tuple5, Tuple5]]:
    """A node's own connection through another's NodePort: up to three tables."""
    ways = node_port(IP[source], port, first, last)
    return [(source, ways[0][1], ways[0][1]), *ways]


def from_pod(
    source: Place, port: int, first: Place, last: Place
) -> list[tuple[Place, Tuple5, Tuple5]]:
    """A pod's connection through another node's NodePort: its own node translates it, too."""
    ways = node_port(IP[source], port, first, last)
    client = POD[source].rsplit(".", 1)[0] + ".9"
    return [(source, tuple5(client, port, IP[first], 30080), ways[0][1]), *ways]


def play(
    script: Script,
    *,
    rng: random.Random | None = None,
    delay: float = 0.0,
    doubled: float = 0.0,
    lost: tuple[Place, float, float] | None = None,
    until: float = 300.0,
    stalls: bool = False,
    limits: Limits | None = None,
) -> list[Followed]:
    """Feeds a joiner; `delay`: of each place at most, `lost`: nothing comes from it in between."""
    rng = rng or random.Random(0)
    joiner = Joiner(owner=owner, limits=limits)
    arriving: list[tuple[float, int, Place, float, str, list[tuple[EventKind, Record]]]] = []
    last = max((event[0] for events in script.events.values() for event in events), default=0.0)
    end = min(until, last + 10)
    for place in (A, B, C):
        late = rng.uniform(0, delay)
        table: dict[int, Record] = {}
        arriving.append((0.0, -1, place, 0.0, "whole", []))
        resync = None if lost is None or lost[0] != place else lost[2] + 0.5
        number, arrives = 0, 0.0
        for at, kind, one in script.ordered(place):
            if resync is not None and at > resync:
                arriving.append(_table(place, resync, late, number, table))
                script.delivered |= {(place, number) for number in table}
                resync = None
            table.pop(one.id, None)
            if kind is not DESTROY:
                table[one.id] = one
            if lost is not None and lost[0] == place and lost[1] <= at < lost[2]:
                if not any(a[4] == "lose" for a in arriving):
                    arriving.append((lost[1] + late, number, place, lost[1], "lose", []))
                continue
            script.delivered.add((place, one.id))
            number += 1
            times = 2 if rng.random() < doubled else 1
            # In their order, whatever floating point makes of two sums.
            arrives = max(arrives, (stalled(place, at)[0] if stalls else at) + late)
            arriving.append((arrives, number, place, at, "", [(kind, one)] * times))
        if resync is not None:
            arriving.append(_table(place, resync, late, number, table))
            script.delivered |= {(place, number) for number in table}
        arriving += [(t + late, 1 << 30, place, float(t), "heard", []) for t in range(int(end))]
    told: list[Followed] = []
    for arrives, _, place, at, what, events in sorted(arriving, key=lambda one: one[:2]):
        if arrives > until:
            break
        if what == "heard":
            joiner.heard(place, stalled(place, at)[1] if stalls else at)
        if what == "lose":
            joiner.lose(place)
        read_at, after = stalled(place, at) if stalls and not what else (at, at - 0.02)
        kinds = bytes(kind for kind, _ in events)
        joiner.feed(place, read_at, kinds, [one for _, one in events], after=after)
        if what == "whole":
            joiner.read_whole(place, at)
        told += joiner.told(arrives)
    told += joiner.finish(until)
    script.unheard = joiner.unheard
    return told


def stalled(place: Place, at: float) -> tuple[float, float]:
    """A reader that now and then stands still for two seconds: when it reads what happened at `at`,
    and until when it has read all before that."""
    into = (at + 2.0 * (A, B, C).index(place)) % 7
    begin = float(round(at - into))  # whole seconds, whatever floating point makes of it
    return (begin + 2.0, begin) if into < 2.0 else (at, at - 0.02)


def _table(
    place: Place, at: float, late: float, number: int, table: dict[int, Record]
) -> tuple[float, int, Place, float, str, list[tuple[EventKind, Record]]]:
    return at + late, number, place, at, "whole", [(EXISTING, one) for one in table.values()]


def connections_of(script: Script, one: Followed) -> list[int]:
    return [script.truth[half.place, half.entry.id or 0] for half in one.connection.halves]


def random_script(rng: random.Random, count: int, gap: float = 1.0) -> Script:
    """Connections from few ports: tuples are used again, though not before `gap` seconds."""
    script = Script()
    used: dict[tuple[Place, Tuple5], float] = {}
    held: dict[tuple[Place, Tuple5], tuple[Tuple5, float]] = {}
    at = 1.0
    for _ in range(count):
        at += rng.uniform(0, 0.5)
        first, last = rng.choice((A, B, C)), rng.choice((A, B, C))
        port = rng.randrange(40000, 40003)
        client = f"203.0.113.{rng.randrange(1, 4)}"
        ways = node_port(client, port, first, last)
        kind = rng.random()
        if kind < 0.3:
            ways = cluster_ip(first, port, last)
        elif kind < 0.7:
            way = from_node if kind < 0.5 else from_pod
            ways = way(rng.choice([p for p in (A, B, C) if p != first]), port, first, last)
        keys = [(place, t) for place, *ends in ways for t in ends]
        free = max((used.get(key, 0.0) for key in keys), default=0.0)
        # What a node lets out is one entry's alone, as long as that is there.
        for place, taken, let_out in ways:
            owner_of = held.get((place, let_out))
            if owner_of is not None and owner_of[0] != taken:
                free = max(free, owner_of[1])
        at = max(at, free)
        fate = rng.choice(("closed", "closed", "closed", "reset", "refused", "unanswered"))
        length = rng.choice((0.01, 0.2, 3.0))
        # A client that gave up may use its port again while its entry waits for an answer: that
        # would be the same entry.
        rest = {"unanswered": 125.0, "refused": gap}.get(fate, length + gap)
        used |= dict.fromkeys(keys, at + rest)
        held |= {(place, out): (taken, at + length + 130.0) for place, taken, out in ways}
        script.connect(
            at, ways, fate, length, died=rng.choice((1, 9)) if fate == "unanswered" else 9
        )
    return script


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_each_connection_is_one_record(seed: int) -> None:
    rng = random.Random(seed)
    stalls = rng.random() < 0.5
    script = random_script(rng, 40, gap=4.0 if stalls else 1.0)
    found = [
        one
        for one in play(script, rng=rng, delay=1.5, doubled=0.2, stalls=stalls, until=3000.0)
        if one.phase in RECORDS
    ]
    numbers = [connections_of(script, one) for one in found]
    assert all(len(set(one)) == 1 for one in numbers)
    assert sorted(one[0] for one in numbers) == list(range(script.connections))
    halves = [(half.place, half.entry.id) for one in found for half in one.connection.halves]
    assert sorted(map(str, halves)) == sorted(map(str, script.truth))


def lossy(seed: int) -> tuple[random.Random, Script, tuple[Place, float, float]]:
    """One place tells nothing for a while, up to fifteen seconds."""
    rng = random.Random(seed)
    script = random_script(rng, 40)
    begin = rng.uniform(1, 15)
    length = rng.uniform(0.1, rng.choice((4, 15)))
    return rng, script, (rng.choice((A, B, C)), begin, begin + length)


@example(seed=2296515)  # a tuple is used again in the very moment of the loss
@example(seed=1534)  # the table has a later connection's entry of the same tuples
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_what_is_lost_makes_no_second_record(seed: int) -> None:
    """Each connection is one record, of all that was seen; only where the entry that joins the
    others was gone before the table was read are there two."""
    rng, script, lost = lossy(seed)
    found = [
        frozenset((half.place, half.entry.id or 0) for half in one.connection.halves)
        for one in play(script, rng=rng, delay=rng.choice((0.1, 1.5)), lost=lost, until=3000.0)
        if one.phase in RECORDS
    ]
    assert sorted(found, key=_by_name) == script.parts()
    assert script.unheard == 0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_a_loss_that_lasts_is_waited_for_only_so_long(seed: int) -> None:
    """Then what is known is told, and counted; what comes after that is not told again."""
    rng, script, lost = lossy(seed)
    limits = Limits(recover_at_most=2.0)
    found = [
        one
        for one in play(script, rng=rng, delay=0.1, lost=lost, until=3000.0, limits=limits)
        if one.phase in RECORDS
    ]
    entries = [(half.place, half.entry.id) for one in found for half in one.connection.halves]
    assert len(entries) == len(set(entries))
    assert all(len(set(connections_of(script, one))) == 1 for one in found)
    parts = script.parts()
    told = Counter(connections_of(script, one)[0] for one in found)
    whole = Counter(script.truth[next(iter(part))] for part in parts)
    assert told.keys() == whole.keys()
    apart = sum(told[number] - whole[number] for number in told)
    assert 0 <= apart <= script.unheard
    assert script.delivered - set(entries) == set() or script.unheard


def test_the_node_in_the_middle_may_be_the_last_to_tell() -> None:
    """Its entry shows that what the two others told is one connection, whichever told first."""
    for port, order in product(range(40000, 40010), permutations((C, A, B))):
        ways = {way[0]: (at, *way[1:]) for at, way in enumerate(from_node(C, port, A, B))}
        joiner = Joiner(owner=owner)
        for place in order:
            at, taken, let_out = ways[place]
            made = record(taken, let_out, "ESTABLISHED", id=1)
            joiner.feed(place, 5.0 + at / 1000, bytes([NEW]), [made])
        (one,) = joiner.finish(6.0)
        assert [half.place for half in one.connection.halves] == [C, A, B]


def one_record(script: Script, **more: object) -> Followed:
    found = [one for one in play(script, **more) if one.phase in RECORDS]  # type: ignore[arg-type]
    assert len(found) == 1
    return found[0]


def test_a_node_port_over_two_nodes() -> None:
    script = Script()
    script.connect(5.0, node_port("203.0.113.9", 40000, A, B), length=2.0)
    told = play(script)
    assert [one.phase for one in told] == [Phase.OPENED, Phase.CLOSED]
    assert [half.place for half in told[1].connection.halves] == [A, B]
    assert told[1].judgement.outcome is Outcome.CLOSED
    assert told[1].began == 5.0
    assert round((told[1].ended or 0) - 5.0, 1) == 2.0
    assert told[1].sights[0].states == (
        "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "LAST_ACK", "TIME_WAIT"
    )  # fmt: skip


def test_a_syn_that_died_behind_the_first_node() -> None:
    script = Script()
    script.connect(5.0, node_port("203.0.113.9", 40000, A, B), "unanswered", died=1)
    told = play(script)
    assert [one.phase for one in told] == [Phase.UNANSWERED, Phase.CLOSED]
    for one in told:
        assert one.judgement.outcome is Outcome.UNANSWERED
        assert one.judgement.failed
        assert (one.judgement.last, one.judgement.next_node) == (A, "b")


def test_a_refused_connection_is_told_at_once() -> None:
    script = Script()
    script.connect(5.0, node_port("203.0.113.9", 40000, A, B), "refused")
    one = one_record(script, until=8.0)
    assert one.judgement.outcome is Outcome.REFUSED
    assert "119 s before its time" in one.judgement.because


def test_a_reset_connection() -> None:
    script = Script()
    script.connect(5.0, node_port("203.0.113.9", 40000, A, A), "reset")
    assert one_record(script).judgement.outcome is Outcome.RESET


def test_one_that_outlasts_the_following_is_told_at_its_end() -> None:
    script = Script()
    script.connect(5.0, cluster_ip(A, 40000, B), "open")
    one = one_record(script)
    assert (one.phase, one.judgement.outcome) == (Phase.STILL_OPEN, Outcome.OPEN)
    assert one.ended is None


def test_an_answer_that_one_node_has_not_seen() -> None:
    script = Script()
    taken = node_port("203.0.113.9", 40000, A, B)
    script.connect(5.0, taken, "unanswered")
    answered = record(*taken[1][1:], "SYN_RECV", id=2)
    script.events[B].append((5.001, UPDATE, answered))
    one = one_record(script, until=20.0)
    assert one.judgement.outcome is Outcome.NO_RETURN
    assert one.judgement.because == "b has seen an answer, a has not"


def test_what_was_over_before_is_no_news() -> None:
    joiner = Joiner(owner=owner)
    _, taken, let_out = node_port("203.0.113.9", 40000, A, A)[0]
    over = record(taken, let_out, "TIME_WAIT", id=1)
    joiner.feed(A, 1.0, bytes([EXISTING]), [over])
    joiner.read_whole(A, 1.0)
    assert joiner.told(10.0) == []
    joiner.feed(A, 60.0, bytes([DESTROY]), [replace_timeout(over, 0)])
    assert joiner.told(80.0) == []
    assert joiner.finish(90.0) == []


def test_what_begins_after_the_end_is_not_told_by_halves() -> None:
    joiner = Joiner(owner=owner)
    for at, port in ((5.0, 40000), (7.0, 40001)):
        _, taken, let_out = node_port("203.0.113.9", port, A, B)[0]
        joiner.feed(A, at, bytes([NEW]), [record(taken, let_out, "ESTABLISHED", id=port)])
    (one,) = joiner.finish(8.0, 6.0)
    assert one.began == 5.0


def test_what_expires_while_the_table_is_read_for_the_first_time_is_no_news() -> None:
    joiner = Joiner(owner=owner)
    for place, taken, let_out in from_node(C, 40000, A, B):
        over = record(taken, let_out, "TIME_WAIT", id=1)
        if place == A:
            joiner.feed(place, 1.0, bytes([EXISTING]), [over])
        joiner.feed(place, 1.0, bytes([DESTROY]), [replace_timeout(over, 0)])
        joiner.read_whole(place, 2.0)
        joiner.heard(place, 10.0)
    assert joiner.told(10.0) == []
    assert joiner.finish(10.0) == []


def test_a_reading_after_a_loss_tells_what_ended_meanwhile() -> None:
    joiner = Joiner(owner=owner)
    _, taken, let_out = node_port("203.0.113.9", 40000, A, A)[0]
    joiner.feed(A, 1.0, bytes([NEW]), [record(taken, let_out, "SYN_SENT", id=1, replied=False)])
    joiner.feed(A, 1.1, bytes([UPDATE]), [record(taken, let_out, "ESTABLISHED", id=1)])
    joiner.lose(A)
    joiner.read_whole(A, 4.0)
    joiner.heard(A, 5.0)
    (one,) = (f for f in joiner.told(10.0) if f.phase is Phase.CLOSED)
    assert one.judgement.outcome is Outcome.UNSEEN
    assert not one.sights[0].complete


def test_memory_is_bounded_and_says_so() -> None:
    limits = Limits(flows=10, remembered=20)
    script = Script()
    for number in range(50):
        way = node_port(f"203.0.113.{number}", 40000 + number, A, B)
        script.connect(1.0 + number / 100, way, "open")
    joiner_told = play(script, limits=limits, until=30.0)
    numbers = [one.number for one in joiner_told if one.phase in RECORDS]
    assert sorted(numbers) == list(range(1, 51))


def test_counters_are_waited_for() -> None:
    joiner = Joiner(owner=owner)
    _, taken, let_out = node_port("203.0.113.9", 40000, A, A)[0]
    joiner.heard(A, 0.9, counts=True)
    joiner.feed(A, 1.0, bytes([NEW]), [record(taken, let_out, "SYN_SENT", id=1, replied=False)])
    over = record(taken, let_out, "TIME_WAIT", id=1)
    joiner.feed(A, 1.1, bytes([UPDATE]), [over])
    joiner.heard(A, 2.4, counts=True)
    assert joiner.told(2.5) == []
    assert joiner.uncounted() == {A}
    counted = record_of(
        replace(
            ConntrackEntry(orig=taken, reply=let_out.inverted(), id=1),
            orig_packets=6, orig_bytes=400, reply_packets=5, reply_bytes=900,
        )
    )  # fmt: skip
    assert counted is not None
    joiner.count(A, [counted])
    (one,) = joiner.told(3.2)
    assert one.sights[0].counted
    assert one.connection.halves[0].entry.reply_bytes == 900


def test_a_place_that_is_behind_is_not_said_to_have_no_entry() -> None:
    joiner = Joiner(owner=owner)
    for place in (A, B):
        joiner.heard(place, 4.0)
        joiner.read_whole(place, 4.0)
    way = node_port("203.0.113.9", 40000, A, B)
    _, taken, let_out = way[0]
    joiner.feed(A, 5.0, bytes([NEW]), [record(taken, let_out, "ESTABLISHED", id=1)])
    sent = taken.src.packed, taken.dst.packed, 6, taken.sport or 0, taken.dport or 0, 0
    assert joiner.knows(sent)
    assert not joiner.knows((*sent[:4], 1, 0))
    joiner.heard(A, 6.0)
    (one,) = joiner.finish(6.0)
    assert one.connection.unseen == ()


def test_what_is_told_without_a_place_that_is_behind_is_counted() -> None:
    script = Script()
    script.connect(5.0, node_port("203.0.113.9", 40000, A, B))
    joiner = Joiner(owner=owner)
    for place in (A, B):
        joiner.read_whole(place, 1.0)
        joiner.heard(place, 4.0)
    for at, kind, one in script.ordered(A)[:-1]:
        joiner.feed(A, at, bytes([kind]), [one])
    joiner.heard(A, 80.0)
    assert joiner.behind(64.0) == {B}
    assert [one.phase for one in joiner.told(64.0)] == []
    assert [one.phase for one in joiner.told(80.0)] == [Phase.CLOSED]
    assert joiner.unheard == 1
