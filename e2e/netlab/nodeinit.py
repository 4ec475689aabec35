"""PID 1 of a node: makes the node's namespaces and mounts, its network, its rules and its pods.

Forked by the supervisor, so that it needs no files and starts at once. It stays, reaps orphans,
and does what the supervisor asks over a socket: one JSON object a line, one answer a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from e2e.netlab import linux
from e2e.netlab.agentaccess import AgentFiles
from e2e.netlab.containerd import NodeRuntime
from e2e.netlab.errors import LabError
from e2e.netlab.kubeproxy import serve_kube_proxy
from e2e.netlab.machine import forget_mounts, quiet_ipv6, sysctl
from e2e.netlab.network import link_batch, node_batch, pod_batch
from e2e.netlab.rules import restore_dump, restore_synthetic, run
from e2e.netlab.server import serve
from e2e.netlab.state import Cgroup
from e2e.netlab.world import AGENT_PORT, Node, Pod, World, agent_object

__all__ = ["AGENT_SOCKET", "NodeInit"]

AGENT_SOCKET = "/run/gketrace/agent.sock"
AGENT_ARGUMENTS = "GKETRACE_LAB_AGENT_ARGUMENTS"
"""The environment's variable with what the agents of a lab are given besides."""
_CGROUP = "/sys/fs/cgroup"
_SECONDS = 60
"""For what takes a moment: a busy machine starts a container's program in ten."""
_READ_ONLY = ("net.netfilter.nf_conntrack_count", "net.netfilter.nf_conntrack_max")
"""In the fixture's sysctl.txt, but fixed for the machine as a whole."""


