"""Requests to the lab's Kubernetes API with the admin's token, for its knobs under /lab/."""

from __future__ import annotations

import base64
import json
import ssl
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

__all__ = ["api_address", "api_request"]


def _current(kubeconfig: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The cluster and the user of the current context."""
    config = json.loads(kubeconfig.read_text())  # the lab writes it as JSON, which is YAML too
    named = {
        what: {item["name"]: item[what[:-1]] for item in config[what]}
        for what in ("contexts", "clusters", "users")
    }
    context = named["contexts"][config["current-context"]]
    return named["clusters"][context["cluster"]], named["users"][context["user"]]


def api_address(kubeconfig: Path) -> str:
    """HOST:PORT of the API."""
    return str(urlsplit(_current(kubeconfig)[0]["server"]).netloc)


def api_request(kubeconfig: Path, method: str, path: str, body: object = None) -> Any:
    """The decoded answer; raises urllib.error.URLError."""
    cluster, user = _current(kubeconfig)
    authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
    request = urllib.request.Request(
        cluster["server"] + path,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {user['token']}", "Content-Type": "application/json"},
    )
    context = ssl.create_default_context(cadata=authority)
    with urllib.request.urlopen(request, context=context, timeout=10) as answer:
        return json.loads(answer.read())
