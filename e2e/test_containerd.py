"""A cluster whose pods are real containers: containerd, runc and CNI plugins, asked over CRI.

GKETRACE_CONTAINERD_TOPOLOGY=ptp runs it on the other topology.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from e2e.answers import chains, document, run_cli
from e2e.netlab import Lab
from e2e.netlab.api import COMMAND
from e2e.netlab.runtime import SIDECAR_PORT
from e2e.netlab.state import lab_cgroup, runtime_dir, state_dir
from e2e.test_answers import differences, some_pairs
from gketrace.errors import ExitCode

TOPOLOGY = os.environ.get("GKETRACE_CONTAINERD_TOPOLOGY", "bridge")
SOCKET = "/run/containerd/containerd.sock"


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(f"t{os.getpid()}-containerd", topology=TOPOLOGY, pods="containerd") as made:
        yield made


def in_node(pid: int) -> int:
    """The PID that the node has for a process of this machine (proc(5), NSpid)."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("NSpid:"))
    return int(line.split()[2])


def report(lab: Lab, pod: str) -> dict[str, Any]:
    ran = run_cli(lab, "pod", pod, "-o", "json")
    assert ran.code == ExitCode.OK, ran.err or ran.out
    return document(ran)


def resolved_as(lab: Lab, pod: str) -> dict[str, Any]:
    """`gketrace pod`'s resolution, which must be the pod's namespace as it is now."""
    found: dict[str, Any] = report(lab, pod)["resolution"]
    assert found["netnsInode"] == lab.pod(pod)["netns"]
    assert found["netnsInode"] == os.stat(f"/proc/{lab.pod(pod)['pid']}/ns/net").st_ino
    return found


# -- the lab itself ------------------------------------------------------------------------------


def test_pods_have_the_world_s_network(lab: Lab) -> None:
    """Addresses, routes and MTU as the captured cluster has them, made by the CNI plugins."""
    for pod in lab.world.pods:
        if pod.host_network:
            assert lab.pod(pod.key)["netns"] == lab.node(pod.node)["netns"]
            continue
        node = lab.world.node(pod.node)
        shown = json.loads(lab.exec(f"pod/{pod.key}", ["ip", "-j", "addr", "show", "eth0"]).stdout)
        addresses = {a["local"] for a in shown[0]["addr_info"] if a["scope"] == "global"}
        assert addresses == {pod.ip, *([pod.ip6] if pod.ip6 else [])}
        assert shown[0]["mtu"] == node.mtu
        routes = lab.exec(f"pod/{pod.key}", ["ip", "route"]).stdout
        assert f"default via {node.gateway} dev eth0" in routes
        veth = lab.pod(pod.key)["veth"]
        on_node = lab.exec(f"node/{node.short}", ["ip", "-d", "link", "show", veth]).stdout
        to_pod = lab.exec(f"node/{node.short}", ["ip", "route", "get", pod.ip]).stdout
        if TOPOLOGY == "bridge":
            assert "master cbr0" in on_node
            assert "hairpin on" in on_node
        else:
            assert f"dev {veth}" in to_pod


def test_objects_name_the_runtime_s_containers(lab: Lab) -> None:
    for key, entry in lab.state["pods"].items():
        namespace, name = key.split("/")
        item = lab.api("GET", f"/api/v1/namespaces/{namespace}/pods/{name}")
        told = {s["name"]: s["containerID"] for s in item["status"]["containerStatuses"]}
        assert told == {c["name"]: f"containerd://{c['id']}" for c in entry["containers"]}
        assert item["metadata"]["uid"] == entry["uid"]
        for container in entry["containers"]:
            cgroup = Path(f"/proc/{container['pid']}/cgroup").read_text()
            assert f"/kubepods/besteffort/pod{entry['uid']}/{container['id']}\n" in cgroup


