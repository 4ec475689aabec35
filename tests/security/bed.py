"""An API server with the roles of deploy/, an agent that asks it, and callers of every kind."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import yaml

from e2e.kubeapi.harness import KubeApi, running_server, until
from gketrace.access import AGENT_NAMESPACE, NAMESPACES_HEADER, audience, server_name
from gketrace_agent.config import Authentication, Config, Limits, Listen
from gketrace_agent.server import AgentServer
from gketrace_cli.certificates import Issued, issue
from gketrace_proto.v1alpha1.agent_pb2_grpc import AgentStub

__all__ = ["NODE", "OTHER_NODE", "Bed", "agent_bed", "agent_process_bed", "binding"]

RBAC = Path(__file__).parents[2] / "deploy/rbac.yaml"
NODE, OTHER_NODE = "node-a", "node-b"
_GROUP = "rbac.authorization.k8s.io"


def binding(role: str, account: str, namespace: str = "") -> dict[str, Any]:
    """A RoleBinding in `namespace`, or a ClusterRoleBinding; `account` is NS/NAME."""
    where, name = account.split("/")
    metadata = {"name": f"{name}-{role}"} | ({"namespace": namespace} if namespace else {})
    return {
        "apiVersion": f"{_GROUP}/v1",
        "kind": "RoleBinding" if namespace else "ClusterRoleBinding",
        "metadata": metadata,
        "roleRef": {"apiGroup": _GROUP, "kind": "ClusterRole", "name": role},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": where}],
    }


def _account(text: str) -> dict[str, Any]:
    namespace, name = text.split("/")
    metadata = {"namespace": namespace, "name": name}
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}


def pod(namespace: str, name: str, ip: str, node: str = NODE, **spec: Any) -> dict[str, Any]:
    """A running pod's object."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {"nodeName": node, "containers": [{"name": "app", "image": "app"}], **spec},
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]},
    }


def objects() -> list[dict[str, Any]]:
    """Roles, accounts with each of them, two nodes, and a pod in each of two namespaces."""
    found = [one for one in yaml.safe_load_all(RBAC.read_text()) if one]
    found += [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        for name in (AGENT_NAMESPACE, "default", "shop")
    ]
    found += [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name},
            "status": {"addresses": [{"type": "InternalIP", "address": address}]},
        }
        for name, address in ((NODE, "10.142.0.6"), (OTHER_NODE, "10.142.0.7"))
    ]
    names = ("default/nobody", "default/viewer", "default/capturer", "default/admin", "shop/tenant")
    found += [_account(name) for name in names]
    found += [
        binding("gketrace-viewer", "default/viewer"),
        binding("gketrace-capturer", "default/capturer"),
        binding("gketrace-node-admin", "default/admin"),
        binding("gketrace-viewer", "shop/tenant", "shop"),
        pod("default", "web", "10.40.0.10"),
        pod("shop", "till", "10.40.0.20"),
        pod("shop", "on-node", "10.142.0.6", hostNetwork=True),
    ]
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Bed:
    """What a test drives."""

    api: KubeApi
    port: int
    issued: Issued
    folder: Path
    server: AgentServer | None = None
    """The agent in this process; None: it is one of its own, `pid`."""
    metrics: int = 0
    """The port of its metrics; 0: none are served."""
    pid: int = field(default_factory=os.getpid)

    def token(self, account: str, *, node: str = NODE, seconds: int = 600, **spec: Any) -> str:
        """A token of ServiceAccount NS/NAME for the node's agent."""
        namespace, name = account.split("/")
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        spec = {"audiences": [audience(node)], "expirationSeconds": seconds, **spec}
        status, made = self.api.call("POST", path, {"spec": spec})
        assert status == 201, made
        return str(made["status"]["token"])

    def channel(self, ca: str = "", name: str = "") -> grpc.Channel:
        secure = grpc.ssl_channel_credentials((ca or self.issued.authority).encode())
        override = ("grpc.ssl_target_name_override", name or server_name(AGENT_NAMESPACE))
        options = (override, ("grpc.use_local_subchannel_pool", 1))
        return grpc.secure_channel(f"127.0.0.1:{self.port}", secure, options=options)

    def stub(self) -> AgentStub:
        return AgentStub(self.channel())


