"""The supervisor's side of `--pods containerd`: what the kubelets are asked, and what they told.

PIDs that the kubelets tell are those of the node's PID namespace; the machine's own are found in
the containers' cgroups.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from e2e.netlab import linux
from e2e.netlab.agentaccess import API_INSIDE, AgentFiles
from e2e.netlab.containerd import pod_cgroup, snapshotter
from e2e.netlab.errors import LabError
from e2e.netlab.images import HELLO_IMAGE
from e2e.netlab.nodeinit import AGENT_ARGUMENTS
from e2e.netlab.state import Cgroup, runtime_dir
from e2e.netlab.world import Node, Pod, World, agent_key, agent_object

__all__ = ["AGENT_IMAGE", "Runtime", "packaged_agent", "with_sidecar"]

AGENT_IMAGE = "gketrace-agent:0.1.0"
SIDECAR_PORT = 9901
_REPOSITORY = Path(__file__).resolve().parents[2]
_LOG = "/var/log/peers.jsonl"


def with_sidecar(pod: dict[str, Any]) -> dict[str, Any]:
    """The pod's object with a second container: the captured cluster has none with two."""
    spec = pod["spec"]
    sidecar = {
        "name": "sidecar",
        "image": "gketrace.dev/lab/sidecar:1",
        "ports": [{"name": "metrics", "containerPort": SIDECAR_PORT, "protocol": "TCP"}],
    }
    return {**pod, "spec": {**spec, "containers": [*spec["containers"], sidecar]}}


def packaged_agent(node: Node, without: tuple[str, ...] = (), seccomp: str = "") -> dict[str, Any]:
    """The agent's pod as deploy/daemonset.yaml's controller makes it, on `node`; of its added
    capabilities those in `without` are left out; `seccomp` is another type of profile.

    The file's arguments hold, but for where the API is: the lab has no ClusterIP for it; those that
    a test adds for processes come after them.
    """
    objects = yaml.safe_load_all((_REPOSITORY / "deploy/daemonset.yaml").read_text())
    template = next(one for one in objects if one and one["kind"] == "DaemonSet")["spec"][
        "template"
    ]
    pod = agent_object(node)
    spec = template["spec"]
    host, port = API_INSIDE.split(":")
    (container,) = spec["containers"]
    security = container["securityContext"]
    added = [name for name in security["capabilities"]["add"] if name not in without]
    if seccomp:
        security = {**security, "seccompProfile": {"type": seccomp}}
    container = {
        **container,
        "args": [
            *container.get("args", ()),
            *shlex.split(os.environ.get(AGENT_ARGUMENTS, "")),
        ],
        "env": [
            *container["env"],
            {"name": "KUBERNETES_SERVICE_HOST", "value": host},
            {"name": "KUBERNETES_SERVICE_PORT", "value": port},
        ],
        "securityContext": {
            **security,
            "capabilities": {**security["capabilities"], "add": added},
        },
    }
    return {
        **pod,
        "metadata": {**pod["metadata"], "labels": template["metadata"]["labels"]},
        "spec": {**spec, "nodeName": node.name, "containers": [container]},
    }


