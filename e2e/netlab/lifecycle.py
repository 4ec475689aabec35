"""`up`, `down` and the control socket, for the command and for tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from e2e.netlab import linux
from e2e.netlab.containerd import check_programs
from e2e.netlab.errors import LabError
from e2e.netlab.state import check_name, lab_cgroup, locked, read_state, state_dir, teardown
from e2e.netlab.world import TOPOLOGIES, default_backend, load_world

__all__ = ["control", "down", "running_state", "up"]

_PARAMETERS = ("topology", "era", "backend", "pods_backend", "agents")


def up(
    *,
    name: str,
    topology: str,
    era: str,
    backend: str | None,
    pods: str,
    agent_image: str,
    progress: Callable[[str], None],
) -> str:
    """Builds the lab, or checks and mends the one that is there; the kubeconfig's path.

    `agent_image`: the archive that scripts/image wrote, to run the agents from; empty: processes.

    Raises LabError: bad parameters, another lab under this name, or a step that failed (then
    nothing is left of it).
    """
    check_name(name)
    if topology not in TOPOLOGIES:
        raise LabError(f"--topology {topology}: there are: {', '.join(TOPOLOGIES)}")
    if pods not in ("process", "containerd"):
        raise LabError(f"--pods {pods}: there are: process, containerd")
    if agent_image and pods != "containerd":
        raise LabError("--agent-image: needs --pods containerd")
    if agent_image and not os.path.exists(agent_image):
        raise LabError(f"--agent-image {agent_image}: no such file; scripts/image writes it")
    backend = backend or default_backend(era)
    load_world(era, backend)
    if os.geteuid() != 0:
        raise LabError("the lab makes network namespaces: run it as root")
    if pods == "containerd":
        check_programs()
    wanted = {
        "topology": topology,
        "era": era,
        "backend": backend,
        "pods_backend": pods,
        "agents": "image" if agent_image else "process",
    }
    with locked(name, create=True):
        state = read_state(name)
        if state and state["complete"] and _alive(state):
            found = {key: state[key] for key in _PARAMETERS}
            if found != wanted:
                text = ", ".join(f"{key} {value}" for key, value in found.items())
                raise LabError(f"lab {name!r} is up with {text}; run `down --name {name}` first")
            try:
                control(name, {"op": "heal"})
            except LabError as error:
                progress(f"cannot be mended, built again: {error}")
            else:
                progress(f"lab {name!r} was up already; checked")
                return str(state["kubeconfig"])
        complete = False
        try:
            teardown(name, keep_folder=True)
            # Made here and only joined by the supervisor: one that starts late cannot bring it
            # back.
            lab_cgroup(name).path.mkdir()
            kubeconfig = _build(
                {
                    "name": name,
                    "state_dir": str(state_dir(name)),
                    "agent_image": os.path.abspath(agent_image) if agent_image else "",
                    **wanted,
                },
                progress,
            )
            complete = True
        finally:
            if not complete:
                # A second Ctrl-C must not leave half of it.
                blocked = {signal.SIGINT, signal.SIGTERM}
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
                teardown(name)
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return kubeconfig


def _build(config: dict[str, Any], progress: Callable[[str], None]) -> str:
    reading, writing = os.pipe()
    config = {**config, "report_fd": writing, "up_pid": os.getpid()}
    folder = Path(config["state_dir"])
    with (folder / "supervisor.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "e2e.netlab.supervisor", json.dumps(config)],
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(writing,),
            start_new_session=True,
        )
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as reports:
        for line in reports:
            report = json.loads(line)
            if "ready" in report:
                process.returncode = 0  # it stays: not ours to wait for
                return str(report["ready"])
            if "error" in report:
                process.wait()
                raise LabError(report["error"])
            progress(report["progress"])
    process.wait()
    last = (folder / "supervisor.log").read_text().strip().splitlines()[-1:]
    raise LabError(f"the lab's supervisor ended: {' '.join(last) or 'it said nothing'}")


def down(name: str) -> bool:
    """Removes the lab; False when there was none."""
    check_name(name)
    with locked(name, create=False) as present:
        teardown(name)
        return present


def _alive(state: dict[str, Any]) -> bool:
    supervisor = state["supervisor"]
    return bool(linux.start_time(supervisor["pid"]) == supervisor["start"])


def running_state(name: str) -> dict[str, Any]:
    """The state of a lab that is up; raises LabError."""
    check_name(name)
    state = read_state(name)
    if state is None or not state["complete"]:
        raise LabError(f"lab {name!r} is not up")
    if not _alive(state):
        raise LabError(f"lab {name!r} has died; run `down --name {name}`, then `up`")
    return state


def control(name: str, request: dict[str, Any]) -> Any:
    """Asks the lab's supervisor; raises LabError with what it says."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(120)
        try:
            sock.connect(str(state_dir(name) / "control.sock"))
            with contextlib.closing(sock.makefile("rw", encoding="utf-8")) as stream:
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                line = stream.readline()
        except OSError as error:
            raise LabError(f"lab {name!r}: its supervisor does not answer: {error}") from error
    if not line:
        raise LabError(f"lab {name!r}: its supervisor ended")
    answer = json.loads(line)
    if "error" in answer:
        raise LabError(answer["error"])
    return answer["ok"]
