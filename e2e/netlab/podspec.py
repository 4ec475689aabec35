"""From a pod's object to what CRI is asked for, as the kubelet translates it.

Only what the lab's pods and deploy/daemonset.yaml use; anything else in a container raises LabError
rather than being left out.  Source: pkg/kubelet/kuberuntime (kuberuntime_sandbox.go,
kuberuntime_container.go, labels.go, security_context.go).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from e2e.netlab.containerd import pod_cgroup
from e2e.netlab.cri import messages
from e2e.netlab.errors import LabError

__all__ = ["container_config", "sandbox_config"]

_MASKED = (
    "/proc/asound /proc/acpi /proc/kcore /proc/keys /proc/latency_stats /proc/timer_list"
    " /proc/timer_stats /proc/sched_debug /proc/scsi /sys/firmware"
).split()
_READ_ONLY = "/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger".split()
"""pkg/securitycontext/util.go, defaultMaskedPaths and defaultReadonlyPaths."""
_KNOWN = {
    "appArmorProfile",
    "args",
    "capabilities",
    "command",
    "env",
    "image",
    "imagePullPolicy",
    "livenessProbe",
    "name",
    "ports",
    "readOnlyRootFilesystem",
    "readinessProbe",
    "resources",
    "runAsUser",
    "seccompProfile",
    "securityContext",
    "startupProbe",
    "terminationMessagePath",
    "terminationMessagePolicy",
    "volumeMounts",
}


def _labels(pod: dict[str, Any]) -> dict[str, str]:
    """pkg/kubelet/types/labels.go."""
    meta = pod["metadata"]
    return {
        "io.kubernetes.pod.name": meta["name"],
        "io.kubernetes.pod.namespace": meta["namespace"],
        "io.kubernetes.pod.uid": meta["uid"],
    }


def _namespaces(pod: dict[str, Any]) -> dict[str, int]:
    known, spec = messages(), pod["spec"]
    return {
        "network": known.NODE if spec.get("hostNetwork") else known.POD,
        "pid": known.NODE if spec.get("hostPID") else known.CONTAINER,
        "ipc": known.NODE if spec.get("hostIPC") else known.POD,
    }


def sandbox_config(pod: dict[str, Any], attempt: int, logs: Path) -> dict[str, Any]:
    """PodSandboxConfig's fields."""
    known, meta = messages(), pod["metadata"]
    host = bool(pod["spec"].get("hostNetwork"))
    ports = [
        {
            "protocol": getattr(known, port.get("protocol", "TCP")),
            "container_port": port["containerPort"],
            "host_port": port.get("hostPort", 0),
            "host_ip": port.get("hostIP", ""),
        }
        for spec in pod["spec"]["containers"]
        for port in spec.get("ports", ())
    ]
    return {
        "metadata": {
            "name": meta["name"],
            "uid": meta["uid"],
            "namespace": meta["namespace"],
            "attempt": attempt,
        },
        "hostname": "" if host else meta["name"],
        "log_directory": str(logs / f"{meta['namespace']}_{meta['name']}_{meta['uid']}"),
        # As the kubelet does: a pod on the host's network needs no mapping.
        "port_mappings": [] if host else ports,
        "labels": {**meta.get("labels", {}), **_labels(pod)},
        "annotations": {**meta.get("annotations", {}), "kubernetes.io/config.source": "api"},
        "linux": {
            "cgroup_parent": f"/{pod_cgroup(meta['uid'])}",
            "security_context": {
                "namespace_options": _namespaces(pod),
                "seccomp": {"profile_type": known.SecurityProfile.RuntimeDefault},
            },
        },
    }


def container_config(
    pod: dict[str, Any], spec: dict[str, Any], attempt: int, files: dict[str, str]
) -> dict[str, Any]:
    """ContainerConfig's fields.  `files`: for each volume that is not a hostPath, the folder that
    holds what it shows.  Limits are left out where the machine's cgroups have none to give."""
    security = spec.get("securityContext", {})
    unknown = ({*spec, *security}) - _KNOWN
    if unknown:
        raise LabError(f"container {spec['name']}: the lab's kubelet does not know {unknown}")
    known = messages()
    profile = security.get("seccompProfile", {}).get("type", "Unconfined")
    context: dict[str, Any] = {
        "namespace_options": _namespaces(pod),
        "readonly_rootfs": bool(security.get("readOnlyRootFilesystem")),
        "capabilities": {
            "add_capabilities": security.get("capabilities", {}).get("add", []),
            "drop_capabilities": security.get("capabilities", {}).get("drop", []),
        },
        "masked_paths": _MASKED,
        "readonly_paths": _READ_ONLY,
        "seccomp": {"profile_type": known.SecurityProfile.ProfileType.Value(profile)},
    }
    if "runAsUser" in security:
        context["run_as_user"] = {"value": security["runAsUser"]}
    return {
        "metadata": {"name": spec["name"], "attempt": attempt},
        "image": {"image": spec["image"]},
        "command": spec.get("command", []),
        "args": spec.get("args", []),
        "envs": [{"key": one["name"], "value": _value(pod, one)} for one in spec.get("env", ())],
        "mounts": [_mount(pod, one, files) for one in spec.get("volumeMounts", ())],
        "labels": {**_labels(pod), "io.kubernetes.container.name": spec["name"]},
        "annotations": {
            "io.kubernetes.container.restartCount": str(attempt),
            "io.kubernetes.container.terminationMessagePolicy": "File",
        },
        "log_path": f"{spec['name']}/{attempt}.log",
        "linux": {"security_context": context},
    }


def _value(pod: dict[str, Any], entry: dict[str, Any]) -> str:
    if "value" in entry:
        return str(entry["value"])
    path = entry["valueFrom"]["fieldRef"]["fieldPath"]
    found = {"spec.nodeName": pod["spec"]["nodeName"], "metadata.name": pod["metadata"]["name"]}
    if path not in found:
        raise LabError(f"environment {entry['name']}: the lab's kubelet does not know {path}")
    return str(found[path])


def _mount(pod: dict[str, Any], mount: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
    known = messages()
    volume = next(one for one in pod["spec"]["volumes"] if one["name"] == mount["name"])
    propagation = {
        "None": known.PROPAGATION_PRIVATE,
        "HostToContainer": known.PROPAGATION_HOST_TO_CONTAINER,
    }[mount.get("mountPropagation", "None")]
    if "hostPath" in volume:
        source = volume["hostPath"]["path"]
    else:
        source = files[mount["name"]]
    return {
        "container_path": mount["mountPath"],
        "host_path": source,
        "readonly": bool(mount.get("readOnly")),
        "propagation": propagation,
    }
