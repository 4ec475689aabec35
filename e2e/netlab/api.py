"""`Lab`: the lab for tests."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from e2e.netlab import lifecycle
from e2e.netlab.apiserver import api_request
from e2e.netlab.errors import LabError
from e2e.netlab.probes import Address, Hold, Prober, Result, finish
from e2e.netlab.targets import find_node, find_pod, resolve
from e2e.netlab.world import World, default_backend, load_world

__all__ = ["AGENT_IMAGE_VARIABLE", "COMMAND", "Lab", "Probe"]

COMMAND = Path(__file__).resolve().parents[1] / "lab"
AGENT_IMAGE_VARIABLE = "GKETRACE_LAB_AGENT_IMAGE"
"""The environment's variable with the image archive that labs run their agents from, as containers
beside pods that are containers too, unless a test asks for something else."""
_TIMEOUT = 1.0
"""Seconds until a probe is a timeout. Everything in the lab answers within milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One connection to try; `source` is what `e2e/lab exec` takes."""

    source: str
    address: str
    port: int
    protocol: str = "TCP"
    bind: Address | None = None


class Lab:
    """A lab by name. `with Lab("x", topology="ptp") as lab:` brings it up and takes it down."""

    def __init__(
        self,
        name: str = "lab",
        *,
        topology: str = "bridge",
        era: str = "1.36",
        backend: str | None = None,
        pods: str = "",
        agent_image: str = "",
    ) -> None:
        self.name = name
        self.agent_image = agent_image or os.environ.get(AGENT_IMAGE_VARIABLE, "")
        self.pods = pods or ("containerd" if self.agent_image else "process")
        self.topology = topology
        self.era = era
        self.backend = backend or default_backend(era)
        self._probers: dict[str, Prober] = {}
        self._state: dict[str, Any] | None = None

    # -- up and down -------------------------------------------------------------------------

    def up(self) -> Lab:
        """Runs `e2e/lab up`; raises LabError with what it says."""
        argv = ["up", "--topology", self.topology, "--era", self.era, "--backend", self.backend]
        argv += ["--pods", self.pods]
        if self.agent_image:
            argv += ["--agent-image", self.agent_image]
        done = self.command(*argv)
        if done.returncode != 0:
            raise LabError(f"{self.name}: up: exit {done.returncode}: {done.stderr.strip()}")
        self._state = None
        return self

    def down(self) -> None:
        """Takes it down; no error when it is not there."""
        for prober in self._probers.values():
            prober.close()
        self._probers = {}
        self._state = None
        lifecycle.down(self.name)

    def command(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs `e2e/lab VERB --name NAME ARGUMENTS`."""
        return subprocess.run(
            [str(COMMAND), verb, "--name", self.name, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=600 if self.agent_image else 120,
        )

    def __enter__(self) -> Lab:
        return self.up()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    # -- what is there -----------------------------------------------------------------------

    @property
    def state(self) -> dict[str, Any]:
        """state.json; `status()` has what changes while the lab runs."""
        if self._state is None:
            self._state = lifecycle.running_state(self.name)
        return self._state

    @property
    def world(self) -> World:
        return load_world(self.era, self.backend)

    @property
    def kubeconfig(self) -> Path:
        return Path(self.state["kubeconfig"])

    def status(self) -> dict[str, Any]:
        """What `e2e/lab status -o json` prints."""
        done = self.command("status", "-o", "json")
        if done.returncode != 0:
            raise LabError(done.stderr.strip())
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def node(self, text: str) -> dict[str, Any]:
        """A node's entry in the state, with its `name`."""
        name = find_node(self.state, text)
        return {"name": name, **self.state["nodes"][name]}

    def pod(self, text: str) -> dict[str, Any]:
        """A pod's entry in the state, with its `key` (namespace/name)."""
        key = find_pod(self.state, text)
        return {"key": key, **self.state["pods"][key]}

    def agent_socket(self, node: str) -> Path:
        """The path, from outside the node, of its agent's unix socket."""
        return Path(self.node(node)["agent_socket"])

    def peers(self, pod: str) -> list[dict[str, Any]]:
        """Every peer that the pod has answered: the lines that server.py describes."""
        text = Path(self.pod(pod)["peers_log"]).read_text()
        return [json.loads(line) for line in text.splitlines()]

    # -- commands and traffic ----------------------------------------------------------------

    def exec(
        self, target: str, argv: Sequence[str], *, stdin: str = "", timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command at `target`, as `e2e/lab exec` does, without its start-up time."""
        place = resolve(self.state, target)
        return subprocess.run(
            place.argv(list(argv), "/"),
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    def connect(
        self,
        source: str,
        address: str,
        port: int,
        protocol: str = "TCP",
        *,
        bind: Address | None = None,
        timeout: float = _TIMEOUT,
    ) -> Result:
        """Opens a connection (sends a datagram, an SCTP INIT), asks who answers, and closes it."""
        _, future = self._prober(source).start(address, port, protocol, timeout, bind)
        return finish(future, timeout)

    def connect_all(self, probes: Iterable[Probe], *, timeout: float = _TIMEOUT) -> list[Result]:
        """`connect` for many at once; results in the probes' order."""
        futures = [
            self._prober(p.source).start(p.address, p.port, p.protocol, timeout, p.bind)[1]
            for p in probes
        ]
        return [finish(future, timeout) for future in futures]

    def hold(
        self,
        source: str,
        address: str,
        port: int,
        *,
        bind: Address | None = None,
        timeout: float = _TIMEOUT,
    ) -> Hold:
        """Opens a TCP connection to a pod and keeps it; raises LabError when it does not open."""
        prober = self._prober(source)
        number, future = prober.start(address, port, "TCP", timeout, bind, hold=True)
        result = finish(future, timeout)
        if result.kind != "delivered":
            raise LabError(f"{source} to {address}:{port}: {result.kind} {result.detail}")
        return Hold(prober, number, result)

    def _prober(self, source: str) -> Prober:
        if source not in self._probers:
            cgroup = Path(self.state["cgroup"]) / "probers"
            self._probers[source] = Prober(resolve(self.state, source), cgroup)
        return self._probers[source]

    # -- changes -----------------------------------------------------------------------------

    def set_lb_target(self, address: str, node: str) -> None:
        """Sends a load balancer's address to another node."""
        request = {"op": "lb-target", "address": address, "node": find_node(self.state, node)}
        lifecycle.control(self.name, request)
        self._state = None

    def stop_agent(self, node: str) -> None:
        self._agent(node, "stop")

    def start_agent(self, node: str) -> None:
        """Starts the node's agent and waits until its socket accepts."""
        self._agent(node, "start")

    def stop_pod(self, pod: str) -> None:
        """Ends the pod's processes, namespace and veth; its object and the rules stay."""
        self._pod(pod, "stop")

    def start_pod(self, pod: str) -> None:
        """Brings a stopped pod back, with new PIDs and a new namespace."""
        self._pod(pod, "start")

    def stop_runtime(self, node: str) -> None:
        """Kills the node's containerd; its containers go on."""
        self._runtime(node, "stop")

    def start_runtime(self, node: str) -> None:
        self._runtime(node, "start")

    def container_exec(self, pod: str, container: str, argv: Sequence[str]) -> dict[str, Any]:
        """Runs a command in a container as the kubelet does: {"code", "out", "err"}."""
        request = {"op": "container-exec", "pod": pod, "container": container, "argv": list(argv)}
        answer: dict[str, Any] = lifecycle.control(self.name, request)
        return answer

    def restart_agents(self, *, without: Sequence[str] = (), seccomp: str = "") -> None:
        """Packaged agents only: anew, without some of the capabilities that they are given, or with
        another type of seccomp profile."""
        request = {"op": "agents", "without": list(without), "seccomp": seccomp}
        lifecycle.control(self.name, request)

    def _runtime(self, node: str, action: str) -> None:
        request = {"op": "runtime", "node": find_node(self.state, node), "action": action}
        lifecycle.control(self.name, request)

    def api(self, method: str, path: str, body: object = None) -> Any:
        """A request to the Kubernetes API as its admin; /lab/… are its knobs (kubeapi.control)."""
        return api_request(self.kubeconfig, method, path, body)

    def _pod(self, pod: str, action: str) -> None:
        key = find_pod(self.state, pod)
        lifecycle.control(self.name, {"op": "pod", "pod": key, "action": action})
        self._state = None
        prober = self._probers.pop(f"pod/{pod}", None) or self._probers.pop(f"pod/{key}", None)
        if prober:
            prober.close()

    def _agent(self, node: str, action: str) -> None:
        request = {"op": "agent", "node": find_node(self.state, node), "action": action}
        lifecycle.control(self.name, request)
