"""Netlink: what sockets of all three kinds read when the kernel's messages are damaged.

Seeds are datagrams of a real namespace.  The sockets are ours, with a kernel behind them that
answers every request with the input.
"""

from __future__ import annotations

import functools
import itertools
import os
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from gketrace.trace import NetnsKind, NetnsRef
from gketrace_agent.kernel import netlink, rtnetlink
from gketrace_agent.kernel.conntrack_columns import Layouts
from gketrace_agent.kernel.conntrack_dump import BulkSocket, TableReading
from gketrace_agent.kernel.conntrack_events import EventSocket
from gketrace_agent.kernel.conntrack_request import KernelFilter
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netlink import NetlinkSocket
from gketrace_agent.kernel.netns import open_path, run_in_netns
from gketrace_agent.kernel.nfnetlink import NftTable, nft_generation, nft_tables
from gketrace_agent.kernel.nft_rules import nft_chains
from gketrace_agent.kernel.nft_rules.dump import RuleDump, head_of
from gketrace_agent.kernel.nft_rules.rule import RuleReader
from gketrace_agent.kernel.nft_rules.sets import SetNames
from gketrace_agent.kernel.nft_rules.words import NotRendered
from gketrace_agent.kernel.nft_tests import nft_tests
from gketrace_agent.observe.addresses import observe_addresses
from gketrace_agent.observe.conntrack_lines import render_batch
from gketrace_agent.observe.conntrack_records import pack_batch
from gketrace_agent.observe.fdb import observe_fdb
from gketrace_agent.observe.links import observe_links
from gketrace_agent.observe.neighbours import observe_neighbours
from gketrace_agent.observe.routes import observe_routes
from gketrace_agent.observe.rules import observe_rules
from tests.kernel.conntrack_made import Made, flows, make

__all__ = [
    "conntrack_seeds",
    "nftables_seeds",
    "read_conntrack",
    "read_events",
    "read_nftables",
    "read_route",
    "read_rules",
    "route_seeds",
    "rules_seeds",
]

_EXPRESSIONS: Final = struct.pack("=H", 4 | 0x8000)
"""The second half of the header of NFTA_RULE_EXPRESSIONS; the first is its length."""
_MARK: Final = struct.pack("=I", 0x7E5A_1D00)
"""Stands for the sequence number in inputs; it is the one that conntrack's socket begins with."""
_LINES: Final = """
link set lo up
link add br0 type bridge
link add v0 type veth peer name v1
link set v0 master br0
link add dm0 type dummy
link add link dm0 name dm0.7 type vlan id 7
link set br0 up
link set v0 up
link set v1 up
link set dm0 up
link set dm0.7 up
addr add 10.9.0.1/24 dev br0 label br0:x
addr add fd00:9::1/64 dev br0 nodad
addr add 10.8.0.1 peer 10.8.0.2 dev dm0
route add default via 10.9.0.254
route add 10.7.0.0/16 nexthop via 10.9.0.2 weight 2 nexthop via 10.9.0.3
route add blackhole 10.6.0.0/16
route add 10.5.0.0/24 via inet6 fd00:9::2 dev br0 mtu 1400
route add fd00:7::/32 via fd00:9::5
route add unreachable fd00:6::/32
route add 10.3.0.0/24 encap ip id 7 dst 10.9.0.7 dev br0
rule add fwmark 0x4000/0x4000 lookup 100 pref 50
rule add from 10.9.0.0/24 iif br0 ipproto tcp dport 80-90 prohibit pref 51
neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev br0 nud permanent
neigh add fd00:9::5 lladdr 02:00:00:00:00:05 dev br0 router nud permanent
"""
_SAVED: Final = Path(__file__).parents[1] / "data" / "rules" / "iptables-nft.txt"
"""Every match and target; those that name objects, which the namespace has not, are left out."""
_RULES: Final = """
table ip t { set s { type ipv4_addr; elements = { 10.0.0.1, 10.0.0.2 } }
 chain c { type filter hook input priority 0; ct l3proto ip tcp dport 80 accept
 meta l4proto tcp ip saddr @s counter drop; ip protocol udp udp dport 53 reject
 iiftype ether ct protocol tcp limit rate 5/second log prefix "x" accept } }
"""


