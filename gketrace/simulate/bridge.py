"""A Linux bridge: where a frame goes, and whether netfilter sees it on the way.

After br_handle_frame_finish, br_forward and br_flood (net/bridge/br_input.c, br_forward.c),
br_dev_xmit (br_device.c) and br_nf_pre_routing (br_netfilter_hooks.c).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from gketrace.simulate.state import Ternary
from gketrace.snapshot import FdbEntry, Link, NetnsSnapshot, Unavailable
from gketrace.trace import Citation, Source

__all__ = ["BridgeDecision", "BridgeKind", "bridge_forward", "calls_iptables"]


class BridgeKind(Enum):
    """What the bridge does with a frame."""

    PORT = "port"
    """Out of the one port that the forwarding database names."""
    LOCAL = "local"
    """Up, to the bridge's own interface."""
    FLOOD = "flood"
    """Out of every port that may have it: the address is not in the forwarding database."""
    DROP = "drop"
    UNKNOWN = "unknown"
    """Something that decides could not be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeDecision:
    """What becomes of one frame."""

    kind: BridgeKind
    ports: tuple[Link, ...] = ()
    """PORT: the one; FLOOD: all; else empty."""
    also_local: bool = False
    """FLOOD: the bridge's own interface gets a copy too (broadcast, multicast, promiscuous)."""
    entry: FdbEntry | None = None
    citations: tuple[Citation, ...] = ()
    detail: str = ""


def bridge_forward(
    snapshot: NetnsSnapshot, bridge: str, mac: str, *, ingress: str = ""
) -> BridgeDecision:
    """Where `bridge` sends a frame for `mac` (lower case, colons; empty: not known).

    `ingress` is the port that it came in by; empty: the bridge's own interface sends it.
    """
    links = snapshot.links
    if isinstance(links, Unavailable):
        return _unknown(f"the interfaces could not be read: {links.reason}")
    device = next((link for link in links if link.name == bridge and link.kind == "bridge"), None)
    if device is None:
        return _unknown(f"there is no bridge {bridge!r} in this namespace")
    source: Link | None = None
    if ingress:
        source = next((x for x in links if x.name == ingress and x.master == device.ifindex), None)
        if source is None or source.port is None:
            return _unknown(f"{ingress} is not a port of {bridge}")
        if source.port.state != "forwarding":
            return _drop(source, f"the port {ingress} is {source.port.state}")
    if not device.up:
        return _drop(device, f"the bridge {bridge} is down")
    if not mac:
        return _unknown("the destination's link address is not known")
    ports = tuple(x for x in links if x.master == device.ifindex and x.port is not None)
    if int(mac[:2], 16) & 1:
        reached = tuple(p for p in ports if _refusal(p, source) is None)
        return BridgeDecision(
            kind=BridgeKind.FLOOD,
            ports=reached,
            also_local=source is not None,
            citations=(_kernel("br_flood: broadcast or multicast"),),
            detail=f"{mac} goes to all ports of {bridge}",
        )
    if source is not None and mac == device.mac:
        return _local(device, None, mac)
    fdb = snapshot.fdb
    if isinstance(fdb, Unavailable):
        return _unknown(f"the forwarding database could not be read: {fdb.reason}")
    return _by_fdb(device, ports, source, mac, fdb)


def _by_fdb(
    device: Link,
    ports: tuple[Link, ...],
    source: Link | None,
    mac: str,
    fdb: tuple[FdbEntry, ...],
) -> BridgeDecision:
    members = {device.ifindex, *(port.ifindex for port in ports)}
    found = [
        entry
        for entry in fdb
        if entry.mac == mac
        and "self" not in entry.flags
        and (entry.master == device.ifindex or (entry.master is None and entry.ifindex in members))
    ]
    if len({(entry.ifindex, _is_local(entry)) for entry in found}) > 1:
        return _unknown(f"{mac} is on several ports of {device.name}, by VLAN")
    if not found:
        reached = tuple(
            p
            for p in ports
            if p.port is not None and p.port.unicast_flood and _refusal(p, source) is None
        )
        return BridgeDecision(
            kind=BridgeKind.FLOOD,
            ports=reached,
            also_local=source is not None and "PROMISC" in device.flags,
            citations=(_kernel("br_flood: no forwarding entry"),),
            detail=f"{mac} is not in the forwarding database of {device.name}",
        )
    entry = found[0]
    if _is_local(entry):
        return _local(device, entry, mac)
    port = next((p for p in ports if p.ifindex == entry.ifindex), None)
    if port is None:
        return _unknown(f"{mac} is on interface {entry.ifindex}, which is no port that is known")
    refusal = _refusal(port, source)
    if refusal is not None:
        return BridgeDecision(
            kind=BridgeKind.DROP,
            entry=entry,
            citations=(_cite(entry, port), _kernel("br_forward: should_deliver")),
            detail=refusal,
        )
    return BridgeDecision(
        kind=BridgeKind.PORT,
        ports=(port,),
        entry=entry,
        citations=(_cite(entry, port),),
        detail=f"{mac} is on port {port.name}",
    )


