"""Agents that send what no agent means: each costs its own node, in one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from gketrace.errors import GketraceError
from gketrace.trace import NetnsRef
from gketrace_cli.agents import Fleet
from gketrace_cli.capture.batch import batch_from_blocks
from gketrace_cli.capture.lines import Lines, LineStyle
from gketrace_cli.capture.report import LineSink
from gketrace_cli.capture.running import Outcome, run_capture
from gketrace_cli.capture.stream import CaptureStream
from gketrace_cli.capture.wire import parse_reply
from gketrace_proto import codec
from gketrace_proto.v1alpha1 import capture_pb2 as pb
from tests.cli.capture.test_files import blocks, packet, tap

ONE = tap(snap_length=0)


def started(taps: int = 1, **more: Any) -> pb.CaptureReply:
    netns = codec.encode(NetnsRef(node="n1"))
    made = [
        pb.CaptureTapStarted(interface="eth0", ifindex=3, link_type=1, netns=netns)
        for _ in range(taps)
    ]
    return pb.CaptureReply(started=pb.CaptureStarted(node="n1", taps=made, **more))


def packets(**more: Any) -> pb.CaptureReply:
    data, counts, lengths = blocks([packet(ONE, 0), packet(ONE, 1)])
    whole = {"tap": 0, "counts": counts, "lengths": lengths, "data": bytes(data)}
    return pb.CaptureReply(packets=pb.CapturePackets(**{**whole, **more}))


def moved(offset: int) -> pb.CaptureReply:
    """The first packet's data begins elsewhere."""
    reply = packets()
    data = bytearray(reply.packets.data)
    data[24:26] = offset.to_bytes(2, "little")
    return packets(data=bytes(data))


@contextmanager
def lying(replies: Sequence[pb.CaptureReply | bytes]) -> Iterator[Fleet]:
    def capture(request: bytes, context: Any) -> Iterator[bytes]:
        for one in replies:
            yield one if isinstance(one, bytes) else one.SerializeToString()
        while context.is_active():  # its call ends when it is hung up on
            yield packets().SerializeToString()

    handler = grpc.unary_stream_rpc_method_handler(capture)
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("gketrace.v1alpha1.Agent", {"Capture": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Fleet(timeout=10) as fleet:
            fleet.add_address("n1", f"127.0.0.1:{port}")
            yield fleet
    finally:
        server.stop(None).wait()


def captured(replies: Sequence[pb.CaptureReply | bytes]) -> Outcome:
    asked = {"n1": pb.CaptureRequest(taps=[pb.CaptureTap()])}
    with lying(replies) as fleet, CaptureStream(fleet, asked) as stream:
        sink = LineSink(Lines(style=LineStyle(), names={}, place=True))
        return run_capture(stream, [sink])


def end(**more: Any) -> pb.CaptureReply:
    return pb.CaptureReply(end=pb.CaptureEnd(**more))


def numbers(taps: int = 1, **more: Any) -> pb.CaptureReply:
    made = [pb.CaptureTapStatistics() for _ in range(taps)]
    return pb.CaptureReply(statistics=pb.CaptureStatistics(taps=made, **more))


@pytest.mark.parametrize(
    ("replies", "said"),
    [
        ([packets()], "packets of a tap that is not open"),
        ([started(), packets(tap=1)], "packets of a tap that is not open"),
        ([started(), packets(tap=(1 << 32) - 1)], "packets of a tap that is not open"),
        ([started(0)], "the start of other taps"),
        ([started(2)], "the start of other taps"),
        ([started(), started()], "the start of other taps"),
        ([started(wall_ns=(1 << 64) - 1)], "a time that no clock has"),
        ([started(latency_seconds=float("nan"))], "a time that no clock has"),
        ([started(latency_seconds=-1.0)], "a time that no clock has"),
        ([started(), numbers(2)], "numbers of other taps"),
        ([numbers()], "numbers of other taps"),
        ([started(), numbers(wall_ns=1 << 63)], "a time that no clock has"),
        ([started(), end(taps=[1])], "the end of a tap that is not open"),
        ([started(), b"\xff\xff\xff"], "none of a capture's"),
        ([started(), b"\x12\x03\x22\x7f\x00"], "is not understood"),
        ([started(), b"\x12" + b"\xff" * 10 + b"\x01"], "a number that is too long"),
        ([started(), packets(data=b"", counts=[1 << 31], lengths=[0])], "not where"),
        ([started(), packets(counts=[(1 << 32) - 1])], "not where"),
        ([started(), packets(counts=[2, 1])], "do not agree"),
        ([started(), packets(lengths=[7])], "do not agree"),
        ([started(), moved(0)], "not where their headers say"),
        ([started(), moved(65535)], "not where their headers say"),
    ],
)
def test_what_no_agent_means(replies: list[pb.CaptureReply | bytes], said: str) -> None:
    outcome = captured(replies)
    assert said in str(outcome.failures["n1"])
    assert outcome.code in (3, 5)


def test_an_end_for_a_reason_that_is_newer() -> None:
    reply = end(taps=[0], text="it is Sunday")
    reply.end.reason = 99  # type: ignore[assignment]
    outcome = captured([started(), reply, end(taps=[7])])
    assert [one.end for one in outcome.taps.values()] == ["it is Sunday"]


def test_a_link_type_that_no_file_can_hold() -> None:
    reply = started()
    reply.started.taps[0].link_type = 1 << 16
    assert "link type" in str(captured([reply]).failures["n1"])


def test_packets_that_begin_before_their_headers_end() -> None:
    """With a VLAN tag, four bytes before the data are written, too."""
    one = replace(packet(ONE, 0), vlan=7)
    data, counts, lengths = blocks([one])
    raw = bytearray(data)
    raw[24:26] = bytes(2)
    with pytest.raises(GketraceError, match="not where their headers say"):
        batch_from_blocks(ONE, memoryview(bytes(raw)), counts, lengths)


def test_a_number_without_end_is_refused_at_once() -> None:
    assert isinstance(parse_reply(b"\x12" + b"\xff" * (4 << 20)), GketraceError)
