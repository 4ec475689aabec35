"""``gketrace-agent`` as a process: starts, says so, stops when told to."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from gketrace_proto.v1alpha1 import agent_pb2, agent_pb2_grpc, target_pb2
from tests.agent.pods import wait_until

AGENT = Path(sys.executable).with_name("gketrace-agent")


@contextmanager
def agent(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [AGENT, "serve", "--node-name", "node-a", *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_told_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    path, log = tmp_path / "agent.sock", tmp_path / "agent.log"
    with agent("--listen", f"unix://{path}", "--log-file", str(log)) as process:
        wait_until(path.exists, seconds=20)
        with grpc.insecure_channel(f"unix:{path}") as channel:
            stub = agent_pb2_grpc.AgentStub(channel)
            assert stub.GetInfo(agent_pb2.GetInfoRequest(), timeout=20).node == "node-a"
        told = time.monotonic()
        process.send_signal(number)
        assert process.wait(60) == 0
        assert time.monotonic() - told < 20
        assert not path.exists()
    messages = [json.loads(line)["msg"] for line in log.read_text().splitlines()]
    assert messages == ["listening", "serving", "call", "stopping", "stopped"]


def test_a_call_that_never_ends_does_not_hold_up_the_end(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with agent("--listen", f"unix://{path}") as process:
        wait_until(path.exists, seconds=20)
        with grpc.insecure_channel(f"unix:{path}") as channel:
            request = agent_pb2.FollowConntrackRequest(target=target_pb2.Target(host=True))
            following = agent_pb2_grpc.AgentStub(channel).FollowConntrack(request)
            next(following)
            told = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert time.monotonic() - told < 20
            with pytest.raises(grpc.RpcError):
                list(following)


def test_tcp_needs_insecure() -> None:
    refused = subprocess.run(
        [AGENT, "serve", "--listen", "tcp://127.0.0.1:0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr == (
        "gketrace-agent: tcp://127.0.0.1:0 would be served without TLS and without access "
        "control; give --tls-cert and --tls-key, use a unix socket, or say --insecure\n"
    )


def test_insecure_is_said_loudly(tmp_path: Path) -> None:
    log = tmp_path / "agent.log"
    arguments = ("--listen", "tcp://127.0.0.1:0", "--insecure", "--log-file", str(log))
    with agent(*arguments) as process:
        assert process.stderr is not None
        warning = process.stderr.readline()
        found = re.fullmatch(
            r"gketrace-agent: WARNING: INSECURE: tcp://127\.0\.0\.1:(\d+) is served without TLS "
            r"and without access control\n",
            warning,
        )
        assert found is not None
        with grpc.insecure_channel(f"127.0.0.1:{found[1]}") as channel:
            stub = agent_pb2_grpc.AgentStub(channel)
            assert stub.GetInfo(agent_pb2.GetInfoRequest(), timeout=20).node == "node-a"
    levels = [json.loads(line)["level"] for line in log.read_text().splitlines()]
    assert levels[0] == "warning"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--log-file", "/nonexistent/agent.log"), 5, "cannot log to /nonexistent/agent.log"),
        (("--listen", "unix:///proc/agent.sock"), 5, "cannot listen on unix:///proc/agent.sock"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    socket = () if "--listen" in arguments else ("--listen", f"unix://{tmp_path}/a.sock")
    ended = subprocess.run(
        [AGENT, "serve", *socket, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NODE_NAME": "node-a"},
    )
    assert ended.returncode == code
    assert ended.stderr.startswith("gketrace-agent: ")
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1
