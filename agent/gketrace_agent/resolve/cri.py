"""The container runtime's own answer: CRI v1 over its unix socket.

The verbose ``info`` of a status is JSON that CRI does not specify.  What is read of it, all
optional: ``pid``, ``netNamespaceClosed``, ``runtimeSpec.linux.namespaces`` (containerd
internal/cri/server/sandbox_status.go and container_status.go; CRI-O server/sandbox_status.go).
cri-dockerd sends none.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc

from gketrace.errors import (
    ForbiddenError,
    GketraceError,
    GoneError,
    TimeoutExceeded,
    UnavailableError,
    UnsupportedError,
)
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_proto.cri import api_pb2, api_pb2_grpc

__all__ = [
    "LABEL_NAME",
    "LABEL_NAMESPACE",
    "LABEL_UID",
    "CriClient",
    "CriContainer",
    "CriSandbox",
    "find_sockets",
]

# kubelet pkg/kubelet/types/labels.go
LABEL_NAME: Final = "io.kubernetes.pod.name"
LABEL_NAMESPACE: Final = "io.kubernetes.pod.namespace"
LABEL_UID: Final = "io.kubernetes.pod.uid"

_SOCKETS: Final = (
    "containerd/containerd.sock",
    "crio/crio.sock",
    "cri-dockerd.sock",
    "k3s/containerd/containerd.sock",
)
_TIMEOUT: Final = 2.0
"""Seconds for one call; a healthy runtime answers in milliseconds."""
_STATUS_CALLS: Final = 8
"""Status calls of one pod's containers that run side by side."""
_STATES: Final = {
    api_pb2.CONTAINER_CREATED: "created",
    api_pb2.CONTAINER_RUNNING: "running",
    api_pb2.CONTAINER_EXITED: "exited",
    api_pb2.CONTAINER_UNKNOWN: "unknown",
}

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CriSandbox:
    """A pod sandbox as the runtime describes it."""

    id: str
    namespace: str
    name: str
    uid: str
    attempt: int
    pid: int
    """0: no sandbox process, or the runtime does not say."""
    netns_path: str
    """As in the runtime's mount namespace; empty: hostNetwork, or the runtime does not say."""
    netns_closed: bool
    host_network: bool
    runtime_handler: str
    ips: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CriContainer:
    """A container as the runtime describes it."""

    id: str
    name: str
    state: str
    pid: int
    """0: not running, or the runtime does not say."""


def find_sockets(paths: HostPaths) -> tuple[Path, ...]:
    """The runtime sockets that are there, in the order in which they are tried."""
    return tuple(path for name in _SOCKETS if (path := paths.run / name).is_socket())


