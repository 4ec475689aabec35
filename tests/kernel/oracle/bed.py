"""The test bed: one namespace under test, shaped as a GKE node, and its surroundings.

The node has ``eth0`` (to the network), ``eth1`` (a second network) and ``cbr0`` with three pods'
veths.  All their other ends lie in one namespace without addresses: it answers nothing, so the
only packets are the ones that the oracle sends.  Neighbours and FDB entries are static.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_interface
from typing import Any, TypeVar

from tests.kernel.oracle.inject import raw_socket
from tests.kernel.oracle.tracing import LegacyLog, TraceSocket

__all__ = ["Bed", "Node"]

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)

TRACE_TABLE = "gktrace"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Addresses of the node under test."""

    name: str = "node"
    eth0: tuple[str, ...] = ("10.142.0.8/24", "fd00:142::8/64")
    eth1: tuple[str, ...] = ("10.50.0.1/24", "fd00:50::1/64")
    cbr0: tuple[str, ...] = ("10.40.0.1/24", "fd00:40::1/64")
    pods: tuple[tuple[str, ...], ...] = (
        ("10.40.0.6", "fd00:40::6"),
        ("10.40.0.10", "fd00:40::10"),
        ("10.40.0.20", "fd00:40::20"),
    )
    gateway: tuple[str, ...] = ("10.142.0.2", "fd00:142::2")
    neighbours: tuple[str, ...] = ("10.142.0.6", "10.142.0.7", "fd00:142::6", "fd00:142::7")
    local: tuple[str, ...] = ()
    """Extra local routes on eth0, as the guest agent adds them."""

    def reachable_from_pod(self, address: str) -> bool:
        """False for an address of the pods' own network that nobody has: it is never sent to."""
        wanted = ip_address(address)
        for bridge in map(ip_interface, self.cbr0):
            if wanted in bridge.network:
                known = {ip_address(a) for pod in self.pods for a in pod} | {bridge.ip}
                return wanted in known
        return True


