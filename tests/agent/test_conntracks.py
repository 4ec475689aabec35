"""The conntrack RPCs of a real server, over a namespace of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from gketrace.conntrack import ConntrackEntry
from gketrace.conntrack_records import entry_from_record, records_from_bytes
from gketrace.conntrack_text import render_entry
from gketrace.errors import TimeoutExceeded
from gketrace.trace import NetnsKind
from gketrace_agent import service as service_module
from gketrace_agent.config import Config, Limits, Listen
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.namespaces import OpenTarget
from gketrace_agent.observe.conntrack_filter import ConntrackFilter, ConntrackFilters
from gketrace_agent.observe.conntrack_table import open_conntrack
from gketrace_agent.server import AgentServer
from gketrace_proto import codec
from gketrace_proto.v1alpha1 import agent_pb2, agent_pb2_grpc
from tests.agent.observe.bed import Bed, Netns, wait_until
from tests.kernel.conntrack_made import Made, flows, make

HOST = agent_pb2.Target(host=True)


@pytest.fixture
def node() -> Iterator[Netns]:
    bed = Bed()
    try:
        yield bed.netns("rpc")
    finally:
        bed.close()


@contextmanager
def serving(
    node: Netns, folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> Iterator[str]:
    """An agent whose host is the namespace; its address."""
    path = folder / "agent.sock"
    config = Config(
        node="node-a",
        listen=(Listen(path=path),),
        runtime_sockets=(),
        limits=Limits(conntrack_entries=5000, stall_seconds=1.0),
        **more,
    )

    class Here:
        def __init__(self, *_: object) -> None:
            self.namespace = node.namespace()

        def open(self, target: object, **_: object) -> Here:
            return self

        def __enter__(self) -> OpenTarget:
            return OpenTarget(here=self.namespace, host=self.namespace, known=(self.namespace,))

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(service_module, "NodeNamespaces", Here)
    server = AgentServer(config)
    server.start()
    try:
        yield f"unix:{path}"
    finally:
        server.stop(0)


@pytest.fixture
def address(node: Netns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serving(node, tmp_path, monkeypatch) as served:
        yield served


@pytest.fixture
def stub(address: str) -> Iterator[agent_pb2_grpc.AgentStub]:
    with grpc.insecure_channel(address) as channel:
        yield agent_pb2_grpc.AgentStub(channel)


def listed(
    stub: agent_pb2_grpc.AgentStub, **more: object
) -> tuple[list[agent_pb2.ListConntrackReply], agent_pb2.ConntrackSummary]:
    replies = list(stub.ListConntrack(agent_pb2.ListConntrackRequest(target=HOST, **more)))
    assert [reply.HasField("summary") for reply in replies] == [False] * (len(replies) - 1) + [True]
    return replies, replies[-1].summary


def test_three_forms_say_the_same(stub: agent_pb2_grpc.AgentStub, node: Netns) -> None:
    node.inside(lambda: make(flows(1200)))
    replies, summary = listed(stub)
    assert (summary.sent, summary.consistent, summary.truncated) == (1200, True, False)
    assert summary.tracked
    assert not summary.accounting
    assert summary.netns.kind == codec.encode(node.ref(NetnsKind.HOST)).kind
    entries = [codec.decode(ConntrackEntry, e) for reply in replies for e in reply.entries]
    assert max(len(reply.entries) for reply in replies) <= 500
    replies, _ = listed(stub, format=agent_pb2.CONNTRACK_FORMAT_RECORDS)
    packed = b"".join(reply.records for reply in replies)
    records = {e.id: e for e in map(entry_from_record, records_from_bytes(packed))}
    for entry in entries:
        other = records[entry.id]
        assert (other.orig, other.reply, other.status) == (entry.orig, entry.reply, entry.status)
    replies, _ = listed(stub, format=agent_pb2.CONNTRACK_FORMAT_TEXT)
    lines = b"".join(reply.text for reply in replies).decode().splitlines()

    def still(line: str) -> str:
        words = line.split()
        return " ".join(words[:2] + words[3:])

    assert [still(line) for line in lines] == [
        still(render_entry(entry, now=time.time())) for entry in entries
    ]


def test_a_limit_and_the_servers_bound(stub: agent_pb2_grpc.AgentStub, node: Netns) -> None:
    node.inside(lambda: make(flows(6000)))
    for asked, expected in ((10, 10), (0, 5000), (9000, 5000)):
        replies, summary = listed(stub, limit=asked, format=agent_pb2.CONNTRACK_FORMAT_TEXT)
        lines = b"".join(reply.text for reply in replies).splitlines()
        assert (len(lines), summary.sent, summary.truncated) == (expected, expected, True)


def test_filters_any_of_which_may_take_an_entry(
    stub: agent_pb2_grpc.AgentStub, node: Netns
) -> None:
    node.inside(lambda: make(flows(1000)))
    filters = [
        agent_pb2.ConntrackFilter(orig_dst="10.43.0.1", protocol=6),
        agent_pb2.ConntrackFilter(orig_dst="10.43.0.1"),
        agent_pb2.ConntrackFilter(address="10.43.0.2"),
    ]
    replies, summary = listed(stub, any=filters)
    found = [entry.orig.dst for reply in replies for entry in reply.entries]
    every = [made.dst for made in flows(1000)]
    assert len(found) == every.count("10.43.0.1") + every.count("10.43.0.2")
    assert summary.duplicates == 0
    with pytest.raises(grpc.RpcError) as caught:
        listed(stub, filter=agent_pb2.ConntrackFilter(tcp_state="OPENISH"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_many_filters_are_one_dump(stub: agent_pb2_grpc.AgentStub, node: Netns) -> None:
    """The kernel would walk its table for each of them."""
    node.inside(lambda: make(flows(300)))
    one = listed(stub)[0][0].entries[0]
    wanted = [agent_pb2.ConntrackFilter(orig_dport=port, protocol=6) for port in range(1, 2000)]
    wanted.append(agent_pb2.ConntrackFilter(address=one.orig.src))
    replies, summary = listed(stub, any=wanted)
    assert summary.readings == 1
    assert one in [entry for reply in replies for entry in reply.entries]
    assert summary.read >= 300


def test_a_reading_that_nobody_waits_for_ends(node: Netns) -> None:
    node.inside(lambda: make(flows(300)))
    wanted = ConntrackFilters(filters=[ConntrackFilter(orig_dport=n) for n in range(1, 20)])
    asked = 0

    def active() -> bool:
        nonlocal asked
        asked += 1
        return asked < 5

    with open_conntrack(node.handle, HostPaths(), active=active) as table:
        reading = table.read(wanted)
        with pytest.raises(TimeoutExceeded, match="its reader has gone"):
            list(reading.batches())
    assert reading.readings < 5


@pytest.mark.parametrize(
    "wrong", [{"protocol": 256}, {"orig_dport": 65536}, {"zone": 1 << 31}, {"dst_nat_port": 70000}]
)
def test_numbers_that_no_entry_has(stub: agent_pb2_grpc.AgentStub, wrong: dict[str, int]) -> None:
    """A protocol of 256 was an internal error."""
    with pytest.raises(grpc.RpcError) as caught:
        listed(stub, any=[agent_pb2.ConntrackFilter(**wrong)])  # type: ignore[arg-type]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_deletion_is_of_that_very_entry(
    node: Netns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [
        Made(src="10.1.0.1", dst="10.1.0.2", sport=1, dport=80),
        Made(src="10.1.0.1", dst="10.1.0.2", sport=1, dport=80, zone=7),
        Made(src="10.1.0.1", dst="10.1.0.2", sport=2, dport=80),
        Made(src="10.1.0.1", dst="10.1.0.2", sport=3, dport=80),
        Made(src="fd00::1", dst="fd00::2", sport=3, dport=80, protocol=17),
        Made(src="10.1.0.1", dst="10.1.0.2", sport=9, dport=8, protocol=1),
        Made(src="fd00::1", dst="fd00::2", sport=9, dport=128, protocol=58),
        Made(src="10.1.0.1", dst="10.1.0.2", sport=4, dport=80, protocol=132),
        Made(src="10.1.0.1", dst="10.1.0.2", protocol=47),
        Made(src="10.1.0.1", dst="10.1.0.2", protocol=99),
    ]
    node.inside(lambda: make(kinds))
    with (
        serving(node, tmp_path, monkeypatch, allow_system_changes=True) as served,
        grpc.insecure_channel(served) as channel,
    ):
        stub = agent_pb2_grpc.AgentStub(channel)
        replies, _ = listed(stub)
        entries = {
            (one.orig.src, one.orig.protocol, one.orig.sport, one.zone): one
            for reply in replies
            for one in reply.entries
        }
        assert len(entries) == len(kinds)
        # One goes, one is made anew with another reply, before the request comes.
        gone, other = kinds[2], kinds[3]
        node.inside(lambda: make([gone, other], delete=True))
        node.inside(lambda: make([replace(other, reply_src="10.1.0.9")]))
        asked = [
            one
            for key, one in entries.items()
            if key[3] == 0  # not that of zone 7
        ]
        reply = stub.DeleteConntrack(
            agent_pb2.DeleteConntrackRequest(target=HOST, entries=asked), timeout=10
        )
        keys = [(one.orig.protocol, one.orig.sport) for one in asked]
        outcomes = dict(zip(keys, reply.outcomes, strict=True))
        named = {k: agent_pb2.ConntrackDeletion.Name(v)[19:] for k, v in outcomes.items()}
        assert (named.pop((6, 2)), named.pop((6, 3))) == ("GONE", "REPLACED")
        assert set(named.values()) == {"DELETED"}
        assert not reply.errors
        left, _ = listed(stub)
        rest = {(e.orig.sport, e.zone, e.reply.src) for r in left for e in r.entries}
        assert rest == {(1, 7, "10.1.0.2"), (3, 0, "10.1.0.9")}
        nameless = type(asked[0])()
        nameless.CopyFrom(asked[0])
        nameless.ClearField("id")
        for wrong in ([], [nameless]):
            with pytest.raises(grpc.RpcError) as caught:
                stub.DeleteConntrack(
                    agent_pb2.DeleteConntrackRequest(target=HOST, entries=wrong), timeout=10
                )
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_an_agent_that_may_not_change_anything_says_so(
    stub: agent_pb2_grpc.AgentStub, node: Netns
) -> None:
    node.inside(lambda: make(flows(1)))
    replies, _ = listed(stub)
    request = agent_pb2.DeleteConntrackRequest(target=HOST, entries=replies[0].entries)
    with pytest.raises(grpc.RpcError) as caught:
        stub.DeleteConntrack(request, timeout=10)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "--allow-system-changes" in caught.value.details()
    assert listed(stub)[1].sent == 1


def test_a_namespace_that_tracks_nothing(stub: agent_pb2_grpc.AgentStub, node: Netns) -> None:
    _, summary = listed(stub)
    assert (summary.sent, summary.tracked) == (0, False)
    stats = stub.GetConntrackStats(agent_pb2.GetConntrackStatsRequest(target=HOST))
    assert (stats.entries, stats.tracked) == (0, False)
    assert stats.limit > 0


def test_statistics_are_those_of_conntrack(stub: agent_pb2_grpc.AgentStub, node: Netns) -> None:
    node.inside(lambda: make(flows(77)))
    stats = stub.GetConntrackStats(agent_pb2.GetConntrackStatsRequest(target=HOST))
    assert (stats.entries, stats.tracked) == (int(node.run("conntrack", "-C")), True)
    for line, cpu in zip(node.run("conntrack", "-S").splitlines(), stats.cpus, strict=True):
        pairs = dict(word.split("=") for word in line.split())
        names = {"chaintoolong": "chain_toolong"}
        expected = {names.get(name, name): int(value) for name, value in pairs.items()}
        assert {"cpu": cpu.cpu, **cpu.counters} == expected


def test_following(stub: agent_pb2_grpc.AgentStub, node: Netns) -> None:
    call = stub.FollowConntrack(
        agent_pb2.FollowConntrackRequest(
            target=HOST, format=agent_pb2.CONNTRACK_FORMAT_TEXT, news=True
        )
    )
    first = next(call)
    assert first.status.mode == "events"
    node.inside(lambda: make(flows(3)))
    text = b""
    for reply in call:
        text += reply.text
        if reply.HasField("status") and reply.status.sent >= 3:
            break
    call.cancel()
    assert [line.split()[0] for line in text.decode().splitlines()] == ["[NEW]"] * 3
    assert reply.status.lost == reply.status.overruns == 0


def test_a_client_that_stops_reading_is_cut_off(
    address: str, node: Netns, caplog: pytest.LogCaptureFixture
) -> None:
    node.inside(lambda: make(flows(5000)))
    # A window that is smaller than the list.
    options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    with grpc.insecure_channel(address, options=options) as channel:
        stub = agent_pb2_grpc.AgentStub(channel)
        call = stub.ListConntrack(agent_pb2.ListConntrackRequest(target=HOST))
        next(call)
        wait_until(lambda: "cut off" in caplog.text, 60)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.CANCELLED
