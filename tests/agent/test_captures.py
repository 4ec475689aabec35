"""Captures of a real server on real veth pairs, with the real tcpdump beside."""

from __future__ import annotations

import os
import re
import secrets
import selectors
import signal
import socket
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from gketrace.capture.packets import CapturedPacket, Direction, LinkType, Tap
from gketrace.errors import (
    ExhaustedError,
    ForbiddenError,
    GketraceError,
    NotFoundError,
    UsageError,
)
from gketrace_agent import service as service_module
from gketrace_agent.capture_counts import CAPTURES
from gketrace_agent.capture_finish import FINISHES, Finishes
from gketrace_agent.capture_limits import CaptureLimits
from gketrace_agent.capture_taps import exclusions
from gketrace_agent.config import Config, Limits, Listen
from gketrace_agent.namespaces import OpenTarget
from gketrace_agent.observe.snapshot import Namespace
from gketrace_agent.server import AgentServer
from gketrace_cli.agents import Fleet
from gketrace_cli.capture.reader import CaptureReader
from gketrace_cli.capture.stream import (
    AgentFailed,
    Batch,
    CaptureStream,
    Event,
    Started,
    Statistics,
    TapsEnded,
)
from gketrace_proto.v1alpha1 import agent_pb2_grpc, target_pb2
from gketrace_proto.v1alpha1 import capture_pb2 as pb
from tests.agent.observe.bed import Bed, Netns, veth, wait_until
from tests.agent.pods import gained

NODE = "node-a"
METADATA = "169.254.169.254"
HOST = target_pb2.Target(host=True)
LIMITS = CaptureLimits(seconds=20, packets=50_000, bytes=64 << 20, ring_bytes=128 << 20)


@dataclass
class Wire:
    """Two namespaces, ``here`` and ``there``, with addresses on a veth pair."""

    bed: Bed
    here: Netns
    there: Netns

    def ping(self, count: int, *, size: int = 56, to: str = "10.9.0.2") -> None:
        """Echo requests, each answered before the next one."""

        def send() -> None:
            kind = socket.SOCK_RAW
            with socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP) as sender:
                sender.settimeout(0.2 if to == METADATA else 20)  # nobody answers for that one
                for number in range(count):
                    body = struct.pack("!BBHHH", 8, 0, 0, 77, number) + b"x" * size
                    words = struct.unpack(f"!{len(body) // 2}H", body)
                    folded = sum(words) % 0xFFFF
                    sender.sendto(body[:2] + struct.pack("!H", 0xFFFF - folded) + body[4:], (to, 0))
                    answered = False
                    while not answered:
                        try:
                            answered = sender.recv(2000)[20] == 0
                        except TimeoutError:
                            break

        self.here.inside(send)

    def tagged(self, count: int) -> None:
        """Frames with VLAN tag 5 from the other end; its tag the kernel takes off."""
        mac = self.here.json("ip", "-j", "link", "show", "v0")[0]["address"].replace(":", "")
        frame = bytes.fromhex(mac + "020000000001" + "81006005" + "0800") + bytes(
            [0x45, 0, 0, 28, 0, 0, 0, 0, 64, 1, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1, 8, *[0] * 200]
        )

        def send() -> None:
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
                sender.bind(("v1", 0))
                for _ in range(count):
                    sender.send(frame)

        self.there.inside(send)

    def datagrams(self, count: int, port: int = 4000, size: int = 20) -> None:
        """To the other end, where nobody listens on that port."""

        def send() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for _ in range(count):
                    sender.sendto(b"x" * size, ("10.9.0.2", port))

        self.here.inside(send)


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    bed = Bed()
    try:
        here, there = bed.netns("here"), bed.netns("there")
        veth(here, "v0", there, "v1")
        for one, last, name in ((here, 1, "v0"), (there, 2, "v1")):
            one.run("sysctl", "-q", "-w", "net.ipv6.conf.all.disable_ipv6=1")
            one.ip("addr", "add", f"10.9.0.{last}/24", "dev", name)
        yield Wire(bed, here, there)
    finally:
        bed.close()


