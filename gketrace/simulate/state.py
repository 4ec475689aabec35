"""What travels with a packet through the hooks of one namespace, beside its header.

`PacketState` is immutable: each rule that changes something returns a new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import Final, Protocol

from gketrace.conntrack import CtState
from gketrace.packet import IPAddress, Packet, Tuple5
from gketrace.quick import quick
from gketrace.snapshot import IpSet, Maybe, RecentEntry
from gketrace.trace import Citation, Hook, Step

__all__ = [
    "CERTAIN",
    "NO",
    "YES",
    "Alternative",
    "Answer",
    "CtInfo",
    "Direction",
    "Environment",
    "NatRequest",
    "PacketState",
    "RecentChange",
    "RecentOp",
    "SetChange",
    "Ternary",
    "Verdict",
    "VerdictKind",
    "decide",
    "lot",
    "unknown",
]


CERTAIN: Final = Fraction(1)
"""The chance of what has no alternative: one object, so that a look at it can do for arithmetic."""


class Ternary(Enum):
    """A match's answer.  UNKNOWN is never treated as NO."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


class Direction(Enum):
    """Which way along its connection a packet goes (enum ip_conntrack_dir)."""

    ORIGINAL = "ORIGINAL"
    REPLY = "REPLY"


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class CtInfo:
    """What connection tracking attached to the packet (skb->_nfct)."""

    state: CtState
    direction: Direction = Direction.ORIGINAL
    orig: Tuple5 | None = None
    """None for INVALID and UNTRACKED."""
    reply: Tuple5 | None = None
    """The expected reply tuple; changes when NAT is applied."""
    status: int = 0
    """`CtStatus` bits."""
    mark: int = 0
    zone: int = 0
    labels: int = 0
    existing: bool = False
    """True: the entry was in the table already, its NAT is settled: no nat rule is consulted."""
    template: bool = False
    """True: what a CT target attaches in raw (nf_ct_tmpl_alloc): a connection of zeros that only
    names a zone.  Tracking replaces it."""


class RecentOp(Enum):
    """What ``-m recent`` did to one entry of a list."""

    SET = "set"
    """The entry exists now, with a time stamp of this moment."""
    REMOVE = "remove"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentChange:
    """A change that this very packet made to an xt_recent list."""

    name: str
    address: IPAddress
    """After the list's mask."""
    op: RecentOp


@dataclass(frozen=True, slots=True, kw_only=True)
class SetChange:
    """A change that this very packet made to an ipset, by the SET target."""

    name: str
    element: tuple[str, ...]
    """The element's parts, as `IpSetEntry.parts`."""
    add: bool
    """False: removed."""


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class PacketState:
    """One packet at one point of its way."""

    packet: Packet
    hook: Hook
    ct: CtInfo | None
    """None: tracking has not looked yet (raw table), or the namespace does not track."""
    in_iface: str = ""
    """Empty for locally made packets."""
    out_iface: str = ""
    """Empty before routing."""
    physdev_in: str = ""
    """Bridge port it came in through, when it passes netfilter from a bridge."""
    physdev_out: str = ""
    bridged: bool = False
    """True: seen by iptables through bridge-nf-call-iptables while being bridged."""
    uid: int | None = None
    """Owner of the sending socket, for locally made packets; None: not known."""
    gid: int | None = None
    notrack: bool = False
    """Set by NOTRACK / CT --notrack in raw."""
    zone: int | None = None
    """Conntrack zone that a CT target in raw chose; None: the default, 0; -1: the packet's mark
    when tracking looks (NF_CT_FLAG_MARK)."""
    recent: tuple[RecentChange, ...] = ()
    """What this packet did to xt_recent lists, oldest first; later rules see it."""
    sets: tuple[SetChange, ...] = ()
    """What this packet did to ipsets, oldest first; later rules see it."""


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one match says of one packet."""

    kind: Ternary
    """A random draw is UNKNOWN with its `chance` set."""
    reason: str = ""
    """For UNKNOWN: what is not known, one clause.  For a draw: what is drawn."""
    chance: Fraction | None = None
    """Probability of YES, strictly between 0 and 1, where the kernel draws lots."""
    state: PacketState | None = None
    """The packet's state after, where the match has a side effect (``recent --set``)."""


YES: Final = Answer(kind=Ternary.YES)
NO: Final = Answer(kind=Ternary.NO)


def decide(condition: bool, *, negated: bool = False) -> Answer:
    """YES or NO, turned round when `negated`."""
    return YES if condition is not negated else NO


