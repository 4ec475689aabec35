"""A pod that can be made with a PID, and be told from all others."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gketrace_proto.v1alpha1 import target_pb2
from tests.agent.pods import CGROUPS

__all__ = ["NAMESPACE", "RacePod", "poll"]

NAMESPACE: Final = "races"
_LAST_PID: Final = Path("/proc/sys/kernel/ns_last_pid")
_SCRIPT: Final = """
ip link set lo up && ip address add {address}/32 dev lo && ip route add blackhole {mark} || exit 1
conntrack -I -p udp -s {address} -d {mark} --sport 1 --dport 2 -t 86400 >/dev/null 2>&1 || exit 1
echo 0 > {cgroup}/cgroup.procs
exec -a app bash -c '
exec 4<> <(:) 3<> /dev/udp/{address}/9
while :; do read -t 0.02 -u 4; echo x >&3; done' 2>/dev/null
"""
"""The last line is the pod's process: it sends to itself all the time."""


def poll(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    """Until it is true.  Raises TimeoutError with `what` did not happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.001)


@dataclass(slots=True, kw_only=True)
class RacePod:
    """One pod, from `start` to `delete`."""

    number: int
    process: subprocess.Popen[bytes]
    root: Path
    """Its cgroup."""
    uid: str
    container_id: str
    path: Path | None = None
    """Where its namespace is mounted."""
    inode: int = 0
    held: int = -1
    """A descriptor of its namespace, so that its inode is not used again."""

    @classmethod
    def start(cls, number: int, root: Path, pid: int = 0) -> RacePod:
        """Begins to start it; `pid`: the one that it gets, if that is free."""
        uid, container_id = str(uuid.uuid4()), uuid.uuid4().hex * 2
        cgroup = CGROUPS / root / "kubepods" / f"pod{uid}" / container_id
        cgroup.mkdir(parents=True)
        words = {"address": _address(number), "mark": _mark(number), "cgroup": cgroup}
        argv = ["unshare", "--net", "bash", "-c", _SCRIPT.format(**words)]
        if pid:
            _LAST_PID.write_text(str(pid - 1))
        process = subprocess.Popen(argv)
        return cls(number=number, process=process, root=cgroup, uid=uid, container_id=container_id)

    def wait(self, mounts: Path, *, hold: bool) -> None:
        """Until it is there; its namespace is mounted, and held open if asked."""
        command = Path(f"/proc/{self.pid}/cmdline")
        poll(lambda: command.read_bytes().startswith(b"app\0"), f"pod {self.number} did not start")
        namespace = f"/proc/{self.pid}/ns/net"
        self.inode = os.stat(namespace).st_ino
        self.path = mounts / f"cni-{self.uid}"
        self.path.touch()
        subprocess.run(["mount", "--bind", namespace, str(self.path)], check=True)
        if hold:
            self.held = os.open(namespace, os.O_RDONLY)

    def kill(self) -> None:
        """Its process, and its namespace's name: what a runtime does, as fast as can be."""
        self.process.kill()
        self.process.wait()
        if self.path is not None:
            subprocess.run(["umount", "--lazy", str(self.path)], check=True)
            self.path.unlink()

    def forget(self) -> None:
        """What is left of it."""
        for procs in self.root.parent.rglob("cgroup.procs"):
            for text in procs.read_text().split():
                os.kill(int(text), signal.SIGKILL)
        poll(lambda: _removed(self.root), f"the cgroup of pod {self.number} is still used")
        poll(lambda: _removed(self.root.parent), f"pod {self.number}'s cgroup is still used")
        if self.held >= 0:
            os.close(self.held)
            self.held = -1

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def name(self) -> str:
        return f"pod-{self.number}"

    @property
    def address(self) -> str:
        return _address(self.number)

    @property
    def mark(self) -> str:
        """The destination of its own route and connection."""
        return _mark(self.number)

    @property
    def ref(self) -> target_pb2.PodRef:
        return target_pb2.PodRef(
            namespace=NAMESPACE,
            name=self.name,
            uid=self.uid,
            container_ids=[self.container_id],
            pod_ips=[self.address],
        )


def _address(number: int) -> str:
    return f"10.{64 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"


def _mark(number: int) -> str:
    return f"198.{18 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:  # a process in it has not quite ended
        return not folder.exists()
    return True
