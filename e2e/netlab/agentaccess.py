"""What the lab's agents need to know who calls, as `gketrace install` gives it to a cluster's.

Certificate, key, the API's certificate authority and each agent's token are files in the lab's
folder, which all nodes see.  The roles are deploy/rbac.yaml's; the default user, gketrace-user, has
them all, so that everything can be tried out.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import yaml

from e2e.netlab.apiserver import api_request
from e2e.netlab.world import AGENT_NAMESPACE
from gketrace.access import CA_CONFIGMAP, CA_KEY, server_name
from gketrace_cli.certificates import issue

__all__ = ["API_INSIDE", "AgentFiles", "access_objects"]

API_INSIDE = "127.0.0.1:6443"
"""The Kubernetes API in each node, whatever port it has outside."""
_RBAC = Path(__file__).parents[2] / "deploy/rbac.yaml"
_ROLES = ("gketrace-viewer", "gketrace-capturer", "gketrace-node-admin")
_DAYS = 30


class AgentFiles:
    """In `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certificate = folder / "tls.crt"
        self.key = folder / "tls.key"
        self.authority = folder / "agents-ca.crt"
        self.kube_ca = folder / "kube-ca.crt"
        self.token = folder / "token"

    def issue(self) -> None:
        """A certificate for the agents, before they start."""
        self.folder.mkdir(exist_ok=True, mode=0o700)
        issued = issue([server_name(AGENT_NAMESPACE)])
        self.authority.write_text(issued.authority)
        self.certificate.write_text(issued.certificate)
        self.key.write_text(issued.key)
        self.key.chmod(0o600)

    def connect(self, kubeconfig: Path) -> None:
        """The agents' way to the API, once that serves.  They look when they are first asked."""
        cluster = json.loads(kubeconfig.read_text())["clusters"][0]["cluster"]
        self.kube_ca.write_bytes(base64.b64decode(cluster["certificate-authority-data"]))
        path = f"/api/v1/namespaces/{AGENT_NAMESPACE}/serviceaccounts/gketrace-agent/token"
        spec = {"expirationSeconds": _DAYS * 86400}
        made = api_request(kubeconfig, "POST", path, {"spec": spec})
        self.token.write_text(made["status"]["token"])
        self.token.chmod(0o600)

    def arguments(self) -> list[str]:
        """Of ``gketrace-agent serve``."""
        return [
            f"--tls-cert={self.certificate}",
            f"--tls-key={self.key}",
            f"--kube-api=https://{API_INSIDE}",
            f"--kube-ca={self.kube_ca}",
            f"--kube-token={self.token}",
        ]


def access_objects(files: AgentFiles) -> list[dict[str, Any]]:
    """ServiceAccounts, roles, bindings and the agents' certificate authority."""
    objects: list[dict[str, Any]] = [one for one in yaml.safe_load_all(_RBAC.read_text()) if one]
    objects.append(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": CA_CONFIGMAP, "namespace": AGENT_NAMESPACE},
            "data": {CA_KEY: files.authority.read_text()},
        }
    )
    for role in _ROLES:
        objects.append(
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "ClusterRoleBinding",
                "metadata": {"name": f"lab-{role}"},
                "roleRef": {
                    "apiGroup": "rbac.authorization.k8s.io",
                    "kind": "ClusterRole",
                    "name": role,
                },
                "subjects": [
                    {
                        "kind": "ServiceAccount",
                        "name": "gketrace-user",
                        "namespace": AGENT_NAMESPACE,
                    }
                ],
            }
        )
    return objects
