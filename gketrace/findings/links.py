"""Interfaces, bridges, neighbours, addresses and MTU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Final

from gketrace.citing import cite_link
from gketrace.findings.making import at, cited, finding, rules_like, sysctl
from gketrace.findings.model import Confidence, Evidence, Finding, Severity, evidence
from gketrace.findings.world import Sight, World
from gketrace.packet import IPAddress
from gketrace.ruleset.iptables import IptablesRuleset
from gketrace.snapshot import Link, NetnsSnapshot, Unavailable
from gketrace.trace import Citation, Source

__all__ = [
    "bridge_switches",
    "duplicates",
    "end_of",
    "hairpin",
    "links_down",
    "mtus",
    "neighbours",
]

_NF: Final = "net.bridge.bridge-nf-call-iptables"
_DEAD: Final = frozenset({"FAILED", "INCOMPLETE"})
_ICMP_DROP: Final = re.compile(rb" -p icmp\b[^\n]*-j (?:DROP|REJECT)\b")


def _links(shot: NetnsSnapshot) -> tuple[Link, ...]:
    return () if isinstance(shot.links, Unavailable) else shot.links


def end_of(sight: Sight, pod: str) -> Link | None:
    """The host's end of a pod's veth pair."""
    for link in _links(sight.host):
        if link.peer is not None and link.peer.netns is not None and link.peer.netns.pod == pod:
            return link
    return None


def _bridge_of(sight: Sight, link: Link) -> Link | None:
    if link.master is None:
        return None
    masters = (one for one in _links(sight.host) if one.ifindex == link.master)
    return next((one for one in masters if one.kind == "bridge"), None)


def links_down(world: World) -> Iterator[Finding]:
    """GKT-313: in pods, their ends on the node, the bridge, and the node's uplink."""
    for sight in world.sights.values():
        for key, shot in sight.seen_pods():
            for link in _links(shot):
                if link.name != "lo" and link.kind == "veth" and _is_down(link, shot.netns.pod):
                    if link.up and (end := end_of(sight, key)) is not None and not end.up:
                        continue  # its other end is down, which is the finding
                    yield _down(sight, link, str(shot.netns), [f"pod {key}"])
        carriers: dict[int, list[str]] = {}
        for key, _ in sight.seen_pods():
            end = end_of(sight, key)
            if end is None:
                continue
            if end.master is not None:
                carriers.setdefault(end.master, []).append(f"pod {key}")
            if not end.up:
                yield _down(sight, end, "host", [f"pod {key}"])
            elif end.port is not None and end.port.state not in ("forwarding", ""):
                yield _down(sight, end, "host", [f"pod {key}"], state=end.port.state)
        for link in _links(sight.host):
            if link.ifindex in carriers and not link.up:
                yield _down(sight, link, "host", carriers[link.ifindex])


def _is_down(link: Link, pod: str) -> bool:
    return bool(pod) and (not link.up or not link.carrier)


def _down(sight: Sight, link: Link, netns: str, subjects: list[str], *, state: str = "") -> Finding:
    where = f"{netns} on node {sight.node}" if netns != "host" else f"node {sight.node}"
    why = f"is {state} on its bridge" if state else "is down"
    if not state and link.up:
        why = "has no carrier"
    return finding(
        "GKT-313",
        f"{link.name} of {where} {why}",
        [cited(cite_link(link), sight.node, netns)],
        remedy="set it up, and find who set it down",
        command=at(f"ip link set {link.name} up", sight.node, netns),
        subjects=[*subjects, f"node {sight.node}"],
        nodes=[sight.node],
        cause=f"link {sight.node} {netns} {link.name}",
    )


