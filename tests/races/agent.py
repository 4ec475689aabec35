"""The agent's process."""

from __future__ import annotations

import os
import select
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
_ENVIRONMENT: Final = {
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    "GRPC_VERBOSITY": "NONE",
    "OPENBLAS_NUM_THREADS": "1",
}


class RaceAgent:
    """Started, and started again."""

    def __init__(self, folder: Path, runtime: Path) -> None:
        self.log = folder / "agent.log"
        self._socket = folder / "agent.sock"
        self._arguments = [
            "serve",
            f"--listen=unix://{self._socket}",
            f"--runtime-endpoint=unix://{runtime}",
            f"--log-file={self.log}",
            "--node-name=races",
        ]
        self._nursery: subprocess.Popen[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._channel: grpc.Channel | None = None
        self.start()

    def start(self, *, warm: bool = False) -> None:
        """`warm`: what it imports is there already (`tests.races.warm`)."""
        if warm:
            self._process = None
            self.pid = self._fork()
        else:
            command = Path(sys.executable).parent / "gketrace-agent"
            self._process = subprocess.Popen([str(command), *self._arguments])
            self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        if self._channel is not None:
            self._channel.close()
        self._channel = grpc.insecure_channel(f"unix:{self._socket}", options=_OPTIONS)
        self.stub = AgentStub(self._channel)
        self.stub.GetInfo(pb.GetInfoRequest(), timeout=60, wait_for_ready=True)

    def _fork(self) -> int:
        if self._nursery is None:
            self._nursery = subprocess.Popen(
                [sys.executable, "-m", "tests.races.warm", *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | _ENVIRONMENT,
            )
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.write("\n")
        self._nursery.stdin.flush()
        return int(self._nursery.stdout.readline())

    @property
    def nursery(self) -> int:
        """The process that warm agents are forked from; 0: none was yet."""
        return 0 if self._nursery is None else self._nursery.pid

    def signal(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    def ended(self) -> None:
        """Waits for it.  Calls to it go on failing until `start`."""
        if self._process is not None:
            self._process.wait(30)
        elif not select.select([self._pidfd], [], [], 30)[0]:
            raise TimeoutError("the agent does not end")
        os.close(self._pidfd)
        self._pidfd = -1

    def settled(self) -> bool:
        """It holds no namespace but those that it keeps."""
        return not Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()

    def stop(self) -> None:
        if self._pidfd >= 0:
            self.signal(signal.SIGTERM)
            self.ended()
        if self._channel is not None:
            self._channel.close()
        if self._nursery is not None:
            with self._nursery:  # it ends with its input
                pass

    def wait_settled(self) -> None:
        poll(self.settled, "the agent's children do not end")