class Runtime:
    """All pods of the lab named `name`, as containers."""

    def __init__(self, world: World, name: str, folder: Path, cgroup: Cgroup) -> None:
        self._world = world
        self._folder = folder
        self._disk = runtime_dir(name)
        self._cgroup = cgroup
        self._told: dict[str, dict[str, Any]] = {}
        with (folder / "kubelet.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "e2e.netlab.kubelet"],
                cwd=_REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                preexec_fn=linux.die_with_parent,
            )

    # -- asking ------------------------------------------------------------------------------

    def _send(self, **request: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LabError("the kubelets' process ended; see kubelet.log")
        answer = json.loads(line)
        if "error" in answer:
            raise LabError(answer["error"])
        return answer["ok"]

    def _ask(self, **request: object) -> Any:
        self._send(**request)
        return self._receive()

    # -- building ----------------------------------------------------------------------------

    def prepare(self) -> None:
        """Starts making the images; does not wait."""
        self._send(op="build", folder=str(self._disk))

    def connect(self, nodes: dict[str, int], agent: str | None) -> None:
        """`nodes`: their PIDs; `agent`: the archive of the agent's image."""
        self._receive()
        self._ask(
            op="nodes",
            nodes=nodes,
            folder=str(self._disk),
            snapshotter=snapshotter(self._disk),
            agent=None if agent is None else {"archive": agent, "name": AGENT_IMAGE},
        )

    def start_pods(self) -> None:
        """All pods of the world."""
        self._told |= self._ask(op="run", pods=[self._request(pod) for pod in self._world.pods])

    def start_agents(self, without: tuple[str, ...] = (), seccomp: str = "") -> None:
        """The packaged agents, anew; see `packaged_agent`.  Waits for their start-up probe, as the
        kubelet does."""
        requests = []
        for node in self._world.nodes:
            item = packaged_agent(node, without, seccomp)
            requests.append(
                {"object": item, "node": node.name, "files": self._files(), "grace": 10}
            )
        for request in requests:
            if self._key(request["object"]) in self._told:
                self._ask(op="stop", pod=self._key(request["object"]))
        self._told |= self._ask(op="run", pods=requests)
        for request in requests:
            self._ask(op="probe", pod=self._key(request["object"]))

    def _key(self, item: dict[str, Any]) -> str:
        return f"{item['metadata']['namespace']}/{item['metadata']['name']}"

    def _files(self) -> dict[str, str]:
        """What the kubelet shows in the volumes `tls` (a Secret) and `token` (projected)."""
        files = AgentFiles(self._folder / "agents")
        shown = {
            "tls": {"tls.crt": files.certificate, "tls.key": files.key},
            "token": {"token": files.token, "ca.crt": files.kube_ca},
        }
        found = {}
        for name, parts in shown.items():
            place = self._folder / "volumes" / name
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            for target, source in parts.items():
                (place / target).write_bytes(source.read_bytes())
                (place / target).chmod(0o400)
            found[name] = str(place)
        return found

    def _request(self, pod: Pod) -> dict[str, Any]:
        item = self._object(pod)
        containers = []
        for number, spec in enumerate(item["spec"]["containers"]):
            ports = pod.ports if number == 0 else [("TCP", SIDECAR_PORT)]
            log = str(self._folder / "peers" / f"{pod.namespace}_{pod.name}.jsonl")
            told = {"pod": pod.key, "node": pod.node, "ports": ports, "log": _LOG}
            containers.append(
                {
                    "name": spec["name"],
                    "image": HELLO_IMAGE,
                    "args": ["-E", "-s", "-S", "-B", "/app/main.py", json.dumps(told)],
                    "ports": spec.get("ports", []),
                    "volumeMounts": [{"name": "log", "mountPath": _LOG}],
                }
            )
        spec = {
            "nodeName": pod.node,
            "hostNetwork": pod.host_network,
            "containers": containers,
            "volumes": [{"name": "log", "hostPath": {"path": log}}],
        }
        return {"object": {**item, "spec": spec}, "node": pod.node, "files": {}, "grace": 0}

    def _object(self, pod: Pod) -> dict[str, Any]:
        if pod.synthetic:
            found = self._world.extra_pod_objects
            return with_sidecar(next(one for one in found if one["metadata"]["uid"] == pod.uid))
        items = json.loads((self._world.path / "pods.json").read_text())["items"]
        item: dict[str, Any] = next(one for one in items if one["metadata"]["uid"] == pod.uid)
        return item

    # -- afterwards --------------------------------------------------------------------------

    def control(self, action: str, key: str) -> None:
        """`stop` ends the pod's containers and sandbox; `start` makes new ones unless all run."""
        if action == "stop":
            self._ask(op="stop", pod=key)
        else:
            self.refresh()  # a container may have ended by itself
            if not self.running(key):
                self._ask(op="start", pod=key)
        self.refresh()

    def execute(self, key: str, container: str, argv: list[str]) -> Any:
        return self._ask(op="exec", pod=key, container=container, argv=argv)

    def refresh(self) -> dict[str, dict[str, Any]]:
        """Asks every runtime; what it tells of each pod."""
        self._told = self._ask(op="status")
        return self._told

    def running(self, key: str) -> bool:
        told = self._told.get(key)
        return bool(told and told["sandbox_pid"] and all(one["pid"] for one in told["containers"]))

    def keys(self) -> tuple[str, ...]:
        """Pods of which all runs."""
        return tuple(key for key in self._told if self.running(key))

    def entry(self, pod: Pod, node: Node) -> dict[str, Any]:
        """The parts of a pod's entry in state.json that the runtime decides."""
        told = self._told.get(pod.key, {})
        base = self._cgroup.child(f"node-{node.short}").child(pod_cgroup(pod.uid))

        def first(identity: str | None) -> int | None:
            pids = base.child(identity).pids() if identity else []
            return min(pids, default=None)

        containers = [
            {"name": one["name"], "id": one["id"], "pid": first(one["id"])}
            for one in told.get("containers", ())
        ]
        return {
            "container_id": containers[0]["id"] if containers else None,
            "sandbox_id": told.get("sandbox_id"),
            "sandbox_pid": first(told.get("sandbox_id")),
            "attempt": told.get("attempt"),
            "pid": containers[0]["pid"] if containers else None,
            "veth": told.get("veth"),
            "netns_name": told.get("netns_name"),
            "containers": containers,
        }

    def add_to(self, nodes: dict[str, Any]) -> None:
        """Completes the nodes' own status with what their runtimes say."""
        told = self.refresh()
        agents = {agent_key(node): node.name for node in self._world.nodes}
        for key, one in told.items():
            state = "running" if self.running(key) else one["containers"][0]["state"]
            if one["node"] not in nodes:
                continue
            if key in agents:
                nodes[one["node"]]["agent"] |= {"state": state, "pid": one["containers"][0]["pid"]}
                continue
            nodes[one["node"]]["pods"][key] = {
                "sandbox_pid": one["sandbox_pid"],
                "pid": one["containers"][0]["pid"],
                "running": self.running(key),
            }

    def heal(self) -> None:
        """Starts again what does not run."""
        self.refresh()
        for key in self._told:
            self.control("start", key)

    def known(self) -> tuple[str, ...]:
        return tuple(self._told)

    def statuses(self, key: str) -> list[dict[str, Any]]:
        """status.containerStatuses as a kubelet reports them."""
        told = self._told[key]
        return [
            {
                "name": one["name"],
                "containerID": f"containerd://{one['id']}",
                "image": one["image"],
                "imageID": "",
                "ready": bool(one["pid"]),
                "started": bool(one["pid"]),
                "restartCount": told["attempt"],
                "state": (
                    {"running": {"startedAt": "2026-11-22T01:00:00Z"}}
                    if one["pid"]
                    else {"terminated": {"exitCode": 137, "reason": "Error"}}
                ),
            }
            for one in told.get("containers", ())
        ]