def unknown(reason: str) -> Answer:
    """UNKNOWN, and why."""
    return Answer(kind=Ternary.UNKNOWN, reason=reason)


def lot(chance: Fraction, reason: str) -> Answer:
    """YES with probability `chance` (0 to 1)."""
    if chance <= 0:
        return NO
    if chance >= 1:
        return YES
    return Answer(kind=Ternary.UNKNOWN, reason=reason, chance=chance)


class Environment(Protocol):
    """What matches need to know of the namespace beside the packet; `Unavailable`: not known."""

    @property
    def now(self) -> float:
        """Seconds since the epoch at which the packet passes."""

    def address_type(self, address: IPAddress, interface: str | None) -> Maybe[str]:
        """The type of `address` as ``-m addrtype`` names it: ``LOCAL``, ``UNICAST``, ….

        IPv4, inet_dev_addr_type(): 0/8 and 255.255.255.255 are BROADCAST, 224/4 MULTICAST, else
        the type of the best route in the local table; UNICAST when it has none, or when
        `interface` is given and the route's device is another.  IPv6, match_lookup_rt6():
        ``LOCAL`` when the address is local (on `interface`, where given), ``ANYCAST``,
        ``UNREACHABLE`` when there is no route or a reject route, else ``UNICAST``.
        """

    def reverse_path(
        self, packet: Packet, interface: str, *, loose: bool, validmark: bool, accept_local: bool
    ) -> Maybe[bool]:
        """True: a look-up of the source address passes ``-m rpfilter`` (rpfilter_mt() without
        its --invert)."""

    def recent(self, name: str) -> Maybe[tuple[RecentEntry, ...]]:
        """The xt_recent list `name`, as it was before this packet."""

    def ipset(self, name: str) -> Maybe[IpSet]:
        """The ipset `name`, as it was before this packet."""

    def sysctl(self, name: str) -> Maybe[str | None]:
        """Dotted name; None: the kernel has no such sysctl here."""


class VerdictKind(Enum):
    """How a base chain (or one rule) decides."""

    ACCEPT = "ACCEPT"
    """Leaves this table at this hook; the next one is asked."""
    DROP = "DROP"
    REJECT = "REJECT"
    QUEUE = "QUEUE"
    """Handed to user space; what that does is unknown."""
    STOLEN = "STOLEN"
    UNKNOWN = "UNKNOWN"
    """A target that is not understood, and that may end the walk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NatRequest:
    """What a nat-table target asked for; the walk carries it out (nf_nat_setup_info)."""

    source: bool
    """True: SNAT, MASQUERADE (the source changes).  False: DNAT, REDIRECT."""
    addresses: tuple[IPAddress, IPAddress] | None = None
    """First and last address of the range; None: the address stays, or is chosen by `masquerade`
    or `redirect`."""
    ports: tuple[int, int] | None = None
    """First and last port; None: ports stay where they can."""
    masquerade: bool = False
    """The address is the one the kernel selects on the output interface."""
    redirect: bool = False
    """The address is the primary one of the input interface (127.0.0.1 for local packets)."""
    netmap: bool = False
    """Only the network part of `addresses` is applied (NETMAP)."""
    prefixlen: int | None = None
    """For `netmap`."""
    random: bool = False
    """--random: the port is picked by a hash with a secret, so it is not known."""
    random_fully: bool = False
    persistent: bool = False
    base_port: int | None = None
    """Shifted port maps (``--to-destination a:1-9/5``)."""
    citation: Citation | None = None


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The end of a base chain."""

    kind: VerdictKind
    citation: Citation
    """The rule or policy that decided."""
    reject_with: str = ""
    """For REJECT: ``icmp-port-unreachable``, ``tcp-reset`` …"""
    detail: str = ""
    nat: NatRequest | None = None
    """Set when a nat target decided (the verdict is then ACCEPT)."""


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """One way through a base chain; the chances of all alternatives sum to 1 where known."""

    state: PacketState
    """The packet after (marks, ct marks, notrack, DSCP …); addresses are not rewritten here."""
    steps: tuple[Step, ...]
    """Rules that matched, in order; non-matching rules leave no step."""
    verdict: Verdict
    chance: Fraction | None = CERTAIN
    """None: hangs on an unknown match."""
    because: str = ""
    """What was drawn or assumed: ``statistic 0.33333333349``, ``if RULE matches (unknown)``."""
