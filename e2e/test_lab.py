"""The lab's own promises: up, down, status, exec; nothing left behind; nodes apart."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml
from kubernetes import client
from kubernetes.config import new_client_from_config

from e2e.netlab import Lab, LabError
from e2e.netlab.api import COMMAND
from e2e.netlab.lifecycle import running_state
from e2e.netlab.state import BASE, lab_cgroup, state_dir

NAME = f"t{os.getpid()}-life"


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def lab_processes(name: str) -> list[str]:
    """Processes that belong to the lab: by its cgroup, or by its name on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            cgroup = (entry / "cgroup").read_text()
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"/gketrace-lab.{name}/" in cgroup or any(
            f'"name": "{name}"'.encode() in word for word in words
        ):
            found.append(f"{entry.name} {words}")
    return found


def traces_outside(lab_links: set[str]) -> set[str]:
    """What a lab could have left in this machine's own namespaces: links and rules.

    Only what looks like a lab's: others may be at work on this machine.
    """
    done = subprocess.run(["ip", "-j", "link"], capture_output=True, text=True, check=True)
    found = {link["ifname"] for link in json.loads(done.stdout)} & lab_links
    done = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True)
    words = ("KUBE-", "IP-MASQ", "CNI-", "table ip kube-proxy")
    return found | {word for word in words if word in done.stdout}


def network_namespaces() -> set[int]:
    """Inodes of every network namespace that some process of this machine holds."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found.add((entry / "ns" / "net").stat().st_ino)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # gone, or a machine's own PID 1 that lets nobody look
    return found


@contextmanager
def reserved(namespaces: set[int]) -> Iterator[set[int]]:
    """Holds namespaces open, so that no test beside this one makes new ones with their inodes."""
    with ExitStack() as stack:
        waiting = set(namespaces)
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and waiting:
                try:
                    held = os.open(entry / "ns" / "net", os.O_RDONLY)
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    continue
                inode = os.fstat(held).st_ino
                if inode in waiting:
                    waiting.remove(inode)
                    stack.callback(os.close, held)
                else:
                    os.close(held)
        assert not waiting, "no process holds them"
        yield namespaces


def assert_nothing_left(name: str, namespaces: set[int]) -> None:
    """`namespaces` are `reserved`: a process in one of them is one that was left."""
    assert not state_dir(name).exists()
    assert not lab_cgroup(name).path.exists()
    until(lambda: not lab_processes(name))
    assert not namespaces & network_namespaces()
    assert name not in Path("/proc/self/mounts").read_text()


@pytest.fixture
def life() -> Iterator[Lab]:
    """A lab of the test's own, not up yet, taken down at the end."""
    lab = Lab(NAME)
    yield lab
    lab.down()


def held_namespaces(lab: Lab) -> set[int]:
    pods = [pod["netns"] for pod in lab.state["pods"].values()]
    nodes = [node["netns"] for node in lab.state["nodes"].values()]
    machines = [
        Path(f"/proc/{machine['pid']}/ns/net").stat().st_ino
        for machine in lab.state["machines"].values()
    ]
    own = Path("/proc/self/ns/net").stat().st_ino
    found = {*pods, *nodes, *machines}
    assert own not in found
    return found


def test_down_leaves_nothing(life: Lab) -> None:
    life.up()
    namespaces = held_namespaces(life)
    # Seven pods with a namespace of their own, three nodes, a switch, a router, two clients.
    assert len(namespaces) == 7 + 3 + 4
    assert namespaces <= network_namespaces()
    veths = {str(pod["veth"]) for pod in life.state["pods"].values() if pod["veth"]}
    lab_links = veths | {"vpc0", "cbr0", "port-2jdh", "port-router", "client0", "internet"}
    assert not traces_outside(lab_links)
    with reserved(namespaces):
        started = time.monotonic()
        life.down()
        assert time.monotonic() - started < 20  # nothing waits for its time to be over
        assert_nothing_left(NAME, namespaces)
    assert not traces_outside(lab_links)
    # Labs of tests beside this one come and go; only a folder that stays empty was left.
    until(lambda: not BASE.exists() or any(BASE.parent.glob("gketrace-lab/*")))


