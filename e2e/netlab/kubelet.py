"""The kubelets of all nodes, in one process: makes pods from their objects, over CRI.

Started by the supervisor as `python -m e2e.netlab.kubelet`, as gRPC does not survive the forks that
the nodes' own processes are made by.  It reaches each node's runtime through /proc/PID/root.  One
JSON object a line on stdin, one answer a line on stdout: {"ok"} or {"error"}.

- {"op": "build", "folder"}: makes the lab's images.
- {"op": "nodes", "nodes": {NAME: PID}, "snapshotter", "agent": {"archive", "name"} or null}:
  imports the images into each node's runtime.
- {"op": "run", "pods": [{"object", "node", "files", "grace"}]}: starts pods, as podspec.py says;
  `grace` are the seconds between SIGTERM and SIGKILL at the end.  Answers {KEY: what runs}.
- {"op": "start" | "stop" | "probe", "pod": KEY}: `probe` runs start-up probes until they succeed.
- {"op": "status"}; {"op": "exec", "pod", "container", "argv"}.

What runs: {"sandbox_id", "sandbox_pid", "attempt", "netns_name", "veth", "ips",
"containers": [{"name", "id", "pid", "state", "image"}]}; PIDs as the node
numbers them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e.netlab.containerd import RUNTIME_SOCKET
from e2e.netlab.cri import CriClient
from e2e.netlab.errors import LabError
from e2e.netlab.images import HELLO_IMAGE, PAUSE_IMAGE, build_images
from e2e.netlab.podspec import container_config, sandbox_config

_SECONDS = 20.0


@dataclass(slots=True, kw_only=True)
class _Running:
    """A pod that was started."""

    node: str
    sandbox: str
    attempt: int
    config: dict[str, Any]
    containers: dict[str, str]
    request: dict[str, Any]
    older: list[str] = field(default_factory=list)


class Kubelet:
    """All pods that this process has started, by namespace/name."""

    def __init__(self) -> None:
        self._clients: dict[str, CriClient] = {}
        self._pods: dict[str, _Running] = {}
        self._folder = Path()
        self._images: list[dict[str, str]] = []

    def handle(self, request: dict[str, Any]) -> Any:
        operation = request["op"]
        if operation == "build":
            self._folder = Path(request["folder"])
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o711)
            names = (PAUSE_IMAGE, HELLO_IMAGE)
            for name, archive in zip(names, build_images(self._folder), strict=True):
                self._images.append({"name": name, "archive": str(archive)})
            return None
        if operation == "nodes":
            return self.connect(request)
        if operation == "run":
            with ThreadPoolExecutor(4, "pods") as pool:
                return dict(pool.map(self.run, request["pods"]))
        if operation == "start":
            key, _ = self.run(self._pods[request["pod"]].request)
            return self.describe(key)
        if operation == "stop":
            return self.stop(request["pod"])
        if operation == "probe":
            return self.probe(request["pod"])
        if operation == "status":
            return {key: self.describe(key) for key in list(self._pods)}
        if operation == "exec":
            return self.execute(request)
        raise LabError(f"kubelet: unknown request {operation!r}")

    # -- runtimes and images -----------------------------------------------------------------

    def connect(self, request: dict[str, Any]) -> None:
        images = [*self._images, *([request["agent"]] if request["agent"] else [])]
        sockets = {
            node: f"/proc/{pid}/root{RUNTIME_SOCKET}" for node, pid in request["nodes"].items()
        }
        self._clients = {node: CriClient(socket) for node, socket in sockets.items()}

        def load(node: str) -> None:
            for image in images:
                self.load(sockets[node], node, image, request["snapshotter"])

        with ThreadPoolExecutor(3, "images") as pool:
            list(pool.map(load, sockets))

    def load(self, socket: str, node: str, image: dict[str, str], snapshotter: str) -> None:
        """Imports an archive and waits until the runtime's CRI side has noticed."""
        ctr = ["ctr", "--address", socket, "--namespace", "k8s.io", "images"]
        argv = [*ctr, "import", "--snapshotter", snapshotter]
        if "/" not in image["name"]:
            # The archive names it without a registry; CRI looks such names up as Docker's.
            argv += ["--index-name", f"docker.io/library/{image['name']}"]
        _run([*argv, image["archive"]])
        deadline = time.monotonic() + _SECONDS
        while not (
            self._clients[node]
            .call("ImageStatus", service="ImageService", image={"image": image["name"]})
            .HasField("image")
        ):
            if time.monotonic() > deadline:
                raise LabError(f"{node}: its runtime does not see image {image['name']}")
            time.sleep(0.02)

    # -- pods --------------------------------------------------------------------------------

    def run(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """A new sandbox with new containers; of earlier ones the last is kept, as it was left."""
        pod, node = request["object"], request["node"]
        key = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
        client = self._clients[node]
        before = self._pods.get(key)
        older: list[str] = []
        attempt = 0
        if before is not None:
            client.call("StopPodSandbox", pod_sandbox_id=before.sandbox)
            for sandbox in before.older:
                client.call("RemovePodSandbox", pod_sandbox_id=sandbox)
            older, attempt = [before.sandbox], before.attempt + 1
        config = sandbox_config(pod, attempt, self._folder / "logs" / node)
        for_logs = Path(config["log_directory"])
        for_logs.mkdir(parents=True, exist_ok=True)
        sandbox = client.call("RunPodSandbox", config=config).pod_sandbox_id
        running = _Running(
            node=node,
            sandbox=sandbox,
            attempt=attempt,
            config=config,
            containers={},
            request=request,
            older=older,
        )
        self._pods[key] = running
        for spec in pod["spec"]["containers"]:
            (for_logs / spec["name"]).mkdir(exist_ok=True)
            made = client.call(
                "CreateContainer",
                pod_sandbox_id=sandbox,
                config=container_config(pod, spec, attempt, request["files"]),
                sandbox_config=config,
            )
            running.containers[spec["name"]] = made.container_id
            client.call("StartContainer", container_id=made.container_id)
        return key, self.describe(key)

    def stop(self, key: str) -> None:
        running = self._pods[key]
        client = self._clients[running.node]
        for container in running.containers.values():
            client.call("StopContainer", container_id=container, timeout=running.request["grace"])
        client.call("StopPodSandbox", pod_sandbox_id=running.sandbox)

    def describe(self, key: str) -> dict[str, Any]:
        running = self._pods[key]
        client = self._clients[running.node]
        reply = client.call("PodSandboxStatus", pod_sandbox_id=running.sandbox, verbose=True)
        info = json.loads(reply.info.get("info", "{}"))
        ready = reply.status.state == 0
        network = reply.status.network
        return {
            "node": running.node,
            "sandbox_id": running.sandbox,
            "sandbox_pid": info.get("pid") if ready else None,
            "attempt": running.attempt,
            "netns_name": _netns_name(info),
            "veth": _veth(info) if ready else None,
            "ips": [ip for ip in (network.ip, *(one.ip for one in network.additional_ips)) if ip],
            "containers": [
                self._container(client, name, identity)
                for name, identity in running.containers.items()
            ],
        }

    def _container(self, client: CriClient, name: str, identity: str) -> dict[str, Any]:
        reply = client.call("ContainerStatus", container_id=identity, verbose=True)
        up = reply.status.state == 1
        pid = json.loads(reply.info.get("info", "{}")).get("pid") if up else None
        status = reply.status
        ended = f"{status.reason} {status.exit_code} {status.message}".strip()
        state = "running" if up else ended
        image = status.image.image
        return {"name": name, "id": identity, "pid": pid, "state": state, "image": image}

    def probe(self, key: str) -> None:
        """Runs the exec start-up probe of each container until it succeeds or the pod's time is
        over, as the kubelet does."""
        running = self._pods[key]
        for spec in running.request["object"]["spec"]["containers"]:
            probe = spec.get("startupProbe")
            if probe is None:
                continue
            times = probe["failureThreshold"]
            for number in range(1, times + 1):
                request = {
                    "pod": key,
                    "container": spec["name"],
                    "argv": probe["exec"]["command"],
                    "timeout": probe["timeoutSeconds"],
                }
                try:
                    said = self.execute(request)
                except LabError as error:  # a timeout, or the container has ended
                    said = {"code": -1, "err": str(error)}
                if said["code"] == 0:
                    break
                if number == times or not all(
                    one["pid"] for one in self.describe(key)["containers"]
                ):
                    states = [one["state"] for one in self.describe(key)["containers"]]
                    raise LabError(f"{key}: start-up probe: {said['err'].strip()[-300:]}; {states}")
                time.sleep(0.5)

    def execute(self, request: dict[str, Any]) -> dict[str, Any]:
        running = self._pods[request["pod"]]
        reply = self._clients[running.node].call(
            "ExecSync",
            container_id=running.containers[request["container"]],
            cmd=request["argv"],
            timeout=request.get("timeout", 30),
        )
        return {
            "code": reply.exit_code,
            "out": reply.stdout.decode(errors="replace"),
            "err": reply.stderr.decode(errors="replace"),
        }


def _netns_name(info: dict[str, Any]) -> str | None:
    spaces = info.get("runtimeSpec", {}).get("linux", {}).get("namespaces") or ()
    paths = [one.get("path") for one in spaces if one.get("type") == "network"]
    return Path(paths[0]).name if paths and paths[0] else None


def _veth(info: dict[str, Any]) -> str | None:
    """The pod's link in the node, as the CNI plugin named it."""
    interfaces = (info.get("cniResult") or {}).get("Interfaces") or {}
    names = [name for name, one in interfaces.items() if not one.get("Sandbox")]
    return next((name for name in names if name.startswith("veth")), None)


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()}")


def main() -> None:
    """Answers requests until stdin ends."""
    kubelet = Kubelet()
    for line in sys.stdin:
        try:
            answer = {"ok": kubelet.handle(json.loads(line))}
        except (LabError, OSError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
