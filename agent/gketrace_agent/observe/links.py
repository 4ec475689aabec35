"""Links: interfaces, veth peers across namespaces, bridge ports (RTM_NEWLINK).

Also the per-interface sysctls of both families, which every link message carries whole
(IFLA_AF_SPEC): reading the same from /proc/sys takes a file for each.

Source: kernel net/core/rtnetlink.c rtnl_fill_ifinfo(), drivers/net/veth.c, net/bridge/br_netlink.c,
net/ipv4/devinet.c inet_fill_link_af(), net/ipv6/addrconf.c ipv6_store_devconf().
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from gketrace.snapshot import BridgePort, Link, LinkPeer
from gketrace.trace import NetnsRef
from gketrace_agent.kernel.netlink import NetlinkError, attributes, text, u32
from gketrace_agent.kernel.reader import KernelReader
from gketrace_agent.kernel.rtnetlink import LINK_HEADER, dump_links, get_link, netns_id

__all__ = ["KnownNetns", "LinkTable", "link_flags", "observe_links"]

_IFLA_ADDRESS: Final = 1
_IFLA_IFNAME: Final = 3
_IFLA_MTU: Final = 4
_IFLA_LINK: Final = 5
_IFLA_MASTER: Final = 10
_IFLA_OPERSTATE: Final = 16
_IFLA_LINKINFO: Final = 18
_IFLA_IFALIAS: Final = 20
_IFLA_AF_SPEC: Final = 26
_IFLA_GROUP: Final = 27
_IFLA_LINK_NETNSID: Final = 37

_IFLA_INFO_KIND: Final = 1
_IFLA_INFO_DATA: Final = 2
_IFLA_INFO_SLAVE_KIND: Final = 4
_IFLA_INFO_SLAVE_DATA: Final = 5
_IFLA_BR_NF_CALL_IPTABLES: Final = 36
_IFLA_BR_NF_CALL_IP6TABLES: Final = 37
_IFLA_BRPORT_STATE: Final = 1
_IFLA_BRPORT_MODE: Final = 4
_IFLA_BRPORT_LEARNING: Final = 8
_IFLA_BRPORT_UNICAST_FLOOD: Final = 9
_IFLA_BRPORT_ISOLATED: Final = 33

_AF_INET: Final = 2
_AF_INET6: Final = 10
_IFLA_INET_CONF: Final = 1
_IFLA_INET6_CONF: Final = 2

_IFF_UP: Final = 0x1
_IFF_RUNNING: Final = 0x40
_FLAGS: Final = (
    (0x8, "LOOPBACK"),
    (0x2, "BROADCAST"),
    (0x10, "POINTOPOINT"),
    (0x1000, "MULTICAST"),
    (0x80, "NOARP"),
    (0x200, "ALLMULTI"),
    (0x100, "PROMISC"),
    (0x400, "MASTER"),
    (0x800, "SLAVE"),
    (0x4, "DEBUG"),
    (0x8000, "DYNAMIC"),
    (0x4000, "AUTOMEDIA"),
    (0x2000, "PORTSEL"),
    (0x20, "NOTRAILERS"),
    (0x1, "UP"),
    (0x10000, "LOWER_UP"),
    (0x20000, "DORMANT"),
    (0x40000, "ECHO"),
)
"""IFF_* in the order in which ``ip link`` prints them."""
_OPERSTATES: Final = (
    "UNKNOWN",
    "NOTPRESENT",
    "DOWN",
    "LOWERLAYERDOWN",
    "TESTING",
    "DORMANT",
    "UP",
)
_PORT_STATES: Final = ("disabled", "listening", "learning", "forwarding", "blocking")
_PAIRED: Final = frozenset({"veth", "netkit", "vxcan"})
"""Kinds whose IFLA_LINK is the other end; elsewhere it is the device underneath."""

_INET_CONF: Final = {
    1: "forwarding",
    3: "proxy_arp",
    4: "accept_redirects",
    6: "send_redirects",
    7: "shared_media",
    8: "rp_filter",
    9: "accept_source_route",
    11: "log_martians",
    13: "arp_filter",
    18: "arp_announce",
    19: "arp_ignore",
    21: "arp_accept",
    22: "arp_notify",
    23: "accept_local",
    24: "src_valid_mark",
    25: "proxy_arp_pvlan",
    26: "route_localnet",
    29: "ignore_routes_with_linkdown",
    32: "bc_forwarding",
}
"""IPV4_DEVCONF_* (include/uapi/linux/ip.h) → name under net.ipv4.conf.IFACE."""
_INET6_CONF: Final = {
    0: "forwarding",
    2: "mtu",
    3: "accept_ra",
    4: "accept_redirects",
    10: "use_tempaddr",
    22: "proxy_ndp",
    24: "accept_source_route",
    26: "disable_ipv6",
    27: "accept_dad",
    37: "use_oif_addrs_only",
    39: "ignore_routes_with_linkdown",
    59: "force_forwarding",
}
"""DEVCONF_* (include/uapi/linux/ipv6.h) → name under net.ipv6.conf.IFACE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownNetns:
    """A namespace that the agent knows, as the one that is being read names it."""

    ref: NetnsRef
    fd: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTable:
    """The links, and what else their messages say."""

    links: tuple[Link, ...]
    sysctls: Mapping[str, str]
    """``net.ipv4.conf.eth0.rp_filter`` → ``"0"``, for each interface and family."""

    def name(self, ifindex: int) -> str:
        """The interface's name; ``if7`` when there is none, as ip prints it."""
        for link in self.links:
            if link.ifindex == ifindex:
                return link.name
        return f"if{ifindex}"