@dataclass
class Bed:
    """Namespaces under test; use as a context manager."""

    node: Node = field(default_factory=Node)
    prefix: str = field(default_factory=lambda: f"gkorc-{secrets.token_hex(3)}")

    def __post_init__(self) -> None:
        self.dut = f"{self.prefix}-d"
        self.peers = f"{self.prefix}-p"
        self.macs: dict[str, str] = {}
        self._senders: dict[str, socket.socket] = {}
        self._raw: dict[tuple[str, int], socket.socket] = {}
        self.trace: TraceSocket
        self.log: LegacyLog

    def __enter__(self) -> Bed:
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for sender in [*self._senders.values(), *self._raw.values()]:
            sender.close()
        for name in ("trace", "log"):
            if hasattr(self, name):
                getattr(self, name).close()
        for name in (self.dut, self.peers):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def _build(self) -> None:
        for name in (self.dut, self.peers):
            subprocess.run(["ip", "netns", "add", name], check=True)
        links = {"eth0": "p-eth0", "eth1": "p-eth1"}
        links |= {f"veth{i}": f"p-pod{i}" for i in range(len(self.node.pods))}
        lines = [
            f"link add {here} type veth peer name {there} netns {self.peers}"
            for here, there in links.items()
        ]
        lines.append("link add cbr0 type bridge")
        lines += [f"link set veth{i} master cbr0" for i in range(len(self.node.pods))]
        lines += [f"link set {name} up" for name in ("lo", "cbr0", *links)]
        for name in ("eth0", "eth1", "cbr0"):
            for address in getattr(self.node, name):
                nodad = " nodad" if ":" in address else ""
                lines.append(f"addr add {address} dev {name}{nodad}")
        self.in_dut(_sysctls)
        self.batch(self.peers, [], before="net.ipv6.conf.all.disable_ipv6=1")
        self.batch(self.dut, lines)
        self.batch(self.peers, [f"link set {name} up" for name in links.values()])
        self._learn_macs(links)
        lines = [f"route add default via {gateway}" for gateway in self.node.gateway]
        for address in dict.fromkeys((*self.node.gateway, *self.node.neighbours)):
            lines.append(f"neigh add {address} lladdr {self.macs['p-eth0']} dev eth0 nud permanent")
        for i, addresses in enumerate(self.node.pods):
            mac = self.macs[f"p-pod{i}"]
            lines += [f"neigh add {a} lladdr {mac} dev cbr0 nud permanent" for a in addresses]
        for address in self.node.eth1:
            peer = ip_interface(address).ip + 1
            lines.append(f"neigh add {peer} lladdr {self.macs['p-eth1']} dev eth1 nud permanent")
        lines += [f"route add local {a} dev eth0 table local proto 66" for a in self.node.local]
        self.batch(self.dut, lines)
        fdb = [
            f"fdb add {self.macs[f'p-pod{i}']} dev veth{i} master static"
            for i in range(len(self.node.pods))
        ]
        fdb += [f"link set dev veth{i} hairpin on" for i in range(len(self.node.pods))]
        _batch(["bridge", "-n", self.dut, "-batch", "-"], fdb)
        for name in links.values():
            self._senders[name] = self.run(self.peers, lambda name=name: _packet_socket(name))
        self.trace = self.run(self.dut, TraceSocket)
        self.log = LegacyLog()

    def _learn_macs(self, links: dict[str, str]) -> None:
        for namespace in (self.dut, self.peers):
            text = subprocess.run(
                ["ip", "-n", namespace, "-j", "link"], check=True, capture_output=True
            ).stdout
            self.macs |= {link["ifname"]: link["address"] for link in json.loads(text)}

    def batch(self, namespace: str, lines: Sequence[str], *, before: str = "") -> None:
        """`ip -batch` in a namespace; `before` is one ``sysctl=value`` set first."""
        if before:
            name, value = before.split("=")
            path = "/proc/sys/" + name.replace(".", "/")
            self.run(namespace, lambda: _write(path, value))
        if lines:
            _batch(["ip", "-n", namespace, "-batch", "-"], lines)

    def run(self, namespace: str, call: Callable[[], T]) -> T:
        """`call()` in a thread of its own that has entered the namespace."""
        out: list[Any] = []

        def body() -> None:
            fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
            try:
                if _LIBC.setns(fd, _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
                out.append((True, call()))
            except BaseException as error:  # noqa: BLE001 - handed to the caller below
                out.append((False, error))
            finally:
                os.close(fd)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        done, value = out[0]
        if not done:
            raise value
        return value  # type: ignore[no-any-return]

    def in_dut(self, call: Callable[[], T]) -> T:
        return self.run(self.dut, call)

    def command(self, argv: Sequence[str], *, text: str = "") -> str:
        """Runs a command in the namespace under test.  Raises RuntimeError with its stderr."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.dut, *argv],
            check=False,
            input=text,
            text=True,
            capture_output=True,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
        return done.stdout

    def trace_table(self, families: Sequence[str] = ("ip", "ip6")) -> None:
        """Turns on the trace of every packet, and shows each as it leaves."""
        self.command(["nft", "-f", "-"], text="".join(_TRACE % family for family in families))

    def peer_mac(self, ingress: str) -> str:
        """The source MAC of frames that come in by `ingress`."""
        name = f"p-pod{ingress[4:]}" if ingress.startswith("veth") else f"p-{ingress}"
        return self.macs[name]

    def handles(self, family: str) -> dict[tuple[str, str, int], int]:
        """(table, chain, rule handle) → 1-based position, of every nftables rule."""
        text = self.command(["nft", "-j", "-a", "list", "ruleset", family])
        positions: dict[tuple[str, str, int], int] = {}
        count: dict[tuple[str, str], int] = {}
        for item in json.loads(text or '{"nftables": []}')["nftables"]:
            rule = item.get("rule")
            if rule is not None:
                chain = rule["table"], rule["chain"]
                count[chain] = count.get(chain, 0) + 1
                positions[(*chain, rule["handle"])] = count[chain]
        return positions

    def send(self, ingress: str, data: bytes, *, mark: int = 0) -> None:
        """One IP packet into the node: through an interface, or made by a local process ("").

        A pod's frame to another pod of the node goes to that pod's MAC, as its on-link route says;
        all else to the bridge's own.
        """
        family = data[0] >> 4
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        sizes = (12, 4) if family == 4 else (8, 16)
        src, dst = (
            socket.inet_ntop(kind, data[at : at + sizes[1]]) for at in (sizes[0], sum(sizes))
        )
        if not ingress:
            if (src, mark) not in self._raw:
                self._raw[src, mark] = self.in_dut(lambda: raw_socket(family, src, mark))
            self._raw[src, mark].sendto(data, (dst, 0))
            return
        pod = ingress.startswith("veth")
        peer = f"p-pod{ingress[4:]}" if pod else f"p-{ingress}"
        receiver = self.macs["cbr0" if pod else ingress]
        if pod:
            for index, addresses in enumerate(self.node.pods):
                if dst in {str(ip_address(address)) for address in addresses}:
                    receiver = self.macs[f"p-pod{index}"]
        head = _mac(receiver) + _mac(self.macs[peer])
        self._senders[peer].send(head + (b"\x08\x00" if family == 4 else b"\x86\xdd") + data)


_TRACE = f"""
table %s {TRACE_TABLE} {{
    chain first-prerouting {{
        type filter hook prerouting priority -450; policy accept;
        meta nftrace set 1
    }}
    chain first-output {{
        type filter hook output priority -450; policy accept;
        meta nftrace set 1
    }}
    chain last-input {{
        type filter hook input priority 450; policy accept;
        counter
    }}
    chain last-postrouting {{
        type filter hook postrouting priority 450; policy accept;
        counter
    }}
}}
"""


def _packet_socket(name: str) -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    made.bind((name, 0))
    return made


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _write(path: str, value: str) -> None:
    with open(path, "w") as file:
        file.write(value)


def _sysctls() -> None:
    for name, value in (
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv6/conf/all/accept_dad", "0"),
        ("net/ipv6/conf/default/accept_dad", "0"),
        ("net/ipv6/conf/default/router_solicitations", "0"),
        ("net/ipv4/conf/all/rp_filter", "0"),
        ("net/ipv4/conf/default/rp_filter", "0"),
        ("net/ipv4/icmp_ratelimit", "0"),
    ):
        _write(f"/proc/sys/{name}", value)
    for name in ("net/netfilter/nf_log/2", "net/netfilter/nf_log/10"):
        module = "nf_log_ipv4" if name.endswith("/2") else "nf_log_ipv6"
        if os.path.exists(f"/proc/sys/{name}"):
            _write(f"/proc/sys/{name}", module)


def _batch(argv: Sequence[str], lines: Sequence[str]) -> None:
    done = subprocess.run(
        argv, check=False, input="\n".join(lines) + "\n", text=True, capture_output=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
