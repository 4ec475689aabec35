"""Where a lab keeps what it is (/run/gketrace-lab/NAME), and how it is taken down.

Every process of a lab is in the cgroup `gketrace-lab.NAME`, and every namespace, link, route, rule
and mount of it lives in namespaces that only those processes hold. So taking a lab down is: kill
the cgroup, wait, remove it, remove the folder. That needs no record of what was built, and works
whenever the building stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.netlab.errors import LabError

__all__ = [
    "Cgroup",
    "check_name",
    "lab_cgroup",
    "locked",
    "read_state",
    "runtime_dir",
    "state_dir",
    "teardown",
    "write_json",
]

BASE = Path("/run/gketrace-lab")
_DISK = Path("/var/lib/gketrace-lab")
_KILL_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cgroup:
    """A folder of a cgroup hierarchy: cgroup2 where it is mounted, else v1's name=systemd."""

    path: Path
    fstype: str
    options: str

    def child(self, name: str) -> Cgroup:
        return Cgroup(path=self.path / name, fstype=self.fstype, options=self.options)

    def join(self) -> None:
        """Makes the folder and moves the calling process into it."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "cgroup.procs").write_text("0")

    def pids(self) -> list[int]:
        """The processes in this folder and below, as this process's PID namespace numbers them."""
        found: list[int] = []
        for folder, _, _ in os.walk(self.path):
            with contextlib.suppress(FileNotFoundError, OSError):  # removed meanwhile
                text = (Path(folder) / "cgroup.procs").read_text()
                found += [int(line) for line in text.split()]
        return found


def check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,28}[a-z0-9])?", name):
        raise LabError(f"lab name {name!r}: use 1 to 30 of a-z, 0-9 and inner '-'")


def state_dir(name: str) -> Path:
    return BASE / name


def runtime_dir(name: str) -> Path:
    """Where the container runtimes of the lab keep images and root file systems: on disk, as /run
    is memory."""
    return _DISK / name


def lab_cgroup(name: str) -> Cgroup:
    """The lab's cgroup; raises LabError when this machine has no hierarchy to put it in."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    for kind, wanted in (("cgroup2", ""), ("cgroup", "name=systemd")):
        for _, target, fstype, options, *_ in mounts:
            if fstype == kind and wanted in options:
                used = f"none,{wanted}" if wanted else ""
                path = Path(target) / f"gketrace-lab.{name}"
                return Cgroup(path=path, fstype=kind, options=used)
    raise LabError("no cgroup2 and no name=systemd cgroup hierarchy is mounted")


@contextlib.contextmanager
def locked(name: str, *, create: bool, seconds: float = 60.0) -> Iterator[bool]:
    """Holds the lab's folder for one `up` or `down`; False when there is no such folder.

    Raises LabError when another process holds it for longer than `seconds`.
    """
    folder = state_dir(name)
    deadline = time.monotonic() + seconds
    while True:
        try:
            if create:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            if create:
                continue  # a `down` removed it in between, or the last lab's the folder of all
            yield False
            return
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise LabError(f"another lab command is busy with lab {name!r}") from None
                    time.sleep(0.02)
            try:
                current = folder.stat().st_ino
            except FileNotFoundError:
                current = -1
            if current == os.fstat(fd).st_ino:
                yield True
                return
        finally:
            os.close(fd)


def read_state(name: str) -> dict[str, Any] | None:
    """The lab's state.json, None when there is none."""
    try:
        state: dict[str, Any] = json.loads((state_dir(name) / "state.json").read_text())
    except FileNotFoundError:
        return None
    return state


def write_json(path: Path, value: object) -> None:
    """Writes the file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def teardown(name: str, *, keep_folder: bool = False) -> None:
    """Removes everything that lab `name` has made, whatever state it is in.

    `keep_folder` leaves the empty folder, on which the caller holds its lock.
    """
    cgroup = lab_cgroup(name)
    deadline = time.monotonic() + _KILL_SECONDS
    while cgroup.path.exists():
        kill = cgroup.path / "cgroup.kill"
        pids = cgroup.pids()
        if pids and kill.exists():
            kill.write_text("1")
        elif pids:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            _remove_cgroup(cgroup.path)
        if time.monotonic() > deadline:
            raise LabError(f"lab {name!r}: still there after {_KILL_SECONDS:.0f} s: {cgroup.path}")
        time.sleep(0.01)
    shutil.rmtree(runtime_dir(name), ignore_errors=True)
    with contextlib.suppress(OSError):  # another lab is there, or nothing was
        _DISK.rmdir()
    if keep_folder:
        for entry in state_dir(name).iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return
    shutil.rmtree(state_dir(name), ignore_errors=True)
    with contextlib.suppress(OSError):  # another lab is there, or nothing was
        BASE.rmdir()


def _remove_cgroup(root: Path) -> None:
    for folder, _, _ in os.walk(root, topdown=False):
        with contextlib.suppress(OSError):  # busy for a moment after its last process: tried again
            Path(folder).rmdir()
