"""Network namespaces to observe, and the tools whose output the observers are compared with."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from gketrace.trace import NetnsKind, NetnsRef
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import NetnsHandle, open_path, run_in_netns
from gketrace_agent.kernel.reader import KernelReader
from gketrace_agent.observe.snapshot import Namespace

T = TypeVar("T")
PATHS = HostPaths()


def wait_until(ready: Callable[[], bool], timeout: float = 30.0) -> None:
    """Polls `ready` until it is true; fails after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


@dataclass
class Netns:
    """A namespace made with ``ip netns``, deleted by `Bed.close`."""

    name: str
    handle: NetnsHandle

    def run(self, *argv: str, stdin: str | None = None, check: bool = True) -> str:
        """A command inside; its output."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.name, *argv],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert not check or done.returncode == 0, (argv, done.stderr)
        return done.stdout

    def ip(self, *argv: str) -> str:
        return self.run("ip", *argv)

    def batch(self, *lines: str) -> None:
        """Lines of ``ip -batch``."""
        self.run("ip", "-force", "-batch", "-", stdin="\n".join(lines) + "\n")

    def json(self, *argv: str) -> Any:
        return json.loads(self.run(*argv) or "[]")

    def inside(self, function: Callable[[], T]) -> T:
        return run_in_netns(self.handle, function)

    def read(self, observe: Callable[[KernelReader], T]) -> T:
        """Runs one observer inside, with a reader of its own."""

        def call() -> T:
            reader = KernelReader(PATHS, self.handle.inode)
            try:
                return observe(reader)
            finally:
                reader.close()

        return self.inside(call)

    def ref(self, kind: NetnsKind = NetnsKind.HOST, pod: str = "") -> NetnsRef:
        return NetnsRef(node="node", kind=kind, inode=self.handle.inode, pod=pod)

    def namespace(self, **more: Any) -> Namespace:
        return Namespace(ref=self.ref(), handle=self.handle, **more)

    def pod(self, name: str, **more: Any) -> Namespace:
        return Namespace(ref=self.ref(NetnsKind.POD, name), handle=self.handle, **more)


@dataclass
class Bed:
    """Makes namespaces and takes them away again."""

    prefix: str = field(default_factory=lambda: f"gko-{os.getpid()}-{secrets.token_hex(2)}")
    made: list[Netns] = field(default_factory=list)

    def netns(self, name: str) -> Netns:
        full = f"{self.prefix}-{name}"
        subprocess.run(["ip", "netns", "add", full], check=True)
        try:
            made = Netns(full, open_path(Path("/run/netns") / full))
        except BaseException:
            subprocess.run(["ip", "netns", "delete", full], check=False)
            raise
        self.made.append(made)
        made.ip("link", "set", "lo", "up")
        return made

    def close(self) -> None:
        for made in self.made:
            made.handle.close()
            subprocess.run(["ip", "netns", "delete", made.name], check=False)
        self.made.clear()


def veth(one: Netns, one_end: str, other: Netns, other_end: str) -> None:
    """A pair between two namespaces, both ends up."""
    one.ip("link", "add", one_end, "type", "veth", "peer", "name", other_end, "netns", other.name)
    one.ip("link", "set", one_end, "up")
    other.ip("link", "set", other_end, "up")
