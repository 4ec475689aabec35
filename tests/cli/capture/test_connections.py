"""Stitched connections as text, JSON and packet comments."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import jsonschema

from gketrace.capture.clock import ClockBounds
from gketrace.capture.packets import CapturedPacket, Direction
from gketrace.capture.passages import Window
from gketrace.capture.plan import Route, Wanted, make_plan
from gketrace.capture.verdicts import State, failed, state_of
from gketrace.errors import ExitCode
from gketrace_cli.capture.connection_document import connection_document
from gketrace_cli.capture.connection_words import packet_comments
from gketrace_cli.capture.connections import draw_connections, exit_code
from gketrace_cli.capture.stitching import Collection, collect_packets
from gketrace_cli.render.documents import envelope
from gketrace_cli.render.layout import Page
from tests.core.capture import frames
from tests.core.capture.network import ACK, ENTRY, INSIDE, PSH, RST, SYN, TAPS, Network
from tests.core.capture.test_plan import WORLD, node_port
from tests.core.capture.test_stitch import Talk
from tests.core.clusters import Cluster

SECOND = 10**9
SCHEMA = json.loads((Path(__file__).parents[3] / "docs/schema/capture.json").read_text())
NAMES = {ip_address("10.40.0.6"): "pod/default/hello"}


def collected(network: Network, *, whole: bool = True, **given: Any) -> Collection:
    packets, _ = network.sorted()
    end = packets[-1].time_ns + 10 * SECOND
    windows = {tap: Window(begin=0, end=end, complete=whole) for tap in TAPS.values()}
    return collect_packets(packets, windows=windows, reference=ENTRY, **given)


def text(collection: Collection) -> list[str]:
    page = Page(width=100)
    draw_connections(page, collection.stitched, NAMES, collection.clocks)
    return page.text().splitlines()


def state(collection: Collection) -> State:
    (connection,) = collection.stitched.connections
    return state_of(connection)


def test_a_connection_that_works() -> None:
    network = Network(skew={INSIDE: 3 * SECOND})
    talk = Talk(network)
    talk.open()
    talk.exchange()
    talk.close()
    found = collected(network)
    assert state(found) is State.CLOSED
    assert exit_code(found.stitched) is ExitCode.OK
    lines = text(found)
    assert lines[0] == (
        "[1] 203.0.113.10:40000 → 10.142.0.7:31830 tcp, as 10.142.0.7:5012 → 10.40.0.6:8080"
    )
    assert lines[1] == "    (pod/default/hello) tcp: closed"
    assert lines[2].startswith("   n33 eth0        in   ")
    assert lines[2].endswith("203.0.113.10:40000 → 10.142.0.7:31830")
    assert lines[3] == "      rewritten; by sequence numbers"
    assert lines[4] == "   n33 eth0        out  +40 µs           10.142.0.7:5012 → 10.40.0.6:8080"
    assert lines[5:9] == [
        "   n2j eth0        in   +20 µs ± 20 µs",
        "   n2j cbr0        out  +40 µs",
        "   n2j veth1       out  +40 µs",
        "   n2j hello:eth0  in   +40 µs",
    ]
    assert lines[9:] == [
        "   there      6 packets, 80 bytes",
        "   back       4 packets, 200 bytes",
        "   answered   in 1.18 ms",
        "   closed     by 203.0.113.10",
        "   closed     by pod default/hello",
        "",
        "1 connection: 1 closed",
    ]
    assert found.section_comments == (
        "clocks against n33, ahead by (corrected): n2j: +3 s ± 20 µs",
    )
    times = [packet.time_ns for packet in found.packets]
    assert times == sorted(times)


def test_unanswered_and_where_it_died() -> None:
    network = Network()
    talk = Talk(network)
    talk.send(SYN, until=3)
    talk.send(SYN, again=True, after=SECOND, until=3)
    found = collected(network)
    connection = found.stitched.connections[0]
    assert state_of(connection) is State.UNANSWERED
    assert exit_code(found.stitched) is ExitCode.BROKEN
    assert "   there      2 packets, 0 bytes, 1 retransmission" in text(found)


def plan_route() -> Route:
    cluster = Cluster(WORLD)
    cluster.pod("2jdh", "hello-server-579859fb5b-szrwh", "10.40.0.6", 8080)
    (paths,) = cluster.paths(node_port(cluster, "33fg"))
    return make_plan([Wanted(path=path) for path in paths]).routes[0]


def test_the_plan_says_where_it_should_have_gone_and_what_rewrote_it() -> None:
    route = plan_route()
    network = Network()
    talk = Talk(network)
    talk.send(SYN, until=3)
    talk.send(SYN, again=True, after=SECOND, until=3)
    real = {"n33": "33fg", "n2j": "2jdh"}
    network.captured = [
        replace(p, tap=replace(p.tap, node=real[p.tap.node])) for p in network.captured
    ]
    packets, _ = network.sorted()
    end = packets[-1].time_ns + 10 * SECOND
    taps = [replace(tap, node=real[tap.node]) for tap in TAPS.values()]
    late = {tap: Window(begin=packets[0].time_ns + 1, end=end) for tap in taps}
    (unsure,) = collect_packets(packets, routes=[route], windows=late).stitched.connections
    assert unsure.expected == ()  # the tap behind was opened after the first packet
    windows = {tap: Window(begin=0, end=end) for tap in taps}
    found = collect_packets(packets, routes=[route], reference="33fg", windows=windows)
    lines = text(found)
    assert "      DNAT to 10.40.0.6:8080 by KUBE-SEP-GNGNYGTEG254KWMX:2" in lines
    assert "      SNAT from 10.142.0.7:* by KUBE-POSTROUTING:3" in lines
    died = "2 packets last seen in at 2jdh eth0, not out at 2jdh cbr0 (hop 4 of the plan)"
    assert lines[-3] == f"   died       {died}"
    comments = packet_comments(found.stitched)
    assert "MASQUERADE" in comments[1]
    assert comments[0].startswith("connection 1, hop 1 of 3")


def test_an_answer_that_dies_on_its_way_back() -> None:
    network = Network()
    talk = Talk(network)
    talk.send(SYN)
    talk.send(SYN | ACK, back=True, until=4)
    found = collected(network)
    (connection,) = found.stitched.connections
    assert [s.tap.interface for s in connection.back.stations] == ["eth0", "veth1", "cbr0", "eth0"]
    assert connection.answer is not None


def test_refused_reset_and_stalled() -> None:
    network = Network()
    talk = Talk(network)
    talk.send(SYN)
    talk.send(RST | ACK, back=True)
    assert state(collected(network)) is State.REFUSED
    assert "   reset      by pod default/hello" in text(collected(network))

    network = Network()
    talk = Talk(network)
    talk.open()
    talk.send(RST, back=True, begin=3)
    assert state(collected(network)) is State.RESET
    assert f"   reset      by node {INSIDE}" in text(collected(network))

    network = Network()
    talk = Talk(network)
    talk.open()
    talk.send(PSH | ACK, 1400, back=True, until=3)
    talk.send(PSH | ACK, 1400, back=True, again=True, after=SECOND, until=3)
    packet = frames.icmp("10.142.0.8", "10.40.0.6", 3, 4, 1400, network.captured[-1].data[14:42])
    network.captured.append(
        CapturedPacket(
            tap=TAPS["bridge"],
            time_ns=network.captured[-1].time_ns + 5,
            data=frames.ethernet(packet),
            original_length=14 + len(packet),
            direction=Direction.OUT,
        )
    )
    network.truth.append(("error", 0))
    found = collected(network)
    assert state(found) is State.STALLED
    assert failed(state(found))
    lines = text(found)
    assert "   died       2 packets back last seen in at n2j cbr0, not out at n2j eth0" in lines
    error = next(line for line in lines if line.startswith("   error"))
    assert error.endswith(
        "ICMP fragmentation needed (MTU 1400) from 10.142.0.8, first seen out at n2j cbr0"
    )


def test_data_that_nobody_acknowledges() -> None:
    """It gets as far as anybody looked, again and again: an ICMP error may be lost behind."""
    network = Network()
    talk = Talk(network)
    talk.open()
    talk.send(PSH | ACK, 80)
    talk.send(ACK, back=True)
    for number in range(3):
        talk.send(PSH | ACK, 1400, back=True, again=number > 0, after=SECOND)
    found = collected(network)
    assert state(found) is State.STALLED
    died = "3 packets back last seen out at n33 eth0, and never acknowledged"
    assert f"   died       {died}" in text(found)
    talk.send(ACK)  # late, but it is
    assert state(collected(network)) is State.OPEN


def test_a_packet_that_goes_round_is_one_packet() -> None:
    """Its TTL gets smaller each time that it comes by."""
    network = Network()
    Talk(network).send(SYN, until=3)
    arrived = network.captured[-1]
    for lap in range(1, 4):
        data = bytearray(arrived.data)
        data[22] -= 2 * lap
        again = replace(arrived, data=bytes(data), time_ns=arrived.time_ns + lap * 40_000)
        network.captured.append(again)
        network.truth.append(network.truth[-1])
    found = collected(network)
    (connection,) = found.stitched.connections
    assert [unit.rounds for unit in connection.there.units] == [4]
    assert connection_document(connection, {})["there"]["rounds"] == 4
    loop = next(line for line in text(found) if line.startswith("   loop"))
    assert loop.startswith("   loop       a packet there came by n2j eth0 4 times, with")


def test_what_was_sent_after_a_reset_does_not_stall() -> None:
    network = Network()
    talk = Talk(network)
    talk.open()
    talk.send(RST, back=True)
    talk.send(PSH | ACK, 1400, back=True, until=3)
    talk.send(PSH | ACK, 1400, back=True, again=True, after=SECOND, until=3)
    assert state(collected(network)) is State.RESET


def test_json_and_what_is_not_certain() -> None:
    network = Network()
    talk = Talk(network)
    talk.open()
    talk.send(PSH | ACK, 10, unseen=(5,))
    found = collected(network, whole=False)
    (connection,) = found.stitched.connections
    document = connection_document(connection, NAMES, found.clocks)
    jsonschema.validate(envelope("CapturedConnection", document), SCHEMA)
    assert document["state"] == "open"
    assert document["server"]["dstName"] == "pod/default/hello"
    assert [s["interface"] for s in document["there"]["stations"]][3:] == ["cbr0", "veth1", "eth0"]
    assert document["there"]["stations"][2]["sinceBoundNs"] == 20_000
    (death,) = document["deaths"]
    assert not death["certain"]
    assert "the capture ended or lost packets there" in death["text"]


def test_an_order_that_clocks_do_not_settle_is_marked() -> None:
    """Two packets of two connections, nearer than the bound."""
    network = Network()
    talk = Talk(network)
    talk.open()
    first, last = network.captured[0], network.captured[-1]
    stray = frames.ethernet(frames.udp("10.0.0.1", 5, "10.0.0.2", 6, b"x", identity=9))
    for tap, ahead in ((first.tap, 0), (last.tap, 5_000)):
        network.captured.append(
            CapturedPacket(
                tap=tap,
                time_ns=last.time_ns + SECOND + ahead,
                data=stray if ahead else stray[:-1] + b"y",
                original_length=len(stray),
                direction=Direction.IN,
            )
        )
        network.truth.append(("x", ahead))
    found = collected(network, bounds=ClockBounds())
    assert found.packets[-1].comment.endswith(
        "order against the packet before is not certain (clocks ± 20 µs)"
    )