def link_flags(flags: int) -> tuple[str, ...]:
    """IFF_* bits → the names that ``ip link`` prints, in its order."""
    names = tuple(name for bit, name in _FLAGS if flags & bit)
    return ("NO-CARRIER", *names) if flags & _IFF_UP and not flags & _IFF_RUNNING else names


def observe_links(
    reader: KernelReader, here: NetnsRef, known: tuple[KnownNetns, ...] = ()
) -> LinkTable:
    """All links of the reader's namespace, which is `here`.

    A veth's peer is named by asking the kernel for it in the namespace where it is
    (IFLA_TARGET_NETNSID), and that namespace is told from `known`.
    """
    messages = reader.messages("links", dump_links(reader.rtnl))
    peers = _Peers(reader, here, known)
    links: list[Link] = []
    sysctls: dict[str, str] = {}
    for message in messages:
        _, _, ifindex, flags, _ = LINK_HEADER.unpack_from(message.body)
        found = attributes(message.body, LINK_HEADER.size)
        link = _link(ifindex, flags, found)
        links.append(link)
        _read_conf(found.get(_IFLA_AF_SPEC, b""), link.name, sysctls)
        if link.kind in _PAIRED and _IFLA_LINK in found:
            peers.add(ifindex, u32(found[_IFLA_LINK]), found.get(_IFLA_LINK_NETNSID))
    resolved = peers.resolve({link.ifindex: link.name for link in links})
    ranks = _ranks(reader)
    return LinkTable(
        links=tuple(
            replace(link, peer=resolved.get(link.ifindex), rank=ranks.get(link.ifindex))
            for link in links
        ),
        sysctls=sysctls,
    )


def _ranks(reader: KernelReader) -> dict[int, int]:
    """ifindex → place in the list of devices.

    /proc/net/igmp walks that list (igmp_mc_seq_start, for_each_netdev_rcu), where a dump of links
    goes by ifindex.  Devices that have joined no group, because they are down, are not in it.
    """
    try:
        lines = reader.read_net("igmp").splitlines()[1:]
    except FileNotFoundError:
        return {}
    shown = [line.split(maxsplit=1)[0] for line in lines if line and not line[0].isspace()]
    return {int(ifindex): place for place, ifindex in enumerate(shown)}


def _link(ifindex: int, flags: int, found: dict[int, bytes]) -> Link:
    info = attributes(found.get(_IFLA_LINKINFO, b""))
    kind = text(info.get(_IFLA_INFO_KIND, b""))
    bridge = attributes(info.get(_IFLA_INFO_DATA, b"")) if kind == "bridge" else {}
    state = found.get(_IFLA_OPERSTATE, b"\0")[0]
    return Link(
        ifindex=ifindex,
        name=text(found[_IFLA_IFNAME]),
        kind=kind,
        mac=found.get(_IFLA_ADDRESS, b"").hex(":"),
        mtu=u32(found.get(_IFLA_MTU, b"")),
        flags=link_flags(flags),
        operstate=_OPERSTATES[state] if state < len(_OPERSTATES) else str(state),
        master=u32(found[_IFLA_MASTER]) if _IFLA_MASTER in found else None,
        port=_port(info),
        bridge_nf_call_iptables=_switch(bridge, _IFLA_BR_NF_CALL_IPTABLES),
        bridge_nf_call_ip6tables=_switch(bridge, _IFLA_BR_NF_CALL_IP6TABLES),
        group=u32(found.get(_IFLA_GROUP, b"")),
        alias=text(found.get(_IFLA_IFALIAS, b"")),
    )


