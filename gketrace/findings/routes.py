"""Routes of every node to every pod, and of every pod to its node and beyond.

The kernel's own look-up (`gketrace.simulate.routing.Fib`) says where a packet goes; where it should
go, the pods' wires and the objects say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network

from gketrace.findings.making import at, cited, finding
from gketrace.findings.model import Evidence, Finding, Severity
from gketrace.findings.world import Sight, World, fib_of
from gketrace.objects import Pod
from gketrace.packet import IPAddress
from gketrace.simulate.fib.decision import RouteDecision, RouteKind
from gketrace.snapshot import Link, NetnsSnapshot, Route, RouteType, Unavailable
from gketrace.trace import Citation, Source

__all__ = ["local_routes", "pod_routes", "routes", "stale_routes"]

_MAIN = 254
"""RT_TABLE_MAIN (include/uapi/linux/rtnetlink.h)."""
_USUAL = frozenset({0, 32766, 32767})
"""Priorities of the rules that every namespace has."""
_ENDS = frozenset({RouteKind.UNREACHABLE, RouteKind.BLACKHOLE, RouteKind.PROHIBIT})


def routes(world: World) -> Iterator[Finding]:
    """GKT-305, GKT-306, GKT-308, GKT-309: from each node to each pod."""
    for sight in world.sights.values():
        if isinstance(sight.host.routes, Unavailable) or isinstance(sight.host.links, Unavailable):
            continue
        links = {link.name: link for link in sight.host.links}
        lost: dict[tuple[str, int], list[Finding]] = {}
        there: Counter[tuple[str, int]] = Counter()
        for pod in world.pods:
            if pod.host_network or not pod.node or pod.phase in ("Succeeded", "Failed"):
                continue
            for address in map(ip_address, pod.pod_ips):
                there[pod.node, address.version] += 1
                for decision in sight.fib.output(address):
                    found = _judge(world, sight, links, pod, address, decision)
                    if found is None:
                        continue
                    if found.code == "GKT-305":
                        lost.setdefault((pod.node, address.version), []).append(found)
                        break  # one for each address
                    yield found
        yield from _lost(sight, lost, there)


def _lost(
    sight: Sight,
    lost: Mapping[tuple[str, int], list[Finding]],
    there: Mapping[tuple[str, int], int],
) -> Iterator[Finding]:
    """GKT-305, one for what one route would cover: all pods of the node itself (its bridge's route,
    or what the CNI plugin made), all pods of all other nodes (the default route)."""
    for version in sorted({version for _, version in lost}):
        whole = {
            node: found
            for (node, of), found in lost.items()
            if of == version and len(found) == there[node, of]
        }
        own = whole.pop(sight.node, [])
        if len(own) > 1:
            text = f"Node {sight.node} has no route to any of its own {len(own)} pods"
            cause = f"no route {sight.node} own {version}"
            remedy = "restore the pods' routes, or the bridge's address that makes them one"
            command = at("ip route show", sight.node)
            yield from (
                replace(one, text=text, cause=cause, remedy=remedy, command=command) for one in own
            )
        others = {node for node, of in there if of == version and node != sight.node}
        if len(others) > 1 and set(whole) == others:
            text = f"Node {sight.node} has no route to the pods of any other node"
            cause = f"no route {sight.node} others {version}"
            remedy = "restore the node's default route, which DHCP gives it"
            command = at("ip route show default", sight.node)
            yield from (
                replace(one, text=text, cause=cause, remedy=remedy, command=command)
                for o in whole.values()
                for one in o
            )
        else:
            whole = {}
        for (node, of), found in lost.items():
            told = node in whole or (node == sight.node and len(own) > 1)
            if of == version and not told:
                yield from found


def _judge(
    world: World,
    sight: Sight,
    links: dict[str, Link],
    pod: Pod,
    address: IPAddress,
    decision: RouteDecision,
) -> Finding | None:
    kind, route = decision.kind, decision.route
    own = pod.node == sight.node
    if kind is RouteKind.UNKNOWN or (address.version == 6 and not _has6(sight)):
        return None
    if kind is RouteKind.LOCAL:
        return None  # local_routes
    if kind is RouteKind.NO_ROUTE:
        return _missing(sight, pod, address, decision)
    if kind in _ENDS:
        return _wrong(sight, pod, address, decision, f"ends in {kind.value}")
    link = links.get(decision.interface)
    if link is None or kind is not RouteKind.FORWARD:
        return None
    behind = _behind(links, link)
    if own and (pod.key in behind or not _wired(links, pod.key)):
        return None
    if not own and not behind and link.kind not in ("bridge", "dummy"):
        return None
    if own and not behind and link.kind not in ("bridge", "dummy"):
        exact = route is not None and route.dst.prefixlen > 0
        if not exact:
            return _missing(sight, pod, address, decision)
    how = f"leads out of {link.name}"
    if not own:
        how += f", and the pod is on node {pod.node}"
    return _wrong(sight, pod, address, decision, how)


def _has6(sight: Sight) -> bool:
    """Whether the node has IPv6 routes beyond link-local ones at all."""
    assert not isinstance(sight.host.routes, Unavailable)
    return any(
        route.family == 6 and route.table == _MAIN and not route.dst.is_link_local
        for route in sight.host.routes
    )


def _behind(links: dict[str, Link], link: Link) -> set[str]:
    """The pods that hang on a link: at a veth's other end, or on a bridge's ports."""
    members = [link]
    if link.kind == "bridge":
        members = [one for one in links.values() if one.master == link.ifindex]
    return {
        one.peer.netns.pod
        for one in members
        if one.peer is not None and one.peer.netns is not None and one.peer.netns.pod
    }


def _wired(links: dict[str, Link], pod: str) -> bool:
    return any(pod in _behind(links, link) for link in links.values())


def _cite(decision: RouteDecision, text: str) -> Citation:
    if decision.route is not None and decision.route.text:
        return Citation(
            source=Source.ROUTE, text=decision.route.text, table=str(decision.route.table)
        )
    return Citation(source=Source.ROUTE, text=text)


def _proof(sight: Sight, decision: RouteDecision, text: str) -> list[Evidence]:
    proof = [cited(_cite(decision, text), sight.node)]
    if decision.rule is not None and decision.rule.priority not in _USUAL:
        rule = Citation(source=Source.POLICY_RULE, text=decision.rule.text)
        proof.insert(0, cited(rule, sight.node))
    return proof


def _missing(sight: Sight, pod: Pod, address: IPAddress, decision: RouteDecision) -> Finding:
    text = f"no route to {address} on node {sight.node}"
    if decision.kind is not RouteKind.NO_ROUTE:
        text = f"only {decision.route.text if decision.route else 'a default'} fits {address}"
    return finding(
        "GKT-305",
        f"Node {sight.node} has no route to pod {pod.key} ({address})",
        [cited(Citation(source=Source.ROUTE, text=text), sight.node)],
        remedy="restore the route that the CNI plugin made; starting the pod again does that",
        command=at(f"ip route get {address}", sight.node),
        subjects=[f"pod {pod.key}", f"node {sight.node}"],
        nodes=[sight.node],
        cause=f"no route {sight.node} {address if pod.node == sight.node else pod.node}",
    )


def _wrong(
    sight: Sight, pod: Pod, address: IPAddress, decision: RouteDecision, how: str
) -> Finding:
    route, rule = decision.route, decision.rule
    by_rule = rule is not None and rule.priority not in _USUAL
    exact = route is not None and route.dst.prefixlen == route.dst.max_prefixlen
    code = "GKT-308" if by_rule else "GKT-309" if exact and how.startswith("leads") else "GKT-306"
    what = {
        "GKT-308": f"A policy rule of node {sight.node} bypasses the route to pod {pod.key}",
        "GKT-309": f"Node {sight.node} has a stale route to {address} of pod {pod.key}",
        "GKT-306": f"The route of node {sight.node} to pod {pod.key} is wrong",
    }[code]
    name = route.dst if route is not None else address
    single = route is not None and len(route.next_hops) == 1 and decision.interface
    device = f" dev {decision.interface}" if single else ""
    command = f"ip route del {name}{device}{_table(route)}"
    if by_rule and rule is not None:
        command = f"ip rule del priority {rule.priority}"
    text = route.text if route is not None else decision.detail
    return finding(
        code,
        f"{what}: it {how}",
        _proof(sight, decision, decision.detail),
        remedy="remove it, and find who made it",
        command=at(command, sight.node),
        subjects=[f"pod {pod.key}", f"node {sight.node}"],
        nodes=[sight.node],
        cause=f"route {sight.node} {rule.text if by_rule and rule else ''} {text}",
    )


def _table(route: Route | None) -> str:
    """What `ip route` has to be told where it is not the main table."""
    return "" if route is None or route.table == _MAIN else f" table {route.table}"


def stale_routes(world: World) -> Iterator[Finding]:
    """GKT-309: a route for one address of the pod range that no pod has."""
    if not world.pods or not world.all_pods:
        return
    for sight in world.sights.values():
        if isinstance(sight.host.routes, Unavailable) or isinstance(sight.host.links, Unavailable):
            continue
        node = next((n for n in world.nodes if n.name == sight.node), None)
        ranges = [ip_network(cidr) for cidr in node.pod_cidrs] if node is not None else []
        links = {link.ifindex: link for link in sight.host.links}
        for route in sight.host.routes:
            if not _for_one_pod(route, links) or not any(
                route.dst.version == r.version and route.dst.network_address in r for r in ranges
            ):
                continue
            if route.dst.network_address in world.pod_by_address:
                continue
            yield finding(
                "GKT-309",
                f"Node {sight.node} has a route to {route.dst.network_address}, which no pod has",
                [cited(_route_citation(route), sight.node)],
                remedy="remove it: it hides the address from the next pod that gets it",
                command=at(f"ip route del {route.dst}{_table(route)}", sight.node),
                subjects=[f"node {sight.node}"],
                nodes=[sight.node],
                cause=f"route {sight.node} {route.text}",
                severity=Severity.WARNING,
            )


def _for_one_pod(route: Route, links: dict[int, Link]) -> bool:
    devices = [links.get(hop.oif) for hop in route.next_hops if hop.oif is not None]
    return (
        route.type is RouteType.UNICAST
        and route.table == _MAIN
        and route.dst.prefixlen == route.dst.max_prefixlen
        and any(link is not None and link.kind in ("veth", "dummy") for link in devices)
    )


def _route_citation(route: Route) -> Citation:
    return Citation(source=Source.ROUTE, text=route.text, table=str(route.table))


def local_routes(world: World) -> Iterator[Finding]:
    """GKT-310: a local route that covers pods makes the node take their packets for itself.

    The GCE guest agent makes such routes (protocol 66) for alias ranges unless ip_aliases=false.
    """
    for sight in world.sights.values():
        if isinstance(sight.host.routes, Unavailable):
            continue
        own = set()
        if not isinstance(sight.host.addresses, Unavailable):
            own = {one.address for one in sight.host.addresses}
        for route in sight.host.routes:
            if route.type is not RouteType.LOCAL or route.dst.network_address in own:
                continue
            hidden = [
                pod
                for address, pod in world.pod_by_address.items()
                if address.version == route.dst.version
                and address in route.dst
                and _taken_in(sight, address)
            ]
            if not hidden:
                continue
            by = " (made by the GCE guest agent)" if route.protocol == 66 else ""
            yield finding(
                "GKT-310",
                f"A local route of node {sight.node}{by} covers {_pods(hidden)}: the node takes "
                "their packets for its own",
                [cited(_route_citation(route), sight.node)],
                remedy="remove it; for the guest agent, set ip_aliases = false there",
                command=at(f"ip route del local {route.dst} table {route.table}", sight.node),
                subjects=[f"node {sight.node}", *(f"pod {pod.key}" for pod in hidden)],
                nodes=[sight.node],
                cause=f"route {sight.node} {route.text}",
            )


def _pods(pods: Sequence[Pod]) -> str:
    return f"pod {pods[0].key}" if len(pods) == 1 else f"{len(pods)} pods"


def _taken_in(sight: Sight, address: IPAddress) -> bool:
    """Whether the look-up ends here.  While a namespace has its three usual rules, the kernel keeps
    local and main in one trie (fib_trie.c, fib_trie_unmerge), so a pod's own /32 route wins over a
    local route of a shorter prefix."""
    return any(d.kind is RouteKind.LOCAL for d in sight.fib.output(address))


def pod_routes(world: World) -> Iterator[Finding]:
    """GKT-305 and GKT-306 inside pods: to the node, and to the outside."""
    nodes = {node.name: node for node in world.nodes}
    for sight in world.sights.values():
        node = nodes.get(sight.node)
        for key, shot in sight.seen_pods():
            pod = world.pod_by_key.get(key)
            if isinstance(shot.routes, Unavailable) or pod is None:
                continue
            fib = fib_of(shot)
            wanted = [ip_address("203.0.113.10")]
            if node is not None:
                wanted = [*(ip_address(ip) for ip in node.internal_ips), *wanted]
            families = {ip_address(ip).version for ip in pod.pod_ips}
            for address in wanted:
                if address.version in families:
                    yield from _inside(sight, shot, pod, address, fib.output(address)[0])


def _inside(
    sight: Sight, shot: NetnsSnapshot, pod: Pod, address: IPAddress, decision: RouteDecision
) -> Iterator[Finding]:
    if decision.kind in (RouteKind.FORWARD, RouteKind.LOCAL, RouteKind.UNKNOWN):
        return
    none = decision.kind is RouteKind.NO_ROUTE
    text = f"no route to {address}" if none else decision.detail
    yield finding(
        "GKT-305" if none else "GKT-306",
        f"Pod {pod.key} has no way out: {text}",
        [cited(_cite(decision, text), sight.node, str(shot.netns))],
        remedy="restore the pod's default route; starting the pod again does that",
        command=f"gketrace pod {pod.name} -n {pod.namespace}",
        subjects=[f"pod {pod.key}"],
        nodes=[sight.node],
        cause=f"route in {pod.key} {text if not none else ''}",
    )
