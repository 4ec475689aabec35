"""The lab's addresses, links and routes, as `ip -batch` text.

```
  client 203.0.113.10   client 192.0.2.10
             \\             /
              router 10.142.0.2 (also the tutorial's client)
                    |
              switch (bridge vpc0)
             /      |      \\
          eth0     eth0     eth0      node namespaces
          cbr0 or /32 routes          --topology
          veth...                     pod namespaces: eth0
```
The router is the VPC: it knows each node's pod range and sends a load balancer's address to one
node with the destination unchanged, as a passthrough load balancer does. A VPC has no broadcast
domain, sends no ICMP redirects, and drops what it has no route for without a word. So does the
router: its default route leads into a bridge without ports.
"""

from __future__ import annotations

import ipaddress

from e2e.netlab.world import Node, Pod, World

__all__ = [
    "CLIENTS",
    "ROUTER_IP",
    "ROUTER_IP6",
    "client_batch",
    "lb_route",
    "link_batch",
    "mac",
    "node_batch",
    "pod_batch",
    "router_batch",
    "switch_batch",
]

ROUTER_IP = "10.142.0.2"
ROUTER_IP6 = "fd00:142::ff"
CLIENTS = {"203.0.113.10": "2001:db8:113::10", "192.0.2.10": "2001:db8:2::10"}
"""The external clients behind the router: IPv4 to IPv6 address."""


def mac(prefix: str, address: str) -> str:
    """A MAC made of a two-byte prefix and an IPv4 address: GCE uses 42:01, CNI plugins 0a:58."""
    return ":".join((prefix, *(f"{byte:02x}" for byte in ipaddress.IPv4Address(address).packed)))


def switch_batch(world: World, pids: dict[str, int]) -> str:
    """Run in the switch's namespace: the bridge, and a veth to every machine (`pids` by name)."""
    mtu = world.nodes[0].mtu
    lines = [
        "link set lo up",
        f"link add vpc0 mtu {mtu} type bridge forward_delay 0 mcast_snooping 0",
        "link set vpc0 up",
    ]
    machines = [(node.short, mac("42:01", node.ip)) for node in world.nodes]
    for name, address in [*machines, ("router", mac("42:01", ROUTER_IP))]:
        lines += [
            f"link add port-{name} mtu {mtu} type veth peer name eth0 address {address}"
            f" mtu {mtu} netns {pids[name]}",
            f"link set port-{name} master vpc0 up",
        ]
    return "\n".join(lines) + "\n"


def lb_route(address: str, node: Node) -> str:
    """Run in the router's namespace: where a load balancer's address goes."""
    return f"route replace {address}/32 via {node.ip} dev eth0\n"


def router_batch(world: World, targets: dict[str, str], pids: dict[str, int]) -> str:
    """Run in the router's namespace; `targets` maps a load balancer's address to a node's name."""
    lines = [
        "link set lo up",
        "link set eth0 up",
        f"addr add {ROUTER_IP}/24 dev eth0",
        f"addr add {ROUTER_IP6}/64 dev eth0 nodad",
        "link add internet type bridge",
        "link set internet arp off up",
        "route add default dev internet",
        "route add ::/0 dev internet",
    ]
    for node in world.nodes:
        lines += [
            f"route add {node.pod_cidr} via {node.ip} dev eth0",
            f"route add {node.pod_cidr6} via {node.ip6} dev eth0",
        ]
    for index, (address, address6) in enumerate(CLIENTS.items()):
        gateway = address.rsplit(".", 1)[0] + ".1"
        gateway6 = address6.removesuffix("10") + "1"
        lines += [
            f"link add client{index} mtu {world.nodes[0].mtu} type veth peer name eth0"
            f" address {mac('42:01', address)} mtu {world.nodes[0].mtu} netns {pids[address]}",
            f"addr add {gateway}/32 dev client{index}",
            f"addr add {gateway6}/128 dev client{index} nodad",
            f"link set client{index} up",
            f"route add {address}/32 dev client{index} src {gateway}",
            f"route add {address6}/128 dev client{index}",
        ]
    routes = "".join(lb_route(address, world.node(name)) for address, name in targets.items())
    return "\n".join(lines) + "\n" + routes