def _switch(found: dict[int, bytes], kind: int) -> bool | None:
    return found[kind][0] != 0 if kind in found else None


def _port(info: dict[int, bytes]) -> BridgePort | None:
    if text(info.get(_IFLA_INFO_SLAVE_KIND, b"")) != "bridge":
        return None
    data = attributes(info.get(_IFLA_INFO_SLAVE_DATA, b""))
    state = data.get(_IFLA_BRPORT_STATE, b"\0")[0]
    return BridgePort(
        state=_PORT_STATES[state] if state < len(_PORT_STATES) else str(state),
        hairpin=bool(_switch(data, _IFLA_BRPORT_MODE)),
        learning=_switch(data, _IFLA_BRPORT_LEARNING) is not False,
        unicast_flood=_switch(data, _IFLA_BRPORT_UNICAST_FLOOD) is not False,
        isolated=bool(_switch(data, _IFLA_BRPORT_ISOLATED)),
    )


def _read_conf(spec: bytes, name: str, into: dict[str, str]) -> None:
    families = attributes(spec)
    inet = attributes(families.get(_AF_INET, b"")).get(_IFLA_INET_CONF, b"")
    values = struct.unpack(f"={len(inet) // 4}i", inet)
    for number, key in _INET_CONF.items():
        # The array starts at IPV4_DEVCONF_FORWARDING, which is 1.
        if number <= len(values):
            into[f"net.ipv4.conf.{name}.{key}"] = str(values[number - 1])
    inet6 = attributes(families.get(_AF_INET6, b"")).get(_IFLA_INET6_CONF, b"")
    values = struct.unpack(f"={len(inet6) // 4}i", inet6)
    for number, key in _INET6_CONF.items():
        if number < len(values):
            into[f"net.ipv6.conf.{name}.{key}"] = str(values[number])


class _Peers:
    """Finds the other ends of veth pairs."""

    def __init__(self, reader: KernelReader, here: NetnsRef, known: tuple[KnownNetns, ...]) -> None:
        self._reader = reader
        self._here = here
        self._known = known
        self._wanted: list[tuple[int, int, int | None]] = []

    def add(self, ifindex: int, peer: int, netnsid: bytes | None) -> None:
        """`peer` 0 means that the kernel does not say (it has gone)."""
        number = None if netnsid is None else struct.unpack("=i", netnsid)[0]
        if peer:
            self._wanted.append((ifindex, peer, number))

    def resolve(self, names: dict[int, str]) -> dict[int, LinkPeer]:
        """ifindex here → its peer."""
        namespaces = self._namespaces() if any(n is not None for *_, n in self._wanted) else {}
        found: dict[int, LinkPeer] = {}
        for ifindex, peer, number in self._wanted:
            if number is None:
                found[ifindex] = LinkPeer(ifindex=peer, name=names.get(peer, ""), netns=self._here)
            else:
                found[ifindex] = LinkPeer(
                    ifindex=peer, name=self._name(peer, number), netns=namespaces.get(number)
                )
        return found

    def _namespaces(self) -> dict[int, NetnsRef]:
        numbers: dict[int, NetnsRef] = {}
        for known in self._known:
            number = netns_id(self._reader.rtnl, known.fd)
            if number is not None:
                numbers[number] = known.ref
        return numbers

    def _name(self, ifindex: int, number: int) -> str:
        if number < 0:
            return ""
        try:
            message = get_link(self._reader.rtnl, ifindex, netns_id=number)
        except NetlinkError as error:
            # The pod went away meanwhile, or we have no NET_ADMIN there: the peer stays nameless,
            # which is what the data then says.
            if error.errno in (errno.ENODEV, errno.EINVAL, errno.EPERM, errno.EACCES):
                return ""
            raise
        if message is None:
            return ""
        return text(attributes(message.body, LINK_HEADER.size).get(_IFLA_IFNAME, b""))
