"""Masquerading: where it is missing, and where it hides who sends."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

from gketrace.findings.making import cited, finding, proxy_logs
from gketrace.findings.model import Evidence, Finding, evidence
from gketrace.findings.world import Sight, Way, World
from gketrace.packet import Protocol
from gketrace.ruleset.iptables import IptablesRuleset
from gketrace.snapshot import Unavailable
from gketrace.trace import Citation, NetnsKind, Source, Step, StepKind

__all__ = ["missing", "node_local_dns", "too_wide"]


def missing(world: World) -> Iterator[Finding]:
    """GKT-318: kube-proxy's masquerading is not reached, or a pod's address leaves the cluster."""
    for sight in world.sights.values():
        for one in sight.programme.iptables:
            rules: IptablesRuleset = one.rules
            post = rules.chain("nat", "POSTROUTING")
            jumps = [r for r in post or () if "-j KUBE-POSTROUTING" in r.text]
            own = rules.chain("nat", "KUBE-POSTROUTING")
            masks = [r for r in own or () if "-j MASQUERADE" in r.text]
            mark = rules.chain("nat", "KUBE-MARK-MASQ")
            marks = [r for r in mark or () if "-j MARK" in r.text]
            if jumps and masks and marks:
                continue
            chain = "POSTROUTING" if not jumps else "KUBE-POSTROUTING"
            lack = "jump to KUBE-POSTROUTING" if not jumps else "MASQUERADE rule"
            if jumps and masks:
                chain, lack = "KUBE-MARK-MASQ", "MARK rule"
            text = f"nat {chain} has no {lack} ({rules.source})"
            proof = Citation(
                source=Source.RULE, text=text, backend=rules.backend, table="nat", chain=chain
            )
            yield finding(
                "GKT-318",
                f"Node {sight.node} does not masquerade Service traffic: nat {chain} has no "
                f"{lack}, so answers bypass the node and clients do not know them",
                [cited(proof, sight.node)],
                remedy="restart kube-proxy, and find what removed the rule",
                command=proxy_logs(world.pods, sight.node),
                subjects=[f"node {sight.node}"],
                nodes=[sight.node],
                cause=f"masquerade {sight.node}",
            )
    yield from _leaving(world)


def _leaving(world: World) -> Iterator[Finding]:
    """Where some nodes masquerade what pods send outside, and others do not."""
    bare: dict[str, Way] = {}
    masked: dict[str, Way] = {}
    for way in world.ways:
        if way.path.front_door != "Address" or not way.sender_pod:
            continue
        if way.path.outcome.disposition.value != "transmitted":
            continue
        source = way.path.outcome.packet.src
        (bare if source in world.pod_by_address else masked)[way.sender_node] = way
    if not bare or not masked:
        return
    for node, way in bare.items():
        sample = next(iter(masked.values()))
        yield finding(
            "GKT-318",
            f"Pods of node {node} leave the cluster with their own addresses; those of "
            f"{', '.join(sorted(masked))} are masqueraded",
            [
                evidence(
                    Source.RULE,
                    f"no rule of nat POSTROUTING masquerades {way.path.outcome.packet}",
                    node=node,
                ),
                *_nat(sample),
            ],
            remedy="restore the masquerading rules (ip-masq-agent, IP-MASQ) on this node",
            command=f"gketrace rules {node} --chain POSTROUTING",
            subjects=[f"node {node}"],
            nodes=[node],
            cause=f"masquerade {node}",
        )


def _nat(way: Way) -> Iterator[Evidence]:
    for node, step in _translations(way):
        if step.citation is not None:
            yield cited(step.citation, node)


def _translations(way: Way) -> Iterator[tuple[str, Step]]:
    """Steps on nodes that changed the source address."""
    for hop in way.path.hops:
        if hop.netns.kind is not NetnsKind.HOST or not hop.netns.node:
            continue
        rules = [s for s in hop.steps if s.kind is StepKind.RULE and s.citation is not None]
        for step in hop.steps:
            if step.before.src != step.after.src:
                last = next((r for r in reversed(rules) if "ASQ" in (r.citation or _NO).text), step)
                yield hop.netns.node, last


_NO = Citation(source=Source.KERNEL, text="")


def too_wide(world: World) -> Iterator[Finding]:
    """GKT-319: pods see each other's packets with a node's address.  Policies by pod then fail."""
    for way in world.ways:
        if way.path.front_door != "Pod" or not way.sender_pod or not way.path.source_seen:
            continue
        seen = ip_address(way.path.source_seen)
        pod = world.pod_by_key.get(way.sender_pod)
        if pod is None or way.path.source_seen in pod.pod_ips:
            continue
        proof = [cited(s.citation, n) for n, s in _translations(way) if s.citation is not None]
        yield finding(
            "GKT-319",
            f"Node {way.sender_node} masquerades what its pods send to other pods: "
            f"{way.path.target} sees {seen} in place of pod {way.sender_pod}",
            proof,
            remedy="leave the pods' ranges out of masquerading (nonMasqueradeCIDRs)",
            command="kubectl -n kube-system get configmap ip-masq-agent -o yaml",
            subjects=[f"node {way.sender_node}"],
            nodes=[way.sender_node],
            cause=f"masquerade of pods {way.sender_node}",
        )


def node_local_dns(world: World) -> Iterator[Finding]:
    """GKT-320: the cache's addresses are on the node, and nobody answers there, or rules send the
    queries past it."""
    for sight in world.sights.values():
        for address in _cache_addresses(sight):
            where = f"{address} of node {sight.node}"
            link = cited(
                Citation(source=Source.ADDRESS, text=f"{address} dev nodelocaldns"), sight.node
            )
            if not isinstance(sight.host.sockets, Unavailable) and not any(
                s.port == 53
                and s.protocol == Protocol.UDP
                and (s.address.is_unspecified or str(s.address) == address)
                for s in sight.host.sockets
            ):
                text = f"no UDP socket is bound to {address}:53"
                yield finding(
                    "GKT-320",
                    f"NodeLocal DNS does not answer: nothing listens on {where}, and pods of this "
                    "node ask there",
                    [cited(Citation(source=Source.SOCKET, text=text), sight.node), link],
                    remedy="see why the node-local-dns pod of this node does not run",
                    command="kubectl -n kube-system get pods -l k8s-app=node-local-dns -o wide "
                    f"--field-selector spec.nodeName={sight.node}",
                    subjects=[f"node {sight.node}"],
                    nodes=[sight.node],
                    cause=f"nodelocaldns {sight.node}",
                )
                return
            if not _untracked(sight, address):
                text = f"no rule of raw PREROUTING exempts {address} from tracking"
                yield finding(
                    "GKT-320",
                    f"Queries to {where} bypass NodeLocal DNS: kube-proxy translates them before "
                    "the cache sees them",
                    [cited(Citation(source=Source.RULE, text=text, table="raw"), sight.node), link],
                    remedy="restart the node-local-dns pod of this node: it writes the rules",
                    command="kubectl -n kube-system delete pod -l k8s-app=node-local-dns "
                    f"--field-selector spec.nodeName={sight.node}",
                    subjects=[f"node {sight.node}"],
                    nodes=[sight.node],
                    cause=f"nodelocaldns {sight.node}",
                )


def _cache_addresses(sight: Sight) -> Iterator[str]:
    if isinstance(sight.host.links, Unavailable) or isinstance(sight.host.addresses, Unavailable):
        return
    index = {link.ifindex for link in sight.host.links if link.name == "nodelocaldns"}
    for one in sight.host.addresses:
        if one.ifindex in index and one.address.version == 4:
            yield str(one.address)


def _untracked(sight: Sight, address: str) -> bool:
    for one in sight.host.rulesets:
        if isinstance(one, IptablesRuleset):
            for rule in one.chain("raw", "PREROUTING") or ():
                exempt = "-j NOTRACK" in rule.text or "--notrack" in rule.text
                if exempt and f"-d {address}/32" in rule.text:
                    return True
    return False
