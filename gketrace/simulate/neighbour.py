"""The link address of a next hop, by the neighbour table (net/core/neighbour.c, arp.c, ndisc.c)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from gketrace.packet import IPAddress
from gketrace.snapshot import Neighbour, NetnsSnapshot, Unavailable
from gketrace.trace import Citation, Source

__all__ = ["NeighbourDecision", "NeighbourKind", "find_neighbour"]


class NeighbourKind(Enum):
    """What is known of the next hop's link address."""

    RESOLVED = "resolved"
    """`NeighbourDecision.mac` is where the frame goes."""
    UNRESOLVED = "unresolved"
    """No entry: the kernel will ask by ARP or NDP, and the answer is not known.  No error."""
    FAILED = "failed"
    """The kernel has asked and nobody answers (FAILED, INCOMPLETE)."""
    NOT_NEEDED = "not-needed"
    """The link has no addresses (loopback, NOARP)."""
    UNKNOWN = "unknown"
    """The neighbour table or the interfaces could not be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighbourDecision:
    """The answer for one next hop."""

    kind: NeighbourKind
    mac: str = ""
    entry: Neighbour | None = None
    citations: tuple[Citation, ...] = ()
    detail: str = ""


_FAILING = frozenset({"FAILED", "INCOMPLETE"})


def find_neighbour(
    snapshot: NetnsSnapshot, interface: str, next_hop: IPAddress, *, broadcast: bool = False
) -> NeighbourDecision:
    """The link address of `next_hop` on `interface`; `broadcast`: its route is of that type."""
    links = snapshot.links
    if isinstance(links, Unavailable):
        return _unknown(f"the interfaces could not be read: {links.reason}")
    link = next((one for one in links if one.name == interface), None)
    if link is None:
        return _unknown(f"there is no interface {interface!r} in this namespace")
    if "LOOPBACK" in link.flags or "NOARP" in link.flags:
        flag = "LOOPBACK" if "LOOPBACK" in link.flags else "NOARP"
        return NeighbourDecision(
            kind=NeighbourKind.NOT_NEEDED,
            citations=(Citation(source=Source.LINK, text=f"{interface}: {flag}"),),
            detail=f"{interface} needs no link addresses",
        )
    mapped = _mapped(next_hop, broadcast)
    if mapped:
        return NeighbourDecision(
            kind=NeighbourKind.RESOLVED,
            mac=mapped,
            citations=(Citation(source=Source.KERNEL, text="arp_constructor: group address"),),
            detail=f"{next_hop} is {mapped} by rule",
        )
    table = snapshot.neighbours
    if isinstance(table, Unavailable):
        return _unknown(f"the neighbours could not be read: {table.reason}")
    entry = next((n for n in table if n.ifindex == link.ifindex and n.address == next_hop), None)
    protocol = "ARP" if next_hop.version == 4 else "NDP"
    if entry is None or (entry.state not in _FAILING and not entry.mac):
        return NeighbourDecision(
            kind=NeighbourKind.UNRESOLVED,
            entry=entry,
            detail=f"{next_hop} will be asked for by {protocol} on {interface}",
        )
    text = f"{next_hop} dev {interface}" + (f" lladdr {entry.mac}" if entry.mac else "")
    citation = Citation(source=Source.NEIGHBOUR, text=f"{text} {entry.state}")
    if entry.state in _FAILING:
        return NeighbourDecision(
            kind=NeighbourKind.FAILED,
            entry=entry,
            citations=(citation,),
            detail=f"{next_hop} does not answer {protocol} on {interface} ({entry.state})",
        )
    return NeighbourDecision(
        kind=NeighbourKind.RESOLVED,
        mac=entry.mac,
        entry=entry,
        citations=(citation,),
        detail=f"{next_hop} is at {entry.mac} ({entry.state})",
    )


def _mapped(address: IPAddress, broadcast: bool) -> str:
    """The link address that follows from a group address; empty: it has to be asked for."""
    raw = address.packed
    if broadcast or (address.version == 4 and raw == b"\xff\xff\xff\xff"):
        return "ff:ff:ff:ff:ff:ff"
    if not address.is_multicast:
        return ""
    if address.version == 6:
        return (b"\x33\x33" + raw[12:]).hex(":")
    return bytes([0x01, 0x00, 0x5E, raw[1] & 0x7F, raw[2], raw[3]]).hex(":")


def _unknown(why: str) -> NeighbourDecision:
    return NeighbourDecision(kind=NeighbourKind.UNKNOWN, detail=why)
