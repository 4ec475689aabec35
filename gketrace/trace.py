"""The trace model: Trace → Path → Hop → Step, and the tree that one node's walk returns.

A `Step` is one decision that some piece of the kernel took about one packet, with the evidence
for it (`Citation`).  A node's walk returns a `Walk`: a tree of `Branch`es, stored flat, that forks
where the kernel draws lots (``-m statistic``, ``numgen``) or where something is not known.  The
stitcher (`gketrace.stitch`) joins walks of several nodes into `Path`s of `Hop`s.

After Batfish's Trace/Hop/Step, with one difference: every step must cite, and what is not known
is a value (`Disposition.UNKNOWN`, ``chance=None``), never an omission.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from typing import Final

from gketrace.conntrack import ConntrackEntry
from gketrace.packet import IPAddress, Packet
from gketrace.quick import quick

__all__ = [
    "FAILURE",
    "SUCCESS",
    "Branch",
    "Citation",
    "Disposition",
    "Flow",
    "Hook",
    "Hop",
    "Ingress",
    "Leaf",
    "Missing",
    "NetnsKind",
    "NetnsRef",
    "Outcome",
    "Path",
    "Source",
    "Step",
    "StepAction",
    "StepKind",
    "Trace",
    "Walk",
]


class NetnsKind(Enum):
    """Whose network namespace it is."""

    HOST = "host"
    """The node's own (that of PID 1)."""
    POD = "pod"
    """A pod sandbox's."""
    OTHER = "other"
    """Some namespace on the node that belongs to no pod that we know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetnsRef:
    """Names one network namespace of one node."""

    node: str
    """Kubernetes node name."""
    kind: NetnsKind = NetnsKind.HOST
    inode: int = 0
    """Inode of /proc/PID/ns/net; 0: not known (a simulated namespace)."""
    pod: str = ""
    """``namespace/name`` of the pod, for `NetnsKind.POD`."""

    def __str__(self) -> str:
        if self.kind is NetnsKind.HOST:
            return "host"
        return f"pod {self.pod}" if self.pod else f"netns {self.inode}"


class Hook(Enum):
    """Netfilter hooks of the IP layer (include/uapi/linux/netfilter.h)."""

    # Members are compared by identity; Enum's own hash is a call for each look-up.
    __hash__ = object.__hash__

    PREROUTING = "PREROUTING"
    INPUT = "INPUT"
    FORWARD = "FORWARD"
    OUTPUT = "OUTPUT"
    POSTROUTING = "POSTROUTING"


class Source(Enum):
    """Where a citation was read."""

    RULE = "rule"
    """An iptables or nftables rule; `Citation.table`, `chain`, `position` are set."""
    POLICY = "policy"
    """The policy of a base chain."""
    ROUTE = "route"
    """A route; `Citation.table` is the routing table."""
    POLICY_RULE = "ip-rule"
    """A routing policy rule."""
    NEIGHBOUR = "neighbour"
    FDB = "fdb"
    LINK = "link"
    ADDRESS = "address"
    SYSCTL = "sysctl"
    CONNTRACK = "conntrack"
    """An existing connection-tracking entry."""
    RECENT = "xt_recent"
    """A line of /proc/net/xt_recent/NAME."""
    SET = "set"
    """An ipset or nft set, map element."""
    SOCKET = "socket"
    OBJECT = "object"
    """A Kubernetes object's field."""
    KERNEL = "kernel"
    """Behaviour that is built into the kernel, named by its function."""


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Citation:
    """The evidence for one step."""

    source: Source
    text: str
    """Verbatim: the rule as iptables-save prints it, the route as ``ip route`` prints it, …"""
    backend: str = ""
    """``iptables-legacy``, ``iptables-nft`` or ``nftables``; empty for other sources."""
    table: str = ""
    chain: str = ""
    position: int = 0
    """1-based number of the rule in its chain, as ``iptables -L --line-numbers`` counts."""
    handle: int | None = None
    """nftables rule handle, where it is known."""
    packets: int | None = None
    """The rule's packet counter when it was read; None: no counter."""
    bytes: int | None = None
    """The rule's byte counter."""


