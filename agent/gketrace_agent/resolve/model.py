"""Who is meant, and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gketrace.errors import UnavailableError
from gketrace.trace import NetnsKind, NetnsRef
from gketrace_agent.kernel.netns import NetnsHandle

__all__ = ["Container", "Finding", "Journal", "PodRef", "ResolveStep", "ResolvedPod"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PodRef:
    """Names a pod; any of namespace and name, UID, or a container id is enough for a runtime."""

    namespace: str = ""
    name: str = ""
    uid: str = ""
    container_ids: tuple[str, ...] = ()
    """Without the ``containerd://`` scheme."""
    pod_ips: tuple[str, ...] = ()
    host_network: bool = False
    """What the API says; compared with what is found."""
    config_hash: str = ""
    """Annotation kubernetes.io/config.hash: the UID in a static pod's cgroup and sandbox."""

    @property
    def full_name(self) -> str:
        """``namespace/name``; empty when either is not known."""
        return f"{self.namespace}/{self.name}" if self.namespace and self.name else ""

    @property
    def uids(self) -> tuple[str, ...]:
        """The UIDs that the node may know it by."""
        return tuple(dict.fromkeys(uid for uid in (self.uid, self.config_hash) if uid))

    def __str__(self) -> str:
        if self.full_name:
            return f"pod {self.full_name}"
        if self.uid:
            return f"pod with UID {self.uid}"
        if self.container_ids:
            return f"pod of container {self.container_ids[0][:12]}"
        return "pod"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveStep:
    """One thing that was tried."""

    step: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A container of the pod, the sandbox's own (pause) not included."""

    id: str
    name: str = ""
    """Empty: not known, as with the cgroup scan."""
    pid: int = 0
    """Its first process, in the node's PID namespace; 0: not running."""
    state: str = ""
    """``running``, ``exited``, ``created``, ``unknown``."""
    start_time: int = 0
    """Clock ticks after boot, /proc/PID/stat field 22."""
    command: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one way of looking found, the namespace open."""

    namespace: str
    name: str
    uid: str
    handle: NetnsHandle
    sandbox_id: str = ""
    sandbox_pid: int = 0
    """0: none, or not known."""
    containers: tuple[Container, ...] = ()
    runtime_handler: str = ""
    """``gvisor``, ``kata`` …; empty: the usual one, or not known."""
    method: str
    """``cri`` or ``cgroup``."""
    netns_path: str = ""
    """As the runtime names it; empty: by PID only."""
    ips: tuple[str, ...] = ()
    other_sandboxes: int = 0
    said_host: bool = False
    """The runtime or the API says that it uses the host's network."""
    pids: tuple[int, ...] = ()
    """Its processes that were met on the way; with the cgroup scan, all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedPod:
    """The answer.  Holds the namespace open: use it with ``with``, or close ``found.handle``."""

    found: Finding
    node: str
    host_network: bool
    """Its namespace is the node's own."""
    steps: tuple[ResolveStep, ...] = ()

    @property
    def netns(self) -> NetnsRef:
        found = self.found
        inode = found.handle.inode
        if self.host_network:
            return NetnsRef(node=self.node, kind=NetnsKind.HOST, inode=inode)
        pod = f"{found.namespace}/{found.name}" if found.name else found.uid
        return NetnsRef(node=self.node, kind=NetnsKind.POD, inode=inode, pod=pod)

    def __enter__(self) -> ResolvedPod:
        return self

    def __exit__(self, *_: object) -> None:
        self.found.handle.close()


@dataclass(slots=True)
class Journal:
    """The steps of one resolution, in order."""

    steps: list[ResolveStep] = field(default_factory=list)

    def done(self, step: str, detail: str) -> None:
        self.steps.append(ResolveStep(step=step, ok=True, detail=detail))

    def failed(self, step: str, detail: str) -> None:
        self.steps.append(ResolveStep(step=step, ok=False, detail=detail))

    def failures(self) -> str:
        """``runtime: …; cgroup scan: …``, for an error message."""
        return "; ".join(f"{s.step}: {s.detail}" for s in self.steps if not s.ok)

    def agree(self, pod: PodRef, found: Sequence[tuple[str, int]]) -> None:
        """Notes that all of `found`, (by what, namespace inode), are in one namespace.

        Raises `UnavailableError` unless they are: a wrong namespace is worse than none.
        """
        if len({inode for _, inode in found}) > 1:
            parts = ", ".join(f"{by} in {inode}" for by, inode in found)
            raise UnavailableError(f"{pod}: its parts are in different network namespaces: {parts}")
        self.done("verify", f"one namespace {found[0][1]}: {', '.join(by for by, _ in found)}")
