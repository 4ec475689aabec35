"""The agent's command line, checked and turned into one `Config`."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

from gketrace.access import CallClass
from gketrace.errors import UsageError
from gketrace_agent.capture_limits import (
    CaptureLimits,
    add_capture_arguments,
    capture_limits,
)
from gketrace_agent.kernel.hostpaths import HostPaths

__all__ = ["Authentication", "Config", "Limits", "Listen", "parse_arguments"]

_SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds its token and the API server's certificate authority."""

_SUN_PATH: Final = 107
"""Bytes of a unix socket's path that the kernel takes (struct sockaddr_un)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """One address to serve on."""

    path: Path | None = None
    """A unix socket."""
    host: str = ""
    port: int = 0
    """TCP; 0: the kernel picks one."""

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix://{self.path}"
        return f"tcp://{self.grpc}"

    @property
    def grpc(self) -> str:
        """As gRPC names it."""
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The server's bounds; a client can only lower them."""

    concurrent_calls: int = 32
    """Calls in progress; one more is refused with RESOURCE_EXHAUSTED."""
    user_calls: int = 24
    """Of one user."""
    follow_calls: int = 24
    """Streams without an end of their own."""
    capture_calls: int = 20
    change_calls: int = 2
    memory_bytes: int = 0
    """Above 90 % of it only quick calls are taken; 0: the cgroup's limit."""
    connections: int = 2048
    """TCP connections at once; each costs about 20 KiB."""
    request_bytes: int = 4 << 20
    reply_bytes: int = 64 << 20
    """Of one message; streams have many."""
    conntrack_entries: int = 4_000_000
    """Sent by one ListConntrack call, which streams them: its memory does not grow with them."""
    stall_seconds: float = 30.0
    """A stream ends when its client takes nothing for so long."""
    call_seconds: float = 60.0
    """The longest that a call may take, whatever deadline its client set."""

    @property
    def classes(self) -> dict[CallClass, int]:
        """Calls at once of each class that has a bound of its own."""
        return {
            CallClass.FOLLOW: self.follow_calls,
            CallClass.CAPTURE: self.capture_calls,
            CallClass.CHANGE: self.change_calls,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Authentication:
    """How callers on TCP show who they are: ServiceAccount tokens, judged by this API server."""

    api_url: str
    ca: Path
    token: Path
    """The agent's own, renewed by the kubelet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All that an agent is told at its start."""

    node: str
    listen: tuple[Listen, ...]
    metrics: Listen | None = None
    """Where /metrics is served; None: nowhere."""
    sample_seconds: float = 15.0
    """The least time between samples of the connection-tracking table for metrics."""
    insecure: bool = False
    """TCP without TLS and without access control was asked for."""
    tls: tuple[Path, Path] | None = None
    """Certificate and key of all TCP listeners."""
    authentication: Authentication | None = None
    """None: whoever reaches a listener may do everything."""
    allow_system_changes: bool = False
    """Calls that change the node are served, to those who may."""
    log_file: Path | None = None
    """None: standard error."""
    log_debug: bool = False
    paths: HostPaths = field(default_factory=HostPaths)
    runtime_sockets: tuple[Path, ...] | None = None
    """None: look at the usual places."""
    limits: Limits = field(default_factory=Limits)
    captures: CaptureLimits = field(default_factory=CaptureLimits)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see {self.prog} --help")


def parse_arguments(arguments: Sequence[str] | None = None) -> Config:
    """The command line → `Config`.  Raises `UsageError`; ``--help`` exits with 0."""
    parser = _Parser(
        prog="gketrace-agent", description="Observes one node and answers gketrace's questions."
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    serve = commands.add_parser("serve", help="serve gRPC until told to stop (SIGTERM, SIGINT)")
    defaults = Limits()
    add = serve.add_argument
    add(
        "--node-name",
        default=os.environ.get("NODE_NAME") or socket.gethostname(),
        metavar="NAME",
        help="this node's Kubernetes name (default: $NODE_NAME, then the host name)",
    )
    add(
        "--listen",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="unix:///PATH or tcp://HOST:PORT; may be given again "
        "(default: unix:///run/gketrace/agent.sock)",
    )
    add(
        "--metrics-listen",
        metavar="ADDRESS",
        help="serve Prometheus metrics at http://HOST:PORT/metrics: tcp://HOST:PORT "
        "(default: do not); counts and Service names only, for whoever reaches the port",
    )
    add(
        "--metrics-sample-seconds",
        type=_positive,
        default=15,
        metavar="N",
        help="the least time between samples of the conntrack table for metrics; a large table is "
        "sampled less often, within 2 %% of one CPU (default: %(default)s)",
    )
    add(
        "--insecure",
        action="store_true",
        help="allow TCP without TLS: whoever reaches the port reads this node's network state",
    )
    add(
        "--tls-cert",
        type=Path,
        metavar="FILE",
        help="certificate chain (PEM) of all TCP listeners; read again when it changes",
    )
    add("--tls-key", type=Path, metavar="FILE", help="its key (PEM)")
    add(
        "--authentication",
        choices=("token", "none"),
        help="who may call over TCP: whoever has a ServiceAccount token for this node and the "
        "roles (token), or everybody (none) (default: token, with --insecure none)",
    )
    add(
        "--kube-api",
        metavar="URL",
        default=_in_cluster_url(),
        help="the API server that judges tokens and permissions (default: the cluster's)",
    )
    add(
        "--kube-ca",
        type=Path,
        default=_SERVICE_ACCOUNT / "ca.crt",
        metavar="FILE",
        help="its certificate authority (default: %(default)s)",
    )
    add(
        "--kube-token",
        type=Path,
        default=_SERVICE_ACCOUNT / "token",
        metavar="FILE",
        help="the agent's own token (default: %(default)s)",
    )
    add(
        "--allow-system-changes",
        action="store_true",
        help="serve the calls that change this node: delete conntrack entries (default: refuse "
        "them, whoever asks)",
    )
    add("--log-file", type=Path, metavar="FILE", help="append the log here, not to stderr")
    add(
        "--log-level",
        choices=("info", "debug"),
        default="info",
        help="debug adds health checks (default: info)",
    )
    add(
        "--runtime-endpoint",
        action="append",
        metavar="ENDPOINT",
        help="container runtime, unix:///PATH, or 'none' for the cgroup scan only; "
        "may be given again (default: the usual sockets of containerd, CRI-O and cri-dockerd)",
    )
    for name in ("proc", "sys", "run"):
        add(
            f"--{name}",
            type=Path,
            default=Path(f"/{name}"),
            metavar="DIR",
            help=f"where the host's /{name} is (default: /{name})",
        )
    add(
        "--max-concurrent-calls",
        type=_positive,
        default=defaults.concurrent_calls,
        metavar="N",
        help="calls in progress (default: %(default)s)",
    )
    for option, value, what in (
        ("user-calls", defaults.user_calls, "calls in progress of one user"),
        ("follow-calls", defaults.follow_calls, "calls that follow something"),
        ("capture-calls", defaults.capture_calls, "captures at once"),
        ("connections", defaults.connections, "TCP connections at once"),
    ):
        add(
            f"--max-{option}",
            type=_positive,
            default=value,
            metavar="N",
            help=f"{what} (default: %(default)s)",
        )
    add(
        "--max-memory-bytes",
        type=_positive,
        default=0,
        metavar="N",
        help="refuse work when the agent uses 90%% of it (default: the cgroup's limit)",
    )
    add(
        "--max-request-bytes",
        type=_positive,
        default=defaults.request_bytes,
        metavar="N",
        help="size of one request (default: %(default)s)",
    )
    add(
        "--max-reply-bytes",
        type=_positive,
        default=defaults.reply_bytes,
        metavar="N",
        help="size of one reply message (default: %(default)s)",
    )
    add(
        "--max-conntrack-entries",
        type=_positive,
        default=defaults.conntrack_entries,
        metavar="N",
        help="entries that one call may list (default: %(default)s)",
    )
    add(
        "--max-stall-seconds",
        type=_positive,
        default=int(defaults.stall_seconds),
        metavar="N",
        help="end a stream whose client takes nothing for so long (default: %(default)s)",
    )
    add(
        "--max-call-seconds",
        type=_positive,
        default=int(defaults.call_seconds),
        metavar="N",
        help="the longest that a call may take (default: %(default)s)",
    )
    add_capture_arguments(add, _positive)
    given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    paths = HostPaths(proc=given.proc, sys=given.sys, run=given.run)
    listen = tuple(_listen(text) for text in given.listen) or (
        Listen(path=Path("/run/gketrace/agent.sock")),
    )
    tls = _tls(given)
    for address in listen:
        if address.path is None and tls is None and not given.insecure:
            raise UsageError(
                f"{address} would be served without TLS and without access control",
                hint="give --tls-cert and --tls-key, use a unix socket, or say --insecure",
            )
    authentication = _authentication(given, tls, listen)
    metrics = None if given.metrics_listen is None else _listen(given.metrics_listen)
    if metrics is not None and metrics.path is not None:
        raise UsageError("metrics are served over TCP", hint="use tcp://HOST:PORT")
    return Config(
        node=given.node_name,
        listen=listen,
        metrics=metrics,
        sample_seconds=float(given.metrics_sample_seconds),
        insecure=given.insecure,
        tls=tls,
        authentication=authentication,
        allow_system_changes=given.allow_system_changes,
        log_file=given.log_file,
        log_debug=given.log_level == "debug",
        paths=paths,
        runtime_sockets=_runtime_sockets(given.runtime_endpoint),
        limits=Limits(
            concurrent_calls=given.max_concurrent_calls,
            user_calls=given.max_user_calls,
            follow_calls=given.max_follow_calls,
            capture_calls=given.max_capture_calls,
            memory_bytes=given.max_memory_bytes,
            connections=given.max_connections,
            request_bytes=given.max_request_bytes,
            reply_bytes=given.max_reply_bytes,
            conntrack_entries=given.max_conntrack_entries,
            stall_seconds=float(given.max_stall_seconds),
            call_seconds=float(given.max_call_seconds),
        ),
        captures=capture_limits(given),
    )


def _tls(given: argparse.Namespace) -> tuple[Path, Path] | None:
    if (given.tls_cert is None) != (given.tls_key is None):
        raise UsageError("--tls-cert and --tls-key belong together")
    if given.tls_cert is None:
        return None
    if given.insecure:
        raise UsageError("--insecure and --tls-cert exclude each other")
    return given.tls_cert, given.tls_key


def _authentication(
    given: argparse.Namespace, tls: object, listen: tuple[Listen, ...]
) -> Authentication | None:
    """A token never comes over a connection that others can read."""
    if given.authentication == "token" and given.insecure:
        raise UsageError("--authentication=token needs TLS: --tls-cert and --tls-key")
    if given.authentication == "none" or tls is None or all(one.path for one in listen):
        return None
    if not given.kube_api:
        raise UsageError(
            "--authentication=token needs an API server, and this is no pod",
            hint="give --kube-api URL, --kube-ca and --kube-token",
        )
    if not given.kube_api.startswith("https://"):
        raise UsageError(f"--kube-api {given.kube_api}: not an https:// URL")
    return Authentication(api_url=given.kube_api, ca=given.kube_ca, token=given.kube_token)


def _in_cluster_url() -> str:
    """The API server as a pod's environment names it; empty: it does not."""
    host = os.environ.get("KUBERNETES_SERVICE_HOST", "")
    port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        return ""
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _listen(text: str) -> Listen:
    scheme, _, rest = text.partition("://")
    if scheme == "unix" and rest.startswith("/"):
        if len(os.fsencode(rest)) > _SUN_PATH:
            raise UsageError(f"{rest} is longer than the {_SUN_PATH} bytes of a unix socket's path")
        return Listen(path=Path(rest))
    host, colon, port = rest.rpartition(":")
    if scheme == "tcp" and colon and host and port.isdigit() and int(port) <= 65535:
        return Listen(host=host.removeprefix("[").removesuffix("]"), port=int(port))
    raise UsageError(f"cannot listen on {text!r}", hint="use unix:///PATH or tcp://HOST:PORT")


def _runtime_sockets(given: list[str] | None) -> tuple[Path, ...] | None:
    if given is None:
        return None
    if given == ["none"]:
        return ()
    for endpoint in given:
        if not endpoint.startswith("unix:///"):
            raise UsageError(f"no such runtime endpoint: {endpoint!r}", hint="use unix:///PATH")
    return tuple(Path(endpoint.removeprefix("unix://")) for endpoint in given)