class StepKind(Enum):
    """Which part of the node took the decision."""

    RECEIVE = "receive"
    """The packet enters this namespace through an interface."""
    SEND = "send"
    """The packet is made here by a local process."""
    CONNTRACK = "conntrack"
    """Connection tracking classified it or applied an existing entry."""
    RULE = "rule"
    """A rule matched."""
    POLICY = "policy"
    """A base chain ended, its policy decided."""
    NAT = "nat"
    """Addresses or ports were rewritten."""
    ROUTE = "route"
    """A routing decision."""
    CHECK = "check"
    """A sysctl or source check passed or stopped it (ip_forward, rp_filter, martian, MTU)."""
    NEIGHBOUR = "neighbour"
    """The next hop's link address."""
    BRIDGE = "bridge"
    """A bridge forwarded the frame by its FDB."""
    TRANSMIT = "transmit"
    """The packet leaves this namespace through an interface."""
    SOCKET = "socket"
    """A listening socket took it, or none did."""
    NETWORK = "network"
    """Between nodes: who owns the next hop, by Kubernetes objects; nothing on the wire was seen."""
    UNKNOWN = "unknown"
    """Something that is not understood or could not be seen."""


class StepAction(Enum):
    """What was decided."""

    CONTINUE = "continue"
    """Nothing changed; on to the next thing."""
    JUMP = "jump"
    GOTO = "goto"
    RETURN = "return"
    ACCEPT = "accept"
    DROP = "drop"
    REJECT = "reject"
    REWRITE = "rewrite"
    """The packet after differs from the packet before."""
    MARK = "mark"
    """The packet's or the connection's mark changed."""
    DELIVER = "deliver"
    FORWARD = "forward"
    FAIL = "fail"
    """Stopped by something that is not a rule."""
    UNKNOWN = "unknown"


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One decision about one packet."""

    kind: StepKind
    action: StepAction
    before: Packet
    after: Packet
    note: str = ""
    """One sentence for people; never the only place where a fact stands."""
    hook: Hook | None = None
    citation: Citation | None = None
    interface: str = ""
    """Interface name, for RECEIVE, TRANSMIT, BRIDGE, ROUTE (the output interface)."""
    next_hop: IPAddress | None = None
    """For ROUTE, NEIGHBOUR and TRANSMIT: who gets the packet next; None: none or on-link dst."""


class Disposition(Enum):
    """How a packet's way ends."""

    DELIVERED = "delivered"
    """A local socket takes it."""
    TRANSMITTED = "transmitted"
    """It left the node through an interface; another node or the network has it."""
    REFUSED = "refused"
    """It reached its address and no socket listens there: RST or port unreachable."""
    DROPPED = "dropped"
    """A rule or policy dropped it silently: the sender times out."""
    REJECTED = "rejected"
    """A rule answered with an ICMP error or RST: the sender is refused."""
    UNREACHABLE = "unreachable"
    """No route, a blackhole or unreachable route, or a check that failed."""
    NO_NEIGHBOUR = "no-neighbour"
    """The next hop's link address is known to be unresolvable (FAILED), or the port is down."""
    LOOPED = "looped"
    """It came back to where it had been with the same header."""
    UNKNOWN = "unknown"
    """Something on the way is not understood or could not be seen."""