def client_batch(address: str) -> str:
    """Run in an external client's namespace."""
    address6 = CLIENTS[address]
    gateway = address.rsplit(".", 1)[0] + ".1"
    gateway6 = address6.removesuffix("10") + "1"
    return "\n".join(
        [
            "link set lo up",
            "link set eth0 up",
            f"addr add {address}/32 dev eth0",
            f"route add {gateway}/32 dev eth0 scope link",
            f"route add default via {gateway} dev eth0 src {address}",
            f"addr add {address6}/128 dev eth0 nodad",
            f"route add {gateway6}/128 dev eth0",
            f"route add ::/0 via {gateway6} dev eth0 src {address6}",
            "",
        ]
    )


def node_batch(world: World, node: Node, topology: str, pids: dict[str, int]) -> str:
    """Run in a node's namespace; `pids` maps a pod's key to its sandbox's PID as the node sees it.
    Pods that are not in it get no link.

    bridge: kubenet's cbr0, with hairpin mode on each port (kubelet --hairpin-mode=hairpin-veth).
    ptp: containernetworking's ptp plugin: the gateway's address on every veth, a /32 route to each
    pod (dataplane 4.2).
    """
    lines = [
        "link set lo up",
        "link set eth0 up",
        f"addr add {node.ip}/24 dev eth0",
        f"addr add {node.ip6}/64 dev eth0 nodad",
        f"route add default via {ROUTER_IP} dev eth0",
        f"route add ::/0 via {ROUTER_IP6} dev eth0",
    ]
    for address in world.load_balancer_ips:
        lines.append(f"route add local {address}/32 dev eth0 table local proto 66 scope host")
    if topology == "bridge":
        lines += [
            f"link add cbr0 address {mac('0a:58', node.gateway)} mtu {node.mtu} type bridge"
            " forward_delay 0",
            f"addr add {node.gateway}/24 dev cbr0",
            f"addr add {node.gateway6}/64 dev cbr0 nodad",
            "link set cbr0 up",
        ]
    links = [
        link_batch(node, pod, topology, pids[pod.key])
        for pod in world.pods_on(node.name)
        if not pod.host_network and pod.key in pids
    ]
    return "\n".join(lines) + "\n" + "".join(links)


def link_batch(node: Node, pod: Pod, topology: str, pid: int) -> str:
    """Run in a node's namespace: one pod's veth; `pid` is its sandbox's."""
    lines = [
        f"link add {pod.veth} mtu {node.mtu} type veth peer name eth0"
        f" address {mac('0a:58', pod.ip)} mtu {node.mtu} netns {pid}"
    ]
    if topology == "bridge":
        lines += [
            f"link set {pod.veth} master cbr0 up",
            f"link set {pod.veth} type bridge_slave hairpin on",
        ]
    else:
        lines += [
            f"addr add {node.gateway}/32 dev {pod.veth}",
            f"link set {pod.veth} up",
            f"route add {pod.ip}/32 dev {pod.veth} scope host",
        ]
        if pod.ip6:
            lines += [
                f"addr add {node.gateway6}/128 dev {pod.veth} nodad",
                f"route add {pod.ip6}/128 dev {pod.veth}",
            ]
    return "\n".join(lines) + "\n"


def pod_batch(node: Node, pod: Pod, topology: str) -> str:
    """Run in a pod's namespace."""
    lines = [
        "link set lo up",
        "link set eth0 up",
        f"addr add {pod.ip}/24 dev eth0",
    ]
    if topology == "ptp":
        lines += [
            f"route del {node.pod_cidr} dev eth0",
            f"route add {node.gateway}/32 dev eth0 scope link src {pod.ip}",
            f"route add {node.pod_cidr} via {node.gateway} dev eth0 src {pod.ip}",
        ]
    lines.append(f"route add default via {node.gateway} dev eth0")
    if pod.ip6:
        length = 64 if topology == "bridge" else 128
        lines.append(f"addr add {pod.ip6}/{length} dev eth0 nodad")
        if topology == "ptp":
            lines.append(f"route add {node.gateway6}/128 dev eth0")
        lines.append(f"route add ::/0 via {node.gateway6} dev eth0")
    return "\n".join(lines) + "\n"