@contextmanager
def serving(
    node: Namespace,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    pods: dict[str, Namespace] | None = None,
    **limits: Any,
) -> Iterator[str]:
    """An agent whose host is `node`; its address."""
    path = folder / "agent.sock"

    class Here:
        def __init__(self, *_: object) -> None:
            pass

        @contextmanager
        def open(self, target: Any, **_: object) -> Iterator[OpenTarget]:
            here = node if target is None else (pods or {})[target.name]
            yield OpenTarget(here=here, host=node, known=(here,))

    monkeypatch.setattr(service_module, "NodeNamespaces", Here)
    server = AgentServer(
        Config(
            node=NODE,
            listen=(Listen(path=path),),
            runtime_sockets=(),
            limits=Limits(stall_seconds=1.0, **limits),
            captures=LIMITS,
        )
    )
    server.start()
    try:
        yield f"unix://{path}"
    finally:
        server.stop(0)


@pytest.fixture
def fleet(wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    with (
        serving(wire.here.namespace(), tmp_path, monkeypatch) as address,
        Fleet(timeout=10) as made,
    ):
        made.add_address(NODE, address)
        yield made


def tap(interface: str = "v0", text: str = "", **more: Any) -> pb.CaptureTap:
    return pb.CaptureTap(**{"target": HOST, "interface": interface, "filter": text, **more})


def request(*taps: pb.CaptureTap, **more: Any) -> pb.CaptureRequest:
    limits = pb.CaptureLimits(**{name: more.pop(name) for name in ("seconds", "packets", "bytes")
                                 if name in more})  # fmt: skip
    return pb.CaptureRequest(taps=taps, limits=limits, **more)


@dataclass
class Done:
    events: list[Event]

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def packets(self) -> list[CapturedPacket]:
        return [packet for event in self.of(Batch) for packet in event.batch.packets()]

    @property
    def statistics(self) -> Any:
        """Of the first tap, at the end."""
        return next(iter(self.of(Statistics)[-1].taps.values()))

    @property
    def end(self) -> TapsEnded:
        return self.of(TapsEnded)[-1]

    @property
    def tap(self) -> Tap:
        return self.of(Started)[0].taps[0]


def run(
    fleet: Fleet,
    asked: pb.CaptureRequest,
    traffic: Callable[[], None] | None = None,
    *,
    stop: bool = False,
) -> Done:
    """A whole capture; `traffic` once it has started.  `stop`: the capture ends after that."""
    done = Done([])
    with CaptureStream(fleet, {NODE: asked}) as stream:
        for event in stream.events():
            done.events.append(event)
            if isinstance(event, Started) and traffic is not None:
                traffic()
                if stop:
                    stream.stop()
    return done


@contextmanager
def tcpdump(netns: Netns, file: Path, *words: str) -> Iterator[None]:
    """Writes what tcpdump captures meanwhile."""
    command = [
        *("ip", "netns", "exec", netns.name, "tcpdump", "-Z", "root", "-n", "-U"),
        *("--immediate-mode", "--time-stamp-precision=nano", "-w", str(file), *words),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        while "listening" not in (line := process.stderr.readline()):
            assert line, "tcpdump has ended"
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)


def _packets_of(file: Path) -> int:
    """How many tcpdump has written by now."""
    try:
        with closing(CaptureReader(str(file))) as reader:
            return sum(1 for _ in reader)
    except GketraceError:  # the last one is half there
        return 0


def contents(packets: list[CapturedPacket]) -> list[tuple[bytes, int]]:
    return [(packet.data, packet.original_length) for packet in packets]


@pytest.mark.parametrize(
    ("interface", "text", "to", "words"),
    [
        ("v0", "icmp", "10.9.0.2", ()),
        ("v0", "vlan 5 and icmp", "", ()),
        ("any", "icmp", "10.9.0.2", ("-y", "LINUX_SLL2")),
        ("lo", "icmp", "127.0.0.1", ()),
    ],
)
def test_the_packets_are_tcpdumps(
    fleet: Fleet,
    wire: Wire,
    tmp_path: Path,
    interface: str,
    text: str,
    to: str,
    words: tuple[str, ...],
) -> None:
    file = tmp_path / "tcpdump.pcap"

    def traffic() -> None:
        if not to:
            wire.tagged(60)
            return
        wire.ping(20, to=to)
        wire.ping(10, size=400, to=to)

    # tcpdump does not empty its ring when told to end.
    with tcpdump(wire.here, file, "-i", interface, "-s", "100", *words, text):
        done = run(fleet, request(tap(interface, text, snap_length=100)), traffic, stop=True)
        wait_until(lambda: _packets_of(file) >= len(done.packets))
    with closing(CaptureReader(str(file))) as reader:
        theirs = list(reader)
    assert len(theirs) >= 60
    assert contents(done.packets) == contents(theirs)
    assert done.tap.link_type == theirs[0].tap.link_type
    for one, other in zip(done.packets, theirs, strict=True):
        assert abs(one.time_ns - other.time_ns) < 1_000_000
    if interface == "v0" and not text.startswith("vlan"):
        ways = {packet.direction for packet in done.packets}
        assert ways == {Direction.IN, Direction.OUT}
    if text.startswith("vlan"):
        assert {packet.vlan for packet in done.packets} == {0x6005}
    assert done.end.reason == "finished"
    assert done.statistics.received == len(theirs)
    assert done.statistics.dropped == 0


def test_headers_are_the_default_and_directions_are_chosen(fleet: Fleet, wire: Wire) -> None:
    ways = {pb.CAPTURE_DIRECTION_IN: Direction.IN, pb.CAPTURE_DIRECTION_OUT: Direction.OUT}
    asked = request(*(tap(text="icmp", direction=way) for way in ways))
    done = run(fleet, asked, lambda: wire.ping(5, size=500), stop=True)
    assert len(done.packets) == 10
    assert {(p.tap.index, p.direction) for p in done.packets} == set(enumerate(ways.values()))
    assert {(len(p.data), p.original_length) for p in done.packets} == {(128, 542)}


def test_limits_are_exact_and_the_servers(fleet: Fleet, wire: Wire) -> None:
    counted = run(fleet, request(tap(text="udp"), packets=7), lambda: wire.datagrams(40))
    assert len(counted.packets) == 7
    assert counted.end.reason == "packets"

    full = run(fleet, request(tap(text="udp"), bytes=1000), lambda: wire.datagrams(40))
    size = full.of(Started)[0].reply.limits.bytes
    assert size == 1000
    assert full.end.reason == "bytes"
    assert 0 < len(full.packets) <= 1000 // 62

    asked = request(tap(snap_length=1 << 20), seconds=1e6, packets=1 << 40, ring_bytes=1 << 40)
    with CaptureStream(fleet, {NODE: asked}) as stream:
        started = next(iter(stream.events()))
    assert isinstance(started, Started)
    granted = started.reply
    assert (granted.limits.seconds, granted.limits.packets) == (20, 50_000)
    assert granted.limits.bytes == 64 << 20
    assert granted.taps[0].snap_length == 262_144
    assert granted.taps[0].ring_bytes == 16 << 20
    assert len(granted.lowered) == 4
    assert granted.lowered[0] == "seconds: 20, not 1e+06, is this agent's limit"


@pytest.mark.parametrize(
    ("asked", "kind", "message"),
    [
        (request(tap("nope0")), NotFoundError, "host nope0: there is no interface nope0 there"),
        (
            request(tap(text="tcp prot 1")),
            UsageError,
            "can't parse filter expression: syntax error",
        ),
        (request(tap(text="tcp) or (udp")), UsageError, "can't parse filter expression"),
        (request(tap("any", "link[14] == 0")), UsageError, "reads link addresses"),
        (request(), UsageError, "the request names no tap"),
        (request(*[tap()] * 33), UsageError, "32 taps at most"),
        (request(tap(text="x" * 40_000)), UsageError, "40000 characters, more than 32768"),
    ],
)
def test_what_is_refused(
    fleet: Fleet, asked: pb.CaptureRequest, kind: type[Exception], message: str
) -> None:
    (failed,) = run(fleet, asked).events
    assert isinstance(failed, AgentFailed)
    assert isinstance(failed.error, kind)
    assert message in str(failed.error)


def test_exclusions(fleet: Fleet, wire: Wire) -> None:
    assert [text for text, _ in exclusions(host=True, ports=(9410,), forwarded=True)] == [
        "tcp port 9410",
        "tcp port 10250",
        "tcp port 8132",
        "host 169.254.169.254 or host fd20:ce::254",
    ]
    assert len(exclusions(host=False, ports=(9410,), forwarded=True)) == 1
    wire.here.ip("route", "replace", "169.254.169.254", "via", "10.9.0.2")

    def both() -> None:
        wire.ping(1, to=METADATA)
        wire.ping(1)

    without = run(fleet, request(tap(text="icmp")), both, stop=True)
    assert len(without.packets) == 2
    assert without.tap.excluded == exclusions(host=True, ports=(), forwarded=False)
    assert without.tap.filter == "not (host 169.254.169.254 or host fd20:ce::254) and (icmp)"
    with_them = run(fleet, request(tap(text="icmp"), include_own=True), both, stop=True)
    assert len(with_them.packets) >= 3
    assert with_them.tap.filter == "icmp"


def _open_things() -> Counter[str]:
    """What captures take of this process, which the agent runs in."""
    maps = Path("/proc/self/maps").read_text()
    fds = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
           if os.path.islink(f"/proc/self/fd/{fd}")]  # fmt: skip
    threads = [thread for thread in threading.enumerate()
               if thread.name.startswith(("netns-", "stall"))]  # fmt: skip
    return Counter(
        [
            *re.findall(r"socket:\[\d+\]", maps),
            *(text for text in fds if text.startswith("net:[")),
            *(f"{thread.name} {thread.ident}" for thread in threads),
        ]
    )


