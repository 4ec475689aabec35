from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gketrace.errors import GoneError, UnavailableError
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import (
    NetnsHandle,
    open_current,
    open_path,
    open_pid,
    process_starttime,
    run_in_netns,
)
from tests.agent.observe.bed import PATHS, Bed, Netns, wait_until
from tests.agent.observe.conftest import bed as bed  # a fixture


@contextmanager
def sleeper(netns: Netns) -> Iterator[int]:
    """A process inside, its first thread with a name that is hard to parse."""
    process = subprocess.Popen(
        ["ip", "netns", "exec", netns.name, "bash", "-c", 'exec -a "a) b (c" sleep 60']
    )
    try:
        inode = netns.handle.inode
        wait_until(lambda: os.stat(f"/proc/{process.pid}/ns/net").st_ino == inode)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def here() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


def test_a_function_runs_inside_and_the_caller_stays(bed: Bed) -> None:
    netns = bed.netns("run")
    home = here()
    seen: list[threading.Thread] = []

    def look() -> int:
        seen.append(threading.current_thread())
        return here()

    assert run_in_netns(netns.handle, look) == netns.handle.inode != home
    assert here() == home
    assert not seen[0].is_alive()


def test_an_exception_comes_back(bed: Bed) -> None:
    def fail() -> None:
        raise LookupError("inside")

    with pytest.raises(LookupError, match="inside"):
        run_in_netns(bed.netns("raise").handle, fail)


def test_a_socket_stays_in_its_namespace(bed: Bed) -> None:
    netns = bed.netns("socket")
    sock = run_in_netns(netns.handle, lambda: socket.create_server(("127.0.0.1", 7777)))
    with sock:
        assert ":7777" in netns.run("ss", "-Hlnt")


def test_a_namespace_by_pid_is_that_of_the_process(bed: Bed) -> None:
    netns = bed.netns("pid")
    with sleeper(netns) as pid:
        start = process_starttime(PATHS, pid)
        with open_pid(PATHS, pid, starttime=start) as handle:
            assert handle.inode == netns.handle.inode
        with pytest.raises(GoneError, match="another process"):
            open_pid(PATHS, pid, starttime=start - 1)
    with pytest.raises(GoneError, match="has ended"):
        open_pid(PATHS, pid)


def test_a_zombie_has_no_namespace() -> None:
    process = subprocess.Popen(["true"])
    try:
        wait_until(lambda: ") Z " in Path(f"/proc/{process.pid}/stat").read_text())
        with pytest.raises(GoneError):
            open_pid(PATHS, process.pid)
    finally:
        process.wait()


def test_an_open_namespace_outlives_its_name(bed: Bed) -> None:
    netns = bed.netns("named")
    with open_path(Path("/run/netns") / netns.name) as handle:
        bed.close()
        assert run_in_netns(handle, here) == handle.inode


def test_what_is_no_namespace_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "cni-empty"
    empty.touch()
    with pytest.raises(UnavailableError, match="HostToContainer"):
        open_path(empty)
    with pytest.raises(UnavailableError, match="not a network namespace"):
        open_path(Path("/proc/self/ns/mnt"))
    with pytest.raises(GoneError):
        open_path(tmp_path / "none")


def test_a_closed_handle_cannot_be_entered() -> None:
    handle = open_current()
    handle.close()
    handle.close()
    with pytest.raises(GoneError, match="closed"):
        run_in_netns(handle, here)


def test_the_inode_entered_is_checked(bed: Bed) -> None:
    one, other = bed.netns("one"), bed.netns("other")
    wrong = NetnsHandle(os.dup(one.handle.fd), "wrong")
    wrong.inode = other.handle.inode  # type: ignore[misc]  # as if the file had been replaced
    with wrong, pytest.raises(UnavailableError, match="was asked for"):
        run_in_netns(wrong, here)


def test_paths_of_a_mounted_host() -> None:
    paths = HostPaths(proc=Path("/host/proc"))
    assert paths.pid(7, "ns", "net") == Path("/host/proc/7/ns/net")
    assert paths.sysctl("net.ipv4.ip_forward") == Path("/host/proc/sys/net/ipv4/ip_forward")
    assert paths.thread_net("tcp") == Path("/host/proc/thread-self/net/tcp")
