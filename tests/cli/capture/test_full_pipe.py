"""A pipe that stays full holds up the agents, which take no more packets off their rings: nothing
piles up on the way."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from gketrace_cli.agents import Fleet
from gketrace_cli.capture.files import FileSink
from gketrace_cli.capture.running import run_capture
from gketrace_cli.capture.stream import CaptureStream
from gketrace_proto import codec
from gketrace_proto.v1alpha1 import capture_pb2 as pb
from tests.cli.capture.test_files import blocks, packet, tap

MOST = 48
"""MiB on the way: 8 messages that are read ahead, and what gRPC holds of both sides."""


def test_a_pipe_that_stays_full_holds_up_the_agent() -> None:
    one = tap(snap_length=0)
    data, counts, lengths = blocks([packet(one, time, 1500) for time in range(640)], per_block=80)
    packets = pb.CapturePackets(counts=counts, lengths=lengths, data=bytes(data))
    sent = 0

    def capture(request: pb.CaptureRequest, context: Any) -> Iterator[pb.CaptureReply]:
        nonlocal sent
        started = pb.CaptureTapStarted(
            interface="eth0", ifindex=one.ifindex, link_type=1, netns=codec.encode(one.netns)
        )
        yield pb.CaptureReply(started=pb.CaptureStarted(node="n1", taps=[started]))
        while context.is_active():
            yield pb.CaptureReply(packets=packets)
            sent += 1

    handler = grpc.unary_stream_rpc_method_handler(
        capture,
        request_deserializer=pb.CaptureRequest.FromString,
        response_serializer=pb.CaptureReply.SerializeToString,
    )
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("gketrace.v1alpha1.Agent", {"Capture": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    reader, writer = os.pipe()
    errors: list[BaseException] = []

    def work(stream: CaptureStream) -> None:
        try:
            run_capture(stream, [FileSink(f"/dev/fd/{writer}")])
        except BrokenPipeError as error:
            errors.append(error)

    try:
        with Fleet(timeout=10) as fleet:
            fleet.add_address("n1", f"127.0.0.1:{port}")
            with CaptureStream(fleet, {"n1": pb.CaptureRequest(taps=[pb.CaptureTap()])}) as stream:
                thread = threading.Thread(target=work, args=(stream,))
                thread.start()
                before, until = -1, time.monotonic() + 20
                while (sent != before or not sent) and time.monotonic() < until:
                    before = sent
                    time.sleep(1)
                assert sent == before
                assert 0 < sent <= MOST
                assert thread.is_alive()
                os.close(writer)
                os.close(reader)
                thread.join(10)
                assert not thread.is_alive()
        assert errors
    finally:
        server.stop(None).wait()
