"""Pods are found by the runtime or by their cgroups, with real processes and namespaces."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gketrace.errors import GoneError, NotFoundError, UnavailableError, UsageError
from gketrace.trace import NetnsKind
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.resolve.model import PodRef
from gketrace_agent.resolve.resolver import Resolver
from gketrace_agent.resolve.scan import scan_cgroups
from gketrace_proto.cri import api_pb2
from tests.agent.pods import (
    FakeContainer,
    FakePod,
    FakeRuntime,
    FakeSandbox,
    container_id,
    fake_pod,
    fake_runtime,
    netns_inode,
)

SANDBOX = container_id()
WEB = container_id()
SIDECAR = container_id()
OLD = container_id()


@pytest.fixture
def by_cgroup() -> Iterator[Resolver]:
    resolver = Resolver(HostPaths(), "node-a", runtime_sockets=())
    yield resolver
    resolver.close()


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "run" / "containerd" / "containerd.sock"


@pytest.fixture
def runtime(socket: Path) -> Iterator[FakeRuntime]:
    with fake_runtime(socket) as served:
        yield served


@pytest.fixture
def by_runtime(socket: Path) -> Iterator[Resolver]:
    resolver = Resolver(HostPaths(run=socket.parent.parent), "node-a")
    yield resolver
    resolver.close()


@pytest.fixture(params=["cgroupfs", "systemd"])
def pod(request: pytest.FixtureRequest) -> Iterator[FakePod]:
    with fake_pod(request.param) as made:
        yield made


@pytest.fixture
def web() -> Iterator[FakePod]:
    with fake_pod() as made:
        yield made


def _steps(resolved) -> list[tuple[str, bool]]:
    return [(step.step, step.ok) for step in resolved.steps]


class TestByCgroup:
    def test_by_uid(self, by_cgroup: Resolver, pod: FakePod) -> None:
        pause = pod.add(SANDBOX, command="pause", own_netns=True)
        web = pod.add(WEB, join=pause)
        ref = PodRef(namespace="default", name="web", uid=pod.uid)
        with by_cgroup.resolve(ref) as resolved:
            assert resolved.found.method == "cgroup"
            assert resolved.found.handle.inode == netns_inode(pause)
            assert (resolved.found.sandbox_id, resolved.found.sandbox_pid) == (SANDBOX, pause)
            assert [(c.id, c.pid, c.command) for c in resolved.found.containers] == [
                (WEB, web, "sleep")
            ]
            assert resolved.found.containers[0].start_time > 0
            assert str(resolved.netns) == "pod default/web"
            assert resolved.netns.kind is NetnsKind.POD
            assert _steps(resolved) == [
                ("runtime", False),
                ("cgroup scan", True),
                ("verify", True),
                ("namespace", True),
            ]
            driver = f"{pod.layout} names"
            assert driver in resolved.steps[1].detail

    def test_by_container_id_of_a_static_pod(self, by_cgroup: Resolver) -> None:
        config_hash = os.urandom(16).hex()
        with fake_pod("systemd", uid=config_hash) as pod:
            pause = pod.add(SANDBOX, command="pause", own_netns=True)
            pod.add(WEB, join=pause)
            api_uid = "0e8c22e6-7b53-4f53-8c15-6d1c5e44a4aa"
            with by_cgroup.resolve(PodRef(uid=api_uid, container_ids=(WEB,))) as resolved:
                assert resolved.found.handle.inode == netns_inode(pause)
                assert resolved.found.uid == api_uid
            with by_cgroup.resolve(PodRef(uid=api_uid, config_hash=config_hash)) as resolved:
                assert resolved.found.handle.inode == netns_inode(pause)
            with pytest.raises(NotFoundError, match="carries its configuration hash"):
                by_cgroup.resolve(PodRef(uid=api_uid))

    def test_host_network(self, by_cgroup: Resolver, web: FakePod) -> None:
        web.add(WEB)
        with by_cgroup.resolve(PodRef(uid=web.uid, host_network=True)) as resolved:
            assert resolved.host_network
            assert resolved.netns.kind is NetnsKind.HOST
            assert resolved.steps[-1].step == "host network"

    def test_the_api_is_contradicted(self, by_cgroup: Resolver, web: FakePod) -> None:
        web.add(WEB, own_netns=True)
        with by_cgroup.resolve(PodRef(uid=web.uid, host_network=True)) as resolved:
            assert not resolved.host_network
            assert not resolved.steps[-1].ok
            assert "said to be hostNetwork" in resolved.steps[-1].detail

    def test_what_runs_in_a_container_does_not_count(
        self, by_cgroup: Resolver, web: FakePod
    ) -> None:
        pause = web.add(SANDBOX, command="pause", own_netns=True)
        inner = web.add(f"{SANDBOX}/docker/{OLD}", own_netns=True)
        web.add(WEB, join=pause)
        assert netns_inode(inner) != netns_inode(pause)
        with by_cgroup.resolve(PodRef(uid=web.uid)) as resolved:
            assert resolved.found.handle.inode == netns_inode(pause)

    def test_parts_in_different_namespaces(self, by_cgroup: Resolver, web: FakePod) -> None:
        web.add(SANDBOX, command="pause", own_netns=True)
        web.add(WEB, own_netns=True)
        with pytest.raises(UnavailableError, match="different network namespaces: pause PID"):
            by_cgroup.resolve(PodRef(uid=web.uid))

    def test_uid_and_container_of_different_pods(self, by_cgroup: Resolver, web: FakePod) -> None:
        web.add(WEB, own_netns=True)
        with fake_pod() as other:
            other.add(SIDECAR, own_netns=True)
            with pytest.raises(UnavailableError, match="different pods' cgroups"):
                by_cgroup.resolve(PodRef(uid=web.uid, container_ids=(SIDECAR,)))

    def test_a_pod_that_went_away_after_the_scan(self, by_cgroup: Resolver, web: FakePod) -> None:
        pid = web.add(WEB, own_netns=True)
        scan = scan_cgroups(HostPaths())
        web.kill(pid)
        with pytest.raises(NotFoundError, match="no container with a living process"):
            by_cgroup.resolve(PodRef(uid=web.uid), scan=scan)

    def test_no_such_pod_says_what_was_tried(self, by_cgroup: Resolver) -> None:
        ref = PodRef(namespace="default", name="nope", uid="11111111-2222-3333-4444-555555555555")
        with pytest.raises(NotFoundError) as caught:
            by_cgroup.resolve(ref)
        assert str(caught.value).startswith(
            "pod default/nope is not on node node-a: runtime: no socket configured"
        )
        assert "cgroup scan: no process in its cgroup" in str(caught.value)

    def test_a_name_alone_is_not_in_a_cgroup(self, by_cgroup: Resolver) -> None:
        with pytest.raises(NotFoundError, match="cgroups name pods by UID or container id"):
            by_cgroup.resolve(PodRef(namespace="default", name="web"))

    def test_nothing_given(self, by_cgroup: Resolver) -> None:
        with pytest.raises(UsageError, match="named by"):
            by_cgroup.resolve(PodRef())

    def test_the_namespace_outlives_the_pod_while_held(
        self, by_cgroup: Resolver, web: FakePod
    ) -> None:
        pid = web.add(WEB, own_netns=True)
        inode = netns_inode(pid)
        with by_cgroup.resolve(PodRef(uid=web.uid)) as resolved:
            web.kill(pid)
            assert resolved.found.handle.inode == inode
            assert os.fstat(resolved.found.handle.fd).st_ino == inode


class TestByRuntime:
    @pytest.fixture
    def box(self, web: FakePod, runtime: FakeRuntime) -> FakeSandbox:
        pause = web.add(SANDBOX, command="pause", own_netns=True)
        box = FakeSandbox(
            id=SANDBOX,
            namespace="default",
            name="web",
            uid=web.uid,
            pid=pause,
            ip="10.40.0.6",
            netns_path=f"/proc/{pause}/ns/net",
            containers=[
                FakeContainer(WEB, "web", web.add(WEB, join=pause)),
                FakeContainer(OLD, "init", 0, api_pb2.CONTAINER_EXITED),
            ],
        )
        runtime.sandboxes.append(box)
        return box

    def test_by_name(self, by_runtime: Resolver, box: FakeSandbox, socket: Path) -> None:
        with by_runtime.resolve(PodRef(namespace="default", name="web")) as resolved:
            assert resolved.found.method == "cri"
            assert (resolved.found.namespace, resolved.found.name, resolved.found.uid) == (
                "default",
                "web",
                box.uid,
            )
            assert resolved.found.handle.inode == netns_inode(box.pid)
            assert (resolved.found.sandbox_id, resolved.found.sandbox_pid) == (SANDBOX, box.pid)
            assert [(c.name, c.pid, c.state) for c in resolved.found.containers] == [
                ("web", box.containers[0].pid, "running"),
                ("init", 0, "exited"),
            ]
            assert resolved.found.ips == ("10.40.0.6",)
            assert resolved.found.netns_path == box.netns_path
            assert _steps(resolved) == [
                ("runtime", True),
                ("sandbox", True),
                ("containers", True),
                ("verify", True),
                ("namespace", True),
            ]
            assert resolved.steps[0].detail == f"faketainerd 9.9 at unix://{socket}"

    @pytest.mark.parametrize("by", ["uid", "container"])
    def test_by_other_names(self, by_runtime: Resolver, box: FakeSandbox, by: str) -> None:
        ref = PodRef(uid=box.uid) if by == "uid" else PodRef(container_ids=(WEB,))
        with by_runtime.resolve(ref) as resolved:
            assert (resolved.found.method, resolved.found.name) == ("cri", "web")

    def test_the_ready_sandbox_of_the_last_attempt(
        self, by_runtime: Resolver, runtime: FakeRuntime, box: FakeSandbox
    ) -> None:
        box.attempt = 2
        for attempt, ready in ((1, True), (3, False)):
            runtime.sandboxes.append(
                FakeSandbox(
                    id=OLD,
                    namespace="default",
                    name="web",
                    uid=box.uid,
                    attempt=attempt,
                    ready=ready,
                )
            )
        with by_runtime.resolve(PodRef(namespace="default", name="web")) as resolved:
            assert (resolved.found.sandbox_id, resolved.found.other_sandboxes) == (SANDBOX, 2)

    def test_none_ready(self, by_runtime: Resolver, box: FakeSandbox) -> None:
        box.ready = False
        with pytest.raises(NotFoundError, match="sandbox: 1 of pod default/web, none ready"):
            by_runtime.resolve(PodRef(namespace="default", name="web"))

    def test_replaced_by_one_of_the_same_name(self, by_runtime: Resolver, box: FakeSandbox) -> None:
        gone = "99999999-2222-3333-4444-555555555555"
        with pytest.raises(NotFoundError, match=f"UID {box.uid}, not {gone}: replaced"):
            by_runtime.resolve(PodRef(namespace="default", name="web", uid=gone))

    def test_a_static_pod(self, by_runtime: Resolver, box: FakeSandbox) -> None:
        mirror, box.uid = box.uid, os.urandom(16).hex()
        box.annotations = {"kubernetes.io/config.hash": box.uid}
        ref = PodRef(namespace="default", name="web", uid=mirror)
        with by_runtime.resolve(ref) as resolved:
            assert (resolved.found.method, resolved.found.uid) == ("cri", box.uid)

    def test_host_network(self, by_runtime: Resolver, box: FakeSandbox, web: FakePod) -> None:
        box.host_network, box.netns_path = True, ""
        box.pid = web.add(SIDECAR, command="pause")
        box.containers = []
        with by_runtime.resolve(PodRef(namespace="default", name="web")) as resolved:
            assert resolved.host_network
            assert resolved.found.handle.inode == netns_inode(os.getpid())

    def test_gvisor_is_flagged(self, by_runtime: Resolver, box: FakeSandbox) -> None:
        box.runtime_handler = "gvisor"
        with by_runtime.resolve(PodRef(namespace="default", name="web")) as resolved:
            assert resolved.found.runtime_handler == "gvisor"

    def test_path_and_process_disagree(
        self, by_runtime: Resolver, box: FakeSandbox, web: FakePod
    ) -> None:
        box.netns_path = f"/proc/{web.add(SIDECAR, own_netns=True)}/ns/net"
        with pytest.raises(UnavailableError, match="different network namespaces"):
            by_runtime.resolve(PodRef(namespace="default", name="web"))

    def test_a_path_that_is_not_mounted_here(
        self, by_runtime: Resolver, box: FakeSandbox, socket: Path
    ) -> None:
        (socket.parent.parent / "netns").mkdir()
        (socket.parent.parent / "netns" / "cni-1").touch()
        box.netns_path = "/var/run/netns/cni-1"
        with by_runtime.resolve(PodRef(namespace="default", name="web")) as resolved:
            assert resolved.found.handle.inode == netns_inode(box.pid)
            failed = [step for step in resolved.steps if not step.ok]
            assert [step.step for step in failed] == ["namespace path"]
            assert "HostToContainer" in failed[0].detail

    def test_it_vanishes_mid_call(
        self, by_runtime: Resolver, runtime: FakeRuntime, box: FakeSandbox
    ) -> None:
        def remove(method: str) -> None:
            if method == "PodSandboxStatus":
                runtime.sandboxes.clear()

        runtime.before = remove
        with pytest.raises(GoneError, match="no longer has it"):
            by_runtime.resolve(PodRef(namespace="default", name="web"))

    def test_its_processes_end_mid_call(
        self, by_runtime: Resolver, runtime: FakeRuntime, box: FakeSandbox, web: FakePod
    ) -> None:
        def end(method: str) -> None:
            if method == "ContainerStatus":
                web.stop()

        runtime.before = end
        with pytest.raises(GoneError, match=f"nothing of its sandbox {SANDBOX[:12]} is left"):
            by_runtime.resolve(PodRef(namespace="default", name="web"))

    def test_a_runtime_that_names_no_process(self, by_runtime: Resolver, box: FakeSandbox) -> None:
        box.info = {}  # cri-dockerd
        with by_runtime.resolve(PodRef(namespace="default", name="web")) as resolved:
            assert resolved.found.containers[0].pid == box.containers[0].pid
            assert resolved.found.handle.inode == netns_inode(box.pid)
            assert ("cgroup scan", True) in _steps(resolved)

    def test_a_dead_runtime_falls_back(self, socket: Path, web: FakePod, tmp_path: Path) -> None:
        socket.parent.mkdir(parents=True)
        script = f"import socket; socket.socket(socket.AF_UNIX).bind({str(socket)!r})"
        subprocess.run(["python3", "-c", script], check=True)
        web.add(WEB, own_netns=True)
        resolver = Resolver(HostPaths(run=tmp_path / "run"), "node-a")
        with resolver.resolve(PodRef(namespace="default", name="web", uid=web.uid)) as resolved:
            assert resolved.found.method == "cgroup"
            assert resolved.steps[0].step == "runtime"
            assert not resolved.steps[0].ok
            assert "unavailable" in resolved.steps[0].detail
        resolver.close()

    def test_the_deadline_holds(
        self, by_runtime: Resolver, runtime: FakeRuntime, web: FakePod, box: FakeSandbox
    ) -> None:
        release = threading.Event()
        runtime.before = lambda method: release.wait(5) and None
        ref = PodRef(namespace="default", name="web", uid=web.uid)
        try:
            with by_runtime.resolve(ref, timeout=0.1) as resolved:
                assert resolved.found.method == "cgroup"
                assert "did not answer in 0.1 s" in resolved.steps[0].detail
        finally:
            release.set()
