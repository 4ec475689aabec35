"""Who is meant, and what was found."""

from __future__ import annotations

from dataclasses import dataclass, field

from gketrace.trace import NetnsKind, NetnsRef
from gketrace_agent.kernel.netns import NetnsHandle

__all__ = ["Container", "Journal", "PodRef", "ResolveStep", "ResolvedPod"]


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
class ResolvedPod:
    """What was found.  Holds the namespace open: use it with ``with``, or close `handle`."""

    namespace: str
    name: str
    uid: str
    node: str
    handle: NetnsHandle
    sandbox_id: str = ""
    sandbox_pid: int = 0
    containers: tuple[Container, ...] = ()
    host_network: bool = False
    runtime_handler: str = ""
    method: str
    """``cri`` or ``cgroup``."""
    steps: tuple[ResolveStep, ...] = ()
    netns_path: str = ""
    ips: tuple[str, ...] = ()
    other_sandboxes: int = 0
    pids: tuple[int, ...] = ()
    """Its processes that were met on the way; with the cgroup scan, all of them."""

    @property
    def netns(self) -> NetnsRef:
        if self.host_network:
            return NetnsRef(node=self.node, kind=NetnsKind.HOST, inode=self.handle.inode)
        pod = f"{self.namespace}/{self.name}" if self.name else self.uid
        return NetnsRef(node=self.node, kind=NetnsKind.POD, inode=self.handle.inode, pod=pod)

    def __enter__(self) -> ResolvedPod:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.close()


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
