"""Where the host's file systems are, as this process sees them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["HostPaths"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPaths:
    """Every host path goes through this; a DaemonSet mounts the host's file systems elsewhere.

    `proc` must be a proc mount of the host's PID namespace (hostPID, or a mount of the host's).
    """

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    run: Path = Path("/run")

    def pid(self, pid: int, *parts: str) -> Path:
        """``pid(12, "ns", "net")`` → ``/proc/12/ns/net``."""
        return self.proc.joinpath(str(pid), *parts)

    def thread_net(self, *parts: str) -> Path:
        """A file of /proc/net of the namespace that the calling thread is in.

        /proc/self/net is that of the main thread; only thread-self follows setns.
        """
        return self.proc.joinpath("thread-self", "net", *parts)

    def sysctl(self, dotted: str) -> Path:
        """``net.ipv4.ip_forward`` → its file.  /proc/sys/net follows the reading thread."""
        return self.proc.joinpath("sys", *dotted.split("."))