def test_status_and_exec(lab: Lab) -> None:
    status = lab.status()
    agents = "image" if lab.agent_image else "process"
    assert (status["pods_backend"], status["agents"]) == ("containerd", agents)
    assert all(pod["running"] for pod in status["pods"].values())
    assert lab.command("exec", "pod/web-0", "--", "hostname").stdout == "web-0\n"
    argv = ["/hello-app", "-E", "-S", "-c", "import os; print(os.listdir('/app'))"]
    said = lab.container_exec("default/web-0", "web", argv)
    assert (said["code"], said["err"]) == (0, "")
    assert "main.py" in said["out"]


# -- what gketrace says --------------------------------------------------------------------------


def test_a_pod_is_found_by_the_runtime(lab: Lab) -> None:
    """Pod, container, PID, namespace: each is the runtime's."""
    entry = lab.pod("hello")
    found = report(lab, "hello-server-579859fb5b-szrwh")
    resolution = found["resolution"]
    assert resolution["method"] == "cri"
    assert resolution["netnsInode"] == entry["netns"]
    assert resolution["netnsPath"].endswith(f"/netns/{entry['netns_name']}")
    assert resolution["sandboxId"] == entry["sandbox_id"]
    assert resolution["sandboxPid"] == in_node(entry["sandbox_pid"])
    assert [(c["name"], c["id"], c["pid"]) for c in found["containers"]] == [
        ("hello-server", entry["container_id"], in_node(entry["pid"]))
    ]
    (eth0,) = (one for one in found["interfaces"] if one["name"] == "eth0")
    assert eth0["hostEnd"]["name"] == entry["veth"]
    assert all(step["ok"] for step in resolution["steps"])


def test_containers_of_one_pod(lab: Lab) -> None:
    """Two containers: both are named, and each socket has its own process."""
    entry = lab.pod("hostport-0")
    found = report(lab, "hostport-0")
    pids = {c["name"]: in_node(c["pid"]) for c in entry["containers"]}
    assert set(pids) == {"hostport", "sidecar"}
    assert {c["name"]: c["pid"] for c in found["containers"]} == pids
    text = run_cli(lab, "pod", "hostport-0").out
    assert f"*:8080 by hello-app, PID {pids['hostport']}" in text
    assert f"*:{SIDECAR_PORT} by hello-app, PID {pids['sidecar']}" in text
    assert lab.connect("client", entry["ip"], SIDECAR_PORT).pod == "default/hostport-0"


def test_a_pod_on_the_host_s_network(lab: Lab) -> None:
    found = report(lab, "hostnet-0")
    assert found["pod"]["hostNetwork"]
    assert found["resolution"]["method"] == "cri"
    assert found["resolution"]["netnsInode"] == lab.node("m69d")["netns"]
    entry = lab.pod("hostnet-0")
    assert found["resolution"]["sandboxId"] == entry["sandbox_id"]
    assert found["containers"][0]["pid"] == in_node(entry["pid"])


def test_a_host_port(lab: Lab) -> None:
    """The chains that portmap made are followed, to the pod that the packet meets."""
    met = lab.connect("client/203.0.113.10", "10.142.0.7", 8088)
    assert met.pod == "default/hostport-0"
    ran = run_cli(lab, "trace", "203.0.113.10", "10.142.0.7:8088", "-o", "json")
    assert ran.code == ExitCode.OK, ran.err or ran.out
    (path,) = document(ran)["paths"]
    assert path["outcome"] == "delivered"
    assert path["endpoint"] == "pod/default/hostport-0 10.40.2.40:8080"
    visited = chains(path)
    assert "CNI-HOSTPORT-DNAT" in visited
    assert any(chain.startswith("CNI-DN-") for chain in visited)


def test_answers_are_what_packets_meet(lab: Lab) -> None:
    """As e2e/test_answers.py, whose pods are processes."""
    found = differences(lab, some_pairs(lab, 0))
    assert not found, "\n".join(found)