def _refusal(port: Link, source: Link | None) -> str | None:
    """should_deliver: why a frame does not go out of `port`; None: it does."""
    info = port.port
    if info is None:
        return f"{port.name} is not a port"
    if source is not None and source.ifindex == port.ifindex and not info.hairpin:
        return f"it came in by {port.name}, and hairpin mode is off there"
    if info.state != "forwarding":
        return f"the port {port.name} is {info.state}"
    if source is not None and source.port is not None and source.port.isolated and info.isolated:
        return f"the ports {source.name} and {port.name} are isolated from each other"
    return None


def _is_local(entry: FdbEntry) -> bool:
    """NUD_PERMANENT marks the addresses of the bridge and its ports themselves (is_local)."""
    return "permanent" in entry.flags or "local" in entry.flags


def calls_iptables(
    snapshot: NetnsSnapshot, bridge: str, family: int
) -> tuple[Ternary, tuple[Citation, ...]]:
    """Whether bridged IP packets pass iptables: the namespace's sysctl, or the bridge's own flag.

    Without br_netfilter there is no such sysctl, and the bridge's flag has no effect.
    """
    name = f"net.bridge.bridge-nf-call-ip{'' if family == 4 else '6'}tables"
    sysctls = snapshot.sysctls
    if isinstance(sysctls, Unavailable):
        return Ternary.UNKNOWN, ()
    value = sysctls.get(name)
    if value is None:
        absent = Citation(
            source=Source.SYSCTL, text=f"{name} is absent: br_netfilter is not loaded"
        )
        return Ternary.NO, (absent,)
    cited: tuple[Citation, ...] = (Citation(source=Source.SYSCTL, text=f"{name} = {value}"),)
    if value != "0":
        return Ternary.YES, cited
    links = snapshot.links
    device = (
        None
        if isinstance(links, Unavailable)
        else next((link for link in links if link.name == bridge), None)
    )
    if device is None:
        return Ternary.UNKNOWN, cited
    flag = device.bridge_nf_call_iptables if family == 4 else device.bridge_nf_call_ip6tables
    if flag is None:
        return Ternary.UNKNOWN, cited
    option = f"nf_call_ip{'' if family == 4 else '6'}tables"
    cited = (*cited, Citation(source=Source.LINK, text=f"{bridge}: {option} {int(flag)}"))
    return (Ternary.YES if flag else Ternary.NO), cited


def _local(device: Link, entry: FdbEntry | None, mac: str) -> BridgeDecision:
    cited = (
        _kernel("br_pass_frame_up: the bridge's own address")
        if entry is None
        else _cite(entry, device)
    )
    return BridgeDecision(
        kind=BridgeKind.LOCAL,
        entry=entry,
        citations=(cited,),
        detail=f"{mac} is {device.name} itself",
    )


def _cite(entry: FdbEntry, port: Link) -> Citation:
    age = "" if entry.updated is None else f" updated {entry.updated:g}s ago"
    vlan = "" if entry.vlan is None else f" vlan {entry.vlan}"
    flags = "".join(f" {flag}" for flag in entry.flags)
    return Citation(source=Source.FDB, text=f"{entry.mac} dev {port.name}{vlan}{flags}{age}")


def _kernel(text: str) -> Citation:
    return Citation(source=Source.KERNEL, text=text)


def _drop(link: Link, why: str) -> BridgeDecision:
    state = link.port.state if link.port is not None else link.operstate
    return BridgeDecision(
        kind=BridgeKind.DROP,
        citations=(Citation(source=Source.LINK, text=f"{link.name} state {state}"),),
        detail=why,
    )


def _unknown(why: str) -> BridgeDecision:
    return BridgeDecision(kind=BridgeKind.UNKNOWN, detail=why)
