"""All that `gketrace pod` says of one pod, worked out from what the agent read.

Pure.  Broken is only what the kernel's own tables prove: a link that is down, an address that is
not there, no route, a failed neighbour, forwarding switched off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, TypeVar

from gketrace.objects import Node, Pod
from gketrace.packet import IPAddress
from gketrace.simulate.routing import Fib, RouteKind
from gketrace.snapshot import (
    Address,
    FdbEntry,
    Link,
    Maybe,
    Neighbour,
    NetnsSnapshot,
    Route,
    Socket,
    Unavailable,
)
from gketrace.trace import Missing
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1 import snapshot_pb2

__all__ = ["Attachment", "Forwarding", "PodReport", "Towards", "build_pod_report"]

T = TypeVar("T")
_GOOD_ROUTES: Final = frozenset({RouteKind.FORWARD, RouteKind.LOCAL})


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """One interface of the pod and what it hangs on."""

    link: Link
    addresses: tuple[Address, ...]
    host: Link | None = None
    """The host end of its veth pair; None: it has none, or it was not found."""
    bridge: Link | None = None
    """The bridge that the host end is a port of."""
    learned: tuple[tuple[FdbEntry, str], ...] = ()
    """FDB entries for its MAC on that bridge, and the port's name."""
    host_routes: tuple[Route, ...] = ()
    """The host's routes for exactly its addresses (/32 or /128)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Towards:
    """The next hop of one side to the other, as its own routing decides."""

    what: str
    """``pod → node`` or ``node → pod``."""
    destination: IPAddress
    interface: str = ""
    next_hop: IPAddress | None = None
    """None: nothing goes out."""
    gateway: bool = False
    """False: the destination itself is on the link."""
    neighbour: Neighbour | None = None
    owner: str = ""
    """The interface of the other side that has the next hop's address; of several, the other end of
    `interface`."""
    route: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwarding:
    """One sysctl that says whether packets are forwarded."""

    where: str
    """``node`` or ``pod``."""
    name: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PodReport:
    """The whole answer."""

    pod: Pod
    node: Node | None
    resolved: pb.ResolvedPod
    inside: NetnsSnapshot
    host: NetnsSnapshot
    attachments: tuple[Attachment, ...]
    towards: tuple[Towards, ...]
    forwarding: tuple[Forwarding, ...]
    rulesets: tuple[snapshot_pb2.RulesetSummary, ...]
    """Of the pod's namespace."""
    sockets: Maybe[tuple[Socket, ...]]
    problems: tuple[str, ...]
    missing: tuple[Missing, ...]

    def container_name(self, container: pb.Container) -> str:
        """By the runtime, or by the Pod object that has its id; empty: neither says."""
        if container.name:
            return container.name
        known = {c.id: c.name for c in self.pod.containers if c.id}
        return known.get(container.id, "")

    @property
    def shared(self) -> bool:
        """True: the pod lives in the node's own namespace."""
        return self.resolved.host_network


def build_pod_report(
    *,
    pod: Pod,
    node: Node | None,
    resolved: pb.ResolvedPod,
    inside: NetnsSnapshot,
    host: NetnsSnapshot,
    rulesets: Iterable[snapshot_pb2.RulesetSummary],
    missing: Iterable[Missing] = (),
) -> PodReport:
    """Joins the two namespaces' snapshots."""
    gaps = [*missing, *inside.missing, *(host.missing if not resolved.host_network else ())]
    problems: list[str] = []
    attachments = () if resolved.host_network else tuple(_attachments(inside, host, gaps))
    towards = () if resolved.host_network else tuple(_both_ways(pod, inside, host, gaps))
    forwarding = tuple(_forwarding(pod, resolved, inside, host, attachments))
    summaries = tuple(rulesets)
    for summary in summaries:
        if summary.unavailable:
            gaps.append(
                Missing(
                    what=summary.backend,
                    why=summary.unavailable,
                    node=inside.netns.node,
                    netns=str(inside.netns),
                )
            )
    sockets = inside.sockets
    if resolved.runtime_handler == "gvisor":
        sockets = Unavailable(
            reason="the pod runs in gVisor, whose sockets the node's kernel does not see"
        )
    if isinstance(sockets, Unavailable):
        gaps.append(_gap("sockets", sockets, inside))
    problems += _attachment_problems(pod, attachments, inside)
    problems += [way.problem for way in towards if way.problem]
    problems += [
        f"{item.name} is {item.value} on the node: nothing is forwarded to the pod"
        for item in forwarding
        if item.where == "node" and item.value == "0" and not resolved.host_network
    ]
    return PodReport(
        pod=pod,
        node=node,
        resolved=resolved,
        inside=inside,
        host=host,
        attachments=attachments,
        towards=towards,
        forwarding=forwarding,
        rulesets=summaries,
        sockets=sockets,
        problems=tuple(dict.fromkeys(problems)),
        missing=tuple(dict.fromkeys(gaps)),
    )


