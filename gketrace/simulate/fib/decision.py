"""What a routing look-up answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

from gketrace.packet import IPAddress
from gketrace.quick import quick
from gketrace.simulate.state import CERTAIN
from gketrace.snapshot import PolicyRule, Route
from gketrace.trace import Citation

__all__ = ["RouteDecision", "RouteKind"]


class RouteKind(Enum):
    """What becomes of the packet."""

    # Members are compared by identity; Enum's own hash is a call for each look-up.
    __hash__ = object.__hash__

    LOCAL = "local"
    """For this namespace: to INPUT, or for a local sender over the loopback."""
    FORWARD = "forward"
    """Out of `RouteDecision.interface`; for received packets through FORWARD."""
    BROADCAST = "broadcast"
    """Received: taken in here.  Sent: out of the interface and looped back."""
    MULTICAST = "multicast"
    """A group address; who takes it is not looked into."""
    UNREACHABLE = "unreachable"
    """An unreachable route or rule: ICMP host or net unreachable to the sender."""
    BLACKHOLE = "blackhole"
    """A blackhole route or rule: silently dropped."""
    PROHIBIT = "prohibit"
    """A prohibit route or rule: ICMP administratively prohibited."""
    NO_ROUTE = "no-route"
    """No route matched."""
    MARTIAN = "martian"
    """Refused for an address that may not come in this way."""
    RP_FILTER = "rp-filter"
    """Dropped by the reverse-path filter."""
    NOT_FORWARDING = "not-forwarding"
    """It would have to be forwarded, and forwarding is off on the interface it came in by."""
    FRAG_NEEDED = "frag-needed"
    """Longer than the MTU and may not be fragmented: ICMP fragmentation needed / too big."""
    TTL_EXCEEDED = "ttl-exceeded"
    """It would be forwarded, and its TTL is used up."""
    BAD_SOURCE = "bad-source"
    """Sent from an address that a local sender may not use (not one of its own)."""
    UNKNOWN = "unknown"
    """Something that decides is not known; `RouteDecision.detail` says what."""


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class RouteDecision:
    """One way that a look-up can go; several where the kernel hashes or something is not known."""

    kind: RouteKind
    interface: str = ""
    """Where it goes out.  LOCAL: ``lo`` for local senders, the receiving interface else."""
    next_hop: IPAddress | None = None
    """The gateway; None: the destination itself is on the link."""
    source: IPAddress | None = None
    """Local senders: the source address (selected, or as given).  None: not known."""
    route: Route | None = None
    """The route that decided; None: none matched, or a check or rule decided."""
    rule: PolicyRule | None = None
    """The policy rule that led to the route, or that decided itself."""
    mtu: int | None = None
    """FORWARD: the route's or the device's MTU in bytes; None: not known."""
    errno: str = ""
    """What a local sender (or RTM_GETROUTE) is told on failure: ``ENETUNREACH`` …"""
    chance: Fraction | None = CERTAIN
    """Of this way among those returned; None: not known."""
    because: str = ""
    """What was hashed or assumed; empty when this is the only way."""
    citations: tuple[Citation, ...] = ()
    """The evidence, in the order in which the kernel looks: rule, route, sysctls, checks."""
    detail: str = ""
    """One sentence for people."""