def neighbours(world: World) -> Iterator[Finding]:
    """GKT-312: a pod, a node or a gateway that was asked for on its link and did not answer."""
    for sight in world.sights.values():
        spaces = [("host", sight.host), *((str(s.netns), s) for _, s in sight.seen_pods())]
        for netns, shot in spaces:
            if isinstance(shot.neighbours, Unavailable):
                continue
            names = {link.ifindex: link.name for link in _links(shot)}
            gateways = _gateways(shot)
            for one in shot.neighbours:
                if one.state not in _DEAD:
                    continue
                who = _who(world, one.address)
                if one.address in gateways:
                    who = who or "the gateway"
                if not who:
                    continue
                device = names.get(one.ifindex, "?")
                text = f"{one.address} dev {device} {one.state}"
                inside = "" if netns == "host" else f"{netns} on "
                yield finding(
                    "GKT-312",
                    f"{who} ({one.address}) does not answer on {device} of {inside}node "
                    f"{sight.node}",
                    [cited(Citation(source=Source.NEIGHBOUR, text=text), sight.node, netns)],
                    remedy="see whether it is up and on that link",
                    command=at(f"ip neigh show {one.address}", sight.node, netns),
                    subjects=[who, f"node {sight.node}"],
                    nodes=[sight.node],
                    cause=f"neighbour {sight.node} {netns} {one.address}",
                    severity=Severity.WARNING if one.state == "INCOMPLETE" else None,
                    confidence=Confidence.LIKELY,
                )


def _gateways(shot: NetnsSnapshot) -> set[IPAddress]:
    if isinstance(shot.routes, Unavailable):
        return set()
    return {hop.gateway for r in shot.routes for hop in r.next_hops if hop.gateway is not None}


def _who(world: World, address: IPAddress) -> str:
    pod = world.pod_by_address.get(address)
    if pod is not None:
        return f"pod {pod.key}"
    node = world.node_by_address.get(address)
    return f"node {node.name}" if node is not None else ""


def duplicates(world: World) -> Iterator[Finding]:
    """GKT-311: by the API, by the namespaces' own addresses, and by link addresses."""
    claims: dict[IPAddress, dict[str, list[Evidence]]] = {}
    for pod in world.pods:
        if pod.host_network or pod.phase in ("Succeeded", "Failed"):
            continue
        for text in pod.pod_ips:
            proof = evidence(Source.OBJECT, f"Pod {pod.key}: status.podIPs {text}")
            claims.setdefault(ip_address(text), {}).setdefault(pod.key, []).append(proof)
    macs: dict[IPAddress, dict[str, Evidence]] = {}
    for sight in world.sights.values():
        for key, shot in sight.seen_pods():
            if isinstance(shot.addresses, Unavailable):
                continue
            by_index = {link.ifindex: link for link in _links(shot)}
            for one in shot.addresses:
                if one.scope != "global" or one.address.is_loopback or one.address.is_link_local:
                    continue
                link = by_index.get(one.ifindex)
                if link is None or link.name == "lo":
                    continue
                text = f"{one.address}/{one.prefixlen} dev {link.name}"
                proof = cited(
                    Citation(source=Source.ADDRESS, text=text), sight.node, str(shot.netns)
                )
                claims.setdefault(one.address, {}).setdefault(key, []).append(proof)
                if link.mac:
                    macs.setdefault(one.address, {})[link.mac] = proof
    for address, owners in claims.items():
        if len(owners) < 2:
            continue
        yield finding(
            "GKT-311",
            f"{' and '.join(sorted(owners))} both have the address {address}",
            [proof for proofs in owners.values() for proof in proofs],
            remedy="delete one of the pods; if it happens again, look at the CNI plugin's IPAM",
            command=f"kubectl get pods -A -o wide --field-selector status.podIP={address}",
            subjects=[f"pod {key}" for key in sorted(owners)],
            nodes=[p.node for proofs in owners.values() for p in proofs],
            cause=f"address {address}",
        )
    yield from _stolen(world, macs)


