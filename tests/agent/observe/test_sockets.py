from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address

from gketrace.packet import Protocol
from gketrace.snapshot import Socket, Unavailable
from gketrace_agent.observe.links import observe_links
from gketrace_agent.observe.sockets import observe_sockets
from tests.agent.observe.bed import Netns
from tests.agent.observe.conftest import World


@contextmanager
def sockets(netns: Netns) -> Iterator[None]:
    """Receiving sockets of every kind, and some that do not receive from just anybody."""
    with ExitStack() as stack:

        def open_them() -> None:
            def bound(
                family: int, kind: int, address: str, port: int, **options: int
            ) -> socket.socket:
                sock = stack.enter_context(socket.socket(family, kind))
                if "v6only" in options:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, options["v6only"])
                sock.bind((address, port))
                if kind == socket.SOCK_STREAM:
                    sock.listen(options.get("backlog", 16))
                return sock

            stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
            bound(socket.AF_INET, stream, "0.0.0.0", 8080, backlog=7)
            bound(socket.AF_INET, stream, "127.0.0.1", 8081)
            bound(socket.AF_INET6, stream, "::", 8082, v6only=0)
            bound(socket.AF_INET6, stream, "::1", 8083, v6only=1)
            bound(socket.AF_INET, datagram, "0.0.0.0", 53)
            bound(socket.AF_INET6, datagram, "::", 54, v6only=1)
            device = bound(socket.AF_INET, datagram, "0.0.0.0", 55)
            device.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
            connected = bound(socket.AF_INET, datagram, "127.0.0.1", 56)
            connected.connect(("127.0.0.1", 53))
            client = stack.enter_context(socket.create_connection(("127.0.0.1", 8080)))
            assert client.getpeername()[1] == 8080

        netns.inside(open_them)
        yield


def read(netns: Netns, pids: tuple[int, ...] = (), handler: str = "") -> tuple[Socket, ...]:
    found = netns.read(
        lambda reader: observe_sockets(
            reader, pids, handler, observe_links(reader, netns.ref()).name
        )
    )
    assert not isinstance(found, Unavailable)
    return found


def test_sockets_are_those_of_ss(world: World) -> None:
    netns = world.ptp
    with sockets(netns):
        found = read(netns)
        lines = netns.run("ss", "-Hlntue").splitlines()
    mine = {
        (
            "tcp" if one.protocol == Protocol.TCP else "udp",
            one.state,
            one.family,
            str(one.address),
            one.port,
            one.interface,
            one.inode,
        )
        for one in found
    }
    theirs = set()
    for line in lines:
        protocol, state, _, _, local, *_ = line.split()
        address, port = local.rsplit(":", 1)
        address, _, device = address.partition("%")
        (inode,) = re.findall(r"ino:(\d+)", line)
        # ss prints a wildcard that takes both families as an asterisk.
        address = "::" if address == "*" else address.strip("[]")
        family = ip_address(address).version
        theirs.add((protocol, state, family, address, int(port), device, int(inode)))
    assert mine == theirs
    assert len(mine) == 7


def test_a_socket_has_its_owner_and_queues(world: World) -> None:
    with sockets(world.ptp):
        found = {one.port: one for one in read(world.ptp, pids=(1, os.getpid()))}
        assert (found[8080].queue, found[8080].backlog) == (1, 7)
        assert (found[53].queue, found[53].backlog) == (None, None)
        assert {one.pid for one in found.values()} == {os.getpid()}
        with open("/proc/self/comm") as file:
            assert found[8080].process == file.read().strip()
        assert (found[8082].v6only, found[8083].v6only, found[54].v6only) == (False, True, True)
        assert found[8080].v6only is None
        assert found[55].interface == "eth0"
        assert found[8080].uid == 0
        assert {one.pid for one in read(world.ptp)} == {None}


def test_gvisor_sockets_are_not_observable(world: World) -> None:
    found = world.ptp.read(
        lambda reader: observe_sockets(reader, (), "gvisor", lambda index: str(index))
    )
    assert isinstance(found, Unavailable)
    assert "not observable" in found.reason


def test_raw_sockets(world: World) -> None:
    sctp, gre = int(Protocol.SCTP), int(Protocol.GRE)
    with ExitStack() as stack:

        def open_them() -> None:
            def raw(family: int, protocol: int, address: str, peer: str = "") -> None:
                one = stack.enter_context(socket.socket(family, socket.SOCK_RAW, protocol))
                one.bind((address, 0))
                if peer:
                    one.connect((peer, 0))

            raw(socket.AF_INET, sctp, "0.0.0.0")
            raw(socket.AF_INET, gre, "10.40.0.7")
            raw(socket.AF_INET, gre, "127.0.0.1", "127.0.0.2")
            raw(socket.AF_INET, socket.IPPROTO_RAW, "0.0.0.0")
            raw(socket.AF_INET6, sctp, "::")
            raw(socket.AF_INET6, gre, "::1")

        world.ptp.inside(open_them)
        found = [one for one in read(world.ptp, pids=(os.getpid(),)) if one.state == "RAW"]
    assert {(one.family, one.protocol, str(one.address), one.port) for one in found} == {
        (4, sctp, "0.0.0.0", 0),
        (4, gre, "10.40.0.7", 0),
        (6, sctp, "::", 0),
        (6, gre, "::1", 0),
    }
    assert {one.pid for one in found} == {os.getpid()}
    assert {one.uid for one in found} == {0}
