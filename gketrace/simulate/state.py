"""What travels with a packet through the hooks of one namespace, beside its header.

`PacketState` is immutable: each rule that changes something returns a new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

from gketrace.conntrack import CtState
from gketrace.packet import IPAddress, Packet, Tuple5
from gketrace.trace import Citation, Hook, Step

__all__ = [
    "Alternative",
    "CtInfo",
    "Direction",
    "NatRequest",
    "PacketState",
    "Ternary",
    "Verdict",
    "VerdictKind",
]


class Ternary(Enum):
    """A match's answer.  UNKNOWN is never treated as NO."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


class Direction(Enum):
    """Which way along its connection a packet goes (enum ip_conntrack_dir)."""

    ORIGINAL = "ORIGINAL"
    REPLY = "REPLY"


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
    """True: the entry was in the table already (its NAT is settled, nat rules are not consulted)."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """One way through a base chain; the chances of all alternatives sum to 1 where known."""

    state: PacketState
    """The packet after (marks, ct marks, notrack, DSCP …); addresses are not rewritten here."""
    steps: tuple[Step, ...]
    """Rules that matched, in order; non-matching rules leave no step."""
    verdict: Verdict
    chance: Fraction | None = Fraction(1)
    """None: hangs on an unknown match."""
    because: str = ""
    """What was drawn or assumed: ``statistic: 0.33333333349``, ``if ... matches (unknown: ...)``."""
