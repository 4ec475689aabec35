"""A pod by its processes' cgroups."""

from __future__ import annotations

from typing import Final

from gketrace.errors import GoneError, UnavailableError
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import open_pid
from gketrace_agent.resolve.model import Container, Finding, Journal, PodRef
from gketrace_agent.resolve.process import Process, read_process
from gketrace_agent.resolve.scan import CgroupScan, Member

__all__ = ["find_by_cgroup"]

_PAUSE: Final = "pause"
_GVISOR: Final = "gvisor"


def find_by_cgroup(
    paths: HostPaths, pod: PodRef, journal: Journal, seen: CgroupScan
) -> Finding | None:
    """None: no process is in the pod's cgroup, as `journal` then says.

    Raises `UnavailableError` when what was found contradicts itself, `GoneError` when it goes away.
    """
    if not pod.uids and not pod.container_ids:
        journal.failed("cgroup scan", "cgroups name pods by UID or container id, none given")
        return None
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
        static = "; a static pod's cgroup carries its configuration hash"
        journal.failed(
            "cgroup scan",
            f"{what}, among {seen.processes} processes of {len(seen.uids)} pods and the node"
            + ("" if pod.config_hash or by_container else static),
        )
        return None
    return _from_members(paths, pod, next(iter(uids)), seen, journal)


def _from_members(
    paths: HostPaths, pod: PodRef, uid: str, seen: CgroupScan, journal: Journal
) -> Finding | None:
    members = seen.first_processes(seen.of_pod((uid,)))
    alive = [(m, p) for m in members if (p := _alive(paths, m)) is not None]
    if not alive:
        journal.failed("cgroup scan", f"pod {uid} has no container with a living process")
        return None
    layout = alive[0][0].owner
    journal.done(
        "cgroup scan",
        f"pod {uid}: {len(alive)} containers with processes, "
        f"{layout.driver} names{f' of {layout.runtime}' if layout.runtime else ''}",
    )
    journal.agree(pod, [(f"{p.command} PID {p.pid}", p.netns_inode) for _, p in alive])
    sandbox = next(((m, p) for m, p in alive if p.command == _PAUSE), None)
    member, process = sandbox or alive[0]
    handle = open_pid(paths, process.pid, starttime=process.start_time)
    if handle.inode != process.netns_inode:
        handle.close()
        raise GoneError(f"{pod}: PID {process.pid} changed its namespace meanwhile")
    gvisor = any(p.command == "runsc-sandbox" for _, p in alive)
    return Finding(
        handle=handle,
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


def _alive(paths: HostPaths, member: Member) -> Process | None:
    try:
        process = read_process(paths, member.pid)
    except GoneError:
        return None
    return process if process.start_time == member.start_time else None
