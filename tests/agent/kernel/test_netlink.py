from __future__ import annotations

import errno
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from pyroute2 import IPRoute

from gketrace.errors import UnavailableError
from gketrace_agent.kernel.netlink import (
    NETLINK_NETFILTER,
    NETLINK_ROUTE,
    NetlinkError,
    NetlinkSocket,
    attribute,
    attributes,
    nested,
)
from gketrace_agent.kernel.nfnetlink import nft_generation
from gketrace_agent.kernel.rtnetlink import (
    LINK_HEADER,
    ROUTE_HEADER,
    dump_links,
    dump_routes,
    get_link,
)
from tests.agent.observe.bed import Bed, Netns
from tests.agent.observe.conftest import bed as bed  # a fixture


def opened(netns: Netns, protocol: int = NETLINK_ROUTE) -> NetlinkSocket:
    return netns.inside(lambda: NetlinkSocket(protocol))


def many_links(netns: Netns, count: int = 60) -> None:
    """Enough for a dump of several datagrams."""
    netns.batch(*(f"link add gko{n} type veth peer name gkp{n}" for n in range(count)))


class Meddler:
    """A socket that does something after each of its first `times` datagrams."""

    def __init__(self, real: socket.socket, meddle: Callable[[], Any], times: int) -> None:
        self._real, self._meddle, self._left = real, meddle, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def recvmsg(self, size: int) -> Any:
        received = self._real.recvmsg(size)
        if self._left:
            self._left -= 1
            self._meddle()
        return received


@pytest.mark.parametrize(("times", "consistent"), [(0, True), (1, True), (1000, False)])
def test_a_table_that_changes_under_the_dump(bed: Bed, times: int, consistent: bool) -> None:
    netns = bed.netns("intr")
    many_links(netns)
    sock = opened(netns)
    number = iter(range(1000))

    def meddle() -> None:
        netns.ip("link", "add", f"gkm{next(number)}", "type", "bridge")

    sock._socket = Meddler(sock._socket, meddle, times)  # type: ignore[assignment]
    try:
        dump = dump_links(sock)
    finally:
        sock.close()
    assert dump.consistent is consistent
    names = {attributes(m.body, LINK_HEADER.size)[3].rstrip(b"\0").decode() for m in dump.messages}
    assert {"lo", "gko0", "gkp59"} <= names
    if times == 1:
        assert "gkm0" in names, "it was read again"


def test_messages_are_those_of_pyroute2(bed: Bed) -> None:
    netns = bed.netns("second")
    many_links(netns, 3)
    netns.batch("link set gko1 up", "link set gkp1 up", "addr add 10.7.0.1/24 dev gko1")

    def other() -> tuple[list[Any], list[Any]]:
        with IPRoute() as ipr:
            return list(ipr.get_links()), list(ipr.get_routes(family=socket.AF_INET))

    links, routes = netns.inside(other)
    sock = opened(netns)
    try:
        mine = {
            (LINK_HEADER.unpack_from(m.body)[2], attributes(m.body, LINK_HEADER.size)[3])
            for m in dump_links(sock).messages
        }
        destinations = [
            (ROUTE_HEADER.unpack_from(m.body)[1], attributes(m.body, ROUTE_HEADER.size).get(1))
            for m in dump_routes(sock, socket.AF_INET).messages
        ]
    finally:
        sock.close()
    assert mine == {(one["index"], one.get("ifname").encode() + b"\0") for one in links}
    theirs = [(one["dst_len"], one.get("dst")) for one in routes]
    assert [(n, d and socket.inet_ntoa(d)) for n, d in destinations] == theirs


def test_a_missing_capability_is_named() -> None:
    """A process of root's that lacks NET_ADMIN, as a container's may, asks for nftables' number."""
    script = (
        "import socket\n"
        "from gketrace.errors import ForbiddenError\n"
        "from gketrace_agent.kernel.netlink import NETLINK_NETFILTER, NetlinkSocket\n"
        "from gketrace_agent.kernel.nfnetlink import nft_generation\n"
        "try:\n"
        "    nft_generation(NetlinkSocket(NETLINK_NETFILTER))\n"
        "except ForbiddenError as error:\n"
        "    print(error)\n"
    )
    setpriv = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]
    done = subprocess.run(
        [*setpriv, sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("(EPERM); the agent needs NET_ADMIN\n"), done.stderr


def test_an_error_has_its_number_and_the_kernels_words(bed: Bed) -> None:
    sock = opened(bed.netns("errors"))
    try:
        with pytest.raises(NetlinkError, match="ENODEV") as caught:
            get_link(sock, 9999)
        assert caught.value.errno == errno.ENODEV
        with pytest.raises(NetlinkError, match="EINVAL"):
            get_link(sock, 1, netns_id=77)
        short = ROUTE_HEADER.pack(socket.AF_INET, 32, 0, 0, 0, 0, 0, 0, 0) + attribute(1, b"x")
        with pytest.raises(NetlinkError, match=r"ERANGE.*policy validation"):
            sock.request(26, short, what="RTM_GETROUTE with a destination of one byte")
        link = get_link(sock, 1)
        assert link is not None
        assert attributes(link.body, LINK_HEADER.size)[3] == b"lo\0"
    finally:
        sock.close()
    with pytest.raises(UnavailableError, match="EBADF"):
        get_link(sock, 1)


def test_each_namespace_has_a_cookie(bed: Bed) -> None:
    one, other = opened(bed.netns("one")), opened(bed.netns("other"))
    try:
        assert one.netns_cookie is not None
        assert one.netns_cookie != other.netns_cookie
    finally:
        one.close()
        other.close()


def test_the_generation_changes_with_the_rules(bed: Bed) -> None:
    netns = bed.netns("generation")
    sock = opened(netns, NETLINK_NETFILTER)
    try:
        first = nft_generation(sock)
        assert first is not None
        assert nft_generation(sock) == first
        netns.run("nft", "add table ip mine")
        second = nft_generation(sock)
        assert second is not None
        assert second > first
    finally:
        sock.close()


def test_attributes_there_and_back() -> None:
    packed = attribute(1, b"abc") + nested(2, attribute(3, b"\x01")) + attribute(0x4004, b"")
    found = attributes(packed)
    assert (found[1], found[4]) == (b"abc", b"")
    assert attributes(found[2]) == {3: b"\x01"}
    with pytest.raises(ValueError, match="attribute"):
        attributes(b"\x40\x00\x01\x00")