@dataclass(slots=True, kw_only=True)
class NodeInit:
    """One node. `cgroup` is its root; `folder` the lab's, which stays visible in the
    node, for the kubeconfig; its pods log to its `peers`. With a `runtime` the pods are that one's,
    and with `packaged` the agent is too: the kubelets' process makes them."""

    world: World
    node: Node
    topology: str
    cgroup: Cgroup
    folder: Path
    agent: Path
    channel: socket.socket
    runtime: NodeRuntime | None
    packaged: bool
    sandboxes: dict[str, int] = field(default_factory=dict)
    containers: dict[str, int] = field(default_factory=dict)
    logs: dict[str, int] = field(default_factory=dict)
    kube_proxy: int = 0
    containerd: int = 0
    agent_pid: int = 0
    exits: dict[int, int] = field(default_factory=dict)

    def main(self) -> NoReturn:
        """Never returns: ends with its supervisor."""
        linux.die_with_parent()
        signal.signal(signal.SIGCHLD, lambda *_: None)
        woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker)
        stream = self.channel.makefile("rw", encoding="utf-8")
        operations: dict[str, Callable[[dict[str, Any]], Any]] = {
            "wire": lambda _: self.wire(),
            "heal": lambda _: self.heal(),
            "status": lambda _: self.status(),
            "agent": lambda request: self.control_agent(request["action"]),
            "pod": lambda request: self.control_pod(request["action"], request["pod"]),
            "settle": lambda request: self.settle(request["pods"]),
            "runtime": lambda request: self.control_runtime(request["action"]),
        }
        answer = self.answer(lambda _: self.machine(), {})
        stream.write(answer)
        stream.flush()
        while True:
            channel = self.channel.fileno()
            readable, _, _ = select.select([channel, woken], [], [])
            if woken in readable:
                with contextlib.suppress(BlockingIOError):
                    os.read(woken, 4096)
                self.reap()
            if channel in readable:
                line = stream.readline()
                if not line:
                    os._exit(0)
                request = json.loads(line)
                stream.write(self.answer(operations[request["op"]], request))
                stream.flush()

    def answer(self, operation: Callable[[dict[str, Any]], Any], request: dict[str, Any]) -> str:
        try:
            return json.dumps({"ok": operation(request)}) + "\n"
        except (LabError, OSError) as error:
            return json.dumps({"error": f"node {self.node.short}: {error}"}) + "\n"

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.exits[pid] = os.waitstatus_to_exitcode(status)

    # -- the machine -------------------------------------------------------------------------

    def machine(self) -> None:
        """Namespaces, mounts, and a sandbox for each pod."""
        self.cgroup.join()
        linux.unshare(
            linux.CLONE_NEWNET
            | linux.CLONE_NEWNS
            | linux.CLONE_NEWUTS
            | linux.CLONE_NEWIPC
            | linux.CLONE_NEWCGROUP
        )
        for pod in self.world.pods_on(self.node.name):
            path = self.folder / "peers" / f"{pod.namespace}_{pod.name}.jsonl"
            self.logs[pod.key] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        linux.make_mounts_private()
        outside = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        forget_mounts()
        linux.mount("proc", "/proc", "proc")
        linux.mount("sysfs", "/sys", "sysfs")
        linux.mount("cgroup", _CGROUP, self.cgroup.fstype, 0, self.cgroup.options)
        linux.mount("tmpfs", "/run", "tmpfs", 0, "mode=0755")
        for folder in ("netns", "gketrace", "lock"):
            Path("/run", folder).mkdir(mode=0o755)
        self.folder.mkdir(parents=True)
        linux.bind_mount(f"/proc/self/fd/{outside}", str(self.folder))
        os.close(outside)
        socket.sethostname(self.node.name)
        self.join("init.scope")
        linux.set_process_title("init", "/sbin/init")
        quiet_ipv6()
        for scope in ("all", "default"):
            sysctl(f"net.ipv4.conf.{scope}.send_redirects", "0")
        if self.runtime is not None:
            linux.make_mounts_shared()
            return
        for pod in self.world.pods_on(self.node.name):
            self.sandboxes[pod.key] = self.sandbox(pod)

    def join(self, name: str) -> None:
        Cgroup(path=Path(_CGROUP, name), fstype="", options="").join()

    def fork(self, child: Callable[[], object]) -> int:
        """Forks a process of this node that runs `child` and ends."""
        pid = os.fork()
        if pid:
            return pid
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            self.channel.close()
            os.setsid()
            child()
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - a forked process: nobody is above it
            os.write(2, f"{self.node.short}: {error!r}\n".encode())
            os._exit(70)

    def sandbox(self, pod: Pod) -> int:
        """The pod's pause process, with the pod's namespaces; the namespace is also named in
        /run/netns, as the container runtime names it."""
        woken, ready = os.pipe()

        def child() -> None:
            os.close(woken)
            self.join(f"{pod.cgroup}/cri-containerd-{pod.sandbox_id}.scope")
            linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWIPC)
            linux.make_mounts_private()
            linux.mount("tmpfs", "/run", "tmpfs", 0, "mode=0755")
            if not pod.host_network:
                linux.unshare(linux.CLONE_NEWNET | linux.CLONE_NEWUTS)
                socket.sethostname(pod.name)
                linux.mount("sysfs", "/sys", "sysfs")
                linux.mount("cgroup", _CGROUP, self.cgroup.fstype, 0, self.cgroup.options)
                quiet_ipv6()
            linux.set_process_title("pause", "/pause")
            os.write(ready, b"1")
            os.close(ready)
            while True:
                signal.pause()

        pid = self.fork(child)
        os.close(ready)
        told = os.read(woken, 1)
        os.close(woken)
        if not told:
            raise LabError(f"pod {pod.key}: its sandbox ended at once")
        if not pod.host_network:
            target = Path("/run/netns", pod.netns_name)
            target.touch()
            linux.bind_mount(f"/proc/{pid}/ns/net", str(target))
        return pid

    # -- the network, the rules, the servers -------------------------------------------------

    def wire(self) -> dict[str, Any]:
        """Once eth0 is there: everything else."""
        run(["ip", "-batch", "-"], node_batch(self.world, self.node, self.topology, self.sandboxes))
        for pod in self.own_pods():
            self.wire_pod(pod)
        self.sysctls()
        restore_dump(self.world, self.node)
        restore_synthetic(self.world, self.node, host_ports=self.runtime is None)
        self.kube_proxy = self.start_kube_proxy()
        if self.runtime is not None:
            self.runtime.configure()
            return self.control_runtime("start")
        for pod in self.own_pods():
            self.containers[pod.key] = self.container(pod)
        self.wait_for_pods(self.world.pods_on(self.node.name))
        self.control_agent("start")
        return self.status()

    def own_pods(self) -> tuple[Pod, ...]:
        """The pods that are this process's to make."""
        return self.world.pods_on(self.node.name) if self.runtime is None else ()

    def wire_pod(self, pod: Pod) -> None:
        """The inside of the pod's namespace."""
        if not pod.host_network:
            enter = ["nsenter", "--target", str(self.sandboxes[pod.key]), "--net"]
            run([*enter, "ip", "-batch", "-"], pod_batch(self.node, pod, self.topology))

    def sysctls(self) -> None:
        lines = (self.node.fixture / "sysctl.txt").read_text().splitlines()
        for line in lines:
            name, value = line.split(" = ")
            if name in _READ_ONLY or (".cbr0." in name and self.topology != "bridge"):
                continue
            sysctl(name, value)
        sysctl("net.ipv6.conf.all.forwarding", "1")
        # A forwarding interface also owns its subnet's all-zeros anycast address, which is the
        # unicast address of one of the captured nodes. all.forwarding alone decides forwarding
        # (ip6_forward, net/ipv6/ip6_output.c).
        sysctl("net.ipv6.conf.eth0.forwarding", "0")

    def container(self, pod: Pod) -> int:
        def child() -> None:
            self.join(f"{pod.cgroup}/cri-containerd-{pod.container_id}.scope")
            pid = self.sandboxes[pod.key]
            kinds = [("ipc", linux.CLONE_NEWIPC), ("mnt", linux.CLONE_NEWNS)]
            if not pod.host_network:
                kinds[:0] = [("net", linux.CLONE_NEWNET), ("uts", linux.CLONE_NEWUTS)]
            for name, kind in kinds:
                linux.setns(f"/proc/{pid}/ns/{name}", kind)
            linux.set_process_title("hello-app", "/hello-app")
            serve(pod.key, self.node.name, pod.ports, self.logs[pod.key])

        return self.fork(child)

    def start_kube_proxy(self) -> int:
        def child() -> None:
            self.join("system.slice/kube-proxy.service")
            linux.set_process_title("kube-proxy", "/usr/local/bin/kube-proxy")
            serve_kube_proxy(self.world, self.node.name)

        return self.fork(child)

    def wait_for_pods(self, pods: Iterable[Pod]) -> None:
        """A connection to each pod's TCP ports from its node, as a kubelet's probe makes: it shows
        that the pod answers, and the bridge learns its MAC."""
        deadline = time.monotonic() + _SECONDS
        for pod in pods:
            for protocol, port in pod.ports:
                while protocol == "TCP" and (
                    self.runtime is not None or self.alive(self.containers.get(pod.key, 0))
                ):
                    try:
                        with socket.create_connection((pod.ip, port), timeout=1) as connection:
                            connection.sendall(b"probe\n")
                            connection.recv(4096)
                        break
                    except OSError as error:
                        if time.monotonic() > deadline:
                            raise LabError(f"pod {pod.key}, port {port}: {error}") from error
                        time.sleep(0.005)

    # -- asked by the supervisor -------------------------------------------------------------

    def alive(self, pid: int) -> bool:
        self.reap()
        return bool(pid) and pid not in self.exits

    def heal(self) -> dict[str, Any]:
        """Starts again what has ended."""
        for pod in self.own_pods():
            self.control_pod("start", pod.key)
        if self.runtime is not None:
            self.control_runtime("start")
        if not self.alive(self.kube_proxy):
            self.kube_proxy = self.start_kube_proxy()
        self.control_agent("start")
        return self.status()

    def control_pod(self, action: str, key: str) -> dict[str, Any]:
        """`stop` ends the pod's processes, namespace and link, as its deletion does; `start`
        brings back what is missing. The rules stay as they are."""
        pod = next(pod for pod in self.world.pods_on(self.node.name) if pod.key == key)
        if action == "stop" or not self.alive(self.sandboxes[key]):
            if not pod.host_network and self.alive(self.sandboxes[key]):
                run(["ip", "link", "delete", pod.veth])
            self.end(self.containers.get(key, 0))
            self.end(self.sandboxes[key])
            name = Path("/run/netns", pod.netns_name)
            if name.exists():
                linux.umount(str(name))
                name.unlink()
            # A namespace that ends by itself takes its link with it, a moment later.
            deadline = time.monotonic() + _SECONDS
            while Path("/sys/class/net", pod.veth).exists():
                if time.monotonic() > deadline:
                    raise LabError(f"pod {key}: its link {pod.veth} stays")
                time.sleep(0.005)
        if action == "start" and not self.alive(self.sandboxes[key]):
            pid = self.sandboxes[key] = self.sandbox(pod)
            if not pod.host_network:
                batch = link_batch(self.node, pod, self.topology, pid)
                run(["ip", "-batch", "-"], batch)
            self.wire_pod(pod)
        if action == "start" and not self.alive(self.containers.get(key, 0)):
            self.containers[key] = self.container(pod)
        self.wait_for_pods(self.world.pods_on(self.node.name))
        return self.status()

    def settle(self, keys: list[str]) -> dict[str, Any]:
        """Once the kubelet has started the pods `keys`."""
        # The bridge plugin turns IPv6 forwarding on everywhere; see sysctls.
        sysctl("net.ipv6.conf.eth0.forwarding", "0")
        pods = [pod for pod in self.world.pods_on(self.node.name) if pod.key in keys]
        for pod in pods:
            # A new sandbox has a new MAC, and announces it perhaps before its port forwards.
            if self.topology == "bridge" and not pod.host_network:
                run(["ip", "neigh", "flush", "to", pod.ip, "dev", "cbr0"])
        self.wait_for_pods(pods)
        self.control_agent("start")
        return self.status()

    def control_runtime(self, action: str) -> dict[str, Any]:
        """Starts containerd, or kills it; containers go on without it."""
        assert self.runtime is not None
        if action == "stop":
            self.end(self.containerd)
        if action == "start" and not self.alive(self.containerd):
            self.containerd = self.fork(self.exec_containerd)
            self.runtime.wait(lambda: self.alive(self.containerd))
        return self.status()

    def exec_containerd(self) -> None:
        assert self.runtime is not None
        argv = self.runtime.command()
        self.join("system.slice/containerd.service")
        self.redirect(self.runtime.folder / "containerd.log")
        os.execvpe(argv[0], argv, self.runtime.environment())

    def redirect(self, path: Path) -> None:
        """Both outputs of this process go to `path`, and it has no other files open."""
        out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open("/dev/null", os.O_RDONLY)
        for source, target in ((null, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        os.closerange(3, 256)

    def end(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends the signal, and SIGKILL five seconds later, and waits for the end."""
        deadline = time.monotonic() + 5
        if self.alive(pid):
            os.kill(pid, number)
        while self.alive(pid):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)

    def status(self) -> dict[str, Any]:
        """`pid`s are as this node sees them; the agent's state in words."""
        if self.alive(self.agent_pid):
            agent = "running"
        elif not self.agent.exists():
            agent = "not installed"
        elif self.agent_pid:
            agent = f"ended with {self.exits[self.agent_pid]}"
        else:
            agent = "stopped"
        return {
            "agent": {
                "state": agent,
                "pid": self.agent_pid if agent == "running" else None,
                "socket": AGENT_SOCKET,
            },
            "pods": {
                pod.key: {
                    "sandbox_pid": self.sandboxes[pod.key],
                    "pid": self.containers.get(pod.key, 0),
                    "running": self.alive(self.containers.get(pod.key, 0)),
                }
                for pod in self.own_pods()
            },
        }

    def control_agent(self, action: str) -> dict[str, Any]:
        if self.packaged:
            return self.status()
        if action == "stop":
            self.end(self.agent_pid, signal.SIGTERM)
            self.agent_pid = 0
        if action == "start" and not self.alive(self.agent_pid) and self.agent.exists():
            self.agent_pid = self.fork(self.exec_agent)
            self.wait_for_agent()
        return self.status()

    def exec_agent(self) -> None:
        pod = agent_object(self.node)
        uid = pod["metadata"]["uid"].replace("-", "_")
        container = pod["status"]["containerStatuses"][0]["containerID"].split("//", 1)[1]
        self.join(
            "kubepods.slice/kubepods-besteffort.slice/"
            f"kubepods-besteffort-pod{uid}.slice/cri-containerd-{container}.scope"
        )
        self.redirect(Path("/run/gketrace/agent.out"))
        argv = [str(self.agent), "serve", "--node-name", self.node.name]
        argv += ["--listen", f"unix://{AGENT_SOCKET}", "--listen", f"tcp://0.0.0.0:{AGENT_PORT}"]
        argv += AgentFiles(self.folder / "agents").arguments()
        argv += ["--log-file", "/run/gketrace/agent.log"]
        argv += shlex.split(os.environ.get(AGENT_ARGUMENTS, ""))
        os.execv(argv[0], argv)

    def wait_for_agent(self) -> None:
        """Until its socket answers, it ends, or thirty seconds have passed: machines are busy."""
        deadline = time.monotonic() + 30
        while self.alive(self.agent_pid) and time.monotonic() < deadline:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(AGENT_SOCKET)
                    return
                except OSError:  # not yet
                    time.sleep(0.02)
