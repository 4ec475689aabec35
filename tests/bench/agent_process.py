"""An agent of its own for a benchmark: its host is a namespace that the benchmark made."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.agent.observe.bed import wait_until

__all__ = ["AgentProcess", "agent_process"]

_CGROUPS: Final = Path("/sys/fs/cgroup")
_TICKS: Final = os.sysconf("SC_CLK_TCK")


class AgentProcess:
    """What can be read of it from outside."""

    def __init__(self, pid: int, socket: str, log: Path, cgroup: Path | None) -> None:
        self.pid, self.socket, self.log, self._cgroup = pid, socket, log, cgroup

    def memory(self, name: str) -> int:
        """``VmRSS`` or ``VmHWM``, in bytes."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(text.partition(f"{name}:")[2].split()[0]) * 1024

    def cpu(self) -> float:
        """Seconds of processor time so far, its ended children included."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(int(value) for value in fields[11:15]) / _TICKS

    def counts(self) -> dict[str, int]:
        """Threads and file descriptors."""
        folder = Path(f"/proc/{self.pid}")
        return {name: len(os.listdir(folder / name)) for name in ("task", "fd")}

    def peak_of_all(self) -> int | None:
        """Bytes that the agent and its children took together at most, as its cgroup counts them:
        what a container's limit bounds.  None: this machine has no memory controller to ask."""
        if self._cgroup is None:
            return None
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            with contextlib.suppress(FileNotFoundError):
                return int((self._cgroup / name).read_text())
        return None


@contextlib.contextmanager
def _cgroup(name: str) -> Iterator[Path | None]:
    """A cgroup with the memory controller, of version 2 or 1; removed at the end."""
    for parent in (_CGROUPS / "memory", _CGROUPS):
        procs = parent / "cgroup.procs"
        if not procs.exists():
            continue
        folder = parent / name
        folder.mkdir()
        try:
            if any((folder / f).exists() for f in ("memory.peak", "memory.max_usage_in_bytes")):
                yield folder
                return
        finally:
            wait_until(lambda: not (folder / "cgroup.procs").read_text(), 10)  # noqa: B023 same
            folder.rmdir()
    yield None


@contextlib.contextmanager
def agent_process(netns: str, *more: str) -> Iterator[AgentProcess]:
    """``gketrace-agent serve`` with `netns` as its node's own namespace, and `more` arguments."""
    name = f"gkbench-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix=name) as folder, _cgroup(name) as cgroup:
        socket = f"{folder}/agent.sock"
        argv = ["ip", "netns", "exec", netns, "unshare", "--fork", "--pid", "--mount-proc"]
        argv += [str(Path(sys.executable).parent / "gketrace-agent"), "serve"]
        argv += ["--listen", f"unix://{socket}", "--log-file", f"{folder}/log", *more]
        if cgroup is not None:
            # The shell enters the cgroup and becomes the agent's starter there.
            argv = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(cgroup), *argv]
        process = subprocess.Popen(argv)
        try:
            wait_until(lambda: os.path.exists(socket) or process.poll() is not None, 60)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            wait_until(lambda: bool(children.read_text().split()), 5)
            served = int(children.read_text().split()[0])
            try:
                yield AgentProcess(served, socket, Path(folder, "log"), cgroup)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(served, 15)
        finally:
            process.wait(30)