SUCCESS: Final = frozenset({Disposition.DELIVERED})
"""The packet arrived."""
FAILURE: Final = frozenset(Disposition) - SUCCESS - {Disposition.TRANSMITTED, Disposition.UNKNOWN}
"""The packet provably did not arrive.  TRANSMITTED and UNKNOWN are neither."""


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A connection-tracking entry in one namespace: read from the kernel, or that a walk makes."""

    netns: NetnsRef
    entry: ConntrackEntry
    assumed: bool = True
    """True: made by a walk (it would be created).  False: read from the kernel."""


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Where a walk's branch ends."""

    disposition: Disposition
    packet: Packet
    """The packet as it is at the end (after NAT); what the receiver or the wire sees."""
    netns: NetnsRef
    detail: str = ""
    """One sentence: by whom, why."""
    interface: str = ""
    """TRANSMITTED: out of which interface."""
    next_hop: IPAddress | None = None
    """TRANSMITTED: to whom on that link; None: to the packet's destination itself, on-link."""
    reject_with: str = ""
    """REJECTED: ``icmp-port-unreachable``, ``tcp-reset``, …"""
    citation: Citation | None = None
    """The rule, route, socket … that decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingress:
    """How the packet comes into a namespace."""

    netns: NetnsRef
    interface: str = ""
    """Name of the receiving interface; empty: the packet is made here by a local process."""


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A stretch of a walk without a fork, in one namespace.  A node of the tree in `Walk`."""

    parent: int | None
    """Index of the parent branch in `Walk.branches`; None for the root.  Parents come first."""
    ingress: Ingress
    """How the packet came into the namespace that this branch is in."""
    enters: bool
    """True: the branch begins where the packet comes into the namespace (a new hop)."""
    chance: Fraction | None = Fraction(1)
    """Probability given the parent; None: not known (it hangs on an unknown)."""
    because: str = ""
    """What this branch assumes: ``statistic 0.333``, ``if the rule matches: …``."""
    steps: tuple[Step, ...] = ()
    outcome: Outcome | None = None
    """Set on leaves, None on branches that fork."""
    flows: tuple[Flow, ...] = ()
    """Entries that this branch creates, confirms or uses, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One way through a `Walk`, from the root to an outcome."""

    chance: Fraction | None
    """Absolute probability in this walk; None when any branch on the way is unknown."""
    branches: tuple[Branch, ...]
    outcome: Outcome

    @property
    def because(self) -> tuple[str, ...]:
        return tuple(b.because for b in self.branches if b.because)

    @property
    def flows(self) -> tuple[Flow, ...]:
        return tuple(f for b in self.branches for f in b.flows)

    def hops(self) -> tuple[Hop, ...]:
        """The branches' steps grouped by visit to a namespace."""
        hops: list[Hop] = []
        for branch in self.branches:
            if branch.enters or not hops:
                hops.append(Hop(ingress=branch.ingress, steps=branch.steps))
            else:
                last = hops[-1]
                hops[-1] = Hop(ingress=last.ingress, steps=last.steps + branch.steps)
        return tuple(hops)


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """All that can become of one packet on one node: a tree of branches, stored flat."""

    branches: tuple[Branch, ...]
    """Parents before children; ``branches[0]`` is the root."""
    missing: tuple[Missing, ...] = ()

    def leaves(self) -> Iterator[Leaf]:
        """Every way from the root to an outcome, in the order of the rules."""
        for branch in self.branches:
            if branch.outcome is None:
                continue
            way: list[Branch] = [branch]
            while (parent := way[-1].parent) is not None:
                way.append(self.branches[parent])
            way.reverse()
            chance: Fraction | None = Fraction(1)
            for part in way:
                if chance is None or part.chance is None:
                    chance = None
                    break
                chance *= part.chance
            yield Leaf(chance=chance, branches=tuple(way), outcome=branch.outcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Something that an answer should rest on and does not: completeness is a contract."""

    what: str
    """``agent``, ``conntrack``, ``sockets``, ``iptables-legacy``, …"""
    why: str
    """One sentence."""
    node: str = ""
    netns: str = ""
    """`NetnsRef` as text; empty: the whole node or cluster."""

    def __str__(self) -> str:
        where = " ".join(part for part in (self.node, self.netns) if part)
        return f"{self.what}{f' on {where}' if where else ''}: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One visit of the packet to one namespace (or, with an empty netns node, the network)."""

    ingress: Ingress
    steps: tuple[Step, ...]

    @property
    def netns(self) -> NetnsRef:
        return self.ingress.netns


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """One way that the packet can take from its source to its end, across nodes."""

    front_door: str
    """``ClusterIP``, ``NodePort``, ``LoadBalancer``, ``ExternalIP``, ``Pod``, ``Address``."""
    source: str
    """Who sends: ``client 203.0.113.10``, ``node/NAME``, ``pod/NS/NAME``."""
    target: str
    """What was asked for: ``10.43.246.223:80/tcp``."""
    chance: Fraction | None
    outcome: Outcome
    hops: tuple[Hop, ...]
    endpoint: str = ""
    """Who takes it: ``pod/NS/NAME 10.40.0.6:8080``, ``node/NAME``; empty when nobody does."""
    because: tuple[str, ...] = ()
    """What the path assumes or drew."""
    flows: tuple[Flow, ...] = ()
    missing: tuple[Missing, ...] = ()
    reply: Path | None = None
    """The return path; None where nobody answers."""
    fresh: tuple[Path, ...] = ()
    """Where an entry decided that was in a kernel's table: the paths of new connections from the
    same sender."""

    @property
    def pinned_by(self) -> Flow | None:
        """The first entry of a kernel's table that the packet belongs to."""
        return next((flow for flow in self.flows if not flow.assumed), None)

    @property
    def source_seen(self) -> str:
        """The source address that the receiver sees; empty when nobody receives it."""
        delivered = self.outcome.disposition in SUCCESS
        return str(self.outcome.packet.src) if delivered else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The answer: all paths of one question, and what it rests on."""

    paths: tuple[Path, ...]
    missing: tuple[Missing, ...] = field(default=())

    @property
    def complete(self) -> bool:
        """True when nothing was missing and no path ends in UNKNOWN."""
        return not self.missing and all(
            not path.missing and path.outcome.disposition is not Disposition.UNKNOWN
            for path in self.paths
        )
