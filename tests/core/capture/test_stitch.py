"""Packets of many taps → connections."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gketrace.capture.clock import ClockBounds, observe
from gketrace.capture.conversations import Evidence, Tracked
from gketrace.capture.packets import CapturedPacket
from gketrace.capture.passages import Fate, Repeat, Window
from gketrace.capture.segments import sightings
from gketrace.capture.stitch import Stitched, StitchedConnection, stitch_packets
from gketrace.conntrack import ConntrackEntry
from gketrace.packet import Tuple5, parse_address
from tests.core.capture import frames
from tests.core.capture.network import (
    ACK,
    ENTRY,
    FIN,
    INSIDE,
    MS,
    NODE_PORT,
    PSH,
    RST,
    SYN,
    TAPS,
    US,
    Network,
    stamp,
    syn_options,
)

CLIENT, FRONT = ("203.0.113.10", 40000), ("10.142.0.7", 31830)
MASKED, POD = ("10.142.0.7", 5012), ("10.40.0.6", 8080)
OUTSIDE, INSIDE_ENDS = (CLIENT, FRONT), (MASKED, POD)


class Talk:
    """One TCP connection over a network."""

    def __init__(
        self,
        network: Network,
        name: str = "a",
        *,
        outside: Any = OUTSIDE,
        inside: Any = INSIDE_ENDS,
        client_seq: int = 1000,
        server_seq: int = 9000,
        begin: int = 0,
        stamps: bool = True,
        identity: int = 100,
    ) -> None:
        self.network = network
        self.name = name
        self.ends = outside, inside
        self.seq = {False: client_seq, True: server_seq}
        self.time = begin
        self.stamps = stamps
        self.identity = identity

    def send(
        self, flags: int, size: int = 0, *, back: bool = False, again: bool = False, **how: Any
    ) -> int:
        self.time += how.pop("after", MS)
        self.identity += 1
        if again:
            self.seq[back] -= size + bool(flags & (SYN | FIN))
        options = b""
        if self.stamps:
            value = (self.time // MS + (7000 if back else 3000)) & 0xFFFFFFFF
            options = syn_options(value) if flags & SYN else stamp(value)
        segment = {
            "flags": flags,
            "seq": self.seq[back] & 0xFFFFFFFF,
            "ack": self.seq[not back] & 0xFFFFFFFF if flags & ACK else 0,
            "options": options,
            "payload": b"x" * size,
            "identity": self.identity & 0xFFFF if self.stamps else 0,
        }
        self.seq[back] += size + bool(flags & (SYN | FIN))
        return self.network.hand_over(self.name, self.time, segment, *self.ends, back=back, **how)

    def open(self) -> None:
        self.send(SYN)
        self.send(SYN | ACK, back=True)
        self.send(ACK)

    def exchange(self) -> None:
        self.send(PSH | ACK, 80)
        self.send(ACK, back=True)
        self.send(PSH | ACK, 200, back=True)
        self.send(ACK)

    def close(self) -> None:
        self.send(FIN | ACK)
        self.send(FIN | ACK, back=True)
        self.send(ACK)


def stitched(network: Network, **given: Any) -> Stitched:
    packets, _ = network.sorted()
    end = max(p.time_ns for p in packets) + 10**10
    windows = {tap: Window(begin=0, end=end) for tap in TAPS.values()}
    return stitch_packets(packets, **{"windows": windows, **given})


def only(network: Network, **given: Any) -> StitchedConnection:
    (found,) = stitched(network, **given).connections
    return found


def names(connection: StitchedConnection) -> list[str]:
    return [
        f"{s.tap.node}/{s.tap.interface} {s.direction.value}" for s in connection.there.stations
    ]


def test_one_connection_through_dnat_and_masquerade() -> None:
    network = Network()
    talk = Talk(network)
    talk.open()
    talk.exchange()
    talk.close()
    found = only(network)
    assert names(found) == [
        "n33/eth0 in",
        "n33/eth0 out",
        "n2j/eth0 in",
        "n2j/cbr0 out",
        "n2j/veth1 out",
        "n2j/eth0 in",
    ]
    assert [s.tap.interface for s in found.back.stations] == [
        "eth0",
        "veth1",
        "cbr0",
        "eth0",
        "eth0",
        "eth0",
    ]
    assert str(found.first) == "203.0.113.10:40000 → 10.142.0.7:31830 tcp"
    assert str(found.last) == "10.142.0.7:5012 → 10.40.0.6:8080 tcp"
    assert Evidence.SEQUENCE in found.evidence
    assert found.client_known
    assert {len(unit.passages) for unit in found.there.units + found.back.units} == {6}
    assert (found.there.bytes, found.back.bytes) == (80, 200)
    assert [(e.reset, e.by_client) for e in found.endings] == [(False, True), (False, False)]
    assert found.endings[1].station.tap == TAPS["pod"]
    assert found.answered_in == 1180 * US


def test_a_syn_that_dies_is_last_seen_where_it_was() -> None:
    network = Network()
    talk = Talk(network)
    talk.send(SYN, until=3)
    talk.send(SYN, again=True, after=10**9, until=3)
    found = only(network)
    assert names(found)[-1] == "n2j/eth0 in"
    assert [u.repeat for u in found.there.units] == [Repeat.NOTHING, Repeat.RETRANSMISSION]
    assert found.answer is None


def test_a_lost_segment_and_its_retransmission() -> None:
    network = Network()
    talk = Talk(network)
    talk.open()
    talk.send(PSH | ACK, 500, until=2)
    talk.send(PSH | ACK, 500, again=True, after=200 * MS)
    talk.send(ACK, back=True)
    found = only(network)
    lost, again = (unit for unit in found.there.units if unit.first.size)
    assert (lost.fate, lost.last.station) == (Fate.LOST, 1)
    assert (again.fate, again.repeat) == (Fate.ARRIVED, Repeat.RETRANSMISSION)


def test_loss_is_not_claimed_where_a_tap_lost_packets_or_ended() -> None:
    network = Network()
    talk = Talk(network)
    talk.open()
    talk.send(PSH | ACK, 500, unseen=(5,))
    packets, _ = network.sorted()
    end = packets[-1].time_ns + 10**10
    dropped = {TAPS["pod"]: Window(begin=0, end=end, complete=False)}
    assert stitch_packets(packets, windows=dropped).connections[0].there.units[-1].fate is (
        Fate.UNKNOWN
    )
    assert stitch_packets(packets).connections[0].there.units[-1].fate is Fate.UNKNOWN


@pytest.mark.parametrize(("begin", "early"), [(0, False), (3, True)])
def test_who_sent_a_reset(begin: int, early: bool) -> None:
    """From the pod; or from its node, on its behalf: no tap of the pod has seen it."""
    network = Network()
    talk = Talk(network)
    talk.open()
    talk.send(PSH | ACK, 10)
    talk.send(RST, back=True, begin=begin)
    (ending,) = only(network).endings
    assert (ending.reset, ending.by_client, ending.early) == (True, False, early)
    assert ending.station.tap == (TAPS["node"] if early else TAPS["pod"])


def test_ports_that_are_used_again_are_two_connections() -> None:
    network = Network()
    for number, begin in enumerate((0, 50 * MS)):
        talk = Talk(
            network,
            str(number),
            client_seq=1000 + number * 77,
            server_seq=5000 + number,
            begin=begin,
            identity=number * 100,
        )
        talk.open()
        talk.exchange()
        talk.close()
    assert [len(c.there.units) for c in stitched(network).connections] == [6, 6]


def test_middle_of_a_connection() -> None:
    """No SYN was captured: its packets say that the two sides of the NAT are one."""
    network = Network()
    talk = Talk(network)
    talk.exchange()
    found = only(network)
    assert found.evidence == {Evidence.TUPLES, Evidence.PACKET}
    assert not found.client_known
    assert {len(unit.passages) for unit in found.there.units + found.back.units} == {6}


def datagram(*ends: Any, payload: bytes, **rest: Any) -> bytes:
    return frames.udp(*ends, payload, **rest)


def test_datagrams_over_ipv6_have_only_conntrack() -> None:
    """No identification, and the same payload: what NAT did is in the entry alone."""
    network, entries = Network(), []
    door, pod = ("fd00:43::21", 53), ("fd00:40::10", 5353)
    for port in (40000, 40001, 40002):
        client, masked = ("fd00:142::9", port), ("fd00:142::7", port - 30000)
        network.hand_over("a", 0, {"payload": b"q"}, (client, door), (masked, pod), build=datagram)
        orig, reply = (
            Tuple5(
                src=parse_address(one[0]),
                dst=parse_address(other[0]),
                protocol=17,
                sport=one[1],
                dport=other[1],
            )
            for one, other in ((client, door), (pod, masked))
        )
        entries.append(Tracked(node=ENTRY, entry=ConntrackEntry(orig=orig, reply=reply)))
    assert all(connection.contested for connection in stitched(network).connections)
    found = stitched(network, entries=entries).connections
    assert [len(connection.there.stations) for connection in found] == [6, 6, 6]
    assert [c.first.sport for c in found] == [c.entries[0].entry.orig.sport for c in found]
    assert not any(connection.contested for connection in found)


def test_datagrams_by_identification_and_payload_or_by_conntrack() -> None:
    network = Network()
    for port in (40000, 40001):  # the same payload twice, at the same time, without an id
        outside = (("203.0.113.10", port), FRONT)
        inside = (("10.142.0.7", port - 30000), POD)
        network.hand_over("a", 0, {"payload": b"ping"}, outside, inside, build=datagram)
    found = stitched(network).connections
    assert len(found) == 4
    assert all(connection.contested for connection in found)

    def half(one: Any, other: Any) -> Tuple5:
        return Tuple5(
            src=parse_address(one[0]),
            dst=parse_address(other[0]),
            protocol=17,
            sport=one[1],
            dport=other[1],
        )

    entries = [
        Tracked(
            node=ENTRY,
            entry=ConntrackEntry(
                orig=half(("203.0.113.10", port), FRONT),
                reply=half(POD, ("10.142.0.7", port - 30000)),
            ),
        )
        for port in (40000, 40001)
    ]
    found = stitched(network, entries=entries).connections
    assert [len(connection.there.stations) for connection in found] == [6, 6]
    assert all(Evidence.CONNTRACK in connection.evidence for connection in found)
    assert [connection.entries for connection in found] == [(entry,) for entry in entries]
    assert not any(connection.contested for connection in found)
    # Of one of them alone: the other's two sides stay apart, and say why.
    found = stitched(network, entries=entries[:1]).connections
    assert [(len(c.there.stations), c.contested) for c in found] == [
        (6, False),
        (1, True),
        (5, True),
    ]
    # An entry of a node that neither side was seen at says nothing of them.
    elsewhere = [replace(entry, node="n3") for entry in entries]
    assert len(stitched(network, entries=elsewhere).connections) == 4

    network = Network()
    for number in range(2):
        segment = {"payload": b"ping", "identity": 7 + number}
        outside = (("203.0.113.10", 40000 + number), FRONT)
        inside = (("10.142.0.7", 10000 + number), POD)
        network.hand_over("a", 0, segment, outside, inside, build=datagram)
    found = stitched(network).connections
    assert [len(connection.there.stations) for connection in found] == [6, 6]
    assert not any(connection.contested for connection in found)


def test_echo_whose_identifier_is_rewritten() -> None:
    def build(
        source: str, sport: int, target: str, dport: int, *, back: bool, **rest: Any
    ) -> bytes:
        number = dport if back else sport
        return frames.icmp(source, target, 0 if back else 8, 0, number << 16 | 1, b"p" * 56, **rest)

    network = Network()
    outside, inside = (CLIENT, ("10.142.0.7", 0)), (("10.142.0.7", 77), ("10.40.0.6", 0))
    for back in (False, True):
        network.hand_over(
            "a",
            back * MS,
            {"back": back, "identity": 5 + back},
            outside,
            inside,
            build=build,
            back=back,
        )
    found = only(network)
    assert len(found.there.stations) == len(found.back.stations) == 6
    assert found.answered_in is not None


def test_an_error_belongs_to_the_connection_it_quotes() -> None:
    network = Network()
    talk = Talk(network)
    talk.open()
    talk.send(PSH | ACK, 1400, back=True, until=4)
    large = network.captured[-1]
    quoted = large.data[14:42]
    for place, source, target in (
        (TAPS["node"], "10.142.0.8", "10.40.0.6"),
        (TAPS["pod"], "10.142.0.8", "10.40.0.6"),
    ):
        packet = frames.icmp(source, target, 3, 4, 1400, quoted)
        frame = frames.ethernet(packet)
        network.captured.append(
            CapturedPacket(
                tap=place,
                time_ns=large.time_ns + US,
                data=frame,
                original_length=len(frame),
            )
        )
        network.truth.append(("error", 0))
    found = stitched(network)
    (error,) = found.connections[0].errors
    assert (error.mtu, error.source, len(error.seen)) == (1400, "10.142.0.8", 2)
    assert not found.stray_errors


def merge(packets: list[CapturedPacket], at: set[str]) -> list[CapturedPacket]:
    """What GRO makes of neighbours: segments of one flow that follow each other at a tap."""
    made: list[CapturedPacket] = []
    last: dict[tuple[object, ...], tuple[int, int]] = {}
    for packet in packets:
        (one,), _, _ = sightings([packet])
        key = (packet.tap, packet.direction, one.flow)
        known = last.get(key)
        if packet.tap.interface in at and one.size and known is not None and known[1] == one.seq:
            head = made[known[0]]
            payload = packet.data[-one.size :]
            data = bytearray(head.data + payload)
            data[16:18] = (len(data) - 14).to_bytes(2, "big")
            made[known[0]] = CapturedPacket(
                tap=head.tap,
                time_ns=head.time_ns,
                data=bytes(data),
                original_length=len(data),
                direction=head.direction,
            )
            last[key] = known[0], one.end
            continue
        made.append(packet)
        last[key] = (len(made) - 1, one.end) if one.size else (-1, -1)
    return made


@pytest.mark.parametrize("at", [{"eth0"}, {"veth1", "cbr0"}])
def test_merged_segments_are_found_by_their_range(at: set[str]) -> None:
    network = Network()
    talk = Talk(network)
    talk.open()
    for _ in range(6):
        talk.send(ACK, 1000, after=5 * US)
    talk.send(ACK, back=True)
    packets, _ = network.sorted()
    merged = merge(packets, at)
    assert len(merged) < len(packets)
    end = packets[-1].time_ns + 10**10
    windows = {tap: Window(begin=0, end=end) for tap in TAPS.values()}
    (found,) = stitch_packets(merged, windows=windows).connections
    assert found.there.bytes == 6000
    assert all(unit.fate is Fate.ARRIVED for unit in found.there.units)
    assert not any(unit.repeat is not Repeat.NOTHING for unit in found.there.units)
    assert any(not unit.whole for unit in found.there.units)


@st.composite
def traffic(draw: st.DrawFn) -> Network:
    """Several connections at once and one after another, with loss, retransmission, reordering,
    the same payloads, the same ports, and skewed clocks."""
    skew = {node: draw(st.integers(-(10**9), 10**9)) for node in (ENTRY, INSIDE)}
    network = Network(skew=skew, delay=draw(st.integers(1, 50)) * US)
    # Two with the same first sequence numbers are one as far as anybody can tell.
    seqs = draw(st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8, unique=True))
    clock = 0
    for number in range(draw(st.integers(1, 4))):
        port = draw(st.sampled_from((40000, 40001)))
        begin = clock if draw(st.booleans()) else 0
        if begin == 0:
            port = 41000 + number
        talk = Talk(
            network,
            str(number),
            outside=(("203.0.113.10", port), FRONT),
            inside=(("10.142.0.7", port - 30000), POD),
            client_seq=seqs[2 * number],
            server_seq=seqs[2 * number + 1],
            begin=begin,
            stamps=draw(st.booleans()),
            identity=number * 1000,
        )
        if draw(st.integers(0, 3)) == 0:
            talk.send(SYN, until=draw(st.integers(1, 5)))
            talk.send(SYN, again=True, after=10**9)
        else:
            talk.send(SYN)
        talk.send(SYN | ACK, back=True)
        talk.send(ACK)
        for _ in range(draw(st.integers(0, 4))):
            size, back = draw(st.sampled_from((1, 100))), draw(st.booleans())
            if draw(st.integers(0, 4)) == 0:
                talk.send(PSH | ACK, size, back=back, until=draw(st.integers(1, 5)))
                talk.send(PSH | ACK, size, back=back, again=True, after=200 * MS)
            else:
                talk.send(PSH | ACK, size, back=back)
            talk.send(ACK, back=not back)
        if draw(st.booleans()):
            talk.close()
        clock = max(clock, talk.time + 10 * MS)
    return network


@given(traffic())
@settings(max_examples=40, deadline=None)
def test_what_is_stitched_is_what_was_sent(network: Network) -> None:
    raw, truth = network.sorted()
    bounds = ClockBounds()
    observe(bounds, sightings(raw)[0])
    clocks = bounds.clocks((ENTRY, INSIDE), ENTRY)
    assert not clocks.contradiction
    ahead = network.skew[INSIDE] - network.skew[ENTRY]
    offset = clocks.offsets[INSIDE]
    if offset.bound_ns is None:  # without timestamps, a repeated SYN tells nothing
        network.captured = [
            replace(packet, time_ns=packet.time_ns - network.skew[packet.tap.node])
            for packet in network.captured
        ]
        raw, truth = network.sorted()
    else:
        assert abs(offset.ahead_ns - ahead) <= offset.bound_ns
    order = sorted(range(len(raw)), key=lambda n: clocks.corrected(raw[n].tap.node, raw[n].time_ns))
    packets = [
        replace(raw[n], time_ns=clocks.corrected(raw[n].tap.node, raw[n].time_ns)) for n in order
    ]
    truth = [truth[n] for n in order]
    end = packets[-1].time_ns + 10**10
    windows = {tap: Window(begin=0, end=end) for tap in TAPS.values()}
    found = stitch_packets(packets, windows=windows, clocks=clocks)
    whose = [
        {truth[p.number][0] for f in (c.there, c.back) for u in f.units for p in u.passages}
        for c in found.connections
    ]
    assert all(len(one) == 1 for one in whose)
    assert len(whose) == len({name for name, _ in truth})
    for connection in found.connections:
        for flow in (connection.there, connection.back):
            for unit in flow.units:
                which = {truth[passage.number] for passage in unit.passages}
                assert len(which) == 1
                (key,) = which
                assert len(unit.passages) == len(network.reach[key])
                whole = len(network.reach[key]) == len(NODE_PORT)
                furthest = len(flow.stations) == len(NODE_PORT)
                if furthest:
                    assert (unit.fate is Fate.ARRIVED) == whole