@functools.cache
def _seeds() -> dict[str, list[bytes]]:
    name = f"gkfuzz-{os.getpid()}"
    saved = "\n".join(x for x in _SAVED.read_text().splitlines() if "gkt" not in x) + "\n"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for argv, text in (
            (["ip", "-n", name, "-force", "-batch", "-"], _LINES),
            (["ip", "netns", "exec", name, "nft", "-f", "-"], _RULES),
            (["ip", "netns", "exec", name, "iptables-nft-restore"], saved),
        ):
            # Not every kernel has every kind of route: those that it has are the seeds.
            subprocess.run(argv, input=text.encode(), check=False, capture_output=True)
        with open_path(Path("/run/netns", name)) as handle:
            return run_in_netns(handle, _record)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def _record() -> dict[str, list[bytes]]:
    """Runs in the namespace: what its kernel answers."""
    make(flows(60))
    make([Made(src="10.0.0.9", dst="10.0.0.10", protocol=p, sport=8, dport=8) for p in (1, 17, 47)])
    make([Made(src="fd00::9", dst="fd00::10", sport=8, dport=8, state=1)])
    kernel: dict[str, list[bytes]] = {"route": [], "nftables": [], "rules": [], "conntrack": []}
    dumps: tuple[tuple[int, str, Callable[[NetlinkSocket], object]], ...] = (
        (netlink.NETLINK_ROUTE, "route", rtnetlink.dump_links),
        (netlink.NETLINK_ROUTE, "route", rtnetlink.dump_addresses),
        (netlink.NETLINK_ROUTE, "route", lambda s: rtnetlink.dump_routes(s, 2)),
        (netlink.NETLINK_ROUTE, "route", lambda s: rtnetlink.dump_routes(s, 10)),
        (netlink.NETLINK_ROUTE, "route", lambda s: rtnetlink.dump_rules(s, 2)),
        (netlink.NETLINK_ROUTE, "route", lambda s: rtnetlink.dump_neighbours(s, 2)),
        (netlink.NETLINK_ROUTE, "route", lambda s: rtnetlink.dump_neighbours(s, 10)),
        (netlink.NETLINK_ROUTE, "route", rtnetlink.dump_fdb),
        (netlink.NETLINK_NETFILTER, "nftables", nft_generation),
        (netlink.NETLINK_NETFILTER, "nftables", nft_tables),
        (
            netlink.NETLINK_NETFILTER,
            "nftables",
            lambda s: nft_tests(s, NftTable(family="ip", name="t")),
        ),
        (netlink.NETLINK_NETFILTER, "rules", lambda s: nft_chains(s, 4)),
    )
    for protocol, group, dump in dumps:
        real = NetlinkSocket(protocol)
        recorder = _Recorder(real._socket)
        real._socket = recorder  # type: ignore[assignment]
        dump(real)
        real.close()
        kernel[group].append(recorder.heard())
    with RuleDump(socket.AF_INET) as rules:
        plain = rules._socket
        for table, chain in (("filter", "C1"), ("nat", "PREROUTING"), ("mangle", "PREROUTING")):
            rules._socket = recorder = _Recorder(plain)  # type: ignore[assignment]
            rules.rules(head_of(table, chain))
            kernel["rules"] += _messages(recorder.heard())
        rules._socket = plain
    bulk = BulkSocket()
    recorder = _Recorder(bulk._socket)
    bulk._socket = recorder  # type: ignore[assignment]
    for _ in bulk.dump(KernelFilter(), bytearray(2 << 20)):
        pass
    bulk.close()
    whole = recorder.heard()
    # Of one message each, and all together.
    kernel["conntrack"] = [whole, *_messages(whole)[:80]]
    return kernel


class _Recorder:
    """A socket that remembers what it received."""

    def __init__(self, real: socket.socket) -> None:
        self._real = real
        self._heard = b""
        self._sequence = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def send(self, data: bytes) -> int:
        self._sequence = data[8:12]
        return self._real.send(data)

    def recvmsg(self, size: int) -> Any:
        answer = self._real.recvmsg(size)
        self._heard += answer[0]
        return answer

    def recv_into(self, room: memoryview, size: int, flags: int) -> int:
        count = self._real.recv_into(room, size, flags)
        self._heard += bytes(room[:count])
        return count

    def heard(self) -> bytes:
        """All messages, the mark in place of the sequence number."""
        out = b""
        for message in _messages(self._heard):
            number = message[8:12]
            out += message[:8] + (_MARK if number == self._sequence else number) + message[12:]
        return out


def _messages(data: bytes) -> list[bytes]:
    found, at = [], 0
    while at + 16 <= len(data):
        length = (int.from_bytes(data[at : at + 4], "little") + 3) & ~3
        found.append(data[at : at + max(16, length)])
        at += max(16, length)
    return found


