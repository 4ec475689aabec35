"""Real processes in real kubepods cgroups and network namespaces, and a runtime that serves CRI."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from gketrace_proto.cri import api_pb2, api_pb2_grpc

CGROUPS = next(
    path
    for path in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
    if (path / "cgroup.procs").exists()
)
"""The root of the cgroup v2 hierarchy, hybrid or not."""


def wait_until(condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def container_id() -> str:
    """An id that nobody else has: tests that run beside this one have pods on this machine too."""
    return os.urandom(32).hex()


def open_files() -> Counter[str]:
    """What this process holds open, by what each descriptor leads to; sockets and pipes have a
    number that no other has.  For `gained`."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile: that of the listing is always
            found[os.readlink(f"/proc/self/fd/{name}")] += 1
    return found


def gained(before: Counter[str], after: Counter[str]) -> list[str]:
    """What is there now and was not.  What went away meanwhile does not count: threads of tests
    before this one may still be letting go of theirs."""
    return sorted((after - before).elements())


def netns_inode(pid: int) -> int:
    return os.stat(f"/proc/{pid}/ns/net").st_ino


@dataclass
class FakePod:
    """A pod's processes.  The sandbox is called pause, the containers sleep."""

    uid: str
    layout: str
    """``systemd`` or ``cgroupfs``."""
    root: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def add(
        self,
        container_id: str,
        *,
        command: str = "sleep",
        own_netns: bool = False,
        join: int | None = None,
        enter: tuple[str, ...] = (),
    ) -> int:
        """Starts a container's process in its cgroup; returns its PID.

        `enter`: a command line that enters the node's namespaces first.
        """
        cgroup = self.root / self.cgroup_of(container_id)
        cgroup.mkdir(parents=True, exist_ok=True)
        inner = ["unshare", "--net"] if own_netns else []
        if join is not None:
            inner = ["nsenter", f"--net=/proc/{join}/ns/net"]
        # The shell enters the cgroup before it becomes the container's process.
        # By 0, as $$ is the PID in the node's PID namespace.
        script = f'echo 0 > {cgroup}/cgroup.procs && exec -a "{command}" sleep infinity'
        process = subprocess.Popen([*enter, *inner, "bash", "-c", script])
        self.processes.append(process)
        if enter:
            # nsenter forks to enter a PID namespace.
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            wait_until(lambda: bool(children.read_text()))
            pid = int(children.read_text())
        else:
            pid = process.pid
        wait_until(lambda: _argv0(pid) == command)
        return pid

    def cgroup_of(self, container_id: str) -> str:
        if self.layout == "cgroupfs":
            return f"kubepods/burstable/pod{self.uid}/{container_id}"
        name = f"kubepods-burstable-pod{self.uid.replace('-', '_')}.slice"
        return f"kubepods.slice/kubepods-burstable.slice/{name}/cri-containerd-{container_id}.scope"

    def kill(self, pid: int) -> None:
        for process in self.processes:
            if process.pid == pid:
                process.kill()
                process.wait()

    def stop(self) -> None:
        for procs in self.root.rglob("cgroup.procs"):
            for pid in procs.read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        for process in self.processes:
            process.kill()
            process.wait()


