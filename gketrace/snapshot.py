"""What a node's kernel says at one moment, as plain data.

An observer in the agent fills these; the simulator reads them; nothing here does I/O.  What could
not be read is an `Unavailable` in place of the data, never an empty tuple.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

from gketrace.conntrack import ConntrackEntry
from gketrace.packet import IPAddress, Tuple5
from gketrace.trace import Missing, NetnsRef

if TYPE_CHECKING:
    from gketrace.ruleset import Ruleset

__all__ = [
    "Address",
    "BridgePort",
    "ConntrackView",
    "FdbEntry",
    "IPNetwork",
    "IpSet",
    "IpSetEntry",
    "Link",
    "LinkPeer",
    "Maybe",
    "Neighbour",
    "NetnsSnapshot",
    "NextHop",
    "NodeView",
    "PolicyAction",
    "PolicyRule",
    "RecentEntry",
    "Route",
    "RouteType",
    "Socket",
    "Unavailable",
]

IPNetwork: TypeAlias = IPv4Network | IPv6Network
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unavailable:
    """Stands where data could not be read."""

    reason: str
    """One sentence: what was tried and what the kernel answered."""


Maybe: TypeAlias = T | Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkPeer:
    """The other end of a veth pair."""

    ifindex: int
    name: str = ""
    """Empty: not resolved."""
    netns: NetnsRef | None = None
    """None: the namespace is not known to the agent (the pod is not one of this node's)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgePort:
    """What a bridge knows of one of its ports (IFLA_BRPORT_*)."""

    state: str
    """``disabled``, ``listening``, ``learning``, ``forwarding`` or ``blocking``."""
    hairpin: bool = False
    learning: bool = True
    unicast_flood: bool = True
    isolated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A network interface (RTM_NEWLINK)."""

    ifindex: int
    name: str
    kind: str = ""
    """IFLA_INFO_KIND: ``veth``, ``bridge``, …; empty for loopback and physical devices."""
    mac: str = ""
    mtu: int = 1500
    flags: tuple[str, ...] = ()
    """``UP``, ``LOWER_UP``, ``LOOPBACK``, ``PROMISC``, ``POINTOPOINT``, ``NOARP`` …"""
    operstate: str = ""
    master: int | None = None
    """ifindex of the bridge or bond it belongs to."""
    peer: LinkPeer | None = None
    port: BridgePort | None = None
    """Set for a port of a bridge."""
    bridge_nf_call_iptables: bool | None = None
    """The bridge's own nf_call_iptables (IFLA_BR_NF_CALL_IPTABLES); None for other links."""
    bridge_nf_call_ip6tables: bool | None = None
    group: int = 0
    alias: str = ""
    rank: int | None = None
    """Place in the namespace's list of devices, which is in order of registration (net->dev_base);
    None: not shown.  Where a search over all devices takes the first, this says which it is."""

    @property
    def up(self) -> bool:
        return "UP" in self.flags

    @property
    def carrier(self) -> bool:
        return "LOWER_UP" in self.flags


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """An address of an interface (RTM_NEWADDR)."""

    ifindex: int
    address: IPAddress
    prefixlen: int
    scope: str = "global"
    label: str = ""
    peer: IPAddress | None = None
    flags: tuple[str, ...] = ()
    """``permanent``, ``secondary``, ``tentative``, ``deprecated``, ``noprefixroute`` …"""


class RouteType(Enum):
    """rtm_type (include/uapi/linux/rtnetlink.h)."""

    UNICAST = "unicast"
    LOCAL = "local"
    BROADCAST = "broadcast"
    ANYCAST = "anycast"
    MULTICAST = "multicast"
    BLACKHOLE = "blackhole"
    UNREACHABLE = "unreachable"
    PROHIBIT = "prohibit"
    THROW = "throw"
    NAT = "nat"


@dataclass(frozen=True, slots=True, kw_only=True)
class NextHop:
    """Where a route sends a packet."""

    oif: int | None = None
    """ifindex; None: none (blackhole and the like)."""
    gateway: IPAddress | None = None
    """None: the destination is on the link.  May be of the other family (RTA_VIA)."""
    weight: int = 1
    """1-256."""
    flags: tuple[str, ...] = ()
    """``onlink``, ``dead``, ``linkdown``, ``pervasive``, ``offload`` …"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A route of any table (RTM_NEWROUTE)."""

    family: int
    """4 or 6."""
    table: int
    """254 main, 255 local, 253 default, …"""
    dst: IPNetwork
    """``0.0.0.0/0`` or ``::/0`` for default."""
    type: RouteType = RouteType.UNICAST
    next_hops: tuple[NextHop, ...] = ()
    """More than one: multipath."""
    src: IPNetwork | None = None
    """IPv6 source-specific routes."""
    tos: int = 0
    priority: int = 0
    """The metric.  Lower wins."""
    scope: str = ""
    """``global``, ``site``, ``link``, ``host``, ``nowhere``."""
    protocol: int = 0
    """rtm_protocol: 2 kernel, 3 boot, 4 static, 66 the GCE guest agent, …"""
    prefsrc: IPAddress | None = None
    mtu: int | None = None
    """RTAX_MTU metric."""
    text: str = ""
    """As ``ip route show table all`` prints it."""


class PolicyAction(Enum):
    """FR_ACT_* (include/uapi/linux/fib_rules.h)."""

    TABLE = "lookup"
    GOTO = "goto"
    NOP = "nop"
    BLACKHOLE = "blackhole"
    UNREACHABLE = "unreachable"
    PROHIBIT = "prohibit"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRule:
    """A routing policy rule (RTM_NEWRULE), as ``ip rule`` shows."""

    family: int
    priority: int
    action: PolicyAction = PolicyAction.TABLE
    table: int = 254
    goto: int | None = None
    """Target priority, for GOTO."""
    src: IPNetwork | None = None
    dst: IPNetwork | None = None
    iif: str = ""
    """``lo`` means locally generated."""
    oif: str = ""
    fwmark: int | None = None
    fwmask: int = 0xFFFFFFFF
    tos: int = 0
    ip_protocol: int | None = None
    sport: tuple[int, int] | None = None
    """First and last port, both included."""
    dport: tuple[int, int] | None = None
    uid_range: tuple[int, int] | None = None
    suppress_prefixlength: int | None = None
    """Results with a prefix of this length or shorter are ignored."""
    suppress_ifgroup: int | None = None
    l3mdev: bool = False
    invert: bool = False
    """``not``: the rule applies where its selector does not match."""
    tun_id: int | None = None
    text: str = ""
    """As ``ip rule`` prints it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """An entry of the neighbour (ARP, NDP) table."""

    ifindex: int
    address: IPAddress
    mac: str = ""
    state: str = ""
    """``REACHABLE``, ``STALE``, ``DELAY``, ``PROBE``, ``FAILED``, ``INCOMPLETE``, ``NOARP``,
    ``PERMANENT``."""
    router: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FdbEntry:
    """An entry of a bridge's forwarding database."""

    mac: str
    ifindex: int
    """The port on which the address was learned or set."""
    master: int | None = None
    """The bridge."""
    vlan: int | None = None
    flags: tuple[str, ...] = ()
    """``permanent``, ``static``, ``self``, ``master``, ``extern_learn``, ``local``."""
    used: float | None = None
    """Seconds since a frame to it was forwarded (NDA_CACHEINFO ndm_used)."""
    updated: float | None = None
    """Seconds since it was learned or refreshed: the age (ndm_updated)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Socket:
    """A socket that can receive: TCP or SCTP that listens, UDP or raw that is not connected."""

    family: int
    """4 or 6 (an IPv6 wildcard without v6only takes IPv4 too)."""
    protocol: int
    address: IPAddress
    """``0.0.0.0`` or ``::``: all addresses."""
    port: int
    """0: a raw socket, which takes a copy of every packet of its protocol."""
    state: str = "LISTEN"
    """``LISTEN``, ``UNCONN`` (UDP) or ``RAW``."""
    v6only: bool | None = None
    interface: str = ""
    """Bound to this device (SO_BINDTODEVICE)."""
    inode: int = 0
    uid: int | None = None
    pid: int | None = None
    """A process that holds it, where it could be found."""
    process: str = ""
    """Its command name."""
    queue: int | None = None
    """Connections waiting in the accept queue."""
    backlog: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentEntry:
    """One address in an xt_recent list (/proc/net/xt_recent/NAME)."""

    address: IPAddress
    ages: tuple[float, ...]
    """Seconds since each remembered packet, newest first."""
    ttl: int = 0
    text: str = ""
    """The line as read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IpSetEntry:
    """One element of an ipset; the fields that its type has, in the type's order."""

    parts: tuple[str, ...]
    """As ipset prints them, split at the commas: ``("10.0.0.1", "tcp:80")``."""
    nomatch: bool = False
    timeout: int | None = None
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class IpSet:
    """An ipset."""

    name: str
    type: str
    """``hash:ip``, ``hash:ip,port``, ``bitmap:port``, …"""
    family: int
    entries: tuple[IpSetEntry, ...]
    header: Mapping[str, str] = field(default_factory=dict)


class ConntrackView(Protocol):
    """Reads connection tracking of one namespace."""

    def lookup(self, tuple5: Tuple5, zone: int = 0) -> Maybe[ConntrackEntry | None]:
        """The entry of `zone` that has `tuple5` as its original or reply tuple; None: none has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetnsSnapshot:
    """One network namespace at one moment."""

    netns: NetnsRef
    links: Maybe[tuple[Link, ...]]
    addresses: Maybe[tuple[Address, ...]]
    routes: Maybe[tuple[Route, ...]]
    """All tables, both families."""
    rules: Maybe[tuple[PolicyRule, ...]]
    neighbours: Maybe[tuple[Neighbour, ...]]
    fdb: Maybe[tuple[FdbEntry, ...]]
    sysctls: Maybe[Mapping[str, str]]
    """Dotted names: ``net.ipv4.ip_forward`` → ``"1"``.  A name that is absent was not there."""
    sockets: Maybe[tuple[Socket, ...]]
    rulesets: tuple[Maybe[Ruleset], ...]
    """Every rule set that hangs on this namespace's hooks: iptables-legacy, iptables-nft,
    nftables; both families.  Empty: no rules at all.  Unavailable: one could not be read."""
    conntrack: Maybe[ConntrackView]
    recent: Maybe[Mapping[str, tuple[RecentEntry, ...]]] = field(default_factory=dict)
    """By list name."""
    ipsets: Maybe[Mapping[str, IpSet]] = field(default_factory=dict)
    """By set name.  Unavailable when a rule uses a set and it could not be read."""
    missing: tuple[Missing, ...] = ()
    taken_at: float = 0.0
    """Seconds since the epoch."""


class NodeView(Protocol):
    """How a walk reaches the namespaces of its node; the agent reads them as they are asked for."""

    @property
    def node(self) -> str: ...

    def snapshot(self, netns: NetnsRef) -> Maybe[NetnsSnapshot]:
        """The namespace at this moment; the same object for the same namespace in one walk."""