class _Kernel:
    """Answers each request with the same bytes, then with the end of a dump."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._waiting: list[bytes] = []

    def send(self, data: bytes) -> int:
        sequence = data[8:12]
        done = struct.pack("=IHH4sIi", 20, 3, 2, sequence, 0, 0)
        self._waiting = [self._answer.replace(_MARK, sequence), done]
        return len(data)

    def recvmsg(self, size: int) -> tuple[bytes, list[Any], int, None]:
        if not self._waiting:
            raise TimeoutError
        return self._waiting.pop(0)[:size], [], 0, None

    def recv_into(self, room: memoryview, size: int, flags: int = 0) -> int:
        if not self._waiting:
            raise BlockingIOError
        data = self._waiting.pop(0)[: len(room)]
        room[: len(data)] = data
        return len(data)

    def poll(self, milliseconds: float) -> list[int]:
        return [1] if self._waiting else []

    def getsockopt(self, *_: int) -> bytes:
        return bytes(8)

    def close(self) -> None:
        pass


def _socket(answer: bytes) -> NetlinkSocket:
    made = NetlinkSocket(netlink.NETLINK_ROUTE)
    made.close()
    made._socket = _Kernel(answer)  # type: ignore[assignment]
    return made


class _Reader:
    """`KernelReader`, of one socket."""

    paths = HostPaths()

    def __init__(self, answer: bytes) -> None:
        self.rtnl = self.netfilter = self.diag = _socket(answer)

    def messages(self, name: str, dump: netlink.Dump) -> list[netlink.Message]:
        return dump.messages

    def read_net(self, *parts: str) -> str:
        return ""


_HERE: Final = NetnsRef(node="fuzz", kind=NetnsKind.HOST, inode=1)


def route_seeds() -> list[bytes]:
    return [bytes((n,)) + one for one in _seeds()["route"] for n in range(len(_OBSERVERS))]


_OBSERVERS: Final[tuple[Callable[[Any], object], ...]] = (
    lambda reader: observe_links(reader, _HERE, ()),
    observe_addresses,
    lambda reader: observe_routes(reader, str),
    observe_rules,
    observe_neighbours,
    observe_fdb,
)


def read_route(data: bytes) -> None:
    """The first byte says which observer reads the rest."""
    _OBSERVERS[data[0] % len(_OBSERVERS) if data else 0](_Reader(data[1:]))


def nftables_seeds() -> list[bytes]:
    return _seeds()["nftables"]


def read_nftables(data: bytes) -> None:
    for read in (
        nft_generation,
        nft_tables,
        lambda s: nft_tests(s, NftTable(family="ip", name="t")),
    ):
        read(_socket(data))


def rules_seeds() -> list[bytes]:
    return _seeds()["rules"]


def read_rules(data: bytes) -> None:
    """As chains, and as rules of a chain; each rule as it is, and without what is before it."""
    reader = RuleReader(4, SetNames(str))
    refused: list[Exception] = []

    head = len(head_of("filter", "C1"))
    with RuleDump(socket.AF_INET) as dump:
        real, dump._socket = dump._socket, _Kernel(data)  # type: ignore[assignment]
        real.close()
        for body in dump.rules(b""):
            inner = body.find(_EXPRESSIONS) - 2
            for rule in (body[4 + head :], body[inner:]):
                try:
                    reader.line(rule, "C1")
                except NotRendered as reason:
                    refused.append(reason)
    nft_chains(_socket(data), 4)
    if refused:
        raise refused[0]


def conntrack_seeds() -> list[bytes]:
    return _seeds()["conntrack"]


def read_conntrack(data: bytes) -> None:
    """As lines, as records, and entry by entry."""
    bulk = BulkSocket()
    bulk.close()
    bulk._socket = _Kernel(data)  # type: ignore[assignment]
    bulk._sequence = itertools.count(0x7E5A_1D00)
    reading = TableReading(
        socket=bulk, filters=(KernelFilter(),), take=lambda group: None, buckets=lambda: 1
    )
    for batch in reading.batches():
        _use(batch)


def _use(batch: Any) -> None:
    render_batch(batch, now=0.0)
    pack_batch(batch)
    list(batch.entries())


def read_events(data: bytes) -> None:
    listening = EventSocket.__new__(EventSocket)
    kernel = _Kernel(data)
    kernel.send(bytes(8) + _MARK)
    listening._socket = kernel  # type: ignore[assignment]
    listening._poll = kernel  # type: ignore[assignment]
    listening._buffer = bytearray(1 << 20)
    listening._view = memoryview(listening._buffer)
    listening._layouts = Layouts()
    listening.heard, listening.overruns, listening.caught_up = 0.0, 0, True
    events, _ = listening.read(0)
    if events is not None:
        assert len(events.kinds) == events.batch.size
        assert isinstance(events.kinds, np.ndarray)
        _use(events.batch)