def test_down_without_a_lab_is_fine(life: Lab) -> None:
    done = life.command("down")
    assert (done.returncode, done.stdout) == (0, "")
    assert "is not there" in done.stderr


def test_up_again_checks_and_mends(life: Lab) -> None:
    first = life.command("up")
    assert first.returncode == 0
    kubeconfig = first.stdout.splitlines()[-1]
    assert yaml.safe_load(Path(kubeconfig).read_text())["kind"] == "Config"
    supervisor = running_state(NAME)["supervisor"]

    web = life.pod("web-0")["pid"]
    os.kill(web, signal.SIGKILL)
    until(lambda: life.connect("client", "10.40.0.10", 8080).kind == "refused")
    second = life.command("up")
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert running_state(NAME)["supervisor"] == supervisor
    assert life.connect("client", "10.40.0.10", 8080).pod == "default/web-0"

    other = life.command("up", "--topology", "ptp")
    assert other.returncode == 2
    assert f"`down --name {NAME}` first" in other.stderr
    assert other.stdout == ""


def test_up_builds_a_dead_lab_again(life: Lab) -> None:
    life.up()
    with reserved(held_namespaces(life)) as namespaces:
        os.kill(life.state["supervisor"]["pid"], signal.SIGKILL)
        until(lambda: not namespaces & network_namespaces())
    with pytest.raises(LabError, match="has died"):
        running_state(NAME)
    life.up()
    assert life.connect("client", "10.142.0.8", 31830).kind == "delivered"


