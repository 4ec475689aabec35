"""`Resolver`: from a pod's name to its open network namespace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from gketrace.errors import (
    GketraceError,
    GoneError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import NetnsHandle, open_path, open_pid
from gketrace_agent.resolve.cri import (
    LABEL_NAME,
    LABEL_NAMESPACE,
    LABEL_UID,
    CriClient,
    CriContainer,
    CriSandbox,
    find_sockets,
)
from gketrace_agent.resolve.host import open_host_netns
from gketrace_agent.resolve.model import Container, Journal, PodRef, ResolvedPod
from gketrace_agent.resolve.process import Process, read_process
from gketrace_agent.resolve.scan import CgroupScan, Member, scan_cgroups
from gketrace_proto.cri import api_pb2

__all__ = ["Resolver"]

_PAUSE: Final = "pause"
_GVISOR: Final = "gvisor"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A sandbox's namespace by one of its names: a path or a process."""

    by: str
    inode: int


class Resolver:
    """Resolves pods of one node.  Any thread may call."""

    def __init__(
        self, paths: HostPaths, node: str, *, runtime_sockets: tuple[Path, ...] | None = None
    ) -> None:
        """`runtime_sockets`: None looks at the usual places at each call; empty: no runtime."""
        self._paths = paths
        self._node = node
        self._sockets = runtime_sockets
        self._clients: dict[Path, CriClient] = {}

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def runtimes(self) -> tuple[CriClient, ...]:
        """The runtimes to ask, in order."""
        sockets = find_sockets(self._paths) if self._sockets is None else self._sockets
        for socket in sockets:
            if socket not in self._clients:
                # Two threads may make one each; the loser's idle channel is closed when collected.
                self._clients.setdefault(socket, CriClient(socket))
        return tuple(self._clients[socket] for socket in sockets)

    def scan(self) -> CgroupScan:
        """One look at all processes, to be shared by the resolutions of one call."""
        return scan_cgroups(self._paths)

    def host_netns(self) -> NetnsHandle:
        """The node's own network namespace; the caller closes it."""
        return open_host_netns(self._paths)

    def resolve(
        self,
        pod: PodRef,
        *,
        timeout: float | None = None,
        scan: CgroupScan | None = None,
        cgroup_first: bool = False,
    ) -> ResolvedPod:
        """Finds `pod` and opens its network namespace; the caller closes it.

        `timeout` bounds each call to the runtime, in seconds.  `cgroup_first`: the runtime is only
        asked when the cgroups do not tell.  Raises `NotFoundError` with all that was tried,
        `GoneError` when it goes away meanwhile, `UnavailableError` when what was found
        contradicts itself, `ForbiddenError` and `UsageError`.
        """
        if not (pod.full_name or pod.uids or pod.container_ids):
            raise UsageError("a pod is named by namespace and name, by UID, or by a container id")
        journal = Journal()
        if cgroup_first:
            found = self._by_cgroup(pod, journal, scan) or self._by_runtime(pod, journal, timeout)
        else:
            found = self._by_runtime(pod, journal, timeout) or self._by_cgroup(pod, journal, scan)
        if found is None:
            raise NotFoundError(f"{pod} is not on node {self._node}: {journal.failures()}")
        return found

    # --- by the runtime ---------------------------------------------------------------------

    def _by_runtime(
        self, pod: PodRef, journal: Journal, timeout: float | None
    ) -> ResolvedPod | None:
        clients = self.runtimes()
        if not clients:
            tried = "no socket configured" if self._sockets is not None else "no socket found"
            journal.failed("runtime", f"{tried} (containerd, CRI-O, cri-dockerd)")
        for client in clients:
            try:
                version = client.version(timeout)
                journal.done("runtime", f"{version} at {client.endpoint}")
                sandboxes = self._sandboxes(client, pod, timeout)
            except GoneError as error:
                journal.failed("sandbox", str(error))
                continue
            except GketraceError as error:
                journal.failed("runtime", str(error))
                continue
            chosen = self._choose(pod, sandboxes, journal)
            if chosen is None:
                continue
            sandbox = client.sandbox(chosen.id, timeout)
            containers = client.containers(chosen.id, timeout)
            return self._from_runtime(pod, sandbox, containers, len(sandboxes) - 1, journal)
        return None

    def _sandboxes(
        self, client: CriClient, pod: PodRef, timeout: float | None
    ) -> tuple[api_pb2.PodSandbox, ...]:
        if pod.full_name:
            labels = {LABEL_NAMESPACE: pod.namespace, LABEL_NAME: pod.name}
            return client.list_sandboxes(labels=labels, timeout=timeout)
        for uid in pod.uids:
            if found := client.list_sandboxes(labels={LABEL_UID: uid}, timeout=timeout):
                return found
        for container_id in pod.container_ids:
            if sandbox_id := client.sandbox_of_container(container_id, timeout):
                return client.list_sandboxes(id=sandbox_id, timeout=timeout)
        return ()

    def _choose(
        self, pod: PodRef, sandboxes: tuple[api_pb2.PodSandbox, ...], journal: Journal
    ) -> api_pb2.PodSandbox | None:
        """The ready sandbox of the latest attempt, of the pod with the right UID."""
        if not sandboxes:
            journal.failed("sandbox", f"the runtime has no sandbox of {pod}")
            return None
        same = [s for s in sandboxes if not pod.uids or s.metadata.uid in pod.uids or _static(s)]
        if not same:
            others = ", ".join(sorted({s.metadata.uid for s in sandboxes}))
            journal.failed(
                "sandbox",
                f"the runtime has {pod} with UID {others}, not {pod.uid}: replaced",
            )
            return None
        ready = [s for s in same if s.state == api_pb2.SANDBOX_READY]
        if not ready:
            journal.failed("sandbox", f"{len(same)} of {pod}, none ready: it is starting or over")
            return None
        chosen = max(ready, key=lambda s: (s.metadata.attempt, s.created_at))
        rest = len(sandboxes) - 1
        journal.done(
            "sandbox",
            f"{chosen.id[:12]} ready, attempt {chosen.metadata.attempt}"
            + (f"; {rest} other" if rest else ""),
        )
        return chosen

    def _from_runtime(
        self,
        pod: PodRef,
        sandbox: CriSandbox,
        containers: tuple[CriContainer, ...],
        others: int,
        journal: Journal,
    ) -> ResolvedPod:
        if sandbox.netns_closed:
            raise GoneError(f"{pod}: the runtime has closed its network namespace")
        listed = tuple(self._described(container) for container in containers)
        running = [c for c in listed if c.pid]
        journal.done(
            "containers",
            f"{len(listed)}, running: "
            + (", ".join(f"{c.name} PID {c.pid}" for c in running) or "none"),
        )
        if not sandbox.pid and not running and not sandbox.netns_path:
            # cri-dockerd says neither PID nor path: the cgroups of the container ids do.
            listed = self._pids_by_cgroup(listed, journal)
            running = [c for c in listed if c.pid]
        handle = self._open(pod, sandbox, running, journal)
        return self._finish(
            pod,
            handle,
            journal,
            namespace=sandbox.namespace,
            name=sandbox.name,
            uid=sandbox.uid,
            sandbox_id=sandbox.id,
            sandbox_pid=sandbox.pid,
            containers=listed,
            runtime_handler=sandbox.runtime_handler,
            method="cri",
            netns_path=sandbox.netns_path,
            ips=sandbox.ips,
            other_sandboxes=others,
            said_host=sandbox.host_network,
            pids=tuple(pid for pid in (sandbox.pid, *(c.pid for c in listed)) if pid),
        )

    def _described(self, container: CriContainer) -> Container:
        """With start time and command; a process that has ended meanwhile counts as not running."""
        pid, start_time, command = container.pid, 0, ""
        if pid:
            try:
                process = read_process(self._paths, pid)
                start_time, command = process.start_time, process.command
            except GoneError:
                pid = 0
        return Container(
            id=container.id,
            name=container.name,
            pid=pid,
            state=container.state if pid or container.state != "running" else "exited",
            start_time=start_time,
            command=command,
        )

    def _pids_by_cgroup(
        self, containers: tuple[Container, ...], journal: Journal
    ) -> tuple[Container, ...]:
        scan = self.scan()
        first = {m.owner.container_id: m for m in scan.first_processes(scan.members)}
        journal.done("cgroup scan", "the runtime names no process; looked up by container id")
        return tuple(
            Container(
                id=c.id,
                name=c.name,
                pid=first[c.id].pid,
                state=c.state,
                start_time=first[c.id].start_time,
                command=read_process(self._paths, first[c.id].pid).command,
            )
            if c.id in first
            else c
            for c in containers
        )

    def _open(
        self, pod: PodRef, sandbox: CriSandbox, running: list[Container], journal: Journal
    ) -> NetnsHandle:
        """Opens the sandbox's namespace by every name it has and checks that they agree."""
        opened: list[tuple[str, NetnsHandle]] = []
        try:
            if sandbox.netns_path:
                path = self._host_path(sandbox.netns_path)
                try:
                    opened.append((str(path), open_path(path)))
                except (GoneError, UnavailableError) as error:
                    journal.failed("namespace path", str(error))
            pids = [(f"sandbox PID {sandbox.pid}", sandbox.pid, None)] if sandbox.pid else []
            pids += [(f"{c.name} PID {c.pid}", c.pid, c.start_time) for c in running]
            for by, pid, start_time in pids:
                try:
                    opened.append((by, open_pid(self._paths, pid, starttime=start_time)))
                except GoneError as error:
                    journal.failed("process", str(error))
            if not opened:
                raise GoneError(
                    f"{pod}: nothing of its sandbox {sandbox.id[:12]} is left: "
                    + (journal.failures() or "the runtime names neither path nor process")
                )
            _check_agreement(pod, [_Found(by=by, inode=h.inode) for by, h in opened], journal)
            return opened.pop(0)[1]
        finally:
            for _, handle in opened:
                handle.close()

    def _host_path(self, path: str) -> Path:
        """A path of the host under /run or /proc, as this process sees it."""
        pure = PurePosixPath(path)
        for prefix, here in (
            ("/var/run", self._paths.run),
            ("/run", self._paths.run),
            ("/proc", self._paths.proc),
        ):
            if pure.is_relative_to(prefix):
                return here / pure.relative_to(prefix)
        return Path(path)

    # --- by cgroups -------------------------------------------------------------------------

    def _by_cgroup(
        self, pod: PodRef, journal: Journal, scan: CgroupScan | None
    ) -> ResolvedPod | None:
        if not pod.uids and not pod.container_ids:
            journal.failed("cgroup scan", "cgroups name pods by UID or container id, none given")
            return None
        seen = scan or self.scan()
        uids = set(pod.uids) & seen.uids
        by_container = seen.uids_of_containers(pod.container_ids)
        if uids and by_container and not by_container <= uids:
            raise UnavailableError(
                f"{pod}: its UID and its container ids are in different pods' cgroups: "
                + ", ".join(sorted(uids | by_container))
            )
        uids |= by_container
        if len(uids) != 1:
            what = "more than one pod's cgroups match" if uids else "no process in its cgroup"
            static = (
                ""
                if pod.config_hash or by_container
                else ("; a static pod's cgroup carries its configuration hash")
            )
            journal.failed(
                "cgroup scan",
                f"{what}, among {seen.processes} processes of {len(seen.uids)} pods and the node{static}",
            )
            return None
        return self._from_members(pod, next(iter(uids)), seen, journal)

    def _from_members(
        self, pod: PodRef, uid: str, seen: CgroupScan, journal: Journal
    ) -> ResolvedPod | None:
        members = seen.first_processes(seen.of_pod((uid,)))
        alive = [(m, p) for m in members if (p := self._alive(m)) is not None]
        if not alive:
            journal.failed("cgroup scan", f"pod {uid} has no container with a living process")
            return None
        layout = alive[0][0].owner
        journal.done(
            "cgroup scan",
            f"pod {uid}: {len(alive)} containers with processes, "
            f"{layout.driver} names{f' of {layout.runtime}' if layout.runtime else ''}",
        )
        _check_agreement(
            pod,
            [_Found(by=f"{p.command} PID {p.pid}", inode=p.netns_inode) for _, p in alive],
            journal,
        )
        sandbox = next(((m, p) for m, p in alive if p.command == _PAUSE), None)
        member, process = sandbox or alive[0]
        handle = open_pid(self._paths, process.pid, starttime=process.start_time)
        if handle.inode != process.netns_inode:
            handle.close()
            raise GoneError(f"{pod}: PID {process.pid} changed its namespace meanwhile")
        gvisor = any(p.command == "runsc-sandbox" for _, p in alive)
        return self._finish(
            pod,
            handle,
            journal,
            namespace=pod.namespace,
            name=pod.name,
            uid=pod.uid or uid,
            sandbox_id=member.owner.container_id if sandbox else "",
            sandbox_pid=process.pid if sandbox else 0,
            containers=tuple(
                Container(
                    id=m.owner.container_id,
                    pid=p.pid,
                    state="running",
                    start_time=p.start_time,
                    command=p.command,
                )
                for m, p in alive
                if sandbox is None or m is not sandbox[0]
            ),
            runtime_handler=_GVISOR if gvisor else "",
            method="cgroup",
            netns_path="",
            ips=(),
            other_sandboxes=0,
            said_host=pod.host_network,
            pids=tuple(m.pid for m in seen.of_pod((uid,)) if m.owner.container_id),
        )

    def _alive(self, member: Member) -> Process | None:
        try:
            process = read_process(self._paths, member.pid)
        except GoneError:
            return None
        return process if process.start_time == member.start_time else None

    # --- either way -------------------------------------------------------------------------

    def _finish(
        self,
        pod: PodRef,
        handle: NetnsHandle,
        journal: Journal,
        *,
        namespace: str,
        name: str,
        uid: str,
        sandbox_id: str,
        sandbox_pid: int,
        containers: tuple[Container, ...],
        runtime_handler: str,
        method: str,
        netns_path: str,
        ips: tuple[str, ...],
        other_sandboxes: int,
        said_host: bool,
        pids: tuple[int, ...],
    ) -> ResolvedPod:
        try:
            with self.host_netns() as host_handle:
                host_inode = host_handle.inode
        except GketraceError:
            handle.close()
            raise
        host = handle.inode == host_inode
        said = said_host or pod.host_network
        detail = (
            f"{handle.inode} is the node's own: hostNetwork"
            if host
            else f"{handle.inode}, not the node's own {host_inode}"
        )
        if said and not host:
            journal.failed("host network", f"said to be hostNetwork, but its namespace is {detail}")
        else:
            journal.done("host network" if host else "namespace", detail)
        return ResolvedPod(
            namespace=namespace,
            name=name,
            uid=uid,
            node=self._node,
            handle=handle,
            sandbox_id=sandbox_id,
            sandbox_pid=sandbox_pid,
            containers=containers,
            host_network=host,
            runtime_handler=runtime_handler,
            method=method,
            steps=tuple(journal.steps),
            netns_path=netns_path,
            ips=ips,
            other_sandboxes=other_sandboxes,
            pids=pids,
        )


def _static(sandbox: api_pb2.PodSandbox) -> bool:
    """A static pod's sandbox has its configuration's hash as UID, not the mirror pod's."""
    return sandbox.annotations.get("kubernetes.io/config.hash") == sandbox.metadata.uid


def _check_agreement(pod: PodRef, found: Iterable[_Found], journal: Journal) -> None:
    """Raises `UnavailableError` unless all are in one namespace: a wrong one is worse than none."""
    every = tuple(found)
    by = ", ".join(f"{f.by} in {f.inode}" for f in every)
    if len({f.inode for f in every}) > 1:
        raise UnavailableError(f"{pod}: its parts are in different network namespaces: {by}")
    journal.done("verify", f"one namespace {every[0].inode}: {', '.join(f.by for f in every)}")
