"""Small nodes for the tests of the walk: namespaces written in a few lines, or from a world.

``Space`` collects links, addresses and routes in iproute2's own words; ``Node`` is a `NodeView`
over several of them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any

from gketrace.conntrack import ConntrackEntry
from gketrace.packet import Packet, Tuple5, protocol_number
from gketrace.ruleset.iptables_save import parse_iptables_save
from gketrace.simulate.query import WalkQuery
from gketrace.simulate.walk import walk
from gketrace.snapshot import (
    Address,
    BridgePort,
    FdbEntry,
    Link,
    LinkPeer,
    Maybe,
    Neighbour,
    NetnsSnapshot,
    NextHop,
    PolicyRule,
    Route,
    RouteType,
    Socket,
    Unavailable,
)
from gketrace.trace import Flow, Ingress, Leaf, NetnsKind, NetnsRef, Walk

WORLDS = Path(__file__).resolve().parents[2] / "data" / "worlds"
UP = ("BROADCAST", "MULTICAST", "UP", "LOWER_UP")
ZERO = (
    "rp_filter",
    "src_valid_mark",
    "accept_local",
    "route_localnet",
    "bc_forwarding",
    "send_redirects",
)
TABLES = {"local": 255, "main": 254, "default": 253}
DEFAULT_RULES = tuple(
    PolicyRule(family=family, priority=priority, table=table, text=f"{priority}: from all")
    for family in (4, 6)
    for priority, table in ((0, 255), (32766, 254), (32767, 253))
    if family == 4 or table != 253
)


class Table:
    """A `ConntrackView` over a tuple of entries."""

    def __init__(self, *entries: ConntrackEntry) -> None:
        self.entries = entries

    def lookup(self, tuple5: Tuple5, zone: int = 0) -> Maybe[ConntrackEntry | None]:
        mine = (e for e in self.entries if e.zone == zone)
        return next((e for e in mine if tuple5 in (e.orig, e.reply)), None)


class Space:
    """A namespace that is being put together."""

    def __init__(self, netns: NetnsRef) -> None:
        self.netns = netns
        self.links: list[Link] = []
        self.addresses: list[Address] = []
        self.routes: list[Route] = []
        self.rules: list[PolicyRule] = list(DEFAULT_RULES)
        self.neighbours: list[Neighbour] = []
        self.fdb: list[FdbEntry] = []
        self.sysctls = {"net.ipv4.ip_forward": "1", "net.ipv6.conf.all.forwarding": "1"}
        self.sockets: Maybe[list[Socket]] = []
        self.rulesets: list[Any] = []
        self.conntrack: Any = Table()
        self.defaults("all")
        self.link("lo", kind="", address="127.0.0.1/8", flags=("LOOPBACK", "UP", "LOWER_UP"))

    def link(
        self,
        name: str,
        *,
        kind: str = "veth",
        address: str = "",
        mac: str = "",
        master: str = "",
        index: int = 0,
        flags: tuple[str, ...] = UP,
        hairpin: bool = False,
        connected: bool = True,
    ) -> Space:
        port = BridgePort(state="forwarding", hairpin=hairpin) if master else None
        made = Link(
            ifindex=index or len(self.links) + 1,
            name=name,
            kind=kind,
            mac=mac,
            flags=flags,
            operstate="UP",
            master=self.index(master) if master else None,
            port=port,
        )
        self.links.append(made)
        self.defaults(name)
        if address:
            self.address(name, address, connected=connected)
        return self

    def defaults(self, name: str) -> None:
        """The per-interface sysctls that a forwarding node has, where nothing else was said."""
        forwarding = self.sysctls["net.ipv4.ip_forward"]
        for key in (*ZERO, "forwarding"):
            value = forwarding if key == "forwarding" else "0"
            self.sysctls.setdefault(f"net.ipv4.conf.{name}.{key}", value)

    def address(self, name: str, text: str, *, connected: bool = True) -> Space:
        given = ip_interface(text)
        family = given.version
        index = self.index(name)
        self.addresses.append(
            Address(
                ifindex=index,
                address=given.ip,
                prefixlen=given.network.prefixlen,
                scope="host" if name == "lo" else "global",
            )
        )
        own = ip_network(given.ip)
        self._route(own, index, 255, RouteType.LOCAL, prefsrc=given.ip, scope="host")
        if name == "lo":
            self._route(given.network, index, 255, RouteType.LOCAL, prefsrc=given.ip, scope="host")
        elif connected and given.network.prefixlen < given.max_prefixlen:
            self._route(
                given.network, index, 254, RouteType.UNICAST, prefsrc=given.ip, scope="link"
            )
        assert family in (4, 6)
        return self

    def route(
        self, dst: str, *, dev: str = "", via: str = "", table: int = 254, scope: str = ""
    ) -> Space:
        network = ip_network("0.0.0.0/0" if dst == "default" else dst)
        gateway = ip_address(via) if via else None
        scope = scope or ("global" if via else "link")
        self._route(network, self.index(dev), table, RouteType.UNICAST, via=gateway, scope=scope)
        return self

    def _route(
        self,
        dst: Any,
        index: int,
        table: int,
        kind: RouteType,
        *,
        prefsrc: Any = None,
        via: Any = None,
        scope: str = "",
    ) -> None:
        dev = next(link.name for link in self.links if link.ifindex == index)
        text = f"{'' if kind is RouteType.UNICAST else kind.value + ' '}{dst}"
        text += f"{f' via {via}' if via else ''} dev {dev}"
        self.routes.append(
            Route(
                family=dst.version,
                table=table,
                dst=dst,
                type=kind,
                next_hops=(NextHop(oif=index, gateway=via),),
                scope=scope,
                prefsrc=prefsrc,
                text=text,
            )
        )

    def listen(self, address: str, port: int, protocol: str = "tcp") -> Space:
        at = ip_address(address)
        assert not isinstance(self.sockets, Unavailable)
        self.sockets.append(
            Socket(
                family=at.version,
                protocol=protocol_number(protocol),
                address=at,
                port=port,
                state="LISTEN" if protocol == "tcp" else "UNCONN",
                process="app",
                pid=7,
            )
        )
        return self

    def iptables(self, text: str, *, family: int = 4) -> Space:
        """Rules: lines of iptables-save, without the frame of a table if there is only one."""
        self.rulesets.append(
            parse_iptables_save(
                text.encode(), backend="iptables-nft", family=family, source="test", taken_at=0.0
            )
        )
        return self

    def index(self, name: str) -> int:
        return next(link.ifindex for link in self.links if link.name == name)

    def set_link(self, name: str, **changes: Any) -> None:
        self.links = [
            replace(link, **changes) if link.name == name else link for link in self.links
        ]

    def snapshot(self) -> NetnsSnapshot:
        sockets = self.sockets
        return NetnsSnapshot(
            netns=self.netns,
            links=tuple(self.links),
            addresses=tuple(self.addresses),
            routes=tuple(self.routes),
            rules=tuple(self.rules),
            neighbours=tuple(self.neighbours),
            fdb=tuple(self.fdb),
            sysctls=self.sysctls,
            sockets=sockets if isinstance(sockets, Unavailable) else tuple(sockets),
            rulesets=tuple(self.rulesets),
            conntrack=self.conntrack,
        )


class Node:
    """A node: its own namespace and its pods'."""

    def __init__(self, name: str = "n1") -> None:
        self.node = name
        self.host = Space(NetnsRef(node=name, inode=1))
        self.pods: dict[str, Space] = {}

    def snapshot(self, netns: NetnsRef) -> Maybe[NetnsSnapshot]:
        for space in (self.host, *self.pods.values()):
            if space.netns == netns:
                return space.snapshot()
        return Unavailable(reason=f"no {netns} on {self.node}")

    def pod(self, name: str, address: str, *, mac: str = "", prefixlen: int = 24) -> Space:
        """A pod whose namespace has ``eth0`` with `address`; not connected to anything yet."""
        ref = NetnsRef(
            node=self.node, kind=NetnsKind.POD, inode=100 + len(self.pods), pod=f"default/{name}"
        )
        space = Space(ref)
        space.link("eth0", index=2, mac=mac, address=f"{address}/{prefixlen}")
        self.pods[name] = space
        return space

    def bridge(self, pod: str, *, bridge: str = "cbr0", hairpin: bool = False) -> None:
        """Puts the pod on a bridge, as kubenet does; its gateway is the bridge's address."""
        self._veth(pod, master=bridge, hairpin=hairpin)
        gateway = next(
            a.address for a in self.host.addresses if a.ifindex == self.host.index(bridge)
        )
        self.pods[pod].route("default", dev="eth0", via=str(gateway))

    def ptp(self, pod: str, gateway: str) -> None:
        """Connects the pod as GKE's ptp plugin does: /32 routes and the gateway on each veth."""
        veth = self._veth(pod)
        space = self.pods[pod]
        address = next(a.address for a in space.addresses if a.ifindex == 2)
        space.routes = [r for r in space.routes if r.table == 255]
        space.route(f"{gateway}/32", dev="eth0")
        space.route("default", dev="eth0", via=gateway)
        self.host.address(veth, f"{gateway}/32", connected=False)
        self.host.route(f"{address}/32", dev=veth, scope="host")

    def _veth(self, pod: str, *, master: str = "", hairpin: bool = False) -> str:
        space, name = self.pods[pod], f"veth-{pod}"
        self.host.link(name, master=master, hairpin=hairpin)
        index = self.host.index(name)
        self.host.set_link(name, peer=LinkPeer(ifindex=2, name="eth0", netns=space.netns))
        space.set_link("eth0", peer=LinkPeer(ifindex=index, name=name, netns=self.host.netns))
        return name

    def walk(
        self,
        packet: Packet,
        *,
        into: str = "",
        pod: str = "",
        flows: tuple[Flow, ...] = (),
        use_conntrack: bool = True,
    ) -> Walk:
        """From the host's or a pod's process, or into the host through the interface `into`."""
        space = self.pods[pod] if pod else self.host
        return walk(
            self,
            WalkQuery(
                ingress=Ingress(netns=space.netns, interface=into),
                packet=packet,
                flows=flows,
                use_conntrack=use_conntrack,
            ),
        )


