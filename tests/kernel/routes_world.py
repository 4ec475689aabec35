"""Random network configurations, put into a namespace of their own and read back from it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import groupby
from pathlib import Path
from random import Random
from typing import TypeVar

from gketrace.snapshot import NetnsSnapshot, Unavailable
from gketrace.trace import NetnsRef
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.reader import KernelReader
from gketrace_agent.observe.addresses import observe_addresses
from gketrace_agent.observe.links import observe_links
from gketrace_agent.observe.neighbours import observe_neighbours
from gketrace_agent.observe.routes import observe_routes
from gketrace_agent.observe.rules import observe_rules

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
TABLES = (254, 254, 254, 100, 101, 253)
MARKS = (0, 0, 1, 2, 0x100, 0x101, 0x4000)
UIDS = (0, 1000)
PORTS = (0, 53, 80, 443, 8080)


def in_new_netns(function: Callable[[], T]) -> T:
    """Runs `function` in a thread in a new network namespace, which ends with the thread."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "unshare")
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def sysctl(name: str, value: int | str) -> None:
    Path("/proc/sys", *name.split(".")).write_text(str(value))


def ip_batch(commands: list[str]) -> None:
    """Runs ip commands in order; a leading -4 or -6 names the family.

    What the kernel refuses (a gateway that is not on link, say) is left out of the world.
    """
    for option, group in groupby(commands, key=_family):
        subprocess.run(
            ["ip", *option, "-force", "-batch", "-"],
            input="".join(f"{line.removeprefix('-4 ').removeprefix('-6 ')}\n" for line in group),
            text=True,
            capture_output=True,
            check=False,
        )


def _family(command: str) -> tuple[str, ...]:
    return (command[:2],) if command.startswith("-") else ()