def _argv0(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()


@contextmanager
def fake_pod(layout: str = "cgroupfs", uid: str = "") -> Iterator[FakePod]:
    root = CGROUPS / f"gkagent-{uuid.uuid4().hex[:8]}"
    root.mkdir()
    pod = FakePod(uid=uid or str(uuid.uuid4()), layout=layout, root=root)
    try:
        yield pod
    finally:
        pod.stop()
        for folder, _, _ in os.walk(root, topdown=False):
            wait_until(lambda folder=folder: _removed(folder))


def _removed(folder: str) -> bool:
    try:
        os.rmdir(folder)
    except OSError:  # its last process is not reaped by the kernel yet
        return not os.path.exists(folder)
    return True


@dataclass
class FakeSandbox:
    id: str
    namespace: str
    name: str
    uid: str
    pid: int = 0
    attempt: int = 0
    ready: bool = True
    netns_path: str = ""
    host_network: bool = False
    runtime_handler: str = ""
    ip: str = ""
    annotations: dict[str, str] = field(default_factory=dict)
    containers: list[FakeContainer] = field(default_factory=list)
    info: dict[str, Any] | None = None
    """In place of what is made from the fields."""


@dataclass
class FakeContainer:
    id: str
    name: str
    pid: int = 0
    state: int = api_pb2.CONTAINER_RUNNING


class FakeRuntime(api_pb2_grpc.RuntimeServiceServicer):
    """Answers CRI v1 for the sandboxes that a test puts in."""

    def __init__(self) -> None:
        self.sandboxes: list[FakeSandbox] = []
        self.before: Callable[[str], None] = lambda method: None
        """Called with each method's name before it is answered."""

    def Version(self, request, context):
        self.before("Version")
        return api_pb2.VersionResponse(
            version="0.1.0",
            runtime_name="faketainerd",
            runtime_version="9.9",
            runtime_api_version="v1",
        )

    def ListPodSandbox(self, request, context):
        self.before("ListPodSandbox")
        reply = api_pb2.ListPodSandboxResponse()
        for box in self.sandboxes:
            labels = {
                "io.kubernetes.pod.namespace": box.namespace,
                "io.kubernetes.pod.name": box.name,
                "io.kubernetes.pod.uid": box.uid,
            }
            wanted = request.filter.label_selector
            if request.filter.id in ("", box.id) and all(
                labels.get(key) == value for key, value in wanted.items()
            ):
                reply.items.append(
                    api_pb2.PodSandbox(
                        id=box.id,
                        metadata=_metadata(box),
                        state=_state(box),
                        labels=labels,
                        annotations=box.annotations,
                    )
                )
        return reply

    def PodSandboxStatus(self, request, context):
        self.before("PodSandboxStatus")
        box = next((b for b in self.sandboxes if b.id == request.pod_sandbox_id), None)
        if box is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"sandbox {request.pod_sandbox_id} not found")
        assert request.verbose
        network = {"type": "network", "path": box.netns_path}
        info = box.info
        if info is None:
            spec = {"linux": {"namespaces": [{"type": "ipc"}, network]}}
            info = {"pid": box.pid, "netNamespaceClosed": False, "runtimeSpec": spec}
        mode = api_pb2.NODE if box.host_network else api_pb2.POD
        return api_pb2.PodSandboxStatusResponse(
            status=api_pb2.PodSandboxStatus(
                id=box.id,
                metadata=_metadata(box),
                state=_state(box),
                network=api_pb2.PodSandboxNetworkStatus(ip=box.ip),
                linux=api_pb2.LinuxPodSandboxStatus(
                    namespaces=api_pb2.Namespace(options=api_pb2.NamespaceOption(network=mode))
                ),
                runtime_handler=box.runtime_handler,
            ),
            info={"info": json.dumps(info)} if info else {},
        )

    def ListContainers(self, request, context):
        self.before("ListContainers")
        wanted = request.filter
        return api_pb2.ListContainersResponse(
            containers=[
                api_pb2.Container(
                    id=container.id,
                    pod_sandbox_id=box.id,
                    metadata=api_pb2.ContainerMetadata(name=container.name),
                    state=container.state,
                )
                for box in self.sandboxes
                for container in box.containers
                if wanted.pod_sandbox_id in ("", box.id) and wanted.id in ("", container.id)
            ]
        )

    def ContainerStatus(self, request, context):
        self.before("ContainerStatus")
        for box in self.sandboxes:
            for container in box.containers:
                if container.id == request.container_id:
                    verbose = {"info": json.dumps({"pid": container.pid})}
                    return api_pb2.ContainerStatusResponse(
                        status=api_pb2.ContainerStatus(
                            id=container.id,
                            metadata=api_pb2.ContainerMetadata(name=container.name),
                            state=container.state,
                        ),
                        info=verbose if box.info is None else {},
                    )
        return context.abort(grpc.StatusCode.NOT_FOUND, "container not found")


def _metadata(box: FakeSandbox) -> api_pb2.PodSandboxMetadata:
    return api_pb2.PodSandboxMetadata(
        name=box.name, namespace=box.namespace, uid=box.uid, attempt=box.attempt
    )


def _state(box: FakeSandbox) -> int:
    return api_pb2.SANDBOX_READY if box.ready else api_pb2.SANDBOX_NOTREADY


@contextmanager
def fake_runtime(socket: Path) -> Iterator[FakeRuntime]:
    """A CRI server on a unix socket."""
    socket.parent.mkdir(parents=True, exist_ok=True)
    runtime = FakeRuntime()
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        api_pb2_grpc.add_RuntimeServiceServicer_to_server(runtime, server)
        server.add_insecure_port(f"unix:{socket}")
        server.start()
        try:
            yield runtime
        finally:
            server.stop(0).wait()
