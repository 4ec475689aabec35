"""Cgroup paths as they are on real nodes → pod UID, container id."""

from __future__ import annotations

import pytest

from gketrace.errors import ParseError
from gketrace_agent.resolve.cgroup import CgroupOwner, parse_cgroup_file, parse_cgroup_path

UID = "2f3c1b9e-8f2d-4f0e-9a57-0d4c1e7b6a21"
UID_ = UID.replace("-", "_")
HASH = "7f1a4d3c9b2e58f06d1c3a5b7e9f0a2c"
ID = "3b1f" * 16
OTHER = "c0de" * 16

REAL = [
    # containerd, systemd driver, cgroup v2 (GKE today)
    (
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice"
        f"/cri-containerd-{ID}.scope",
        (UID, ID, "containerd", "systemd"),
    ),
    (
        f"/kubepods.slice/kubepods-pod{UID_}.slice/cri-containerd-{ID}.scope",
        (UID, ID, "containerd", "systemd"),
    ),
    # containerd, cgroupfs driver, cgroup v1 (GKE before cgroup v2)
    (f"/kubepods/burstable/pod{UID}/{ID}", (UID, ID, "", "cgroupfs")),
    (f"/kubepods/besteffort/pod{UID}/{ID}", (UID, ID, "", "cgroupfs")),
    (f"/kubepods/pod{UID}/{ID}", (UID, ID, "", "cgroupfs")),
    # a static pod: its configuration's hash
    (f"/kubepods/burstable/pod{HASH}/{ID}", (HASH, ID, "", "cgroupfs")),
    (
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{HASH}.slice"
        f"/cri-containerd-{ID}.scope",
        (HASH, ID, "containerd", "systemd"),
    ),
    # CRI-O
    (
        f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UID_}.slice"
        f"/crio-{ID}.scope",
        (UID, ID, "cri-o", "systemd"),
    ),
    (
        f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UID_}.slice"
        f"/crio-{ID}.scope/container",
        (UID, ID, "cri-o", "systemd"),
    ),
    (f"/kubepods/burstable/pod{UID}/crio-{ID}", (UID, ID, "cri-o", "cgroupfs")),
    # its monitor is in the pod's cgroup and in the host's namespaces
    (
        f"/kubepods.slice/kubepods-pod{UID_}.slice/crio-conmon-{ID}.scope",
        (UID, "", "", "systemd"),
    ),
    # docker, cri-dockerd
    (
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice"
        f"/docker-{ID}.scope",
        (UID, ID, "docker", "systemd"),
    ),
    # a systemd-style path handed to a cgroupfs runtime
    (
        f"/system.slice/containerd.service/kubepods-burstable-pod{UID_}.slice:cri-containerd:{ID}",
        (UID, ID, "containerd", "systemd"),
    ),
    # kind: a node that is itself a container
    (
        f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice"
        f"/kubelet-kubepods-besteffort-pod{UID_}.slice/cri-containerd-{ID}.scope",
        (UID, ID, "containerd", "systemd"),
    ),
    (f"/docker/{OTHER}/kubelet/kubepods/besteffort/pod{UID}/{ID}", (UID, ID, "", "cgroupfs")),
    # what is below the container's cgroup is inside the container
    (f"/kubepods/burstable/pod{UID}/{ID}/docker/{OTHER}", (UID, ID, "", "cgroupfs")),
    (
        f"/kubepods.slice/kubepods-pod{UID_}.slice/cri-containerd-{ID}.scope/init.scope",
        (UID, ID, "containerd", "systemd"),
    ),
    # read from inside another cgroup namespace
    (f"/../../pod{UID}/{ID}", (UID, ID, "", "cgroupfs")),
    (f"/../../../besteffort/pod{UID}/{ID}", (UID, ID, "", "cgroupfs")),
    (
        f"/../../kubepods-besteffort-pod{UID_}.slice/cri-containerd-{ID}.scope",
        (UID, ID, "containerd", "systemd"),
    ),
    # the pod's own cgroup: a shim
    (f"/kubepods/burstable/pod{UID}", (UID, "", "", "cgroupfs")),
    (f"/kubepods.slice/kubepods-pod{UID_}.slice", (UID, "", "", "systemd")),
]

NOT_PODS = [
    "/",
    "/init.scope",
    "/system.slice/containerd.service",
    "/system.slice/kubelet.service",
    "/kubepods.slice",
    "/kubepods/burstable",
    f"/system.slice/docker-{ID}.scope",
    f"/docker/{ID}",
    "/user.slice/user-1000.slice/session-3.scope",
    "/machine.slice/libpod-conmon.scope",
    "/kubepods/burstable/podinfo/x",
    f"/../cri-containerd-{ID}.scope",
]


@pytest.mark.parametrize(("path", "expected"), REAL, ids=[path for path, _ in REAL])
def test_real_paths(path: str, expected: tuple[str, str, str, str]) -> None:
    uid, container, runtime, driver = expected
    assert parse_cgroup_path(path) == CgroupOwner(
        pod_uid=uid, container_id=container, runtime=runtime, driver=driver
    )


@pytest.mark.parametrize("path", NOT_PODS)
def test_paths_that_name_no_pod(path: str) -> None:
    assert parse_cgroup_path(path) is None


def test_version_1_file_takes_the_line_that_names_a_container() -> None:
    text = (
        "12:devices:/\n"
        f"11:memory:/kubepods/burstable/pod{UID}\n"
        f"10:pids:/kubepods/burstable/pod{UID}/{ID}\n"
        "1:name=systemd:/system.slice/containerd.service\n"
        "0::/\n"
    )
    assert parse_cgroup_file(text) == CgroupOwner(pod_uid=UID, container_id=ID, driver="cgroupfs")


def test_a_deleted_cgroup_still_names_its_pod() -> None:
    owner = parse_cgroup_file(f"0::/kubepods/pod{UID}/{ID} (deleted)\n")
    assert owner is not None
    assert owner.container_id == ID


def test_host_processes_have_no_owner() -> None:
    assert parse_cgroup_file("0::/system.slice/ssh.service\n") is None


def test_an_unreadable_line_is_quoted() -> None:
    with pytest.raises(ParseError, match=r"/proc/7/cgroup:2: not a cgroup line: 'kubepods'"):
        parse_cgroup_file("0::/\nkubepods\n", source="/proc/7/cgroup")


def test_a_cgroup_s_name_may_hold_what_looks_like_an_end_of_line() -> None:
    owner = parse_cgroup_file(f"0::/kubepods/pod{UID}/{ID}/a\u2028b\x0bc\x85\n")
    assert owner is not None
    assert owner.container_id == ID
    assert parse_cgroup_file("") is None
