"""/proc/PID/cgroup → whose process it is.  Pure.

Layouts, all read here (kubelet pkg/kubelet/cm/cgroup_manager_linux.go escapeSystemdCgroupName;
containerd pkg/cri cgroup paths; CRI-O internal/config/cgmgr):

- systemd driver: ``…/kubepods-burstable-podUID.slice/cri-containerd-ID.scope``, UID's dashes
  turned into underscores; ``crio-ID.scope``, ``docker-ID.scope``, ``libpod-ID.scope``
- cgroupfs driver: ``/kubepods/burstable/podUID/ID``, ``…/podUID/crio-ID``
- a systemd-style path on a cgroupfs runtime: ``…/kubepods-podUID.slice:cri-containerd:ID``
- seen from inside another cgroup namespace: ``/../../podUID/ID``, with the head cut off

What follows the container's own cgroup (``…/init.scope``, ``…/docker/ID2``) is inside the container
and does not count.  A static pod's UID is its configuration's hash: 32 digits without dashes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from gketrace.errors import ParseError

__all__ = ["CgroupOwner", "parse_cgroup_file", "parse_cgroup_path"]

_UID: Final = r"[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32}"
_POD_CGROUPFS: Final = re.compile(rf"pod({_UID})")
_POD_SYSTEMD: Final = re.compile(rf"(?:[^/:]*-)?pod({_UID})\.slice")
_CONTAINER: Final = re.compile(r"(?:([a-z]+(?:-[a-z]+)*)-)?([0-9a-f]{64})(?:\.scope)?")
_HELPERS: Final = frozenset({"crio-conmon", "libpod-conmon"})
"""Monitors of a container, in the pod's cgroup and in the host's namespaces."""
_RUNTIMES: Final = {
    "cri-containerd": "containerd",
    "crio": "cri-o",
    "docker": "docker",
    "libpod": "podman",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupOwner:
    """The pod, and where the path names one the container, that a process belongs to."""

    pod_uid: str
    """With dashes, as the API writes it; a static pod's is 32 digits without."""
    container_id: str = ""
    """64 digits; empty: a process of the pod's own cgroup (a shim, a monitor)."""
    runtime: str = ""
    """``containerd``, ``cri-o``, ``docker``, ``podman``; empty: the name does not tell."""
    driver: str = ""
    """``systemd`` or ``cgroupfs``: who names the cgroups."""


def parse_cgroup_path(path: str) -> CgroupOwner | None:
    """The owner by one cgroup path; None: it names no pod."""
    segments = path.split("/")
    for position, segment in enumerate(segments):
        if found := _POD_CGROUPFS.fullmatch(segment):
            return _owner(found[1], "cgroupfs", segments[position + 1 :])
        if found := _POD_SYSTEMD.fullmatch(segment):
            return _owner(found[1], "systemd", segments[position + 1 :])
        slice_name, *rest = segment.split(":")
        if len(rest) == 2 and (found := _POD_SYSTEMD.fullmatch(slice_name)):
            return _owner(found[1], "systemd", [f"{rest[0]}-{rest[1]}"])
    return None


def _owner(uid: str, driver: str, below: list[str]) -> CgroupOwner:
    pod_uid = uid.replace("_", "-")
    container = _CONTAINER.fullmatch(below[0]) if below else None
    if container is None or container[1] in _HELPERS:
        return CgroupOwner(pod_uid=pod_uid, driver=driver)
    return CgroupOwner(
        pod_uid=pod_uid,
        container_id=container[2],
        runtime=_RUNTIMES.get(container[1] or "", ""),
        driver=driver,
    )


def parse_cgroup_file(text: str, *, source: str = "cgroup") -> CgroupOwner | None:
    """The owner by a whole /proc/PID/cgroup: version 1 has a line for each hierarchy.

    The first line that names a container wins, else the first that names a pod: on a hybrid
    system some hierarchies hold the process at their root.  Raises `ParseError` for a line that
    is not ``ID:CONTROLLERS:PATH``.
    """
    pod_only: CgroupOwner | None = None
    # The kernel lets a cgroup's name hold whatever else splitlines() takes for an end of line.
    lines = text.split("\n")
    if not lines[-1]:
        del lines[-1]
    for number, line in enumerate(lines, start=1):
        parts = line.split(":", 2)
        if len(parts) != 3 or not parts[0].isdigit():
            raise ParseError("not a cgroup line", source=source, line=number, text=line)
        owner = parse_cgroup_path(parts[2].removesuffix(" (deleted)"))
        if owner is None:
            continue
        if owner.container_id:
            return owner
        pod_only = pod_only or owner
    return pod_only
