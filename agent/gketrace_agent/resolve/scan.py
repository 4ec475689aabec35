"""All processes of the node that belong to pods, by their cgroups."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from gketrace.errors import GoneError
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import process_starttime
from gketrace_agent.resolve.cgroup import CgroupOwner, parse_cgroup_file
from gketrace_agent.resolve.process import read_cgroup

__all__ = ["CgroupScan", "Member", "scan_cgroups"]

_GOFER = b"runsc-gofer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A process found in a pod's cgroup."""

    pid: int
    start_time: int
    owner: CgroupOwner


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupScan:
    """One look at all processes."""

    processes: int
    """How many were looked at."""
    members: tuple[Member, ...]
    uids: frozenset[str] = field(default=frozenset())
    """Pods that have at least one process."""

    def of_pod(self, uids: Iterable[str]) -> tuple[Member, ...]:
        wanted = {uid.replace("_", "-") for uid in uids}
        return tuple(m for m in self.members if m.owner.pod_uid in wanted)

    def uids_of_containers(self, container_ids: Iterable[str]) -> frozenset[str]:
        """The pods that these containers belong to."""
        wanted = frozenset(container_ids)
        return frozenset(m.owner.pod_uid for m in self.members if m.owner.container_id in wanted)

    def first_processes(self, members: Iterable[Member]) -> tuple[Member, ...]:
        """The oldest process of each container: its init, as all others descend from it.

        Members without a container (shims, monitors) are left out: they are in the host's
        namespaces.
        """
        first: dict[str, Member] = {}
        for member in members:
            key = member.owner.container_id
            held = first.get(key)
            order = (member.start_time, member.pid)
            if key and (held is None or order < (held.start_time, held.pid)):
                first[key] = member
        return tuple(first.values())


def scan_cgroups(paths: HostPaths) -> CgroupScan:
    """Reads /proc/*/cgroup.  Processes that end meanwhile are left out.

    About 25 µs for a process; gVisor's gofers are left out, as each is in an empty network
    namespace of its own.
    """
    members: list[Member] = []
    count = 0
    for name in os.listdir(paths.proc):
        if not name.isdigit():
            continue
        count += 1
        pid = int(name)
        try:
            text = read_cgroup(paths, pid)
            if "pod" not in text:
                continue
            owner = parse_cgroup_file(text, source=f"/proc/{pid}/cgroup")
            if owner is None or _is_gofer(paths, pid):
                continue
            start_time = process_starttime(paths, pid)
            # The PID may be another process's since the first reading.
            if read_cgroup(paths, pid) == text:
                members.append(Member(pid=pid, start_time=start_time, owner=owner))
        except (FileNotFoundError, ProcessLookupError, GoneError):
            continue
    return CgroupScan(
        processes=count,
        members=tuple(members),
        uids=frozenset(m.owner.pod_uid for m in members),
    )


def _is_gofer(paths: HostPaths, pid: int) -> bool:
    return os.path.basename(paths.pid(pid, "cmdline").read_bytes().split(b"\0", 1)[0]) == _GOFER