def _stolen(world: World, macs: dict[IPAddress, dict[str, Evidence]]) -> Iterator[Finding]:
    """A neighbour entry for a pod's address with a link address that is not the pod's."""
    for sight in world.sights.values():
        if isinstance(sight.host.neighbours, Unavailable):
            continue
        names = {link.ifindex: link.name for link in _links(sight.host)}
        for one in sight.host.neighbours:
            pod = world.pod_by_address.get(one.address)
            if pod is None or pod.node != sight.node or not one.mac or one.state in _DEAD:
                continue
            known = macs.get(one.address, {})
            if not known or one.mac in known:
                continue
            text = f"{one.address} dev {names.get(one.ifindex, '?')} lladdr {one.mac} {one.state}"
            yield finding(
                "GKT-311",
                f"Somebody else on node {sight.node} answers for {one.address} of pod {pod.key}",
                [
                    cited(Citation(source=Source.NEIGHBOUR, text=text), sight.node),
                    *known.values(),
                ],
                remedy="find who has that link address",
                command=at(f"bridge fdb show | grep {one.mac}", sight.node),
                subjects=[f"pod {pod.key}"],
                nodes=[sight.node],
                cause=f"address {one.address}",
            )


def _bridged(sight: Sight) -> list[tuple[str, Link, Link]]:
    """(pod, its port, its bridge)."""
    found = []
    for key, _ in sight.seen_pods():
        port = end_of(sight, key)
        bridge = _bridge_of(sight, port) if port is not None else None
        if port is not None and bridge is not None:
            found.append((key, port, bridge))
    return found


def bridge_switches(world: World) -> Iterator[Finding]:
    """GKT-314: without br_netfilter, frames between two ports of the bridge meet no rules."""
    for sight in world.sights.values():
        wired = _bridged(sight)
        if not wired or isinstance(sight.host.sysctls, Unavailable):
            continue
        if not sight.by_rules or any(b.bridge_nf_call_iptables for _, _, b in wired):
            continue
        value = sight.host.sysctls.get(_NF)
        if value not in (None, "0"):
            continue
        name = wired[0][2].name
        proof = (
            sysctl(sight.host, _NF, value)
            if value is not None
            else cited(
                Citation(source=Source.SYSCTL, text=f"{_NF} is absent: br_netfilter is not loaded"),
                sight.node,
            )
        )
        yield finding(
            "GKT-314",
            f"On node {sight.node} frames on {name} bypass the rules: a pod that reaches a pod of "
            "its own node through a Service gets answers that are not translated back",
            [proof, cited(cite_link(wired[0][2]), sight.node)],
            remedy="load br_netfilter and switch it on",
            command=at(f"modprobe br_netfilter; sysctl -w {_NF}=1", sight.node),
            subjects=[f"node {sight.node}"],
            nodes=[sight.node],
            cause=f"bridge-nf {sight.node}",
        )


def hairpin(world: World) -> Iterator[Finding]:
    """GKT-315: a frame does not leave a bridge by the port that it came in by, unless told to."""
    served: dict[str, list[str]] = {}
    for one in world.expected.values():
        for end in one.usable:
            if end.pod:
                served.setdefault(end.pod_key, []).append(f"service {one.service.key}")
    for sight in world.sights.values():
        lacking = [
            (key, port, bridge)
            for key, port, bridge in _bridged(sight)
            if key in served
            and port.port is not None
            and not port.port.hairpin
            and "PROMISC" not in bridge.flags
        ]
        if not lacking:
            continue
        yield finding(
            "GKT-315",
            f"Hairpin is off on {len(lacking)} bridge port{'s' if len(lacking) > 1 else ''} of "
            f"node {sight.node}: these pods cannot reach themselves through their Services",
            [
                cited(cite_link(port), sight.node, note=f"port of pod {key}, hairpin off")
                for key, port, _ in lacking
            ],
            remedy="set hairpin on the ports (kubelet --hairpin-mode=hairpin-veth), or promiscuous "
            "mode on the bridge",
            command=at(
                "; ".join(f"bridge link set dev {port.name} hairpin on" for _, port, _ in lacking),
                sight.node,
            ),
            subjects=[f"pod {key}" for key, _, _ in lacking],
            nodes=[sight.node],
            cause=f"hairpin {sight.node}",
        )


