"""The one long-lived process of a lab outside its nodes: parent of every machine and of the API.

Started by `up` as `python -m e2e.netlab.supervisor CONFIG`, in its own session. Until the lab is
complete it dies with `up`, and every machine dies with it (PR_SET_PDEATHSIG), and by the end of
their PID namespaces every process in them. `down` then has only a cgroup and a folder to remove.

It tells `up` how it goes, one JSON object a line: {"progress"}, then {"ready"} or {"error"}.
Later it answers on STATE_DIR/control.sock, one request a connection, in the same form.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e.netlab import linux
from e2e.netlab.agentaccess import API_INSIDE, AgentFiles, access_objects
from e2e.netlab.apiserver import api_address, api_request
from e2e.netlab.containerd import NodeRuntime
from e2e.netlab.errors import LabError
from e2e.netlab.machine import holder
from e2e.netlab.network import (
    CLIENTS,
    client_batch,
    lb_route,
    router_batch,
    switch_batch,
)
from e2e.netlab.nodeinit import AGENT_SOCKET, NodeInit
from e2e.netlab.rules import run, synthetic_list
from e2e.netlab.runtime import Runtime, packaged_agent, with_sidecar
from e2e.netlab.state import Cgroup, lab_cgroup, runtime_dir, write_json
from e2e.netlab.world import Node, Pod, World, agent_key, agent_object, load_world

__all__ = ["main"]

REPOSITORY = Path(__file__).resolve().parents[2]
AGENT = Path(sys.prefix) / "bin" / "gketrace-agent"
_READY_SECONDS = 30.0
_VERSIONS = {"1.36": "v1.36.2", "1.30": "v1.30.5", "1.20": "v1.20.2"}
"""The kube-proxy of each era, which is also what the API says that it is."""


@dataclass(slots=True, kw_only=True)
class _Node:
    pid: int
    stream: Any

    def receive(self) -> Any:
        line = self.stream.readline()
        if not line:
            raise LabError("a node's init ended; see supervisor.log")
        answer = json.loads(line)
        if "error" in answer:
            raise LabError(answer["error"])
        return answer["ok"]

    def send(self, request: dict[str, Any]) -> None:
        self.stream.write(json.dumps(request) + "\n")
        self.stream.flush()

    def ask(self, request: dict[str, Any]) -> Any:
        self.send(request)
        return self.receive()


@dataclass(slots=True, kw_only=True)
class Supervisor:
    """`config` is what `up` was asked for: name, topology, era, backend, pods_backend, agents,
    agent_image, state_dir. `runtime` runs the pods of `--pods containerd`."""

    config: dict[str, Any]
    world: World
    cgroup: Cgroup
    folder: Path
    report: int
    machines: dict[str, int] = field(default_factory=dict)
    nodes: dict[str, _Node] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)
    api: subprocess.Popen[bytes] | None = None
    runtime: Runtime | None = None
    started: float = field(default_factory=time.monotonic)

    # -- building ----------------------------------------------------------------------------

    def tell(self, **message: object) -> None:
        os.write(self.report, json.dumps(message).encode() + b"\n")

    def progress(self, text: str) -> None:
        self.tell(progress=f"{time.monotonic() - self.started:5.2f}s {text}")

    def build(self) -> None:
        self.save(complete=False)
        self.agent_files().issue()
        if self.config["pods_backend"] == "containerd":
            self.runtime = Runtime(self.world, self.config["name"], self.folder, self.cgroup)
            self.runtime.prepare()
        self.start_machines()
        self.progress("machines: switch, router, clients, three nodes and their pods' sandboxes")
        self.start_api()
        self.wire()
        self.progress(f"network: {self.config['topology']}; rules: {self.world.path.name}")
        self.wait_for_api()
        if self.runtime is not None:
            self.start_containers(self.runtime)
        self.save(complete=True)

    def start_containers(self, runtime: Runtime) -> None:
        nodes = {name: handle.pid for name, handle in self.nodes.items()}
        runtime.connect(nodes, self.config["agent_image"] if self.packaged else None)
        self.progress("images: imported into each node's containerd")
        runtime.start_pods()
        self.settle(runtime)
        self.progress("pods: run by containerd")
        if self.packaged:
            runtime.start_agents()
            self.tell_api()
            self.progress("agents: run by containerd")

    def settle(self, runtime: Runtime) -> None:
        """After the kubelets have changed something."""
        for handle in self.nodes.values():
            handle.send({"op": "settle", "pods": runtime.keys()})
        for handle in self.nodes.values():
            handle.receive()
        self.tell_api()

    @property
    def packaged(self) -> bool:
        return bool(self.config["agents"] == "image")

    def node_runtime(self, node: Node) -> NodeRuntime | None:
        if self.runtime is None:
            return None
        return NodeRuntime(
            world=self.world,
            node=node,
            topology=self.config["topology"],
            folder=runtime_dir(self.config["name"]) / f"node-{node.short}",
        )

    def agent_files(self) -> AgentFiles:
        return AgentFiles(self.folder / "agents")

    def start_machines(self) -> None:
        (self.folder / "peers").mkdir(exist_ok=True)
        pipes = {}
        for name in ("switch", "router", *CLIENTS):
            pipes[name] = self.start_holder(name)
        pid_namespace = "/proc/self/ns/pid"
        own = os.open(pid_namespace, os.O_RDONLY | os.O_CLOEXEC)
        for node in self.world.nodes:
            ours, theirs = socket.socketpair()
            linux.unshare(linux.CLONE_NEWPID)
            pid = os.fork()
            if pid == 0:
                ours.close()
                init = NodeInit(
                    world=self.world,
                    node=node,
                    topology=self.config["topology"],
                    cgroup=self.cgroup.child(f"node-{node.short}"),
                    folder=self.folder,
                    agent=AGENT,
                    channel=theirs,
                    runtime=self.node_runtime(node),
                    packaged=self.packaged,
                )
                init.main()
            theirs.close()
            linux.setns(f"/proc/self/fd/{own}", linux.CLONE_NEWPID)
            self.machines[node.short] = pid
            self.nodes[node.name] = _Node(pid=pid, stream=ours.makefile("rw", encoding="utf-8"))
            self.save(complete=False)
        os.close(own)
        for name, pipe in pipes.items():
            if not os.read(pipe, 1):
                raise LabError(f"machine {name} ended at once; see supervisor.log")
            os.close(pipe)
        for handle in self.nodes.values():
            handle.receive()

    def start_holder(self, name: str) -> int:
        woken, ready = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(woken)
                holder(name, self.cgroup.child("vpc"), ready, forwards=name == "router")
            except BaseException as error:  # noqa: BLE001 - a forked process: nobody is above it
                os.write(2, f"{name}: {error!r}\n".encode())
                os._exit(70)
        os.close(ready)
        self.machines[name] = pid
        self.save(complete=False)
        return woken

    def wire(self) -> None:
        self.ip("switch", switch_batch(self.world, self.machines))
        for handle in self.nodes.values():
            handle.send({"op": "wire"})
        addresses = (*self.world.load_balancer_ips, *self.world.external_ips)
        self.targets = {address: self.world.lb_target(address) for address in addresses}
        self.ip("router", router_batch(self.world, self.targets, self.machines))
        for address in CLIENTS:
            self.ip(address, client_batch(address))
        for handle in self.nodes.values():
            handle.receive()

    def ip(self, machine: str, batch: str) -> None:
        target = str(self.machines[machine])
        run(["nsenter", "--target", target, "--net", "ip", "-batch", "-"], batch)

    # -- the API -----------------------------------------------------------------------------

    def start_api(self) -> None:
        """`python -m e2e.kubeapi`, which writes the kubeconfig that `up` prints."""
        make = packaged_agent if self.packaged else agent_object
        agents = [make(node) for node in self.world.nodes] if AGENT.exists() else []
        extra = list(self.world.extra_pod_objects)
        pods = {key: entry for key, entry in self.pod_entries().items() if entry["sandbox_pid"]}
        config = {
            "name": self.config["name"],
            "state_dir": str(self.folder),
            "objects_dir": str(self.world.path),
            "objects": access_objects(self.agent_files()),
            "extra_pods": [*(extra if self.runtime is None else map(with_sidecar, extra)), *agents],
            "netns": {
                "nodes": {name: {"pid": handle.pid} for name, handle in self.nodes.items()},
                "pods": {key: {"pid": entry["sandbox_pid"]} for key, entry in pods.items()},
            },
            "listen": "127.0.0.1:0",
            "version": _VERSIONS[self.world.era],
        }
        path = self.folder / "kubeapi.json"
        write_json(path, config)
        with (self.folder / "kubeapi.log").open("ab") as log:
            self.api = subprocess.Popen(
                [sys.executable, "-m", "e2e.kubeapi", "--config", str(path)],
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                preexec_fn=linux.die_with_parent,
            )

    def wait_for_api(self) -> None:
        """Until it says `ready KUBECONFIG`."""
        assert self.api is not None
        assert self.api.stdout is not None
        readable, _, _ = select.select([self.api.stdout], [], [], _READY_SECONDS)
        line = self.api.stdout.readline() if readable else b""
        if not line.startswith(b"ready "):
            said = (self.folder / "kubeapi.log").read_text().strip().splitlines()[-1:]
            raise LabError(f"the Kubernetes API did not start: {' '.join(said) or 'no answer'}")
        self.listen_inside()
        self.progress("api: serving")

    def listen_inside(self) -> None:
        """The API's address works in the nodes and at the clients too."""
        kubeconfig = self.folder / "kubeconfig"
        address = api_address(kubeconfig)
        for name, pid in self.machines.items():
            if name != "switch":
                api_request(kubeconfig, "POST", "/lab/listen", {"pid": pid, "address": address})
        for node in self.nodes.values():
            where = {"pid": node.pid, "address": API_INSIDE}
            api_request(kubeconfig, "POST", "/lab/listen", where)
        self.agent_files().connect(kubeconfig)

    def tell_api(self) -> None:
        """Where the pods' namespaces are now, and what their containers' runtime says of them."""
        pods = {
            key: {"pid": entry["sandbox_pid"]} if entry["sandbox_pid"] else None
            for key, entry in self.pod_entries().items()
        }
        kubeconfig = self.folder / "kubeconfig"
        api_request(kubeconfig, "POST", "/lab/netns", {"pods": pods})
        if self.runtime is not None:
            for key in self.runtime.known():
                namespace, name = key.split("/")
                path = f"/api/v1/namespaces/{namespace}/pods/{name}"
                item = api_request(kubeconfig, "GET", path)
                item["status"]["containerStatuses"] = self.runtime.statuses(key)
                api_request(kubeconfig, "PUT", f"{path}/status", item)

    # -- what is there -----------------------------------------------------------------------

    def pod_entries(self) -> dict[str, dict[str, Any]]:
        """PIDs as the machine sees them, from the pods' cgroups."""
        return {pod.key: self.pod_entry(pod) for pod in self.world.pods}

    def pod_entry(self, pod: Pod) -> dict[str, Any]:
        node = self.world.node(pod.node)
        made = self.runtime.entry(pod, node) if self.runtime else self.process_entry(pod, node)
        pid = made["sandbox_pid"]
        return {
            "node": pod.node,
            "uid": pod.uid,
            "ip": pod.ip,
            "ip6": pod.ip6,
            "host_network": pod.host_network,
            "container": pod.container,
            **made,
            "netns": _inode(pid) if pid else None,
            "ports": [list(port) for port in pod.ports],
            "peers_log": str(self.folder / "peers" / f"{pod.namespace}_{pod.name}.jsonl"),
            "synthetic": pod.synthetic,
        }

    def process_entry(self, pod: Pod, node: Node) -> dict[str, Any]:
        base = self.cgroup.child(f"node-{node.short}").child(pod.cgroup)
        sandbox = base.child(f"cri-containerd-{pod.sandbox_id}.scope").pids()
        container = base.child(f"cri-containerd-{pod.container_id}.scope").pids()
        return {
            "container_id": pod.container_id,
            "sandbox_id": pod.sandbox_id,
            "sandbox_pid": sandbox[0] if sandbox else None,
            "pid": container[0] if container else None,
            "veth": None if pod.host_network else pod.veth,
        }

    def save(self, *, complete: bool) -> None:
        config = {k: v for k, v in self.config.items() if k not in ("report_fd", "up_pid")}
        state: dict[str, Any] = {
            **config,
            "complete": complete,
            "supervisor": {"pid": os.getpid(), "start": linux.start_time(os.getpid())},
            "cgroup": str(self.cgroup.path),
            "world": str(self.world.path),
            "machines": {
                name: {"pid": pid, "start": linux.start_time(pid)}
                for name, pid in self.machines.items()
            },
        }
        if complete:
            state |= {
                "kubeconfig": str(self.folder / "kubeconfig"),
                "lb_targets": self.targets,
                "clients": CLIENTS,
                "nodes": {
                    node.name: {
                        "pid": self.nodes[node.name].pid,
                        "short": node.short,
                        "ip": node.ip,
                        "ip6": node.ip6,
                        "pod_cidr": node.pod_cidr,
                        "pod_cidr6": node.pod_cidr6,
                        "netns": _inode(self.nodes[node.name].pid),
                        "agent_socket": f"/proc/{self.nodes[node.name].pid}/root{AGENT_SOCKET}",
                    }
                    for node in self.world.nodes
                },
                "pods": self.pod_entries(),
                "synthetic": [
                    {"name": item.name, "where": item.where, "why": item.why}
                    for item in synthetic_list(
                        self.world, self.config["topology"], self.config["pods_backend"]
                    )
                ],
            }
        write_json(self.folder / "state.json", state)

    # -- afterwards --------------------------------------------------------------------------

    def serve(self, control: socket.socket) -> None:
        """Answers control requests, for ever."""
        while True:
            connection, _ = control.accept()
            with connection, connection.makefile("rw", encoding="utf-8") as stream:
                try:
                    answer = {"ok": self.handle(json.loads(stream.readline()))}
                except (LabError, OSError, ValueError) as error:
                    answer = {"error": str(error)}
                with contextlib.suppress(OSError):  # the asker went away
                    stream.write(json.dumps(answer) + "\n")
                    stream.flush()

    def handle(self, request: dict[str, Any]) -> Any:
        operation = request.get("op")
        if operation == "status":
            nodes = {name: handle.ask({"op": "status"}) for name, handle in self.nodes.items()}
            if self.runtime is not None:
                self.runtime.add_to(nodes)
            return {"nodes": nodes, "api": self.api_state()}
        if operation == "heal":
            for handle in self.nodes.values():
                handle.ask({"op": "heal"})
            if self.runtime is not None:
                self.runtime.heal()
                self.settle(self.runtime)
            if self.api_state() == "ended":
                self.start_api()
                self.wait_for_api()
            self.tell_api()
            self.save(complete=True)
            return None
        if operation == "agent":
            if self.runtime is not None and self.packaged:
                key = agent_key(self.world.node(request["node"]))
                self.runtime.control(request["action"], key)
                self.tell_api()
                answer = {request["node"]: self.nodes[request["node"]].ask({"op": "status"})}
                self.runtime.add_to(answer)
                return answer[request["node"]]
            return self.nodes[request["node"]].ask(request)
        if operation in ("agents", "container-exec", "runtime"):
            return self.handle_runtime(request)
        if operation == "pod":
            node = next(pod.node for pod in self.world.pods if pod.key == request["pod"])
            if self.runtime is None:
                self.nodes[node].ask(request)
                self.tell_api()
            else:
                self.runtime.control(request["action"], request["pod"])
                self.settle(self.runtime)
            self.save(complete=True)
            return None
        if operation == "lb-target":
            address, name = request["address"], request["node"]
            self.ip("router", lb_route(address, self.world.node(name)))
            self.targets[address] = name
            self.save(complete=True)
            return None
        raise LabError(f"unknown request {operation!r}")

    def handle_runtime(self, request: dict[str, Any]) -> Any:
        """What only `--pods containerd` has."""
        if self.runtime is None:
            raise LabError(f"{request['op']}: this lab's pods are no containers")
        if request["op"] == "runtime":
            return self.nodes[request["node"]].ask(request)
        if request["op"] == "container-exec":
            return self.runtime.execute(request["pod"], request["container"], request["argv"])
        self.runtime.start_agents(tuple(request["without"]), request["seccomp"])
        self.tell_api()
        return None

    def api_state(self) -> str:
        return "serving" if self.api and self.api.poll() is None else "ended"


def _inode(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except FileNotFoundError:
        return None


def main() -> None:
    """Builds the lab that argv[1], a JSON object, describes."""
    config = json.loads(sys.argv[1])
    linux.die_with_parent()
    if os.getppid() != config["up_pid"]:
        sys.exit(1)  # it died before the line above
    cgroup = lab_cgroup(config["name"])
    (cgroup.path / "supervisor").mkdir()  # not its parent: `up` may be taking that down already
    cgroup.child("supervisor").join()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    supervisor = Supervisor(
        config=config,
        world=load_world(config["era"], config["backend"]),
        cgroup=cgroup,
        folder=Path(config["state_dir"]),
        report=config["report_fd"],
    )
    os.set_inheritable(supervisor.report, False)
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    control.bind(str(supervisor.folder / "control.sock"))
    control.listen(8)
    try:
        supervisor.build()
    except (LabError, OSError) as error:
        supervisor.tell(error=str(error))
        sys.exit(1)
    linux.outlive_parent()
    supervisor.tell(ready=str(supervisor.folder / "kubeconfig"))
    os.close(supervisor.report)
    supervisor.serve(control)


if __name__ == "__main__":
    main()
