"""A lab with changes that undo themselves, and gketrace's answers about it in this process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from e2e.netlab import Lab, LabError
from gketrace.findings.detect import find
from gketrace.findings.model import Finding
from gketrace.findings.world import World
from gketrace.kubenames import ChainRole, ServicePort, endpoint_chain, service_chain
from gketrace_cli.checking.whole import read_world
from gketrace_cli.options import Options
from gketrace_cli.session import Session

__all__ = ["Stage"]

NODES = ("2jdh", "m69d", "33fg")
CLUSTER_CIDR = "10.40.0.0/14"


class Stage:
    """One lab, while something is wrong with it.  `undo` puts everything back."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._undo = ExitStack()
        self.missing: tuple[str, ...] = ()
        """What the last check did not see."""

    @property
    def bridge(self) -> bool:
        return self.lab.topology == "bridge"

    def undo(self) -> None:
        """Everything back, in reverse order."""
        self._undo.close()
        # What the probes left behind is not the fixture's.
        for node in NODES:
            self.run(f"node/{node}", "conntrack -F", check=False)

    # commands

    def run(self, where: str, command: str, *, stdin: str = "", check: bool = True) -> str:
        """A shell command at ``node/2jdh``, ``pod/web-0`` or ``client/203.0.113.10``."""
        done = self.lab.exec(where, ["sh", "-c", command], stdin=stdin)
        if check and done.returncode:
            raise LabError(f"{where}: {command}: exit {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def do(self, where: str, command: str, back: str) -> None:
        """`command` now, `back` on undo."""
        self.run(where, command)
        self._undo.callback(self.run, where, back, check=False)

    def later(self, call: Callable[[], Any]) -> None:
        """Called on undo."""
        self._undo.callback(call)

    def keep(self, where: str, argv: list[str]) -> subprocess.Popen[str]:
        """A command that runs until undo; its first line of output is waited for."""
        from e2e.netlab.targets import resolve

        process = subprocess.Popen(
            resolve(self.lab.state, where).argv(argv, "/"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # nsenter forks when it enters a PID namespace
        )
        self._undo.callback(self._end, process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    def _end(self, process: subprocess.Popen[str]) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def sysctl(self, node: str, name: str, value: str) -> None:
        path = "/proc/sys/" + name.replace(".", "/")
        before = self.run(f"node/{node}", f"cat {path}").strip()
        self.do(f"node/{node}", f"echo {value} > {path}", f"echo {before} > {path}")

    @property
    def iptables(self) -> str:
        return "iptables-legacy" if self.lab.backend == "legacy" else "iptables-nft"

    def rule(self, node: str, table: str, chain: str, spec: str, *, where: str = "") -> None:
        """Inserts a rule, first in its chain; `where` is another place than the node."""
        tool, place = self.iptables, where or f"node/{node}"
        self.do(
            place, f"{tool} -t {table} -I {chain} {spec}", f"{tool} -t {table} -D {chain} {spec}"
        )

    def saved(self, node: str) -> None:
        """The node's rules as they are now come back on undo, whatever happens to them."""
        tool = self.iptables
        text = self.run(f"node/{node}", f"{tool}-save -c")
        self._undo.callback(self.run, f"node/{node}", f"{tool}-restore -c", stdin=text)

    # what there is

    def pod_ip(self, pod: str) -> str:
        return str(self.lab.pod(pod)["ip"])

    def node_ip(self, node: str) -> str:
        return str(self.lab.node(node)["ip"])

    def veth(self, pod: str) -> str:
        """The node's end of the pod's veth pair."""
        return next(p.veth for p in self.lab.world.pods if p.key == self.lab.pod(pod)["key"])

    def pod_device(self, pod: str) -> str:
        """The device of its node that packets to the pod go out of."""
        return "cbr0" if self.bridge else self.veth(pod)

    # objects

    def create(self, path: str, body: dict[str, Any]) -> None:
        """POST; deleted on undo."""
        name = body["metadata"]["name"]
        with contextlib.suppress(urllib.error.HTTPError):
            self.lab.api("DELETE", f"{path}/{name}")
        self.lab.api("POST", path, body)
        self._undo.callback(self._delete, f"{path}/{name}")

    def _delete(self, path: str) -> None:
        with contextlib.suppress(urllib.error.HTTPError):
            self.lab.api("DELETE", path)

    def put(self, path: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Reads, changes and writes an object; as it was on undo."""
        before = self.lab.api("GET", path)
        after = json.loads(json.dumps(before))
        change(after)
        self.lab.api("PUT", path, after)

        def back() -> None:
            now = self.lab.api("GET", path)
            before["metadata"]["resourceVersion"] = now["metadata"]["resourceVersion"]
            self.lab.api("PUT", path, before)

        self._undo.callback(back)

    def service(
        self,
        name: str,
        ip: str,
        endpoints: list[tuple[str, int, str, str]],
        *,
        ready: bool = True,
        selector: dict[str, str] | None = None,
        target_port: int | str = 8080,
        node_port: int = 0,
        affinity: bool = False,
        protocol: str = "TCP",
        **spec: Any,
    ) -> None:
        """A Service on port 80 and its EndpointSlice: (address, port, node, pod)."""
        port: dict[str, Any] = {
            "name": "http", "port": 80, "protocol": protocol, "targetPort": target_port,
        }  # fmt: skip
        if node_port:
            port["nodePort"] = node_port
        body: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": "default"},
            "spec": {
                "type": "NodePort" if node_port else "ClusterIP",
                "clusterIP": ip,
                "clusterIPs": [ip],
                "ipFamilies": ["IPv4"],
                "ports": [port],
                "selector": selector or {"app": name},
                "sessionAffinity": "ClientIP" if affinity else "None",
                **spec,
            },
            "status": {"loadBalancer": {}},
        }
        if affinity:
            body["spec"]["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": 10800}}
        self.create("/api/v1/namespaces/default/services", body)
        by_port: dict[int, list[dict[str, Any]]] = {}
        for address, number, node, pod in endpoints:
            by_port.setdefault(number, []).append(
                {
                    "addresses": [address],
                    "conditions": {"ready": ready, "serving": ready, "terminating": False},
                    "nodeName": self.lab.node(node)["name"],
                    "targetRef": {"kind": "Pod", "namespace": "default", "name": pod},
                }
            )
        for count, (number, found) in enumerate(by_port.items()):
            self.create(
                "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices",
                {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "addressType": "IPv4",
                    "metadata": {
                        "name": f"{name}-{count}",
                        "namespace": "default",
                        "labels": {"kubernetes.io/service-name": name},
                    },
                    "ports": [{"name": "http", "port": number, "protocol": protocol}],
                    "endpoints": found,
                },
            )

    def programme(
        self,
        name: str,
        ip: str,
        ends: list[str],
        *,
        node_port: int = 0,
        affinity: bool = False,
        nodes: Any = NODES,
    ) -> None:
        """The rules that kube-proxy makes for `service` (1.36, iptables mode), on each node."""
        port = ServicePort(namespace="default", service=name, port="http")
        chain = service_chain(ChainRole.SERVICE, port)
        comment = f'-m comment --comment "default/{name}:http cluster IP"'
        door = f"{comment} -d {ip}/32 -p tcp -m tcp --dport 80"
        lines = [f"-N {chain}", f"-I KUBE-SERVICES {door} -j {chain}"]
        lines.append(f"-A {chain} {door} ! -s {CLUSTER_CIDR} -j KUBE-MARK-MASQ")
        back = [f"-D KUBE-SERVICES {door} -j {chain}", f"-F {chain}", f"-X {chain}"]
        if node_port:
            outside = service_chain(ChainRole.EXTERNAL, port)
            lines += [f"-N {outside}", f"-A {outside} -j KUBE-MARK-MASQ"]
            lines.append(f"-A {outside} -j {chain}")
            rule = f"KUBE-NODEPORTS -p tcp -m tcp --dport {node_port} -j {outside}"
            lines.append(f"-I {rule}")
            back = [f"-D {rule}", f"-F {outside}", f"-X {outside}", *back]
        for number, end in enumerate(ends):
            sep = endpoint_chain(port, end)
            chance = f"{1 / (len(ends) - number):.10f}"
            pick = f"-m statistic --mode random --probability {chance}"
            pick = pick if number < len(ends) - 1 else ""
            recent = f"-m recent --name {sep} --set " if affinity else ""
            lines.append(f"-N {sep}")
            lines.append(f"-A {sep} -s {end.partition(':')[0]}/32 -j KUBE-MARK-MASQ")
            lines.append(f"-A {sep} {recent}-p tcp -m tcp -j DNAT --to-destination {end}")
            if affinity:
                seconds = "--rcheck --seconds 10800 --reap"
                lines.append(f"-A {chain} -m recent --name {sep} {seconds} -j {sep}")
            lines.append(f"-A {chain} {pick} -j {sep}")
            back += [f"-F {sep}", f"-X {sep}"]
        for node in nodes:
            tool = self.iptables
            self.do(
                f"node/{node}",
                " && ".join(f"{tool} -t nat {line}" for line in lines),
                "; ".join(f"{tool} -t nat {line}" for line in back),
            )

    # gketrace

    def read(self) -> World:
        """What `gketrace check` rests on; read again when an agent was not reached."""
        for _ in range(3):
            with Session(Options(kubeconfig=str(self.lab.kubeconfig), timeout=20)) as session:
                world, _ = read_world(session)
            if len(world.sights) == len(world.nodes):
                break
            time.sleep(0.2)
        return world

    def check(self, alter: Callable[[World], World] | None = None) -> tuple[Finding, ...]:
        """What `gketrace check` finds."""
        world = self.read()
        self.missing = tuple(map(str, world.missing))
        return find(world if alter is None else alter(world))

    # traffic

    def reaches(self, source: str, address: str, port: int, protocol: str = "TCP") -> bool:
        """Whether a real connection gets an answer."""
        result = self.lab.connect(source, address, port, protocol, timeout=0.7)
        return result.kind == "delivered"


@contextlib.contextmanager
def staged(lab: Lab) -> Iterator[Stage]:
    """A stage that is put back at the end."""
    made = Stage(lab)
    try:
        yield made
    finally:
        made.undo()


__all__ += ["staged"]
