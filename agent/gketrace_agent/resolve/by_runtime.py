"""A pod by its container runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from gketrace.errors import GketraceError, GoneError, UnavailableError
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import NetnsHandle, open_path
from gketrace_agent.resolve.cri import (
    LABEL_NAME,
    LABEL_NAMESPACE,
    LABEL_UID,
    CriClient,
    CriContainer,
    CriSandbox,
)
from gketrace_agent.resolve.model import Container, Finding, Journal, PodRef
from gketrace_agent.resolve.process import open_owned, read_process
from gketrace_agent.resolve.scan import CgroupScan
from gketrace_proto.cri import api_pb2

__all__ = ["RuntimeSearch"]


class RuntimeSearch:
    """Asks runtimes.  `scan` is called where a runtime names no process."""

    def __init__(self, paths: HostPaths, scan: Callable[[], CgroupScan]) -> None:
        self._paths = paths
        self._scan = scan

    def find(
        self, clients: tuple[CriClient, ...], pod: PodRef, journal: Journal, timeout: float | None
    ) -> Finding | None:
        """None: no runtime knows the pod, as `journal` then says.  Raises `GoneError` when it
        goes away after it was found, `UnavailableError` when the answers contradict each other."""
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
            chosen = _choose(pod, sandboxes, journal)
            if chosen is None:
                continue
            sandbox = client.sandbox(chosen.id, timeout)
            containers = client.containers(chosen.id, timeout)
            return self._found(pod, sandbox, containers, len(sandboxes) - 1, journal)
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

    def _found(
        self,
        pod: PodRef,
        sandbox: CriSandbox,
        containers: tuple[CriContainer, ...],
        others: int,
        journal: Journal,
    ) -> Finding:
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
        return Finding(
            handle=handle,
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
        scan = self._scan()
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
        """Opens the sandbox's namespace by every name it has and checks that they agree.

        A process counts when its cgroup is the pod's, or where that names no pod (Kata's
        hypervisor), beside the namespace's own path.
        """
        opened: list[tuple[str, NetnsHandle]] = []
        try:
            if sandbox.netns_path:
                path = self._host_path(sandbox.netns_path)
                try:
                    opened.append((str(path), open_path(path)))
                except (GoneError, UnavailableError) as error:
                    journal.failed("namespace path", str(error))
            # What a runtime says may be older than the end of its process, whose PID may be another
            # pod's by now.
            uids = {uid for uid in (sandbox.uid, *pod.uids) if uid}
            pids: list[tuple[str, int, int | None]] = []
            if sandbox.pid:
                pids.append((f"sandbox PID {sandbox.pid}", sandbox.pid, None))
            pids += [(f"{c.name} PID {c.pid}", c.pid, c.start_time) for c in running]
            for by, pid, start_time in pids:
                try:
                    handle, owner = open_owned(self._paths, pid, start_time)
                except GoneError as error:
                    journal.failed("process", str(error))
                    continue
                if owner in uids or (owner == "" and opened):
                    opened.append((by, handle))
                    continue
                handle.close()
                whose = f"pod {owner}" if owner else "no pod, and no namespace path confirms it"
                journal.failed("process", f"{by} is in a cgroup of {whose}")
            if not opened:
                raise GoneError(
                    f"{pod}: nothing of its sandbox {sandbox.id[:12]} is left: "
                    + (journal.failures() or "the runtime names neither path nor process")
                )
            journal.agree(pod, [(by, handle.inode) for by, handle in opened])
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


def _choose(
    pod: PodRef, sandboxes: tuple[api_pb2.PodSandbox, ...], journal: Journal
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


def _static(sandbox: api_pb2.PodSandbox) -> bool:
    """A static pod's sandbox has its configuration's hash as UID, not the mirror pod's."""
    return sandbox.annotations.get("kubernetes.io/config.hash") == sandbox.metadata.uid