# -- changes -------------------------------------------------------------------------------------


def test_a_restarted_pod_is_the_new_one(lab: Lab) -> None:
    """Between the stop and the start nothing answers; afterwards never the old namespace."""
    before = lab.pod("web-2")
    assert resolved_as(lab, "web-2")["sandboxId"] == before["sandbox_id"]
    # Held, as else the kernel may give its inode's number to the next one.
    with Path(f"/proc/{before['sandbox_pid']}/ns/net").open("rb"):
        lab.stop_pod("web-2")
        try:
            assert not Path(f"/proc/{before['pid']}").exists()
            ran = run_cli(lab, "pod", "web-2", "-o", "json")
            assert ran.code != ExitCode.OK
            assert str(before["netns"]) not in ran.out
            assert "none ready" in ran.out + ran.err
        finally:
            lab.start_pod("web-2")
    after = lab.pod("web-2")
    assert after["attempt"] == before["attempt"] + 1
    for what in ("netns", "sandbox_id", "container_id", "sandbox_pid", "pid", "veth", "netns_name"):
        assert after[what] != before[what]
    found = resolved_as(lab, "web-2")
    assert (found["method"], found["sandboxId"]) == ("cri", after["sandbox_id"])
    assert found["otherSandboxes"] == 1
    assert lab.connect("client", after["ip"], 8080).pod == "default/web-2"


@contextmanager
def without_socket(lab: Lab, node: str) -> Iterator[None]:
    """containerd's socket is out of the way."""
    lab.exec(f"node/{node}", ["mv", SOCKET, f"{SOCKET}.away"])
    try:
        yield
    finally:
        lab.exec(f"node/{node}", ["mv", f"{SOCKET}.away", SOCKET])


@contextmanager
def dead_runtime(lab: Lab, node: str) -> Iterator[None]:
    """containerd is killed and its socket left over; containers go on."""
    lab.stop_runtime(node)
    try:
        yield
    finally:
        lab.start_runtime(node)


@pytest.mark.parametrize(
    ("breakage", "said"),
    [(without_socket, "no socket found"), (dead_runtime, "unavailable")],
)
def test_the_cgroups_tell_when_the_runtime_does_not(
    lab: Lab, breakage: Callable[[Lab, str], Any], said: str
) -> None:
    with breakage(lab, "33fg"):
        found = resolved_as(lab, "hostport-0")
        assert found["method"] == "cgroup"
        failed = [step["detail"] for step in found["steps"] if not step["ok"]]
        assert any(said in detail for detail in failed), failed
    assert resolved_as(lab, "hostport-0")["method"] == "cri"


# -- nothing stays -------------------------------------------------------------------------------


def assert_nothing_left(name: str) -> None:
    assert not state_dir(name).exists()
    assert not runtime_dir(name).exists()
    assert not lab_cgroup(name).path.exists()
    assert name not in Path("/proc/self/mounts").read_text()
    until(lambda: not processes_of(name))


def processes_of(name: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"/gketrace-lab.{name}/" in (entry / "cgroup").read_text():
                    found.append(entry.name)
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def test_a_killed_up_leaves_nothing_after_down() -> None:
    """Killed while sandboxes are being made, with half of the containers running."""
    name = f"t{os.getpid()}-killed"
    argv = [str(COMMAND), "up", "--name", name, "--pods", "containerd", "--topology", TOPOLOGY]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert any("images:" in line for line in process.stderr)
        runtime = runtime_dir(name)
        until(lambda: any(runtime.glob("logs/*/*/*/0.log")))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
        subprocess.run([str(COMMAND), "down", "--name", name], check=True, capture_output=True)
    assert_nothing_left(name)


def test_down_leaves_nothing(lab: Lab) -> None:
    """The last one: it takes the shared lab down."""
    name = lab.name
    assert processes_of(name)
    lab.down()
    assert_nothing_left(name)