def _gap(what: str, gone: Unavailable, shot: NetnsSnapshot) -> Missing:
    return Missing(what=what, why=gone.reason, node=shot.netns.node, netns=str(shot.netns))


def _known(
    value: Maybe[tuple[T, ...]], what: str, shot: NetnsSnapshot, gaps: list[Missing]
) -> tuple[T, ...]:
    """The data, or nothing and an entry in `gaps`."""
    if isinstance(value, Unavailable):
        gaps.append(_gap(what, value, shot))
        return ()
    return value


def _attachments(
    inside: NetnsSnapshot, host: NetnsSnapshot, gaps: list[Missing]
) -> Iterator[Attachment]:
    links = _known(inside.links, "links", inside, gaps)
    addresses = _known(inside.addresses, "addresses", inside, gaps)
    host_links = {link.ifindex: link for link in _known(host.links, "links", host, gaps)}
    fdb = _known(host.fdb, "fdb", host, gaps)
    routes = _known(host.routes, "routes", host, gaps)
    for link in links:
        own = tuple(a for a in addresses if a.ifindex == link.ifindex)
        if "LOOPBACK" in link.flags or link.name == "lo":
            continue
        end = host_links.get(link.peer.ifindex) if link.peer else None
        bridge = host_links.get(end.master) if end is not None and end.master else None
        learned: tuple[tuple[FdbEntry, str], ...] = ()
        if bridge is not None:
            learned = tuple(
                (entry, host_links[entry.ifindex].name if entry.ifindex in host_links else "?")
                for entry in fdb
                if entry.mac == link.mac and entry.master in (None, bridge.ifindex)
            )
        ips = {a.address for a in own}
        exact = tuple(
            r
            for r in routes
            if r.dst.prefixlen == r.dst.max_prefixlen and r.dst.network_address in ips
        )
        yield Attachment(
            link=link,
            addresses=own,
            host=end,
            bridge=bridge,
            learned=learned,
            host_routes=exact,
        )


def _attachment_problems(
    pod: Pod, attachments: tuple[Attachment, ...], inside: NetnsSnapshot
) -> list[str]:
    found: list[str] = []
    if isinstance(inside.links, Unavailable):
        return found
    if not attachments and not pod.host_network:
        found.append("the pod's namespace has no interface but the loopback")
    for at in attachments:
        if not at.link.up or not at.link.carrier:
            found.append(f"{at.link.name} in the pod is {_state(at.link)}")
        if at.host is not None and not at.host.up:
            found.append(f"{at.host.name}, the host end of {at.link.name}, is down")
        port = at.host.port if at.host is not None and at.bridge is not None else None
        if port is not None and port.state not in ("forwarding", ""):
            found.append(f"the host end of {at.link.name} is {port.state} on its bridge")
        if at.bridge is not None and not at.bridge.up:
            found.append(f"bridge {at.bridge.name} is down")
        for entry, learned_on in at.learned:
            if at.host is not None and entry.ifindex != at.host.ifindex:
                found.append(
                    f"{at.link.mac} is learned on port {learned_on}, not on {at.host.name}: "
                    "another device uses the same address"
                )
    if attachments and not isinstance(inside.addresses, Unavailable):
        here = {str(a.address) for at in attachments for a in at.addresses}
        for ip in pod.pod_ips:
            if str(ip_address(ip)) not in here:
                found.append(f"the API says that the pod has {ip}, and no interface in it has it")
    return found


def _state(link: Link) -> str:
    if not link.up:
        return "down"
    return "up" if link.carrier else "up, without carrier (its other end is down)"