class World:
    """One random configuration; `build` must run inside its namespace."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.devices: list[str] = []
        self.own4: list[tuple[str, IPv4Address, int]] = []
        self.own6: list[tuple[str, IPv6Address, int]] = []
        self.commands: list[str] = []
        self.prefixes: dict[int, list[tuple[str, int]]] = {4: [], 6: []}

    # -- building ------------------------------------------------------------------------------

    def build(self) -> None:
        sysctl("net.ipv6.conf.default.accept_dad", 0)
        sysctl("net.ipv6.conf.default.router_solicitations", 0)
        r = self.random
        self._links()
        self._addresses()
        self._up()
        ip_batch(self.commands)
        self.commands = []
        self._sysctls()
        self._wait_for_addresses()
        for _ in range(r.choice((0, 4, 10, 20))):
            self._route4()
        for _ in range(r.choice((0, 4, 10, 20))):
            self._route6()
        if r.random() < 0.75:
            for _ in range(r.randint(1, 10)):
                self._rule(4)
            for _ in range(r.randint(1, 10)):
                self._rule(6)
        if r.random() < 0.1:
            family = r.choice(("-4", "-6"))
            self.commands += [
                f"{family} rule add pref {r.choice((5, 200))} lookup local",
                f"{family} rule del pref 0",
            ]
        self._neighbours()
        ip_batch(self.commands)
        if r.random() < 0.4:
            self._late_downs()
        self._settle()

    def _links(self) -> None:
        r = self.random
        for i in range(r.randint(2, 5)):
            name = f"e{i}"
            mtu = r.choice((1500, 1500, 1460, 1280, 9000))
            self.commands.append(f"link add {name} mtu {mtu} type veth peer name p{i} mtu {mtu}")
            self.devices.append(name)
            if r.random() < 0.2:
                self.commands.append(f"link set {name} group {r.choice((5, 6))}")
        if r.random() < 0.4:
            self.commands.append("link add br0 type bridge")
            self.commands.append("link set p0 master br0")
            self.devices.append("br0")

    def _addresses(self) -> None:
        r = self.random
        for position, name in enumerate([*self.devices, "lo"]):
            for _ in range(r.choice((0, 1, 1, 2, 3)) if name != "lo" else r.choice((0, 0, 1))):
                self._address4(name, position)
            for _ in range(r.choice((0, 1, 1, 2)) if name != "lo" else r.choice((0, 0, 1))):
                self._address6(name, position)

    def _address4(self, name: str, position: int) -> None:
        r = self.random
        length = 32 if name == "lo" else r.choice((24, 24, 24, 16, 30, 31, 32))
        address = IPv4Address(
            (10 << 24) | (position << 16) | (r.randint(0, 1) << 8) | r.randint(1, 250)
        )
        scope = r.choice(("", "", "", "", " scope link", " scope host"))
        peer = ""
        if length == 32 and name != "lo" and r.random() < 0.5:
            peer = f" peer 10.{position}.7.{r.randint(1, 250)}/{r.choice((32, 24))}"
            self.commands.append(f"addr add {address}{peer} dev {name}{scope}")
        else:
            broadcast = r.choice((" brd +", "", " brd 10.250.0.255"))
            noroute = r.choice(("", "", "", " noprefixroute"))
            self.commands.append(
                f"addr add {address}/{length}{broadcast} dev {name}{scope}{noroute}"
            )
        self.own4.append((name, address, length))

    def _address6(self, name: str, position: int) -> None:
        r = self.random
        base = r.choice((0xFD00 << 112, 0x20010DB8 << 96, 0x2002 << 112))
        host = r.randint(1, 250)
        address = IPv6Address(base | (position << 64) | host)
        length = 128 if name == "lo" else r.choice((64, 64, 64, 112, 128, 48))
        extra = r.choice(("", "", "", " preferred_lft 0", " noprefixroute"))
        self.commands.append(f"-6 addr add {address}/{length} dev {name} nodad{extra}")
        self.own6.append((name, address, length))

    def _up(self) -> None:
        r = self.random
        if r.random() < 0.95:
            self.commands.append("link set lo up")
        for name in self.devices:
            peer = "p" + name[1:]
            if r.random() < 0.93:
                self.commands.append(f"link set {name} up")
            if name != "br0" and r.random() < 0.85:
                self.commands.append(f"link set {peer} up")

    def _sysctls(self) -> None:
        r = self.random
        for who in ("all", *self.devices, "lo"):
            for key, values in (
                ("rp_filter", (0, 0, 1, 2)),
                ("accept_local", (0, 0, 0, 1)),
                ("src_valid_mark", (0, 1)),
                ("send_redirects", (0, 1)),
                ("ignore_routes_with_linkdown", (0, 1)),
                ("bc_forwarding", (0, 0, 1)),
            ):
                sysctl(f"net.ipv4.conf.{who}.{key}", r.choice(values))
            if r.random() < 0.1:
                sysctl(f"net.ipv4.conf.{who}.route_localnet", 1)
            sysctl(f"net.ipv6.conf.{who}.ignore_routes_with_linkdown", r.choice((0, 1)))
            if r.random() < 0.1:
                sysctl(f"net.ipv6.conf.{who}.use_oif_addrs_only", 1)
        sysctl("net.ipv4.ip_forward", r.choice((0, 1, 1, 1)))
        sysctl("net.ipv6.conf.all.forwarding", r.choice((0, 1, 1)))
        for name in self.devices:
            if r.random() < 0.15:
                sysctl(f"net.ipv4.conf.{name}.forwarding", r.choice((0, 1)))
        sysctl("net.ipv4.fib_multipath_use_neigh", r.choice((0, 0, 1)))

    def _gateway4(self) -> tuple[str, IPv4Address]:
        r = self.random
        if self.own4 and r.random() < 0.85:
            name, address, length = r.choice(self.own4)
            net = IPv4Network((address, length), strict=False)
            host = int(net.network_address) + r.randint(1, max(1, net.num_addresses - 2))
            return name, IPv4Address(host)
        return r.choice(self.devices), IPv4Address((10 << 24) | (200 << 16) | r.randint(1, 250))

    def _hop4(self) -> str:
        r = self.random
        name, gateway = self._gateway4()
        if r.random() < 0.3 or name == "lo":
            return f"dev {r.choice([*self.devices, *self.devices, 'lo'])}"
        onlink = " onlink" if r.random() < 0.3 else ""
        return f"via {gateway} dev {name}{onlink}"

    def _prefix4(self) -> str:
        r = self.random
        choice = r.random()
        if choice < 0.2:
            return "default"
        if choice < 0.3:
            return r.choice(("127.1.0.0/16", "127.0.0.0/9", "224.0.0.0/4", "239.1.0.0/16"))
        address = (
            r.choice((10, 10, 10, 192)) << 24
            | r.randint(0, 6) << 16
            | r.randint(0, 2) << 8
            | r.randint(0, 255)
        )
        if choice < 0.4 and self.own4:
            address = int(r.choice(self.own4)[1])
        length = r.choice((8, 9, 16, 17, 24, 25, 28, 32, 32))
        return str(IPv4Network((address, length), strict=False))

    def _place(self, family: int) -> tuple[str, int]:
        """A prefix and a table; often those of an earlier route, for metric and TOS to decide."""
        r = self.random
        earlier = self.prefixes[family]
        if earlier and r.random() < 0.4:
            return r.choice(earlier)
        prefix = self._prefix4() if family == 4 else self._prefix6()
        earlier.append((prefix, r.choice(TABLES)))
        return earlier[-1]

    def _route4(self) -> None:
        r = self.random
        prefix, table = self._place(4)
        words = [f"table {table}"]
        if r.random() < 0.6:
            words.append(f"metric {r.choice((10, 20, 100))}")
        if r.random() < 0.1:
            words.append(f"tos {r.choice(('0x10', '0x08', '0x04'))}")
        if r.random() < 0.2:
            words.append(f"mtu {r.choice((1400, 1300))}")
        if r.random() < 0.2 and self.own4:
            words.append(f"src {r.choice(self.own4)[1]}")
        verb = r.choice(("add", "add", "append"))
        choice = r.random()
        if choice < 0.2:
            kind = r.choice(("unreachable", "blackhole", "prohibit", "throw"))
            self.commands.append(f"route {verb} {kind} {prefix} {' '.join(words)}")
        elif choice < 0.25:
            local = r.choice((f"10.{r.randint(0, 6)}.0.0/16", "192.0.2.0/24", "10.8.0.1/32"))
            device = r.choice([*self.devices, "lo"])
            where = r.choice(("local", "100"))
            self.commands.append(f"route {verb} local {local} dev {device} table {where}")
        elif choice < 0.45:
            hops = " ".join(
                f"nexthop {self._hop4()} weight {r.randint(1, 5)}" for _ in range(r.randint(2, 3))
            )
            self.commands.append(f"route {verb} {prefix} {' '.join(words)} {hops}")
        else:
            self.commands.append(f"route {verb} {prefix} {self._hop4()} {' '.join(words)}")

    def _hop6(self) -> str:
        r = self.random
        if r.random() < 0.3 or not self.own6:
            return f"dev {r.choice([*self.devices, *self.devices, 'lo'])}"
        name, address, _ = r.choice(self.own6)
        if name == "lo" or r.random() < 0.2:
            return f"via fe80::{r.randint(1, 9)} dev {r.choice(self.devices)}"
        gateway = IPv6Address((int(address) >> 16 << 16) | r.randint(0x300, 0x3FF))
        onlink = " onlink" if r.random() < 0.3 else ""
        return f"via {gateway} dev {name}{onlink}"

    def _prefix6(self) -> str:
        r = self.random
        if r.random() < 0.25:
            return "default"
        base = r.choice((0xFD00 << 112, 0xFD00 << 112, 0x20010DB8 << 96))
        address = base | r.randint(0, 6) << 64 | r.randint(0, 255)
        length = r.choice((8, 16, 32, 48, 64, 64, 112, 128))
        return str(IPv6Network((address, length), strict=False))

    def _route6(self) -> None:
        r = self.random
        prefix, table = self._place(6)
        words = [f"table {table}"]
        if r.random() < 0.6:
            words.append(f"metric {r.choice((10, 20, 1024))}")
        if r.random() < 0.2:
            words.append(f"mtu {r.choice((1400, 1300))}")
        if r.random() < 0.2 and self.own6:
            words.append(f"src {r.choice(self.own6)[1]}")
        # Never append: of several routes made siblings one by one the kernel shows the first one's
        # source only, and leaves other routes between them out of its dump.
        verb = "add"
        if r.random() < 0.1:
            prefix = f"{prefix} from {r.choice(('fd00::/16', 'fd00:0:0:1::/64', '2001:db8::/32'))}"
        choice = r.random()
        if choice < 0.2:
            kind = r.choice(("unreachable", "blackhole", "prohibit", "throw"))
            self.commands.append(f"-6 route {verb} {kind} {prefix} {' '.join(words)}")
        elif choice < 0.25:
            kind = r.choice(("local", "anycast"))
            address = f"fd00:0:0:{r.randint(0, 6)}::{r.randint(0, 255):x}"
            where = f"dev {r.choice([*self.devices, 'lo'])} table {r.choice(('local', '100'))}"
            self.commands.append(f"-6 route {verb} {kind} {address} {where}")
        elif choice < 0.45:
            hops = " ".join(
                f"nexthop {self._hop6()} weight {r.randint(1, 5)}" for _ in range(r.randint(2, 3))
            )
            self.commands.append(f"-6 route {verb} {prefix} {' '.join(words)} {hops}")
        else:
            self.commands.append(f"-6 route {verb} {prefix} {self._hop6()} {' '.join(words)}")

    def _rule(self, family: int) -> None:
        r = self.random
        words = [f"pref {r.choice((10, 50, 100, 100, 1000, 32765, 32800))}"]
        for chance, make in (
            (0.2, lambda: f"from {self._rule_prefix(family)}"),
            (0.15, lambda: f"to {self._rule_prefix(family)}"),
            (0.15, lambda: f"iif {r.choice([*self.devices, 'lo', 'lo', 'gone'])}"),
            (0.12, lambda: f"oif {r.choice([*self.devices, 'lo', 'gone'])}"),
            (
                0.3,
                lambda: r.choice(("fwmark 1", "fwmark 2", "fwmark 0x100/0x100", "fwmark 0/0xff")),
            ),
            (0.1, lambda: f"tos {r.choice(('0x10', '0x08'))}"),
            (0.15, lambda: f"ipproto {r.choice(('tcp', 'udp', 'icmp'))}"),
            (0.15, lambda: f"dport {r.choice(('80', '53-443'))}"),
            (0.1, lambda: f"sport {r.choice(('80', '53-443'))}"),
            (0.1, lambda: f"uidrange {r.choice(('0-0', '1000-2000'))}"),
        ):
            if r.random() < chance:
                words.append(make())
        action = r.random()
        if action < 0.6:
            words.append(f"lookup {r.choice((254, 100, 101, 100, 101, 77))}")
            if r.random() < 0.25:
                words.append(f"suppress_prefixlength {r.choice((0, 8, 16, 24))}")
            if r.random() < 0.15:
                words.append(f"suppress_ifgroup {r.choice((0, 5))}")
        elif action < 0.7:
            words.append(f"goto {r.choice((100, 1000, 32766, 32765, 40000))}")
        elif action < 0.75:
            words.append("nop")
        else:
            words.append(r.choice(("unreachable", "blackhole", "prohibit")))
        invert = "not " if r.random() < 0.15 else ""
        self.commands.append(f"-{family} rule add {invert}{' '.join(words)}")

    def _rule_prefix(self, family: int) -> str:
        r = self.random
        if family == 4:
            return f"10.{r.randint(0, 6)}.0.0/{r.choice((8, 16, 16, 24))}"
        return f"{r.choice(('fd00', '2001:db8'))}:0:0:{r.randint(0, 6)}::/{r.choice((16, 64, 64))}"

    def _neighbours(self) -> None:
        r = self.random
        for _ in range(r.randint(0, 4)):
            name, gateway = self._gateway4()
            state = r.choice(
                (
                    "permanent lladdr 02:00:00:00:00:01",
                    "reachable lladdr 02:00:00:00:00:02",
                    "stale lladdr 02:00:00:00:00:03",
                )
            )
            if name != "lo":
                self.commands.append(f"neigh replace {gateway} dev {name} nud {state}")

    def _late_downs(self) -> None:
        r = self.random
        name = r.choice(self.devices)
        if name != "br0":
            ip_batch(
                [f"link set {r.choice((name, 'p' + name[1:]))} {r.choice(('down', 'down', 'up'))}"]
            )

    def _wait_for_addresses(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            shown = subprocess.run(
                ["ip", "-6", "-o", "addr", "show", "tentative"], capture_output=True, text=True,
                check=True,
            ).stdout  # fmt: skip
            pending = [line for line in shown.splitlines() if "dadfailed" not in line]
            if not pending:
                return
            time.sleep(0.01)

    def _settle(self) -> None:
        """Waits until routes, links and addresses have stopped changing."""
        before = ""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            now = "".join(
                subprocess.run(["ip", *what], capture_output=True, text=True, check=True).stdout
                for what in (
                    ("-o", "link"), ("route", "show", "table", "all"),
                    ("-6", "route", "show", "table", "all"), ("-o", "addr"),
                )
            )  # fmt: skip
            if now == before:
                return
            before = now
            time.sleep(0.05)


def read_snapshot() -> NetnsSnapshot:
    """The routing part of the calling thread's namespace, by the agent's own observers."""
    reader = KernelReader(HostPaths(), os.stat("/proc/thread-self/ns/net").st_ino)
    here = NetnsRef(node="world")
    try:
        links = observe_links(reader, here)
        return NetnsSnapshot(
            netns=here,
            links=links.links,
            addresses=observe_addresses(reader),
            routes=observe_routes(reader, links.name),
            rules=observe_rules(reader),
            neighbours=observe_neighbours(reader),
            fdb=(),
            sysctls=read_sysctls(),
            sockets=(),
            rulesets=(),
            conntrack=Unavailable(reason="not asked for"),
        )
    finally:
        reader.close()


def read_sysctls() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("net.ipv4.ip_forward", "net.ipv4.fib_multipath_use_neigh"):
        found[name] = Path("/proc/sys", *name.split(".")).read_text().strip()
    for family in (4, 6):
        for directory in Path(f"/proc/sys/net/ipv{family}/conf").iterdir():
            for key in _KEYS[family]:
                file = directory / key
                if file.exists():
                    name = f"net.ipv{family}.conf.{directory.name}.{key}"
                    found[name] = file.read_text().strip()
    return found


_KEYS = {
    4: (
        "rp_filter", "accept_local", "src_valid_mark", "send_redirects", "forwarding",
        "ignore_routes_with_linkdown", "bc_forwarding", "route_localnet",
    ),
    6: (
        "forwarding", "force_forwarding", "disable_ipv6", "mtu", "use_oif_addrs_only",
        "use_tempaddr", "ignore_routes_with_linkdown",
    ),
}  # fmt: skip