def _packet_sockets(netns: Netns) -> int:
    return len(netns.run("cat", "/proc/net/packet").splitlines()) - 1


def test_twenty_at_once_and_nothing_is_left(fleet: Fleet, wire: Wire) -> None:
    before = _open_things()
    stub = agent_pb2_grpc.AgentStub(fleet.agent(NODE).channel)
    with ExitStack() as stack:
        calls = []
        for _ in range(20):
            call = stub.Capture(request(tap(text="udp")))
            stack.callback(call.cancel)
            assert next(call).HasField("started")
            calls.append(call)
        assert CAPTURES.read().open == 20
        assert CAPTURES.read().ring_bytes <= LIMITS.ring_bytes
        assert _packet_sockets(wire.here) == 20
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Capture(request(tap())))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        wire.datagrams(3)
        for call in calls:
            received = 0
            while received < 3:
                received += sum(next(call).packets.counts)
            assert received == 3
    wait_until(lambda: CAPTURES.read().open == 0)
    wait_until(lambda: _packet_sockets(wire.here) == 0)
    wait_until(lambda: not gained(before, _open_things()))
    assert CAPTURES.read().ring_bytes == 0


def test_memory_for_rings_is_bounded() -> None:
    most = 16 << 20
    granted = [CAPTURES.take_memory(most, most) for _ in range(8)]
    with pytest.raises(ExhaustedError, match="take 16 of the 16 MiB that they may"):
        CAPTURES.take_memory(most, most)
    for size in granted:
        CAPTURES.give_memory(size)
    assert granted == [2 << 20] * 8