def _both_ways(
    pod: Pod, inside: NetnsSnapshot, host: NetnsSnapshot, gaps: list[Missing]
) -> Iterator[Towards]:
    """One entry per address family and direction."""
    fib_inside, fib_host = Fib(inside), Fib(host)
    for text in pod.pod_ips:
        ip = ip_address(text)
        back = next(iter(_host_addresses(pod, host, ip.version)), None)
        if back is not None:
            yield _towards("pod → node", fib_inside, back, inside, host, gaps)
        yield _towards("node → pod", fib_host, ip, host, inside, gaps)


def _host_addresses(pod: Pod, host: NetnsSnapshot, version: int) -> Iterator[IPAddress]:
    if pod.host_ip and (ip := ip_address(pod.host_ip)).version == version:
        yield ip
    if not isinstance(host.addresses, Unavailable):
        for address in host.addresses:
            if address.address.version == version and address.scope == "global":
                yield address.address


def _towards(
    what: str,
    fib: Fib,
    destination: IPAddress,
    near: NetnsSnapshot,
    far: NetnsSnapshot,
    gaps: list[Missing],
) -> Towards:
    decision = fib.output(destination)[0]
    text = ""
    if decision.route is not None:
        text = decision.route.text
    if decision.kind is RouteKind.UNKNOWN:
        gaps.append(_gap("route", Unavailable(reason=decision.detail), near))
        return Towards(what=what, destination=destination)
    if decision.kind not in _GOOD_ROUTES:
        side = "pod" if what.startswith("pod") else "node"
        return Towards(
            what=what,
            destination=destination,
            route=text,
            problem=f"the {side} cannot reach {destination}: "
            f"{decision.detail or decision.kind.value}",
        )
    hop = decision.next_hop or destination
    neighbour = _neighbour(near, decision.interface, hop)
    problem = ""
    if neighbour is not None and neighbour.state == "FAILED":
        problem = f"{hop} does not answer on {decision.interface} (neighbour {neighbour.state})"
    return Towards(
        what=what,
        destination=destination,
        interface=decision.interface,
        next_hop=hop,
        gateway=decision.next_hop is not None,
        neighbour=neighbour,
        owner=_owner(near, decision.interface, far, hop),
        route=text,
        problem=problem,
    )


def _neighbour(shot: NetnsSnapshot, interface: str, address: IPAddress) -> Neighbour | None:
    if isinstance(shot.neighbours, Unavailable) or isinstance(shot.links, Unavailable):
        return None
    indexes = {link.ifindex for link in shot.links if link.name == interface}
    return next((n for n in shot.neighbours if n.ifindex in indexes and n.address == address), None)


def _owner(near: NetnsSnapshot, interface: str, far: NetnsSnapshot, hop: IPAddress) -> str:
    """On ptp links the gateway's address is on every veth of the node: the one at the other end of
    `interface` is meant."""
    if isinstance(near.links, Unavailable) or isinstance(far.links, Unavailable):
        return ""
    if isinstance(far.addresses, Unavailable):
        return ""
    holders = {a.ifindex for a in far.addresses if a.address == hop}
    found = [link.name for link in far.links if link.ifindex in holders]
    ends = {one.peer.ifindex for one in near.links if one.name == interface and one.peer}
    other = [link.name for link in far.links if link.ifindex in holders & ends]
    return ", ".join(other or found)


def _forwarding(
    pod: Pod,
    resolved: pb.ResolvedPod,
    inside: NetnsSnapshot,
    host: NetnsSnapshot,
    attachments: tuple[Attachment, ...],
) -> Iterator[Forwarding]:
    """The switches that a packet from or to the pod meets (ip_route_input_slow: IN_DEV_FORWARD of
    the interface that it comes in by)."""
    versions = sorted({ip_address(ip).version for ip in pod.pod_ips} or {4})
    names: list[str] = []
    for version in versions:
        if version == 4:
            names.append("net.ipv4.ip_forward")
        family = "ipv4" if version == 4 else "ipv6"
        names.append(f"net.{family}.conf.all.forwarding")
        for at in attachments:
            through = at.bridge or at.host
            if through is not None:
                names.append(f"net.{family}.conf.{through.name}.forwarding")
    if not isinstance(host.sysctls, Unavailable):
        for name in names:
            if name in host.sysctls:
                yield Forwarding(where="node", name=name, value=host.sysctls[name])
    if not resolved.host_network and not isinstance(inside.sysctls, Unavailable):
        for name in names[:1]:
            if name in inside.sysctls:
                yield Forwarding(where="pod", name=name, value=inside.sysctls[name])