def metadata(token: str | None, namespaces: str = "") -> tuple[tuple[str, str], ...]:
    """What goes with a call."""
    found = () if token is None else (("authorization", f"Bearer {token}"),)
    return found + (((NAMESPACES_HEADER, namespaces),) if namespaces else ())


@contextmanager
def _prepared(folder: Path) -> Iterator[tuple[KubeApi, Issued]]:
    """An API server, and in `folder` what an agent is given: certificate, authority, token."""
    with running_server(folder / "api", name="sec", objects=objects(), min_token_seconds=1) as api:
        issued = issue([server_name(AGENT_NAMESPACE)])
        files = {
            "tls.crt": issued.certificate,
            "tls.key": issued.key,
            "kube-ca.crt": _kube_ca(api),
        }
        for name, text in files.items():
            (folder / name).write_text(text)
        made = api.call(
            "POST",
            f"/api/v1/namespaces/{AGENT_NAMESPACE}/serviceaccounts/gketrace-agent/token",
            {"spec": {}},
        )[1]
        (folder / "token").write_text(made["status"]["token"])
        yield api, issued


@contextmanager
def agent_bed(folder: Path, limits: Limits | None = None) -> Iterator[Bed]:
    """Everything running, the agent in this process; stopped at the end."""
    with ExitStack() as stack:
        api, issued = stack.enter_context(_prepared(folder))
        config = Config(
            node=NODE,
            listen=(Listen(path=folder / "agent.sock"), Listen(host="127.0.0.1", port=0)),
            tls=(folder / "tls.crt", folder / "tls.key"),
            authentication=Authentication(
                api_url=api.url, ca=folder / "kube-ca.crt", token=folder / "token"
            ),
            runtime_sockets=(),
            limits=limits or Limits(),
        )
        server = AgentServer(config)
        bound = server.start()
        stack.callback(server.stop, 0)
        yield Bed(api=api, server=server, port=bound[1].port, issued=issued, folder=folder)


@contextmanager
def agent_process_bed(folder: Path, *options: str) -> Iterator[Bed]:
    """As `agent_bed`, with the agent as a process of its own; `options` are its.  It also serves
    metrics, at `Bed.metrics`.  What it logs is in `folder`/agent.log."""
    with ExitStack() as stack:
        api, issued = stack.enter_context(_prepared(folder))
        log = folder / "agent.log"
        process = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "gketrace-agent"),
                "serve",
                f"--node-name={NODE}",
                f"--listen=unix://{folder / 'agent.sock'}",
                "--listen=tcp://127.0.0.1:0",
                "--metrics-listen=tcp://127.0.0.1:0",
                f"--tls-cert={folder / 'tls.crt'}",
                f"--tls-key={folder / 'tls.key'}",
                f"--kube-api={api.url}",
                f"--kube-ca={folder / 'kube-ca.crt'}",
                f"--kube-token={folder / 'token'}",
                "--runtime-endpoint=none",
                f"--log-file={log}",
                *options,
            ]
        )
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        said = until(lambda: log.exists() and _serving(log), seconds=60)
        yield Bed(
            api=api,
            port=_port(said, "listening"),
            metrics=_port(said, "metrics"),
            pid=process.pid,
            issued=issued,
            folder=folder,
        )


def _serving(log: Path) -> list[dict[str, Any]]:
    """What it has said, once it serves."""
    said = [json.loads(line) for line in log.read_text().split("\n")[:-1]]
    return said if any(one["msg"] == "serving" for one in said) else []


def _port(said: list[dict[str, Any]], message: str) -> int:
    """The TCP port that it tells of with `message`."""
    addresses = [one["address"] for one in said if one["msg"] == message]
    return next(int(one.rpartition(":")[2]) for one in addresses if one.startswith("tcp:"))


def _kube_ca(api: KubeApi) -> str:
    cluster = json.loads(api.kubeconfig.read_text())["clusters"][0]["cluster"]
    return base64.b64decode(cluster["certificate-authority-data"]).decode()
