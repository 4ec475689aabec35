"""Cgroups as the node has them, from a container's namespace."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.resolve.process import read_cgroup
from tests.agent.pods import CGROUPS, wait_until

SCRIPT = """
import sys, threading
from gketrace_agent.resolve.host import see_all_cgroups
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.resolve.process import read_cgroup

paths = HostPaths()
path = lambda: read_cgroup(paths, int(sys.argv[1])).splitlines()[-1].split(":", 2)[2]
print(path())
print(see_all_cgroups(paths))
print(path())
threading.Thread(target=lambda: print(path())).start()
"""


def test_a_container_s_own_pod_is_named(tmp_path: Path) -> None:
    """From a cgroup namespace of its own; a sibling's cgroup, as a pod's sandbox is one."""
    pod = CGROUPS / f"gkcgns-{uuid.uuid4().hex[:8]}"
    own, sandbox = pod / "own", pod / "sandbox"
    other = subprocess.Popen(["sleep", "60"])
    try:
        for folder in (own, sandbox):
            folder.mkdir(parents=True)
        (sandbox / "cgroup.procs").write_text(str(other.pid))
        script = f'echo $$ > {own}/cgroup.procs && exec unshare --cgroup "$@"'
        argv = ["sh", "-c", script, "sh", sys.executable, "-c", SCRIPT, str(other.pid)]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        before, why, after, thread = done.stdout.split("\n")[:4]
        assert before == "/../sandbox"
        assert why == ""
        told = read_cgroup(HostPaths(), other.pid).splitlines()[-1]
        assert f"{pod.name}/sandbox" in told
        # As PID 1 has it, whose namespace may be above this process's own.
        assert after.endswith(told.split(":", 2)[2].replace("/..", ""))
        assert thread == after
    finally:
        other.kill()
        other.wait()
        for folder in (own, sandbox, pod):
            wait_until(lambda folder=folder: _gone(folder))


def _gone(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:  # a process in it has not quite ended
        return not folder.exists()
    return True


def test_why_it_cannot_is_said(tmp_path: Path) -> None:
    """A /proc without PID 1: the agent goes on as it is."""
    (tmp_path / "thread-self").symlink_to("/proc/thread-self")
    script = f"""
from pathlib import Path
from gketrace_agent.resolve.host import see_all_cgroups
from gketrace_agent.kernel.hostpaths import HostPaths
print(see_all_cgroups(HostPaths(proc=Path({str(tmp_path)!r}))))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{tmp_path}/1/ns/cgroup: No such file or directory\n"
