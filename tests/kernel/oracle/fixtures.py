"""Cases over the real kube-proxy dumps: every front door, from every kind of source."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from ipaddress import ip_address, ip_interface
from pathlib import Path

from gketrace.packet import Packet, Protocol, TcpFlags
from tests.kernel.oracle.bed import Bed, Node

__all__ = ["WORLDS", "Case", "World", "worlds"]

WORLDS = Path(__file__).resolve().parents[2] / "data" / "worlds"
_PROTOCOLS = {"TCP": Protocol.TCP, "UDP": Protocol.UDP, "SCTP": Protocol.SCTP}
_NFACCT = ("localhost_nps_accepted_pkts", "ct_state_invalid_dropped_pkts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One packet to send."""

    ingress: str
    """Interface that receives it; "" for a locally made packet."""
    packet: Packet
    label: str = ""


@dataclass(frozen=True)
class World:
    """One node of one dump."""

    folder: Path
    short: str

    @property
    def name(self) -> str:
        return f"{self.folder.name}/{self.short}"

    @property
    def backend(self) -> str:
        return (
            "nftables" if self.folder.name.endswith("nftables") else self.folder.name.split("-")[-1]
        )

    def _items(self, kind: str) -> list[dict]:
        return json.loads((self.folder / f"{kind}.json").read_text())["items"]

    @cached_property
    def node(self) -> Node:
        """The node under test, with its own addresses and its own pods'."""
        home = self.folder / f"node-{self.short}"
        links = {link["ifname"]: link for link in json.loads((home / "ip-addr.json").read_text())}
        found = {
            name: tuple(
                f"{a['local']}/{a['prefixlen']}"
                for a in links[name]["addr_info"]
                if a["scope"] == "global"
            )
            for name in ("eth0", "cbr0")
        }
        bridge = ip_interface(found["cbr0"][0])
        sixth = f"fd00:40:{bridge.ip.packed[2]:x}::"
        pods = tuple(
            tuple(ip["ip"] for ip in pod["status"]["podIPs"])
            for pod in self._items("pods")
            if not pod["spec"].get("hostNetwork") and pod["spec"]["nodeName"].endswith(self.short)
        )
        return Node(
            name=self.short,
            eth0=found["eth0"],
            cbr0=(*found["cbr0"], f"{sixth}1/64"),
            pods=pods,
            neighbours=tuple(
                a
                for a in _NODE_ADDRESSES
                if a not in {str(ip_interface(x).ip) for x in found["eth0"]}
            ),
            gateway=("10.142.0.2", "fd00:142::ff"),
        )

    def restore(self, bed: Bed) -> None:
        """The dump's rules into the namespace under test."""
        home = self.folder / f"node-{self.short}"
        for name in _NFACCT:
            bed.command(["nfacct", "add", name])
        if self.backend == "nftables":
            bed.command(["nft", "-f", "-"], text=(home / "nft.txt").read_text())
            return
        for tool, file in (("iptables", "iptables-save.txt"), ("ip6tables", "ip6tables-save.txt")):
            if text := (home / file).read_text():
                bed.command([f"{tool}-{self.backend}-restore"], text=text)

    def doors(self) -> list[tuple[str, int, int]]:
        """(address, port, protocol) of every front door of every service, and of the endpoints."""
        node_addresses = [str(ip_interface(a).ip) for a in (*self.node.eth0, *self.node.cbr0)]
        found: set[tuple[str, int, int]] = set()
        for service in self._items("services"):
            spec = service["spec"]
            addresses = [a for a in spec.get("clusterIPs", []) if a != "None"]
            addresses += spec.get("externalIPs", [])
            ingress = service.get("status", {}).get("loadBalancer", {}).get("ingress") or []
            addresses += [entry["ip"] for entry in ingress]
            health = spec.get("healthCheckNodePort")
            if health:
                found |= {(a, health, Protocol.TCP) for a in node_addresses}
            for port in spec["ports"]:
                protocol = _PROTOCOLS[port["protocol"]]
                found |= {(a, port["port"], protocol) for a in addresses}
                if port.get("nodePort"):
                    found |= {(a, port["nodePort"], protocol) for a in node_addresses}
                    found.add(("127.0.0.1", port["nodePort"], protocol))
        for piece in self._items("endpointslices"):
            for port in piece.get("ports") or []:
                for endpoint in piece["endpoints"]:
                    found |= {
                        (a, port["port"], _PROTOCOLS[port["protocol"]])
                        for a in endpoint["addresses"]
                    }
        return sorted(found)

    def sources(self, family: int) -> list[tuple[str, str]]:
        """(ingress, source address) of every kind of sender."""
        own = [a for a in (*self.node.eth0, *self.node.cbr0) if ip_interface(a).version == family]
        sources = [("", str(ip_interface(a).ip)) for a in own]
        sources += [("eth0", a) for a in _OUTSIDE if ip_address(a).version == family]
        sources += [("eth0", a) for a in self.node.neighbours if ip_address(a).version == family]
        for index, addresses in enumerate(self.node.pods):
            sources += [(f"veth{index}", a) for a in addresses if ip_address(a).version == family]
        if family == 4:
            sources += [("", "127.0.0.1"), ("eth1", "10.50.0.9"), ("eth0", "10.40.3.9")]
        return sources

    def cases(self, rng: random.Random) -> Iterator[Case]:
        """Endless cases: each door from each source first, then variations of them."""
        doors = self.doors()
        full = [
            (door, source)
            for door in doors
            for source in self.sources(ip_address(door[0]).version)
            if not _to_itself(source, door[0])
        ]
        rng.shuffle(full)
        for door, source in full:
            yield self._case(rng, door, source)
        while True:
            address, port, protocol = rng.choice(doors)
            family = ip_address(address).version
            if rng.random() < 0.25:
                port = rng.choice((22, 53, 80, 443, 8080, 10250, 30000, 31830, 65535))
            if rng.random() < 0.2:
                address = rng.choice([a for a in _ELSEWHERE if ip_address(a).version == family])
            if rng.random() < 0.2:
                protocol = rng.choice((Protocol.TCP, Protocol.UDP, Protocol.SCTP, Protocol.ICMP))
            source = rng.choice(self.sources(family))
            if not _to_itself(source, address):
                yield self._case(rng, (address, port, protocol), source, True)

    @staticmethod
    def _case(
        rng: random.Random,
        door: tuple[str, int, int],
        source: tuple[str, str],
        vary: bool = False,
    ) -> Case:
        address, port, protocol = door
        ingress, src = source
        if protocol == Protocol.ICMP and ip_address(address).version == 6:
            protocol = Protocol.ICMPV6
        icmp = protocol in (Protocol.ICMP, Protocol.ICMPV6)
        flags = TcpFlags.SYN
        if vary and rng.random() < 0.3:
            flags = rng.choice(
                (TcpFlags.ACK, TcpFlags.SYN | TcpFlags.ACK, TcpFlags.RST, TcpFlags.FIN)
            )
        return Case(
            ingress=ingress,
            packet=Packet(
                src=ip_address(src),
                dst=ip_address(address),
                protocol=protocol,
                sport=None if icmp else rng.randrange(1024, 65536),
                dport=None if icmp else port,
                icmp_type=(8 if protocol == Protocol.ICMP else 128) if icmp else None,
                icmp_code=0 if icmp else None,
                icmp_id=rng.randrange(65536) if icmp else None,
                tcp_flags=flags,
                ttl=64,
            ),
            label=f"{src} ({ingress or 'local'}) to {address}:{port}/{protocol}",
        )


def _to_itself(source: tuple[str, str], address: str) -> bool:
    """A pod's packet to its own address, which never leaves the pod."""
    return source[0].startswith("veth") and ip_address(source[1]) == ip_address(address)


_OUTSIDE = ("203.0.113.10", "192.0.2.10", "198.51.100.7", "10.142.0.2", "10.40.1.10", "10.40.2.10",
            "2001:db8:113::10", "fd00:40:1::10")  # fmt: skip
_ELSEWHERE = ("8.8.8.8", "10.43.240.99", "10.43.255.254", "10.142.0.99", "10.40.9.9", "127.0.0.1",
              "255.255.255.255", "224.0.0.5", "10.142.0.255", "2001:db8::1", "fd00:43::99",
              "fd00:40:1::10")  # fmt: skip
_NODE_ADDRESSES = ("10.142.0.6", "10.142.0.7", "10.142.0.8", "10.142.0.2", "fd00:142::",
                   "fd00:142::1",
                   "fd00:142::2", "fd00:142::ff")  # fmt: skip


def worlds() -> list[World]:
    """Every node of every dump."""
    return [
        World(folder, home.name.removeprefix("node-"))
        for folder in sorted(WORLDS.iterdir())
        for home in sorted(folder.glob("node-*"))
    ]