def mtus(world: World) -> Iterator[Finding]:
    """GKT-316 and GKT-317: the path is smaller than what pods send, and whether they are told."""
    for sight in world.sights.values():
        uplinks = _uplinks(sight)
        for key, shot in sight.seen_pods():
            inside = next((link for link in _links(shot) if link.kind == "veth"), None)
            if inside is None:
                continue
            path = [link for link in (end_of(sight, key), *uplinks) if link is not None]
            if (end := end_of(sight, key)) is not None:
                bridge = _bridge_of(sight, end)
                path += [bridge] if bridge is not None else []
            small = [link for link in path if link.mtu < inside.mtu]
            if small:
                yield from _small(world, sight, key, shot, inside, min(small, key=_mtu))
    yield from _other_nodes(world)


def _mtu(link: Link) -> int:
    return link.mtu


def _uplinks(sight: Sight) -> list[Link]:
    """Where default routes go out."""
    if isinstance(sight.host.routes, Unavailable):
        return []
    out = {
        hop.oif for r in sight.host.routes if r.dst.prefixlen == 0 for hop in r.next_hops if hop.oif
    }
    return [link for link in _links(sight.host) if link.ifindex in out]


def _small(
    world: World, sight: Sight, key: str, shot: NetnsSnapshot, inside: Link, small: Link
) -> Iterator[Finding]:
    proof = [
        cited(cite_link(inside), sight.node, str(shot.netns), note=f"MTU {inside.mtu}"),
        cited(cite_link(small), sight.node, note=f"MTU {small.mtu}"),
    ]
    silent = _silenced(sight)
    if silent is not None:
        yield finding(
            "GKT-317",
            f"Packets of pod {key} larger than {small.mtu} bytes vanish: {small.name} of node "
            f"{sight.node} cannot carry them, and a rule drops the ICMP errors that would say so",
            [silent, *proof],
            remedy="let ICMP errors pass (type 3 code 4), or give the pods the smaller MTU",
            command=f"gketrace rules {sight.node} --chain {silent.citation.chain}",
            subjects=[f"pod {key}", f"node {sight.node}"],
            nodes=[sight.node],
            cause=f"mtu {sight.node} {small.name}",
        )
        return
    yield finding(
        "GKT-316",
        f"Pod {key} sends up to {inside.mtu} bytes, and {small.name} of node {sight.node} carries "
        f"{small.mtu}: it depends on ICMP errors that may be lost on the way",
        proof,
        remedy="give the pods the smaller MTU in the CNI plugin's configuration",
        command=at(f"ip link set {inside.name} mtu {small.mtu}", sight.node, str(shot.netns)),
        subjects=[f"pod {key}", f"node {sight.node}"],
        nodes=[sight.node],
        cause=f"mtu {sight.node} {small.name}",
    )


def _silenced(sight: Sight) -> Evidence | None:
    """A rule that drops ICMP in a base chain that errors pass."""
    for one in sight.host.rulesets:
        if not isinstance(one, IptablesRuleset) or one.family != 4:
            continue
        for rule in rules_like(one, _ICMP_DROP):
            return cited(rule.citation, sight.node)
    return None


def _other_nodes(world: World) -> Iterator[Finding]:
    """Nodes whose uplinks differ."""
    by_mtu: dict[int, list[tuple[Sight, Link]]] = {}
    for sight in world.sights.values():
        for link in _uplinks(sight)[:1]:
            by_mtu.setdefault(link.mtu, []).append((sight, link))
    if len(by_mtu) < 2:
        return
    least = min(by_mtu)
    odd = by_mtu[least]
    yield finding(
        "GKT-316",
        f"The uplinks of nodes differ in MTU: {least} on "
        f"{', '.join(sight.node for sight, _ in odd)}, up to {max(by_mtu)} elsewhere",
        [
            cited(cite_link(link), sight.node, note=f"MTU {link.mtu}")
            for pairs in by_mtu.values()
            for sight, link in pairs
        ],
        remedy="set the network's own MTU on all of them",
        command=at(f"ip link set {odd[0][1].name} mtu {max(by_mtu)}", odd[0][0].node),
        subjects=[f"node {sight.node}" for sight, _ in odd],
        nodes=[sight.node for sight, _ in odd],
        cause="mtu of uplinks",
    )
