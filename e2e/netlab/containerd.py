"""A node's container runtime: Debian's containerd with runc and the CNI plugins, as the node's own.

Its socket is at its usual place, as each node has a /run of its own; everything else is in a
folder of the lab on disk (`runtime_folder`), which `down` removes.  The pod network is what netd
and kubenet configure (dataplane 4.2, 4.8): ptp or bridge, host-local, portmap.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.netlab.errors import LabError
from e2e.netlab.images import PAUSE_IMAGE
from e2e.netlab.world import Node, Pod, World

__all__ = ["RUNTIME_SOCKET", "NodeRuntime", "check_programs", "pod_cgroup"]

RUNTIME_SOCKET = "/run/containerd/containerd.sock"
_PLUGINS = Path("/usr/lib/cni")
_NEEDED = ("bridge", "host-local", "loopback", "portmap", "ptp")
_SECONDS = 20.0
_DISABLED = (
    "io.containerd.internal.v1.opt",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
)
"""Not used here; the first makes a folder in /opt."""
_IPAM = """\
#!/bin/sh
# CNI IPAM: asks host-local for the address that the pod has in the captured cluster.  The runtime
# itself passes no addresses, only the pod's name.
namespace=${{CNI_ARGS##*K8S_POD_NAMESPACE=}}
name=${{CNI_ARGS##*K8S_POD_NAME=}}
exec {plugin} < {folder}/"${{namespace%%;*}}_${{name%%;*}}.json"
"""
_RUNC = """\
#!/bin/sh
# This machine's cgroup2 hierarchy has no cpu controller (it is bound to version 1), and containerd
# gives every sandbox cpu shares: without them in the bundle runc does not miss it.
bundle=
for word; do
    [ "$previous" = --bundle ] && bundle=$word
    previous=$word
done
[ -z "$bundle" ] || sed -i 's/"cpu":{{[^}}]*}}/"cpu":{{}}/' "$bundle/config.json"
exec {runc} "$@"
"""


def check_programs() -> None:
    """Raises LabError unless everything that `--pods containerd` needs is installed."""
    missing = [name for name in ("containerd", "ctr", "runc") if shutil.which(name) is None]
    missing += [str(_PLUGINS / name) for name in _NEEDED if not (_PLUGINS / name).exists()]
    if missing:
        raise LabError(
            f"--pods containerd: missing {', '.join(missing)}; install the Debian packages"
            " containerd, runc and containernetworking-plugins"
        )


def pod_cgroup(uid: str) -> str:
    """A BestEffort pod's cgroup as the kubelet's cgroupfs driver names it
    (pkg/kubelet/cm/cgroup_manager_linux.go): nothing manages units here."""
    return f"kubepods/besteffort/pod{uid}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRuntime:
    """containerd of `node`, below `folder`."""

    world: World
    node: Node
    topology: str
    folder: Path

    def command(self) -> list[str]:
        """containerd's command line."""
        return ["containerd", "--config", str(self.folder / "config.toml")]

    def configure(self) -> None:
        """Writes all that containerd and the plugins are given."""
        for name in ("bin", "cni", "net.d", "addresses", "root"):
            (self.folder / name).mkdir(parents=True)
        # portmap runs iptables: the node's, which writes beside kube-proxy's rules.
        backend = "legacy" if self.world.backend == "legacy" else "nft"
        for family in ("iptables", "ip6tables"):
            for suffix in ("", "-save", "-restore"):
                tool = shutil.which(f"{family}-{backend}{suffix}")
                if tool is None:
                    raise LabError(f"{family}-{backend}{suffix} is missing")
                (self.folder / "bin" / f"{family}{suffix}").symlink_to(tool)
        for plugin in _PLUGINS.iterdir():
            (self.folder / "cni" / plugin.name).symlink_to(plugin)
        ipam = _IPAM.format(plugin=_PLUGINS / "host-local", folder=self.folder / "addresses")
        _write_program(self.folder / "cni" / "lab-host-local", ipam)
        for pod in self.world.pods_on(self.node.name):
            if not pod.host_network:
                path = self.folder / "addresses" / f"{pod.namespace}_{pod.name}.json"
                path.write_text(json.dumps(self._request(pod)))
        (self.folder / "net.d" / "10-gke.conflist").write_text(json.dumps(self._network()))
        (self.folder / "config.toml").write_text(self._config())

    def environment(self) -> dict[str, str]:
        """With which containerd is started."""
        path = f"{self.folder / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {"PATH": path, "LANG": "C.UTF-8"}

    def _network(self) -> dict[str, Any]:
        main: dict[str, Any] = {
            "type": self.topology,
            "mtu": self.node.mtu,
            "ipMasq": False,
            "ipam": {"type": "lab-host-local"},
        }
        if self.topology == "bridge":
            main |= {"bridge": "cbr0", "isGateway": True, "hairpinMode": True}
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        return {"cniVersion": "0.3.1", "name": "gke-pod-network", "plugins": [main, portmap]}

    def _request(self, pod: Pod) -> dict[str, Any]:
        """What host-local is given for `pod`: the node's ranges, and the addresses wanted."""
        ranges = [[{"subnet": self.node.pod_cidr, "gateway": self.node.gateway}]]
        routes = [{"dst": "0.0.0.0/0"}]
        if pod.ip6:
            ranges.append([{"subnet": self.node.pod_cidr6, "gateway": self.node.gateway6}])
            routes.append({"dst": "::/0"})
        return {
            "cniVersion": "0.3.1",
            "name": "gke-pod-network",
            "ipam": {
                "type": "host-local",
                "ranges": ranges,
                "routes": routes,
                "dataDir": str(self.folder / "networks"),
            },
            "args": {"cni": {"ips": [ip for ip in (pod.ip, pod.ip6) if ip]}},
        }

    def _config(self) -> str:
        runc = shutil.which("runc") or "runc"
        program = runc
        if not _has_controllers():
            program = str(self.folder / "bin" / "runc-without-cpu")
            _write_program(Path(program), _RUNC.format(runc=runc))
        cri = "io.containerd.grpc.v1.cri"
        return f"""\
version = 2
root = "{self.folder}/root"
state = "/run/containerd"
disabled_plugins = {json.dumps(_DISABLED)}

[grpc]
  address = "{RUNTIME_SOCKET}"

[plugins."{cri}"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  [plugins."{cri}".cni]
    bin_dir = "{self.folder}/cni"
    conf_dir = "{self.folder}/net.d"
  [plugins."{cri}".containerd]
    snapshotter = "{snapshotter(self.folder)}"
    [plugins."{cri}".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."{cri}".containerd.runtimes.runc.options]
        BinaryName = "{program}"
"""

    def wait(self, alive: Callable[[], bool]) -> None:
        """Until containerd's socket accepts; raises LabError when it ends or takes too long."""
        deadline = time.monotonic() + _SECONDS
        while True:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(RUNTIME_SOCKET)
                    return
                except OSError as error:
                    if not alive() or time.monotonic() > deadline:
                        said = (self.folder / "containerd.log").read_text().splitlines()[-1:]
                        raise LabError(f"containerd: {error}: {' '.join(said)}") from error
            time.sleep(0.02)


def snapshotter(folder: Path) -> str:
    """overlayfs, unless `folder` is on an overlay itself."""
    best = ("", "")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, fstype, *_ = line.split()
        if folder.is_relative_to(target) and len(target) >= len(best[0]):
            best = (target, fstype)
    return "native" if best[1] == "overlay" else "overlayfs"


def _has_controllers() -> bool:
    """Whether the node's cgroup2 hierarchy can hold cpu shares; version 1 is not its business."""
    path = Path("/sys/fs/cgroup/cgroup.controllers")
    return not path.exists() or "cpu" in path.read_text().split()


def _write_program(path: Path, text: str) -> None:
    path.write_text(text)
    os.chmod(path, 0o755)
