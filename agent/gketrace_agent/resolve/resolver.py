"""`Resolver`: from a pod's name to its open network namespace."""

from __future__ import annotations

from pathlib import Path

from gketrace.errors import GketraceError, NotFoundError, UnavailableError, UsageError
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import NetnsHandle
from gketrace_agent.resolve.by_cgroup import find_by_cgroup
from gketrace_agent.resolve.by_runtime import RuntimeSearch
from gketrace_agent.resolve.cri import CriClient, find_sockets
from gketrace_agent.resolve.host import open_host_netns
from gketrace_agent.resolve.model import Finding, Journal, PodRef, ResolvedPod
from gketrace_agent.resolve.scan import CgroupScan, scan_cgroups

__all__ = ["Resolver"]


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
        return self._checked(pod, found, journal)

    def _by_runtime(self, pod: PodRef, journal: Journal, timeout: float | None) -> Finding | None:
        clients = self.runtimes()
        if not clients:
            tried = "no socket configured" if self._sockets is not None else "no socket found"
            journal.failed("runtime", f"{tried} (containerd, CRI-O, cri-dockerd)")
        return RuntimeSearch(self._paths, self.scan).find(clients, pod, journal, timeout)

    def _by_cgroup(self, pod: PodRef, journal: Journal, scan: CgroupScan | None) -> Finding | None:
        if not pod.uids and not pod.container_ids:
            journal.failed("cgroup scan", "cgroups name pods by UID or container id, none given")
            return None
        return find_by_cgroup(self._paths, pod, journal, scan or self.scan())

    def _checked(self, pod: PodRef, found: Finding, journal: Journal) -> ResolvedPod:
        """With the question answered whether its network is the node's own."""
        try:
            with self.host_netns() as host_handle:
                host_inode = host_handle.inode
        except GketraceError:
            found.handle.close()
            raise
        inode = found.handle.inode
        host = inode == host_inode
        if host and found.method == "cri" and not (found.said_host or pod.host_network):
            found.handle.close()
            raise UnavailableError(
                f"{pod}: found in the node's own network namespace, and its runtime says that it "
                "has one of its own"
            )
        if host:
            journal.done("host network", f"{inode} is the node's own: hostNetwork")
        elif found.said_host or pod.host_network:
            journal.failed(
                "host network",
                f"said to be hostNetwork, but its namespace is {inode}, not the node's own "
                f"{host_inode}",
            )
        else:
            journal.done("namespace", f"{inode}, not the node's own {host_inode}")
        return ResolvedPod(
            found=found, node=self._node, host_network=host, steps=tuple(journal.steps)
        )
