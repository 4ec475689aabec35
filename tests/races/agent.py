"""The agent's process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import grpc

from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1.agent_pb2_grpc import AgentStub
from tests.races.pods import poll

__all__ = ["RaceAgent"]

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 50),
)


class RaceAgent:
    """Started, and started again."""

    def __init__(self, folder: Path, runtime: Path) -> None:
        self.log = folder / "agent.log"
        self._socket = folder / "agent.sock"
        self._argv = [
            str(Path(sys.executable).parent / "gketrace-agent"),
            "serve",
            f"--listen=unix://{self._socket}",
            f"--runtime-endpoint=unix://{runtime}",
            f"--log-file={self.log}",
            "--node-name=races",
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._argv)
        self._channel = grpc.insecure_channel(f"unix:{self._socket}", options=_OPTIONS)
        self.stub = AgentStub(self._channel)
        self.stub.GetInfo(pb.GetInfoRequest(), timeout=60, wait_for_ready=True)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def ended(self) -> None:
        """Waits for it; the channel to it is closed."""
        assert self._process is not None
        assert self._channel is not None
        self._process.wait(30)
        self._channel.close()

    def settled(self) -> bool:
        """It holds no namespace but those that it keeps."""
        return not Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()

    def stop(self) -> None:
        self.signal(signal.SIGTERM)
        self.ended()

    def wait_settled(self) -> None:
        poll(self.settled, "the agent's children do not end")
