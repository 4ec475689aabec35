"""The cross-node join over synthetic clusters whose connections are known."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cache
from ipaddress import IPv4Address, ip_address, ip_network
from typing import TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st

from gketrace.connections import (
    Connection,
    Doubt,
    Place,
    PlaceEntries,
    join_connections,
)
from gketrace.conntrack import ConntrackEntry, CtStatus
from gketrace.conntrack_records import Record, record_of
from gketrace.packet import IPAddress, Protocol, Tuple5

SHAPES = "nodeport nodeport local clusterip clusterip hairpin direct out ping mesh".split()
"""Of the connections that are made; the common ones twice."""
Seen: TypeAlias = ConntrackEntry | Record
address = cache(ip_address)
REPLIED = CtStatus.SEEN_REPLY | CtStatus.ASSURED | CtStatus.CONFIRMED


def tuple5(src: str, sport: int, dst: str, dport: int, protocol: int = 6) -> Tuple5:
    if protocol == Protocol.ICMP:
        return Tuple5(
            src=address(src),
            dst=address(dst),
            protocol=1,
            sport=sport,
            icmp_type=8,
            icmp_code=0,
        )
    return Tuple5(src=address(src), dst=address(dst), protocol=protocol, sport=sport, dport=dport)


def entry(taken: Tuple5, let_out: Tuple5 | None = None, **more: object) -> ConntrackEntry:
    let_out = let_out or taken
    values: dict = {"status": REPLIED, "tcp_state": "ESTABLISHED" if taken.protocol == 6 else ""}
    return ConntrackEntry(orig=taken, reply=let_out.inverted(), **{**values, **more})


@dataclass
class Cluster:
    """Makes connections, and remembers which entries belong together."""

    nodes: int
    rng: random.Random
    chains: list[list[tuple[Place, ConntrackEntry]]] = field(default_factory=list)
    """Each connection's entries, in the order in which its packets pass."""
    kept: list[list[Seen | None]] = field(default_factory=list)
    """Beside them, what the join is given of them; None: the entry was lost."""
    truth: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By the identity of what the join is given: its chain, and where it stands in it."""
    contested: set[int] = field(default_factory=set)
    port: int = 0

    def node_ip(self, node: int) -> str:
        return str(IPv4Address(0x0A8E0000 + node + 1))

    def pod_ip(self, node: int, pod: int) -> str:
        return str(IPv4Address(0x0A280000 + node * 256 + pod + 2))

    def owner(self, address: IPAddress) -> str:
        value = int(address)
        if value - 0x0A8E0001 in range(self.nodes):
            return f"n{value - 0x0A8E0001}"
        if address in ip_network("10.40.0.0/14") and (value - 0x0A280000) // 256 < self.nodes:
            return f"n{(value - 0x0A280000) // 256}"
        return ""

    def client(self) -> tuple[str, int]:
        """An address and port that no connection had before."""
        self.port += 1
        return str(IPv4Address(0xC6330000 + self.port // 60000)), 1024 + self.port % 60000

    def snat_port(self) -> int:
        return 1024 + self.port % 60000

    def host(self, node: int) -> Place:
        return Place(node=f"n{node}")

    def pod(self, node: int, pod: int) -> Place:
        return Place(node=f"n{node}", pod=f"default/p{node}-{pod}")

    def add(self, *chain: tuple[Place, ConntrackEntry]) -> int:
        """One connection's entries, in the order in which its packets pass."""
        self.chains.append(list(chain))
        return len(self.chains) - 1

    def connect(self) -> None:
        """One connection of some shape."""
        rng = self.rng
        a, b = rng.randrange(self.nodes), rng.randrange(self.nodes)
        pod = rng.randrange(40)
        protocol = rng.choice((6, 6, 6, 17))
        server = self.pod_ip(b, pod)
        inside = [self.pod(b, pod)] if rng.random() < 0.3 else []
        shape = rng.choice(SHAPES)
        client, port = self.client()
        mine = self.pod_ip(a, rng.randrange(40, 80))
        vip = f"10.43.0.{rng.randrange(1, 200)}"
        if shape == "nodeport":
            first = tuple5(client, port, self.node_ip(a), 30080, protocol)
            wire = tuple5(self.node_ip(a), self.snat_port(), server, 8080, protocol)
            # The source port must be free on the wire towards this server.
            behind = [self.host(b)] if a != b else []
            self.add(
                (self.host(a), entry(first, wire)),
                *((place, entry(wire)) for place in behind + inside),
            )
        elif shape == "local":
            first = tuple5(client, port, self.node_ip(b), 30081, protocol)
            wire = tuple5(client, port, server, 8080, protocol)
            self.add((self.host(b), entry(first, wire)), *((p, entry(wire)) for p in inside))
        elif shape == "clusterip":
            sport = self.snat_port()
            mine = str(IPv4Address(0x0A280000 + a * 256 + 100 + self.port // 60000))
            first = tuple5(mine, sport, vip, 80, protocol)
            wire = tuple5(mine, sport, server, 8080, protocol)
            before = [self.pod(a, 1000)] if rng.random() < 0.3 else []
            behind = [self.host(b)] if a != b else []
            self.add(
                *((place, entry(first)) for place in before),
                (self.host(a), entry(first, wire)),
                *((place, entry(wire)) for place in behind + inside),
            )
        elif shape == "hairpin":
            sport = self.snat_port()
            first = tuple5(server, sport, vip, 80, protocol)
            wire = tuple5(self.node_ip(b), sport, server, 8080, protocol)
            places = inside * 2
            self.add(
                *((p, entry(first)) for p in places[:1]),
                (self.host(b), entry(first, wire)),
                *((p, entry(wire)) for p in places[1:]),
            )
        elif shape == "direct":
            wire = tuple5(mine, self.snat_port(), server, 9090 + self.port % 7, protocol)
            self.add(*((self.host(n), entry(wire)) for n in dict.fromkeys((a, b))))
        elif shape == "out":
            first = tuple5(mine, self.snat_port(), "203.0.113.9", 443, protocol)
            self.add(
                (
                    self.host(a),
                    entry(first, replace(first, src=ip_address(self.node_ip(a)))),
                )
            )
        elif shape == "mesh":
            # Both pods' proxies: each app's connection is redirected to the proxy inside the pod
            # (REDIRECT; 127.0.0.1 in OUTPUT), and the proxy's own goes on from there.
            sport = self.snat_port()
            mine = str(IPv4Address(0x0A280000 + a * 256 + 180 + self.port // 60000))
            first = tuple5(mine, sport, vip, 80)
            self.add(
                (self.pod(a, 1001), entry(first, tuple5(mine, sport, "127.0.0.1", 15001))),
            )
            taken = tuple5(client, port, self.node_ip(a), 30083)
            wire = tuple5(self.node_ip(a), sport, server, 8080)
            self.add(
                (self.host(a), entry(taken, wire)),
                *((self.host(n), entry(wire)) for n in (b,) if b != a),
                (self.pod(b, pod), entry(wire, replace(wire, dport=15006))),
            )
            self.add((self.pod(b, pod), entry(tuple5("127.0.0.6", sport, server, 8080))))
        else:
            wire = tuple5(client, port, server, 0, Protocol.ICMP)
            self.add((self.host(b), entry(wire)), *((p, entry(wire)) for p in inside))

    def reuse(self) -> None:
        """A client that used its port again, through another node, before the old entry ended;
        its address is kept, so that both lead into one tuple."""
        if self.nodes < 3:
            return
        client, port = self.client()
        a, b, c = self.rng.sample(range(self.nodes), 3)
        server = self.pod_ip(c, 1)
        wire = tuple5(client, port, server, 8080)
        old = tuple5(client, port, self.node_ip(a), 30082)
        new = tuple5(client, port, self.node_ip(b), 30082)
        stale = entry(old, wire, tcp_state="TIME_WAIT")
        self.contested.add(self.add((self.host(a), stale)))
        self.contested.add(self.add((self.host(b), entry(new, wire)), (self.host(c), entry(wire))))

    def finish(self, lost: float, as_records: bool) -> list[PlaceEntries]:
        """The tables, some entries lost on the way, in no order."""
        tables: dict[Place, list[Seen]] = defaultdict(list)
        tuples: set[tuple[Place, Tuple5, Tuple5]] = set()
        for number, chain in enumerate(self.chains):
            kept: list[Seen | None] = []
            for index, (place, one) in enumerate(chain):
                if self.rng.random() < lost:
                    kept.append(None)
                    continue
                key = (place, one.orig, one.reply)
                assert key not in tuples, "the generator made a tuple twice"
                tuples.add(key)
                seen = (record_of(one) if as_records else None) or one
                kept.append(seen)
                tables[place].append(seen)
                self.truth[id(seen)] = (number, index)
            self.kept.append(kept)
        made: list[PlaceEntries] = []
        for place, found in tables.items():
            self.rng.shuffle(found)
            made.append(PlaceEntries(place=place, entries=found, complete=not lost))
        self.rng.shuffle(made)
        return made

    def check(self, joined: list[Connection]) -> None:
        """Every true pair that the remaining entries prove, no false one, each entry once."""
        together: dict[int, int] = {}
        for number, connection in enumerate(joined):
            for half in connection.halves:
                chain, index = self.truth[id(half.seen)]
                assert half.place == self.chains[chain][index][0]
                assert id(half.seen) not in together, "an entry in two connections"
                together[id(half.seen)] = number
            origins = {self.truth[id(half.seen)][0] for half in connection.halves}
            if len(origins) > 1:
                # The rival was lost, and nothing but the state tells that these are two.
                assert origins <= self.contested, f"a false pair: {connection}"
                assert any(seen is None for kept in self.kept for seen in kept)
                assert Doubt.STATE in connection.doubts
            elif not origins & self.contested:
                places = [self.truth[id(half.seen)][1] for half in connection.halves]
                assert places == sorted(places), f"out of order: {connection}"
        assert together.keys() == self.truth.keys(), "an entry is missing"
        for number, chain in enumerate(self.chains):
            if number in self.contested:
                continue
            group: int | None = None
            for (_, one), seen in zip(chain, self.kept[number], strict=True):
                if seen is None:
                    if one.orig != one.reply.inverted():
                        group = None  # the only proof that both sides are one is lost
                    continue
                found = together[id(seen)]
                assert group is None or group == found, f"a true pair was not found: {chain}"
                group = found


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    nodes=st.integers(1, 6),
    count=st.integers(1, 60),
    reused=st.integers(0, 3),
    lost=st.sampled_from((0.0, 0.0, 0.1, 0.4)),
    as_records=st.booleans(),
)
def test_every_true_pair_and_no_false_one(
    seed: int, nodes: int, count: int, reused: int, lost: float, as_records: bool
) -> None:
    cluster = Cluster(nodes, random.Random(seed))
    for _ in range(count):
        cluster.connect()
    for _ in range(reused):
        cluster.reuse()
    tables = cluster.finish(lost, as_records)
    joined = join_connections(tables, cluster.owner)
    cluster.check(joined)
    if not lost:
        assert not any(connection.unseen for connection in joined)
        assert not any(connection.doubts for connection in joined)


def test_a_hundred_nodes_and_a_hundred_thousand_connections() -> None:
    cluster = Cluster(100, random.Random(4))
    for _ in range(100_000):
        cluster.connect()
    for _ in range(100):
        cluster.reuse()
    tables = cluster.finish(0.02, as_records=True)
    total = sum(len(table.entries) for table in tables)
    start = time.process_time()
    joined = join_connections(tables, cluster.owner)
    seconds = time.process_time() - start
    print(f"{total} entries, {len(joined)} connections in {seconds:.2f} s of CPU")
    cluster.check(joined)


A, B = Place(node="a"), Place(node="b")
NODES = {"10.142.0.1": "a", "10.142.0.2": "b", "10.40.0.5": "a", "10.40.1.5": "b"}


def owner(address: IPAddress) -> str:
    return NODES.get(str(address), "")


OUTSIDE = tuple5("198.51.100.7", 4000, "10.142.0.1", 30080)
WIRE = tuple5("10.142.0.1", 5000, "10.40.1.5", 8080)


def join(*tables: tuple[Place, list[ConntrackEntry]], complete: bool = True) -> list[Connection]:
    return join_connections(
        [PlaceEntries(place=place, entries=found, complete=complete) for place, found in tables],
        owner,
    )


def test_a_nodeport_connection_over_two_nodes() -> None:
    (one,) = join((B, [entry(WIRE)]), (A, [entry(OUTSIDE, WIRE)]))
    assert [half.place for half in one.halves] == [A, B]
    assert (one.first, one.last) == (OUTSIDE, WIRE)
    assert (one.unseen, one.contested, one.doubts) == ((), (), ())


def test_the_lost_half_is_named_when_its_node_was_read_whole() -> None:
    (one,) = join((A, [entry(OUTSIDE, WIRE)]), (B, []))
    assert [(gone.node, gone.tuple5) for gone in one.unseen] == [("b", WIRE)]
    (one,) = join((B, [entry(WIRE)]), (A, []))
    assert [gone.node for gone in one.unseen] == ["a"]
    (one,) = join((A, [entry(OUTSIDE, WIRE)]), (B, []), complete=False)
    assert one.unseen == ()
    (one,) = join((A, [entry(OUTSIDE, WIRE)]))
    assert one.unseen == (), "b was not read at all"


def test_halves_that_disagree() -> None:
    (one,) = join((A, [entry(OUTSIDE, WIRE)]), (B, [entry(WIRE, tcp_state="TIME_WAIT")]))
    assert one.doubts == (Doubt.STATE,)
    (one,) = join((A, [entry(OUTSIDE, WIRE, status=8)]), (B, [entry(WIRE)]))
    assert one.doubts == (Doubt.REPLIES,)


def test_an_entry_that_an_answer_made() -> None:
    (one,) = join((A, [entry(OUTSIDE, WIRE)]), (B, [entry(WIRE.inverted())]))
    assert one.doubts == (Doubt.REVERSED,)
    assert (one.first, one.last) == (OUTSIDE, WIRE)
    direct = tuple5("10.40.0.5", 7000, "10.40.1.5", 8080)
    (one,) = join((A, [entry(direct, started=5)]), (B, [entry(direct.inverted(), started=9)]))
    assert (one.first, one.last) == (direct, direct)
    assert [half.reversed for half in one.halves] == [False, True]


def test_what_cannot_be_told_is_left_apart() -> None:
    wire = tuple5("198.51.100.7", 4000, "10.40.1.5", 8080)
    other = replace(OUTSIDE, dst=ip_address("10.142.0.3"))
    tables = [(A, [entry(OUTSIDE, wire)]), (Place(node="c"), [entry(other, wire)])]
    joined = join(*tables, (B, [entry(wire)]))
    assert [len(one.halves) for one in joined] == [1, 1, 1]
    assert all(len(one.contested) == 2 for one in joined)


def test_zones_with_the_same_addresses_are_left_apart() -> None:
    joined = join((B, [entry(WIRE, zone=1), entry(WIRE, zone=2)]), (A, [entry(OUTSIDE, WIRE)]))
    assert [len(one.halves) for one in joined] == [1, 1, 1]
    assert all(one.contested for one in joined)
