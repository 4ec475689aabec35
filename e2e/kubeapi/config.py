"""The server's configuration file.

JSON, with these members (all but ``state_dir`` may be left out):

* ``name``         the cluster's name; names the context in the kubeconfig.
* ``state_dir``    a folder for the kubeconfig; made when it does not exist.
* ``objects_dir``  a folder with pods.json, services.json, ... as ``kubectl get -o json`` prints.
* ``objects``      a list of more objects of any served kind (RBAC, ServiceAccounts, ...).
* ``extra_pods``   a list of more Pods (the agents' own, say). One that exists is replaced.
* ``overrides``    JSON merge patches by ``pods/NAMESPACE/NAME`` or ``nodes/NAME``.
* ``netns``        ``{"nodes": {NAME: {"pid": N}}, "pods": {"NAMESPACE/NAME": {"pid": N}}}``: a
  process (seen from here) in the network namespace of each node and pod, for port-forwards.
* ``listen``       ``127.0.0.1:0``; port 0 picks a free one.
* ``listen_netns`` ``[{"pid": N, "address": "10.43.240.1:443"}]``: more listeners, inside the
  network namespace of a process.
* ``users``        ``{NAME: {"groups": [...], "token": "..."}}``: more users with a static bearer
  token; a token is made up when none is given. Each gets a context ``NAME@CLUSTER``.
* ``sans``         more names and addresses for the server certificate.
* ``version``      the ``gitVersion`` to answer with.
* ``min_token_seconds`` the shortest ServiceAccount token to issue (600, as the real one).
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Config", "ConfigError", "Listener", "parse_address", "parse_config", "read_objects"]


class ConfigError(Exception):
    """The configuration makes no sense; the text says which member and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    address: tuple[str, int]
    pid: int | None = None
    """A process in the network namespace to listen in; None is the server's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    name: str
    state_dir: Path
    objects: tuple[dict[str, Any], ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    node_pids: Mapping[str, int] = field(default_factory=dict)
    pod_pids: Mapping[str, int] = field(default_factory=dict)
    listeners: tuple[Listener, ...]
    users: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sans: tuple[str, ...] = ()
    version: str
    min_token_seconds: int


_MEMBERS = frozenset(
    {
        "extra_pods",
        "listen",
        "listen_netns",
        "min_token_seconds",
        "name",
        "netns",
        "objects",
        "objects_dir",
        "overrides",
        "sans",
        "state_dir",
        "users",
        "version",
    }
)
_FILES = ("pods", "services", "endpoints", "endpointslices", "nodes")


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` with a literal address. Raises: ConfigError."""
    host, _, port = text.rpartition(":")
    try:
        return str(ipaddress.ip_address(host.strip("[]"))), int(port)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not ADDRESS:PORT") from error


def read_objects(folder: Path) -> list[dict[str, Any]]:
    """The objects of the lists in ``folder``. Raises: ConfigError."""
    objects: list[dict[str, Any]] = []
    for stem in _FILES:
        path = folder / f"{stem}.json"
        try:
            document = json.loads(path.read_bytes())
            objects += document["items"]
        except FileNotFoundError as error:
            raise ConfigError(f"objects_dir: {path} does not exist") from error
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"objects_dir: {path} is not a list of objects: {error}") from error
    return objects


def _pids(given: Any, what: str) -> dict[str, int]:
    try:
        return {name: int(entry["pid"]) for name, entry in dict(given or {}).items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"netns.{what}: every entry is NAME: {{'pid': N}}") from error


def parse_config(document: Any) -> Config:
    """Raises: ConfigError."""
    if not isinstance(document, dict):
        raise ConfigError("the configuration is not a JSON object")
    if unknown := sorted(set(document) - _MEMBERS):
        raise ConfigError(f"unknown member {', '.join(unknown)}")
    if not document.get("state_dir"):
        raise ConfigError("state_dir is missing")
    objects: list[dict[str, Any]] = []
    if document.get("objects_dir"):
        objects += read_objects(Path(document["objects_dir"]))
    objects += document.get("objects") or []
    objects += [
        {"kind": "Pod", "apiVersion": "v1", **pod} for pod in document.get("extra_pods") or []
    ]
    netns = document.get("netns") or {}
    listeners = [Listener(address=parse_address(document.get("listen", "127.0.0.1:0")))]
    for entry in document.get("listen_netns") or []:
        listeners.append(Listener(address=parse_address(entry["address"]), pid=int(entry["pid"])))
    return Config(
        name=document.get("name") or "lab",
        state_dir=Path(document["state_dir"]),
        objects=tuple(objects),
        overrides=document.get("overrides") or {},
        node_pids=_pids(netns.get("nodes"), "nodes"),
        pod_pids=_pids(netns.get("pods"), "pods"),
        listeners=tuple(listeners),
        users=document.get("users") or {},
        sans=tuple(document.get("sans") or ()),
        version=document.get("version") or "v1.36.2",
        min_token_seconds=int(document.get("min_token_seconds", 600)),
    )