def test_a_client_that_stops_reading_is_cut_off(
    fleet: Fleet, wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    before = CAPTURES.read()
    options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    with grpc.insecure_channel(fleet.agent(NODE).address.replace("unix://", "unix:"),
                               options=options) as channel:  # fmt: skip
        call = agent_pb2_grpc.AgentStub(channel).Capture(
            request(tap(text="udp", snap_length=2000), ring_bytes=2 << 20)
        )
        next(call)
        for _ in range(10):
            wire.datagrams(1000, size=1400)
        wait_until(lambda: "cut off" in caplog.text, 60)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.CANCELLED
    wait_until(lambda: CAPTURES.read().open == 0)
    assert CAPTURES.read().dropped > before.dropped
    assert _packet_sockets(wire.here) == 0


def test_an_interface_that_goes_away(fleet: Fleet, wire: Wire) -> None:
    wire.here.ip("link", "add", "gone0", "type", "veth", "peer", "name", "gone1")
    wire.here.ip("link", "set", "gone0", "up")

    def remove() -> None:
        wire.here.ip("link", "set", "gone0", "down")
        wire.here.ip("link", "set", "gone0", "up")  # that is no reason to end
        wire.ping(1)
        wire.here.ip("link", "delete", "gone0")

    asked = request(tap("gone0"), tap(text="icmp"), seconds=4)
    done = run(fleet, asked, remove)
    first, second = done.of(TapsEnded)
    assert (first.reason, first.taps[0].interface) == ("interface-gone", "gone0")
    assert first.text == "interface gone0 was deleted, or moved to another namespace"
    assert (second.reason, second.taps[0].interface) == ("seconds", "v0")
    assert len([p for p in done.packets if p.tap.interface == "v0"]) == 2


def test_a_namespace_that_vanishes(
    wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = wire.bed.netns("pod")
    inode = pod.handle.inode
    target = target_pb2.Target(pod=target_pb2.PodRef(namespace="default", name="web"))
    with (
        serving(
            wire.here.namespace(), tmp_path, monkeypatch, pods={"web": pod.pod("default/web")}
        ) as address,
        Fleet(timeout=10) as fleet,
    ):
        fleet.add_address(NODE, address)

        def vanish() -> None:
            subprocess.run(["ip", "netns", "delete", pod.name], check=True)

        done = run(fleet, request(tap("lo", target=target), statistics_seconds=10), vanish)
        wait_until(lambda: CAPTURES.read().open == 0)
        assert CAPTURES.read().ring_bytes == 0
    assert done.end.reason == "namespace-gone"
    assert done.end.text.startswith("nothing uses the namespace of pod default/web any more")
    assert done.tap.netns.inode == inode
    assert done.tap.pod == "default/web"
    wait_until(lambda: not any(text.startswith("socket:") for text in _open_things()))


def test_an_agent_that_dies_is_an_event(
    wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: dict[str, AgentFailed] = {}
    with ExitStack() as agent, Fleet(timeout=10) as fleet:
        fleet.add_address(NODE, agent.enter_context(serving(wire.here.namespace(), tmp_path,
                                                            monkeypatch)))  # fmt: skip
        fleet.add_address("node-b", f"unix://{tmp_path}/nobody.sock")
        asked = request(tap(text="icmp"))
        with CaptureStream(fleet, {NODE: asked, "node-b": asked, "node-c": asked}) as stream:
            for event in stream.events():
                if isinstance(event, Started):
                    agent.close()
                elif isinstance(event, AgentFailed):
                    failed[event.node] = event
    assert {node: len(event.taps) for node, event in failed.items()} == {
        NODE: 1,
        "node-b": 0,
        "node-c": 0,
    }
    assert "no agent on node node-c" in str(failed["node-c"].error)


def _stopped(fleet: Fleet, wire: Wire, **more: Any) -> Done:
    """A capture that is stopped when 20 packets have passed."""
    done = Done([])
    with CaptureStream(fleet, {NODE: request(tap(text="icmp"), **more)}) as stream:
        for event in stream.events():
            done.events.append(event)
            if isinstance(event, Started):
                wire.ping(10)
                stream.stop()
    assert not done.of(AgentFailed)
    assert len(done.packets) == 20
    assert done.statistics.received == 20
    return done


def test_a_stop_finishes_the_capture_at_once(fleet: Fleet, wire: Wire) -> None:
    """Statistics that come by themselves would come too late."""
    done = _stopped(fleet, wire, statistics_seconds=10, latency_seconds=2)
    assert isinstance(done.events[-2], Statistics)
    assert done.end is done.events[-1]
    assert done.end.reason == "finished"
    assert not FINISHES._open


def test_a_stop_awaits_statistics_of_an_agent_that_cannot_be_told(
    fleet: Fleet, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of before FinishCapture says no id."""
    monkeypatch.setattr(secrets, "token_hex", lambda _: "")
    done = _stopped(fleet, wire)
    assert isinstance(done.events[-1], Statistics)


def test_a_stop_that_the_agent_refuses(
    fleet: Fleet, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it is over a bound."""

    def refuse(*_: object) -> None:
        raise ExhaustedError("the agent is busy")

    monkeypatch.setattr(FINISHES, "finish", refuse)
    done = _stopped(fleet, wire)
    assert isinstance(done.events[-1], Statistics)


def test_a_stop_before_the_start(fleet: Fleet) -> None:
    with CaptureStream(fleet, {NODE: request(tap(), statistics_seconds=10)}) as stream:
        stream.stop()
        events = list(stream.events())
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], TapsEnded)


def test_a_client_that_goes_is_noticed_at_once(fleet: Fleet) -> None:
    """Not only when there is something to tell it."""
    channel = grpc.insecure_channel(fleet.agent(NODE).address.replace("unix://", "unix:"))
    asked = request(tap(text="tcp port 9"), quiet_statistics_seconds=10)
    next(agent_pb2_grpc.AgentStub(channel).Capture(asked))
    assert CAPTURES.read().open == 1
    channel.close()
    wait_until(lambda: CAPTURES.read().open == 0, 8)


def test_only_who_began_a_capture_may_finish_it(fleet: Fleet) -> None:
    agent = fleet.agent(NODE)
    said = set()
    for wrong in ("", "0" * 32):
        with pytest.raises(grpc.RpcError) as caught:
            agent.stub.FinishCapture(pb.FinishCaptureRequest(capture_id=wrong), timeout=5)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        said.add(caught.value.details())
    assert said == {"root (unix socket) has no capture with this id in progress"}
    finishes = Finishes()
    with finishes.open("a") as finish, selectors.DefaultSelector() as asked:
        asked.register(finish, selectors.EVENT_READ)
        with pytest.raises(ForbiddenError, match="b has no capture with this id"):
            finishes.finish(finish.id, "b")
        assert not asked.select(0)
        finishes.finish(finish.id, "a")
        assert asked.select(0)
    with pytest.raises(ForbiddenError):
        finishes.finish(finish.id, "a")


def test_cooked_packets_name_their_interfaces(fleet: Fleet, wire: Wire) -> None:
    done = run(fleet, request(tap("any", "icmp")), lambda: wire.ping(1), stop=True)
    names = {
        int(line.split(":")[0]): line.split(":")[1].strip().partition("@")[0]
        for line in wire.here.ip("-o", "link").splitlines()
    }
    assert done.tap.link_type == LinkType.LINUX_SLL2
    assert {names[packet.ifindex] for packet in done.packets} == {"v0"}
    assert done.tap.interfaces == names
    assert replace(done.tap, index=1) != done.tap
