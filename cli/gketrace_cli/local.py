"""``--local``: an agent on this node for the time of one command.

It listens on a unix socket of its own in a folder of mode 0700 and is stopped when the command
ends, whatever way it ends.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from gketrace.errors import NotFoundError, UnavailableError
from gketrace.objects import Node
from gketrace_cli.leftovers import forget, keep, make_folder, remove_folder

__all__ = ["LocalAgent", "local_node", "start_local_agent"]

_STOP_SECONDS: Final = 3.0
_POLL_SECONDS: Final = 0.02


class LocalAgent:
    """A running ``gketrace-agent``."""

    def __init__(self, node: str, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.node: Final = node
        self._process: Final = process
        self._folder: Final = folder

    @property
    def socket(self) -> Path:
        return self._folder / "agent.sock"

    @property
    def address(self) -> str:
        return f"unix://{self.socket}"

    def stop(self) -> None:
        """Ends it; kills it when it does not end in time."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        remove_folder(self._folder)
        forget(self)

    def wait(self, timeout: float) -> None:
        """Until it listens.  Raises: `UnavailableError` with what it said when it does not."""
        deadline = time.monotonic() + timeout
        while not self.socket.exists():
            if self._process.poll() is not None:
                said = (self._folder / "log").read_text(errors="replace").strip().splitlines()
                why = said[-1] if said else f"exit status {self._process.returncode}"
                raise UnavailableError(f"the local agent did not start: {why}")
            if time.monotonic() > deadline:
                raise UnavailableError(f"the local agent did not listen within {timeout:g} s")
            time.sleep(_POLL_SECONDS)


def start_local_agent(nodes: Iterable[Node], *, timeout: float) -> LocalAgent:
    """Starts ``gketrace-agent`` for the node that this machine is.

    Raises: `NotFoundError` when it is none of the cluster's; `UnavailableError`.
    """
    node = local_node(nodes)
    beside = Path(sys.executable).with_name("gketrace-agent")
    program = str(beside) if beside.exists() else shutil.which("gketrace-agent")
    if program is None:
        raise UnavailableError(
            "gketrace-agent is not installed here", hint="pip install 'gketrace[agent]'"
        )
    folder = make_folder("gketrace-local-")
    try:
        agent = keep(lambda: _start(program, node.name, folder), LocalAgent.stop)
    except BaseException:
        remove_folder(folder)
        raise
    try:
        agent.wait(timeout)
    except BaseException:
        agent.stop()
        raise
    return agent


def _start(program: str, node: str, folder: Path) -> LocalAgent:
    with (folder / "log").open("wb") as log:
        # Its own session: Ctrl-C at the terminal goes to the command, which then stops it.
        process = subprocess.Popen(
            [
                program,
                "serve",
                "--node-name",
                node,
                "--listen",
                f"unix://{folder / 'agent.sock'}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return LocalAgent(node, process, folder)


def local_node(nodes: Iterable[Node]) -> Node:
    """The node whose address this machine has, or whose name it bears.  Raises `NotFoundError`."""
    known = list(nodes)
    for node in known:
        if any(_is_own(ip) for ip in node.internal_ips):
            return node
    name = socket.gethostname()
    for node in known:
        if name in (node.name, node.hostname):
            return node
    raise NotFoundError(
        f"this machine ({name}) is none of the cluster's {len(known)} nodes",
        hint="--local works on a node; elsewhere leave it out",
    )


def _is_own(ip: str) -> bool:
    """True when a socket can be bound to the address, which only an own address allows."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((ip, 0))
        except OSError:
            return False
    return True
