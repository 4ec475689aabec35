"""Who is meant: `node/2jdh`, `pod/web-0`, `client/203.0.113.10`; and how to get in there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.netlab.errors import LabError
from e2e.netlab.network import CLIENTS, ROUTER_IP

__all__ = ["Target", "find_node", "find_pod", "resolve"]

_JOIN = 'mkdir -p "$1" && echo 0 > "$1/cgroup.procs" && shift && exec "$@"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A place to run a command: the process whose namespaces are entered, and its cgroup."""

    title: str
    pid: int
    namespaces: tuple[str, ...]
    cgroup: Path

    def argv(self, command: list[str], folder: str) -> list[str]:
        """Joins the cgroup and the namespaces and runs `command` in `folder`."""
        flags = [f"--{name}" for name in self.namespaces]
        enter = ["nsenter", "--target", str(self.pid), *flags, f"--wdns={folder}", "--", *command]
        return ["sh", "-c", _JOIN, "sh", str(self.cgroup), *enter]

    def network_argv(self, command: list[str], cgroup: Path) -> list[str]:
        """Joins `cgroup` and the network namespace, no other, and runs `command`."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--", *command]
        return ["sh", "-c", _JOIN, "sh", str(cgroup), *enter]


def find_node(state: dict[str, Any], text: str) -> str:
    """A node's name from its name, a unique suffix of it, or an address."""
    nodes = state["nodes"]
    found = [
        name
        for name, node in nodes.items()
        if text in (name, node["ip"], node["ip6"]) or name.endswith(f"-{text}")
    ] or [name for name in nodes if text and name.endswith(text)]
    if len(found) != 1:
        known = ", ".join(node["short"] for node in nodes.values())
        raise LabError(
            f"node {text!r}: {'no such node' if not found else 'several'}; have: {known}"
        )
    return str(found[0])


def find_pod(state: dict[str, Any], text: str) -> str:
    """A pod's namespace/name from [namespace/]name or a unique prefix of the name."""
    namespace, _, name = text.rpartition("/")
    pods = [key for key in state["pods"] if key.split("/")[0] == (namespace or "default")]
    found = [key for key in pods if key.split("/")[1] == name] or [
        key for key in pods if name and key.split("/")[1].startswith(name)
    ]
    if len(found) != 1:
        known = ", ".join(state["pods"])
        raise LabError(f"pod {text!r}: {'no such pod' if not found else 'several'}; have: {known}")
    return str(found[0])


def resolve(state: dict[str, Any], text: str) -> Target:
    """The target that `text` names; raises LabError."""
    kind, _, name = text.partition("/")
    cgroup = Path(state["cgroup"])
    if kind == "node" and name:
        node = state["nodes"][find_node(state, name)]
        return Target(
            title=f"node/{node['short']}",
            pid=node["pid"],
            namespaces=("net", "pid", "mount", "uts", "ipc", "cgroup"),
            cgroup=cgroup / f"node-{node['short']}" / "user.slice",
        )
    if kind == "pod" and name:
        key = find_pod(state, name)
        pod = state["pods"][key]
        node = state["nodes"][pod["node"]]
        relative = Path(f"/proc/{pod['sandbox_pid']}/cgroup").read_text().splitlines()
        folder = next(line.split(":", 2)[2] for line in relative if "kubepods" in line)
        root = next(parent for parent in (cgroup, *cgroup.parents) if parent.name == cgroup.name)
        inside: tuple[str, ...] = ("net", "pid", "mount", "uts", "ipc", "cgroup")
        if state["pods_backend"] == "containerd":
            # An image holds no shell: the node's files and processes, as `kubectl debug` gives.
            outside = f"/proc/{node['pid']}/ns"
            inside = ("net", "uts", "ipc", f"pid={outside}/pid", f"mount={outside}/mnt")
        return Target(
            title=f"pod/{key}",
            pid=pod["sandbox_pid"],
            namespaces=inside,
            cgroup=root.parent / folder.lstrip("/"),
        )
    if kind in ("client", "switch"):
        machine = "switch" if kind == "switch" else name or "router"
        machine = "router" if machine == ROUTER_IP else machine
        if machine not in ("router", "switch", *CLIENTS):
            known = ", ".join((ROUTER_IP, *CLIENTS))
            raise LabError(f"client {name!r}: no such client; have: {known}")
        return Target(
            title=f"client/{ROUTER_IP if machine == 'router' else machine}",
            pid=state["machines"][machine]["pid"],
            namespaces=("net", "mount", "uts"),
            cgroup=cgroup / "vpc",
        )
    raise LabError(f"{text!r}: say node/NAME, pod/[NAMESPACE/]NAME, client or client/ADDRESS")