class CriClient:
    """Calls one runtime.  The connection is made at the first call and kept; any thread may call.

    Every call raises `UnavailableError` (nobody listens), `TimeoutExceeded`, `UnsupportedError`
    (no CRI v1), `ForbiddenError`, and where an id is given `GoneError` when it is gone.
    """

    def __init__(self, socket: Path) -> None:
        self.endpoint: Final = f"unix://{socket}"
        self._channel = grpc.insecure_channel(
            f"unix:{socket}",
            options=(
                ("grpc.default_authority", "localhost"),
                ("grpc.max_receive_message_length", 16 << 20),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ),
        )
        self._stub = api_pb2_grpc.RuntimeServiceStub(self._channel)
        self._lock = threading.Lock()
        self._version = ""

    def close(self) -> None:
        self._channel.close()

    def version(self, timeout: float | None = None) -> str:
        """``containerd 1.6.20``; asked once, as a new version means a new process and socket."""
        with self._lock:
            if not self._version:
                reply = self._call(
                    self._stub.Version, api_pb2.VersionRequest(version="v1"), timeout
                )
                self._version = f"{reply.runtime_name} {reply.runtime_version}".strip()
            return self._version

    def list_sandboxes(
        self, *, labels: dict[str, str] | None = None, id: str = "", timeout: float | None = None
    ) -> tuple[api_pb2.PodSandbox, ...]:
        """Sandboxes in any state that have all of `labels`."""
        wanted = api_pb2.PodSandboxFilter(id=id, label_selector=labels or {})
        request = api_pb2.ListPodSandboxRequest(filter=wanted)
        return tuple(self._call(self._stub.ListPodSandbox, request, timeout).items)

    def sandbox_of_container(self, container_id: str, timeout: float | None = None) -> str:
        """The id of the sandbox that a container runs in; empty: no such container."""
        request = api_pb2.ListContainersRequest(filter=api_pb2.ContainerFilter(id=container_id))
        found = self._call(self._stub.ListContainers, request, timeout).containers
        return found[0].pod_sandbox_id if found else ""

    def sandbox(self, sandbox_id: str, timeout: float | None = None) -> CriSandbox:
        request = api_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id, verbose=True)
        reply = self._call(self._stub.PodSandboxStatus, request, timeout)
        status, info = reply.status, _info(reply.info)
        network = status.network
        return CriSandbox(
            id=status.id,
            namespace=status.metadata.namespace,
            name=status.metadata.name,
            uid=status.metadata.uid,
            attempt=status.metadata.attempt,
            pid=_pid(info),
            netns_path=_netns_path(info),
            netns_closed=info.get("netNamespaceClosed") is True,
            host_network=status.linux.namespaces.options.network == api_pb2.NODE,
            runtime_handler=status.runtime_handler or str(info.get("runtimeHandler") or ""),
            ips=tuple(ip for ip in (network.ip, *(a.ip for a in network.additional_ips)) if ip),
        )

    def containers(self, sandbox_id: str, timeout: float | None = None) -> tuple[CriContainer, ...]:
        """The sandbox's containers; one that is removed meanwhile is left out."""
        request = api_pb2.ListContainersRequest(
            filter=api_pb2.ContainerFilter(pod_sandbox_id=sandbox_id)
        )
        listed = self._call(self._stub.ListContainers, request, timeout).containers
        if not listed:
            return ()
        with ThreadPoolExecutor(min(len(listed), _STATUS_CALLS), "cri-status") as pool:
            found = pool.map(lambda c: self._container(c, timeout), listed)
            return tuple(container for container in found if container is not None)

    def _container(self, listed: api_pb2.Container, timeout: float | None) -> CriContainer | None:
        request = api_pb2.ContainerStatusRequest(container_id=listed.id, verbose=True)
        try:
            reply = self._call(self._stub.ContainerStatus, request, timeout)
        except GoneError:
            return None
        running = reply.status.state == api_pb2.CONTAINER_RUNNING
        return CriContainer(
            id=listed.id,
            name=listed.metadata.name,
            state=_STATES.get(reply.status.state, "unknown"),
            pid=_pid(_info(reply.info)) if running else 0,
        )

    def _call(self, method: Callable[..., T], request: object, timeout: float | None) -> T:
        limit = _TIMEOUT if timeout is None else max(0.001, min(_TIMEOUT, timeout))
        try:
            return method(request, timeout=limit)
        except grpc.RpcError as error:
            raise self._translated(error, limit) from None

    def _translated(self, error: grpc.RpcError, limit: float) -> GketraceError:
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.NOT_FOUND:
            return GoneError(f"the runtime no longer has it: {details}")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return TimeoutExceeded(f"{self.endpoint} did not answer in {limit:g} s")
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return UnsupportedError(f"{self.endpoint} does not speak CRI v1: {details}")
        if code is grpc.StatusCode.PERMISSION_DENIED:
            return ForbiddenError(f"{self.endpoint} refused: {details}")
        return UnavailableError(f"{self.endpoint}: {code.name.lower()}: {details}")


def _info(info: Any) -> dict[str, Any]:
    """The JSON under the key ``info``; what is not a JSON object counts as nothing said."""
    try:
        found = json.loads(info.get("info", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _pid(info: dict[str, Any]) -> int:
    pid = info.get("pid")
    return pid if isinstance(pid, int) and pid > 0 else 0


def _netns_path(info: dict[str, Any]) -> str:
    spec = info.get("runtimeSpec")
    linux = spec.get("linux") if isinstance(spec, dict) else None
    namespaces: Sequence[Any] = (linux.get("namespaces") or ()) if isinstance(linux, dict) else ()
    for namespace in namespaces:
        if isinstance(namespace, dict) and namespace.get("type") == "network":
            return str(namespace.get("path") or "")
    return ""
