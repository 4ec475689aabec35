"""Every sysctl that the simulator asks for is one that the agent reads."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import gketrace.simulate
from gketrace.packet import Packet, Protocol, TcpFlags
from gketrace.simulate.walk import WalkQuery, walk
from gketrace.snapshot import NetnsSnapshot, Unavailable
from gketrace.trace import Ingress, NetnsRef
from gketrace_agent.observe.links import _INET6_CONF, _INET_CONF
from gketrace_agent.observe.snapshot import Observer
from gketrace_agent.observe.sysctls import NAMES
from tests.agent.observe.conftest import World

SIMULATOR = Path(gketrace.simulate.__file__).parent
_WHOLE = re.compile(r"net(\.[a-z0-9_-]+){2,}(?<!-)")
_CONF_CALLS = frozenset({"conf", "conf_or", "conf_citations"})


class Recording(Mapping[str, str]):
    """Sysctls that remember which were asked for."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values_read = values
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.asked.add(name)
        return self.values_read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_read)

    def __len__(self) -> int:
        return len(self.values_read)


class View:
    """The one namespace."""

    node = "node"

    def __init__(self, shot: NetnsSnapshot) -> None:
        self._shot = shot

    def snapshot(self, netns: NetnsRef) -> NetnsSnapshot | Unavailable:
        if netns == self._shot.netns:
            return self._shot
        return Unavailable(reason=f"{netns} is not here")


def written() -> Iterator[tuple[str, str]]:
    """(where, name) of each sysctl that the simulator's source names; ``*`` is an interface."""
    for path in sorted(SIMULATOR.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(SIMULATOR)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if _WHOLE.fullmatch(node.value):
                    yield where, node.value
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in _CONF_CALLS
            ):
                literals = [a.value for a in node.args if isinstance(a, ast.Constant)]
                if len(literals) < 2:
                    continue  # conf_or's and conf_citations' own calls, which hand names on
                family, *names = literals
                who = "all" if names[0] == "all" or node.func.attr != "conf" else "*"
                key = names[1] if names[0] == "all" else names[0]
                yield where, f"net.ipv{family}.conf.{who}.{key}"
                if who == "all" and node.func.attr == "conf_or":
                    yield where, f"net.ipv{family}.conf.*.{key}"


def test_the_agent_reads_every_sysctl_that_the_simulator_names() -> None:
    single = {f"net.ipv4.conf.*.{key}" for key in _INET_CONF.values()}
    single |= {f"net.ipv6.conf.*.{key}" for key in _INET6_CONF.values()}
    found = dict(written())
    assert len(set(found.values())) > 20
    # A citation of ``all`` is shown where there is a value: not every name has one there.
    unread = {
        where: name
        for where, name in found.items()
        if name not in NAMES and name.replace(".all.", ".*.") not in single
    }
    assert unread == {}
    assert {f"net.bridge.bridge-nf-call-{it}" for it in ("iptables", "ip6tables")} <= set(NAMES)


def test_walks_ask_only_for_sysctls_that_were_read(world: World) -> None:
    world.node.run("sysctl", "-q", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    with Observer().observe(world.node.namespace()) as observation:
        shot = observation.snapshot
    assert not isinstance(shot.sysctls, Unavailable)
    asked: set[str] = set()
    for packet in packets():
        for interface in ("", "eth0", "vethptp", "vethbridged", "lo"):
            recording = Recording(shot.sysctls)
            here = replace(shot, sysctls=recording)
            walk(
                View(here),
                WalkQuery(
                    ingress=Ingress(netns=shot.netns, interface=interface),
                    packet=packet,
                    use_conntrack=False,
                ),
            )
            asked |= recording.asked
    assert len(asked) > 20
    absent = asked - set(shot.sysctls)
    there = {
        name
        for name in absent
        # A kernel of this machine that has the file would have had it read.
        if os.path.exists("/proc/sys/" + name.replace(".", "/"))
    }
    assert there == set()


def packets() -> Iterator[Packet]:
    """To this node, through it, and to what nobody has; of both families."""
    sources = ("0.0.0.0", "10.40.0.7", "10.40.0.6", "10.142.0.2", "127.0.0.1")
    targets = (
        "10.142.0.9",
        "10.142.0.255",
        "10.40.0.6",
        "10.40.0.7",
        "127.0.0.1",
        "8.8.8.8",
        "255.255.255.255",
        "224.0.0.5",
    )
    for src in sources:
        for dst in targets:
            yield _syn(src, dst)
    for src in ("::", "fd00:142::2", "fd00:142::8", "::1", "fe80::1"):
        for dst in ("fd00:142::8", "fd00:142::9", "2001:db8::1", "::1", "ff02::1"):
            yield _syn(src, dst)
    for protocol, kind, src, dst in (
        (Protocol.ICMP, 8, "10.142.0.2", "10.142.0.9"),
        (Protocol.ICMPV6, 128, "fd00:142::2", "fd00:142::8"),
    ):
        yield Packet(
            src=ip_address(src),
            dst=ip_address(dst),
            protocol=protocol,
            icmp_type=kind,
            icmp_code=0,
            icmp_id=1,
            ttl=64,
        )


def _syn(src: str, dst: str) -> Packet:
    return Packet(
        src=ip_address(src),
        dst=ip_address(dst),
        protocol=Protocol.TCP,
        sport=40000,
        dport=80,
        tcp_flags=TcpFlags.SYN,
        ttl=64,
    )