def world_node(world: str, name: str) -> Node:
    """A node of a real world: its own links, addresses, routes, sysctls and iptables rules."""
    folder = WORLDS / world / f"node-{name}"
    node = Node(name)
    host = node.host
    host.links, host.addresses, host.routes, host.sysctls = [], [], [], {}
    for link in json.loads((folder / "ip-link.json").read_text()):
        host.links.append(
            Link(
                ifindex=link["ifindex"],
                name=link["ifname"],
                kind=link.get("linkinfo", {}).get("info_kind", ""),
                mac=link["address"],
                mtu=link["mtu"],
                flags=tuple(link["flags"]),
                operstate=link["operstate"],
                bridge_nf_call_iptables=bool(
                    link.get("linkinfo", {}).get("info_data", {}).get("nf_call_iptables", 0)
                ),
            )
        )
    for link in json.loads((folder / "ip-addr.json").read_text()):
        for info in link["addr_info"]:
            host.addresses.append(
                Address(
                    ifindex=link["ifindex"],
                    address=ip_address(info["local"]),
                    prefixlen=info["prefixlen"],
                    scope=info["scope"],
                )
            )
    for route in json.loads((folder / "ip-route.json").read_text()):
        host.routes.append(_route(host, route))
    for line in (folder / "sysctl.txt").read_text().splitlines():
        key, _, value = line.partition(" = ")
        host.sysctls[key] = value
    for name in ("all", *(link.name for link in host.links)):
        # The worlds' sysctl.txt holds only some; writing ip_forward sets all of forwarding.
        host.defaults(name)
    for file, family in (("iptables-save.txt", 4), ("ip6tables-save.txt", 6)):
        if (folder / file).exists() and (folder / file).stat().st_size:
            backend = "iptables-legacy" if "legacy" in world else "iptables-nft"
            host.rulesets.append(
                parse_iptables_save(
                    (folder / file).read_bytes(),
                    backend=backend,
                    family=family,
                    source=file,
                    taken_at=0.0,
                )
            )
    return node


