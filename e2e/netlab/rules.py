"""A node's packet filter: the dump of the real kube-proxy, then what the dump lacks.

Everything runs in the caller's network namespace. Counters start at zero.
"""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass

from e2e.netlab.errors import LabError
from e2e.netlab.world import Node, Pod, World

__all__ = ["Synthetic", "restore_dump", "restore_synthetic", "run", "synthetic_list"]

_NFACCT = ("localhost_nps_accepted_pkts", "ct_state_invalid_dropped_pkts")
HOST_PORT = 8088
_NON_MASQUERADE = (
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "240.0.0.0/4",
)
"""ip-masq-agent's --nomasq-all-reserved-ranges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic:
    """Something in the lab that is not from the captured cluster, and why it is there."""

    name: str
    where: str
    why: str


def run(argv: list[str], stdin: str = "") -> str:
    """Runs a command of this machine; its stdout. Raises LabError with its stderr."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        text = (done.stderr or done.stdout).strip()
        raise LabError(f"{' '.join(argv)}: exit {done.returncode}: {text}")
    return done.stdout


def _save_backend(world: World) -> str:
    """Which iptables the node's own tools use: beside kube-proxy's nftables it is iptables-nft."""
    return "legacy" if world.backend == "legacy" else "nft"


def restore_dump(world: World, node: Node) -> None:
    """kube-proxy's rules, as the fixture holds them."""
    if world.backend == "nftables":
        run(["nft", "-f", str(node.fixture / "nft.txt")])
        return
    for family in ("iptables", "ip6tables"):
        text = (node.fixture / f"{family}-save.txt").read_text()
        if "--nfacct-name" in text:
            for name in _NFACCT:
                present = run(["nfacct", "list"])
                if name not in present:
                    run(["nfacct", "add", name])
        if text:
            run([f"{family}-{world.backend}-restore"], text)


def restore_synthetic(world: World, node: Node, *, host_ports: bool = True) -> None:
    """Adds the synthetic chains to the restored ones, with the same backend; without `host_ports`
    those of portmap are left to portmap itself."""
    backend = _save_backend(world)
    run([f"iptables-{backend}-restore", "--noflush"], _ip_masq() + _kubelet(world))
    for pod in world.pods_on(node.name):
        if pod.synthetic and host_ports:
            run([f"iptables-{backend}-restore", "--noflush"], _host_port(node, pod))


def _ip_masq() -> str:
    """dataplane 4.4; the static form of cluster/gce/gci/configure-helper.sh, without
    --random-fully."""
    local = '-m comment --comment "ip-masq: local traffic is not subject to MASQUERADE" -j RETURN'
    lines = [
        "*nat",
        ":IP-MASQ - [0:0]",
        '-A POSTROUTING -m comment --comment "ip-masq: ensure nat POSTROUTING directs all'
        ' non-LOCAL destination traffic to our custom IP-MASQ chain"'
        " -m addrtype ! --dst-type LOCAL -j IP-MASQ",
        f"-A IP-MASQ -d 169.254.0.0/16 {local}",
        *(f"-A IP-MASQ -d {cidr} {local}" for cidr in _NON_MASQUERADE),
        '-A IP-MASQ -m comment --comment "ip-masq: outbound traffic is subject to MASQUERADE'
        ' (must be last in chain)" -j MASQUERADE',
        "COMMIT",
    ]
    return "\n".join(lines) + "\n"


def _kubelet(world: World) -> str:
    """The chains that a kubelet makes (pkg/kubelet/kubelet_network_linux.go): empty marks, and in
    the 1.20 era the rule and the drop behind KUBE-MARK-DROP, without which kube-proxy's own
    "has no local endpoints" does nothing."""
    marks = [":KUBE-KUBELET-CANARY - [0:0]"]
    hint = [] if world.era == "1.20" else [":KUBE-IPTABLES-HINT - [0:0]"]
    lines = ["*mangle", *marks, *hint, "COMMIT"]
    if world.era == "1.20":
        lines += [
            "*nat",
            *marks,
            "-A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000",
            "COMMIT",
            "*filter",
            *marks,
            ":KUBE-FIREWALL - [0:0]",
            '-A KUBE-FIREWALL -m comment --comment "kubernetes firewall for dropping marked'
            ' packets" -m mark --mark 0x8000/0x8000 -j DROP',
            '-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming'
            ' localnet connections" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP',
            "-I OUTPUT 1 -j KUBE-FIREWALL",
            "-I INPUT 1 -j KUBE-FIREWALL",
            "COMMIT",
        ]
    return "\n".join(lines) + "\n"