@pytest.mark.parametrize("delay", [0.12, 0.25, 0.4, 0.6])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_broken_up_leaves_nothing(life: Lab, number: signal.Signals, delay: float) -> None:
    """Whenever `up` ends early: by itself on Ctrl-C, after `down` when it was killed."""
    process = subprocess.Popen(
        [str(COMMAND), "up", "--name", NAME],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(delay)  # the moments themselves are the test's parameter
    complete = process.poll() is not None
    process.send_signal(number)
    code = process.wait()
    if not complete and number != signal.SIGKILL and code != 0:
        # 130 by the command; else the signal came before the command had started.
        assert code in (130, -number, 1)
        assert_nothing_left(NAME, set())
    life.down()
    assert_nothing_left(NAME, set())


def test_killed_right_after_the_machines_started(life: Lab) -> None:
    """The worst moment: everything runs and nothing is recorded as complete."""
    process = subprocess.Popen(
        [str(COMMAND), "up", "--name", NAME], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    assert b"machines" in process.stderr.readline()
    assert lab_processes(NAME)
    process.kill()
    process.wait()
    process.stderr.close()
    until(lambda: not lab_processes(NAME))
    life.down()
    assert_nothing_left(NAME, set())


def test_two_labs_at_once(life: Lab) -> None:
    life.topology = "ptp"
    with Lab(f"{NAME}-b", era="1.20") as other:
        life.up()
        assert not held_namespaces(life) & held_namespaces(other)
        for lab in (life, other):
            result = lab.connect("client/203.0.113.10", "35.231.121.11", 80)
            assert result.pod == "default/hello-server-579859fb5b-szrwh"
        assert len(life.peers("hello")) == len(other.peers("hello")) == 2
    assert life.connect("client", "10.142.0.8", 31830).kind == "delivered"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--era", "1.20", "--backend", "nft"], "no fixture for --era 1.20 --backend nft"),
        (["--era", "1.30", "--backend", "nftables"], "--era 1.30 --backend nft"),
        (["--agent-image", "agent.tar"], "needs --pods containerd"),
        (["--pods", "containerd", "--agent-image", "agent.tar"], "scripts/image writes it"),
        (["--topology", "mesh"], "invalid choice"),
    ],
)
def test_what_cannot_be_built(life: Lab, arguments: list[str], text: str) -> None:
    done = life.command("up", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not state_dir(NAME).exists()


@pytest.mark.parametrize("name", ["", "a/b", "..", "Lab", "a" * 31])
def test_bad_names(name: str) -> None:
    done = Lab(name).command("up")
    assert done.returncode == 2
    assert "lab name" in done.stderr


def test_status(lab: Lab) -> None:
    status = lab.status()
    assert (status["era"], status["backend"], status["topology"]) == ("1.36", "nft", "bridge")
    assert status["api"] == "serving"
    assert {node["short"] for node in status["nodes"].values()} == {"2jdh", "m69d", "33fg"}
    assert all(pod["running"] for pod in status["pods"].values())
    assert len(status["pods"]) == 8
    names = " ".join(item["name"] for item in status["synthetic"])
    for word in ("IP-MASQ", "local routes", "CNI-HOSTPORT", "health ports"):
        assert word in names
    assert all(item["why"] and item["where"] for item in status["synthetic"])
    text = lab.command("status").stdout
    assert "SYNTHETIC" in text
    assert "35.231.121.12 -> m69d" in text


def test_exec(lab: Lab) -> None:
    """Names, exit codes, arguments as they are, and one-line errors."""
    command = lab.command
    assert command("exec", "node/2jdh", "--", "hostname").stdout.strip() == lab.node("2jdh")["name"]
    assert command("exec", "node/10.142.0.6", "--", "hostname").stdout.strip().endswith("m69d")
    assert command("exec", "pod/hello", "--", "hostname").stdout.startswith("hello-server-")
    assert command("exec", "pod/default/web-1", "--", "hostname").stdout == "web-1\n"
    assert "10.142.0.2/24" in command("exec", "client", "--", "ip", "-4", "addr").stdout
    assert "192.0.2.10" in command("exec", "client/192.0.2.10", "--", "ip", "addr").stdout
    assert command("exec", "client", "--", "sh", "-c", "exit 7").returncode == 7
    assert (
        command("exec", "pod/web-0", "--", "printf", "%s|", "a b", "$HOME").stdout == "a b|$HOME|"
    )
    for target, text in (
        ("node/nope", "no such node"),
        ("pod/web", "several"),
        ("pod/kube-system/web-0", "no such pod"),
        ("client/1.2.3.4", "no such client"),
        ("router", "say node/NAME"),
    ):
        done = command("exec", target, "--", "true")
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert text in done.stderr
    assert command("exec", "node/2jdh").returncode == 2


def test_a_node_sees_only_itself(lab: Lab) -> None:
    """Processes, mounts, links, cgroups and /run of a node are its own."""
    for short, pods in (("2jdh", 2), ("m69d", 2), ("33fg", 3)):
        cgroups = lab.exec(f"node/{short}", ["sh", "-c", "cat /proc/[0-9]*/cgroup"]).stdout
        own = [pod for pod in lab.state["pods"].values() if pod["node"].endswith(short)]
        others = [pod for pod in lab.state["pods"].values() if not pod["node"].endswith(short)]
        for pod in own:
            uid = pod["uid"].replace("-", "_")
            path = (
                f"0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{uid}.slice"
                f"/cri-containerd-{pod['container_id']}.scope"
            )
            assert path in cgroups.splitlines() or path in cgroups
        for pod in others:
            assert pod["uid"].replace("-", "_") not in cgroups
            assert pod["container_id"] not in cgroups
        inodes = lab.exec(
            f"node/{short}", ["sh", "-c", "stat -Lc %i /proc/[0-9]*/ns/net | sort -u"]
        ).stdout.split()
        with_own = {pod["netns"] for pod in own} | {lab.node(short)["netns"]}
        assert {int(inode) for inode in inodes} == with_own
        netns = lab.exec(f"node/{short}", ["ls", "/run/netns"]).stdout.split()
        assert len(netns) == pods
        names = lab.exec(f"node/{short}", ["ls", "/sys/class/net"]).stdout.split()
        veths = {pod["veth"] for pod in own if pod["veth"]}
        assert set(names) == {"lo", "eth0", "cbr0", *veths}


def test_names_in_run_netns_are_the_pods(lab: Lab) -> None:
    """/run/netns/cni-… is the namespace of the pod's processes, as a runtime leaves it."""
    script = "stat -Lc %i /run/netns/*"
    inodes = lab.exec("node/2jdh", ["sh", "-c", script]).stdout.split()
    pods = [pod for pod in lab.state["pods"].values() if pod["node"].endswith("2jdh")]
    assert {int(inode) for inode in inodes} == {pod["netns"] for pod in pods}


@pytest.mark.parametrize("kind", [("bridge", "1.36", "nft"), ("ptp", "1.20", "legacy")])
def test_the_dump_is_what_the_node_holds(
    labs: Callable[..., Lab], kind: tuple[str, str, str]
) -> None:
    """Every rule of the fixture is there, in order; what is added, status calls synthetic."""
    lab = labs(*kind)
    for node in lab.world.nodes:
        tool = f"iptables-{lab.backend}-save"
        for table in ("filter", "nat", "mangle"):
            now = lab.exec(f"node/{node.short}", [tool, "-t", table]).stdout.splitlines()
            have = [line for line in now if line.startswith("-A ")]
            text = (node.fixture / "iptables-save.txt").read_text()
            section = (
                text.split(f"*{table}\n")[1].split("COMMIT")[0] if f"*{table}\n" in text else ""
            )
            wanted = [
                line.split("] ", 1)[1] for line in section.splitlines() if line.startswith("[")
            ]
            left = iter(have)
            assert all(rule in left for rule in wanted), f"{node.short} {table}"
            added = [rule for rule in have if rule not in wanted]
            words = ("IP-MASQ", "CNI-", "KUBE-MARK-DROP", "KUBE-FIREWALL")
            assert all(any(word in rule for word in words) for rule in added)


def test_fixture_sysctls_hold(lab: Lab) -> None:
    fixed = ("nf_conntrack_count", "nf_conntrack_max")
    for node in lab.world.nodes:
        for line in (node.fixture / "sysctl.txt").read_text().splitlines():
            name, value = line.split(" = ")
            if not name.endswith(fixed):
                got = lab.exec(f"node/{node.short}", ["cat", f"/proc/sys/{name.replace('.', '/')}"])
                assert got.stdout.strip() == value, name


def test_ptp_links_are_what_the_plugin_makes(labs: Callable[..., Lab]) -> None:
    lab = labs("ptp")
    routes = lab.exec("node/2jdh", ["ip", "-4", "route"]).stdout
    veth = lab.pod("hello")["veth"]
    assert f"10.40.0.6 dev {veth} scope host" in routes
    assert "cbr0" not in routes
    addresses = json.loads(lab.exec("node/2jdh", ["ip", "-j", "-4", "addr"]).stdout)
    gateway = [
        link["ifname"]
        for link in addresses
        if any((a["local"], a["prefixlen"]) == ("10.40.0.1", 32) for a in link["addr_info"])
    ]
    assert len(gateway) == 2
    inside = lab.exec("pod/hello", ["ip", "-4", "route"]).stdout.splitlines()
    assert [line.strip() for line in inside] == [
        "default via 10.40.0.1 dev eth0",
        "10.40.0.0/24 via 10.40.0.1 dev eth0 src 10.40.0.6",
        "10.40.0.1 dev eth0 scope link src 10.40.0.6",
    ]


def test_bridge_learns_the_pods(lab: Lab) -> None:
    lab.connect("client", "10.142.0.8", 31830)
    ports = json.loads(lab.exec("node/2jdh", ["bridge", "-j", "fdb", "show", "br", "cbr0"]).stdout)
    learned = {entry["mac"]: entry["ifname"] for entry in ports if not entry.get("state")}
    assert learned["0a:58:0a:28:00:06"] == lab.pod("hello")["veth"]


def test_load_balancer_addresses_are_local(lab: Lab) -> None:
    routes = lab.exec("node/33fg", ["ip", "route", "show", "table", "local", "proto", "66"]).stdout
    for address in ("35.231.121.11", "35.231.121.12", "35.231.121.13", "35.231.121.14"):
        assert f"local {address} dev eth0 scope host" in routes


def test_the_api_serves_the_world(lab: Lab) -> None:
    """Through the kubeconfig that `up` printed, with the stock client."""
    config = yaml.safe_load(lab.kubeconfig.read_text())
    assert config["current-context"]
    api = client.CoreV1Api(new_client_from_config(str(lab.kubeconfig)))
    pods = {
        f"{pod.metadata.namespace}/{pod.metadata.name}": pod
        for pod in api.list_pod_for_all_namespaces().items
    }
    assert set(lab.state["pods"]) <= set(pods)
    for key, entry in lab.state["pods"].items():
        assert pods[key].metadata.uid == entry["uid"]
        status = pods[key].status.container_statuses[0]
        assert status.container_id == f"containerd://{entry['container_id']}"
    api.api_client.close()


def test_the_api_is_reached_from_nodes_and_clients(lab: Lab) -> None:
    """At the kubeconfig's own address, with the kubeconfig's file at its own path."""
    for target in ("node/2jdh", "node/33fg", "client", "client/192.0.2.10"):
        config = json.loads(lab.exec(target, ["cat", str(lab.kubeconfig)]).stdout)
        server = config["clusters"][0]["cluster"]["server"]
        said = lab.exec(target, ["curl", "-sk", f"{server}/version"]).stdout
        assert json.loads(said)["gitVersion"] == "v1.36.2"


def test_agents_run_in_their_nodes(life: Lab) -> None:
    """One on each node, in the node's namespaces; a stopped one is mended by `up`."""
    life.up()
    for name, node in life.status()["nodes"].items():
        assert node["agent"]["state"] == "running", name
        assert stat.S_IMODE(life.agent_socket(name).stat().st_mode) == 0o600
        pid = str(node["agent"]["pid"])
        inode = life.exec(f"node/{node['short']}", ["stat", "-Lc", "%i", f"/proc/{pid}/ns/net"])
        assert int(inode.stdout) == node["netns"]
    pods = life.api("GET", "/api/v1/pods?labelSelector=app.kubernetes.io/name%3Dgketrace-agent")
    assert {pod["status"]["podIP"] for pod in pods["items"]} == {
        node["ip"] for node in life.state["nodes"].values()
    }
    assert all(
        {"name": "grpc", "containerPort": 9410, "hostPort": 9410, "protocol": "TCP"}
        in pod["spec"]["containers"][0]["ports"]
        for pod in pods["items"]
    )
    life.stop_agent("m69d")
    assert life.status()["nodes"][life.node("m69d")["name"]]["agent"]["state"] == "stopped"
    assert not life.agent_socket("m69d").exists()
    life.up()
    assert life.status()["nodes"][life.node("m69d")["name"]]["agent"]["state"] == "running"


@pytest.mark.parametrize("topology", ["bridge", "ptp"])
def test_a_pod_goes_and_comes_back(life: Lab, topology: str) -> None:
    life.topology = topology
    life.up()
    before = life.pod("hello")
    with reserved({before["netns"]}):
        life.stop_pod("hello")
        links = life.exec("node/2jdh", ["ls", "/sys/class/net"]).stdout
        assert before["veth"] not in links
        assert before["netns"] not in network_namespaces()
    assert life.connect("client", "10.142.0.8", 31830).kind in ("timeout", "unreachable")
    life.start_pod("hello")
    assert life.pod("hello")["pid"] not in (None, before["pid"])
    assert life.connect("client", "10.142.0.8", 31830).pod == before["key"]
    assert life.connect("pod/hello", "10.43.246.223", 80).pod == before["key"]


def test_a_lab_keeps_no_foreign_namespace(life: Lab) -> None:
    """A namespace that this machine had named when the lab came up can still be deleted."""
    name = f"{NAME}-foreign"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        life.up()
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    for pid in (
        [node["pid"] for node in life.state["nodes"].values()]
        + [pod["sandbox_pid"] for pod in life.state["pods"].values()]
        + [machine["pid"] for machine in life.state["machines"].values()]
    ):
        assert name not in Path(f"/proc/{pid}/mountinfo").read_text()


def test_without_a_virtual_environment(tmp_path: Path) -> None:
    (tmp_path / "e2e").mkdir()
    copy = shutil.copy(COMMAND, tmp_path / "e2e" / "lab")
    done = subprocess.run([copy, "up"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"e2e/lab: {tmp_path}/.venv is missing: run scripts/setup first\n"