def _route(host: Space, route: dict[str, Any]) -> Route:
    gateway = ip_address(route["gateway"]) if "gateway" in route else None
    dst = route["dst"]
    prefsrc = ip_address(route["prefsrc"]) if "prefsrc" in route else None
    family = next(a.version for a in (gateway, prefsrc, ip_network_or(dst)) if a is not None)
    network = ip_network("0.0.0.0/0" if family == 4 else "::/0") if dst == "default" else None
    kind = route.get("type", "unicast")
    text = f"{'' if kind == 'unicast' else kind + ' '}{dst}"
    text += f" via {gateway}" if gateway else ""
    return Route(
        family=family,
        table=TABLES[route.get("table", "main")],
        dst=network or ip_network(dst),
        type=RouteType(kind),
        next_hops=(NextHop(oif=host.index(route["dev"]), gateway=gateway),),
        scope=route.get("scope", "global"),
        protocol=2 if route.get("protocol") == "kernel" else 3,
        priority=route.get("metric", 0),
        prefsrc=prefsrc,
        text=f"{text} dev {route['dev']}",
    )


def ip_network_or(text: str) -> Any:
    return None if text == "default" else ip_network(text)


def tcp(src: str, dst: str, sport: int | None = None) -> Packet:
    """``tcp("10.0.0.1", "10.0.0.2:80")``; the source port may follow its address likewise."""
    return _packet(src, dst, sport, 6)


def udp(src: str, dst: str, sport: int | None = None) -> Packet:
    return _packet(src, dst, sport, 17)


def _packet(src: str, dst: str, sport: int | None, protocol: int) -> Packet:
    address, _, port = src.partition(":")
    to, _, dport = dst.partition(":")
    return Packet(
        src=ip_address(address),
        dst=ip_address(to),
        protocol=protocol,
        sport=int(port) if port else sport,
        dport=int(dport),
    )


def one(walked: Walk) -> Leaf:
    """The only way through."""
    (leaf,) = walked.leaves()
    return leaf


def lines(leaf: Leaf) -> list[str]:
    """The steps of a leaf, one short line each, with the namespace where it changes."""
    shown: list[str] = []
    for hop in leaf.hops():
        shown.append(f"-- {hop.netns}")
        for step in hop.steps:
            cite = step.citation
            if cite is not None and cite.source.value == "rule":
                text = f"{cite.table} {cite.chain} {cite.position}"
            elif cite is not None and cite.source.value == "policy":
                text = f"{cite.table} {cite.chain} policy"
            else:
                text = ""
            words = [step.kind.value, step.action.value, text, step.interface]
            if step.after != step.before:
                words.append(str(step.after))
            shown.append(" ".join(word for word in words if word))
    return shown