def _host_port(node: Node, pod: Pod) -> str:
    """The portmap plugin's chains for the hostPort pod (dataplane 4.8; portmap_iptables.go)."""
    name = "gke-pod-network"
    digest = hashlib.sha512((name + pod.sandbox_id).encode()).hexdigest()
    chain = f"CNI-DN-{digest}"[:28]
    port = f"-p tcp -m tcp --dport {HOST_PORT}"
    entry = "-m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT"
    lines = [
        "*nat",
        ":CNI-HOSTPORT-DNAT - [0:0]",
        ":CNI-HOSTPORT-SETMARK - [0:0]",
        ":CNI-HOSTPORT-MASQ - [0:0]",
        f":{chain} - [0:0]",
        f"-A PREROUTING {entry}",
        f"-A OUTPUT {entry}",
        '-I POSTROUTING 1 -m comment --comment "CNI portfwd requiring masquerade"'
        " -j CNI-HOSTPORT-MASQ",
        "-A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE",
        '-A CNI-HOSTPORT-SETMARK -m comment --comment "CNI portfwd masquerade mark"'
        " -j MARK --set-xmark 0x2000/0x2000",
        f'-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \\"{name}\\" id:'
        f' \\"{pod.sandbox_id}\\"" -m multiport --dports {HOST_PORT} -j {chain}',
        f"-A {chain} -s {node.pod_cidr} {port} -j CNI-HOSTPORT-SETMARK",
        f"-A {chain} -s 127.0.0.1/32 {port} -j CNI-HOSTPORT-SETMARK",
        f"-A {chain} {port} -j DNAT --to-destination {pod.ip}:8080",
        "COMMIT",
    ]
    return "\n".join(lines) + "\n"


def synthetic_list(world: World, topology: str, pods: str) -> tuple[Synthetic, ...]:
    """Everything that is not from the dump, for `status`; `pods` is their backend."""
    host = next(pod for pod in world.pods if pod.synthetic)
    items = [
        Synthetic(
            name="IP-MASQ",
            where="nat POSTROUTING and chain IP-MASQ on every node",
            why="GKE's ip-masq-agent was not in the captured cluster",
        ),
        Synthetic(
            name="local routes of load balancer addresses",
            where="table local, proto 66, dev eth0, on every node",
            why="the GCE guest agent adds them; the captured nodes were not GCE machines",
        ),
        Synthetic(
            name=f"pod {host.key} and its CNI-HOSTPORT-* and CNI-DN-* chains",
            where=f"nat on {host.node}, host port {HOST_PORT}",
            why="no pod of the captured cluster has a hostPort behind the portmap plugin",
        ),
        Synthetic(
            name="kubelet's chains (KUBE-KUBELET-CANARY"
            + (
                ", KUBE-FIREWALL, KUBE-MARK-DROP's rule)"
                if world.era == "1.20"
                else ", KUBE-IPTABLES-HINT)"
            ),
            where="mangle, nat and filter on every node",
            why="no kubelet ran on the captured nodes; kube-proxy relies on them",
        ),
        Synthetic(
            name="kube-proxy's health ports",
            where="10256 and healthCheckNodePorts on every node, answered by a process of the lab",
            why="kube-proxy itself does not run; its rules are restored",
        ),
        Synthetic(
            name="pods' processes, namespaces and veths",
            where="every node",
            why="pods were only objects when the dump was taken",
        ),
        Synthetic(
            name="IPv6 forwarding, routes and pod gateways (fd00:40:N::1)",
            where="every node",
            why="the captured nodes had an IPv6 address on eth0 only",
        ),
        Synthetic(
            name="send_redirects=0",
            where="every node",
            why="GCE images set it; a VPC is routed and has no redirects",
        ),
    ]
    items.append(
        Synthetic(
            name="the Kubernetes API on 127.0.0.1",
            where="a listener without a process, and the kubeconfig's folder, in every node",
            why="so that the kubeconfig works inside the nodes and at the clients",
        )
    )
    if pods == "containerd":
        items.append(
            Synthetic(
                name=f"container sidecar of pod {host.key}",
                where=host.node,
                why="no pod of the captured cluster has two containers",
            )
        )
    if topology == "ptp":
        items.append(
            Synthetic(
                name="veths with /32 routes instead of cbr0",
                where="every node",
                why="the dump was taken on nodes with cbr0; --topology ptp is today's GKE",
            )
        )
    if world.era == "1.20":
        items.append(
            Synthetic(
                name="listening sockets on node ports",
                where="every node, process kube-proxy",
                why="kube-proxy 1.20 holds them open; it does not run here",
            )
        )
    return tuple(items)
