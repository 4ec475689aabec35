"""What is no ordinary pod or node, named for what it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gketrace.findings.making import cited, finding, of_endpoint
from gketrace.findings.model import Finding, evidence
from gketrace.findings.world import World
from gketrace.trace import Citation, Source

if TYPE_CHECKING:
    from gketrace.ruleset.iptables import IptablesRuleset

__all__ = ["data_planes", "host_network", "pod_rules", "sandboxes"]


def pod_rules(world: World) -> Iterator[Finding]:
    """GKT-322: rules that act inside a pod: a mesh's, or somebody's by hand."""
    from gketrace.ruleset.iptables import IptablesRuleset
    from gketrace.ruleset.nft import NftRuleset

    for sight in world.sights.values():
        for key, shot in sight.seen_pods():
            for one in shot.rulesets:
                rule = None
                if isinstance(one, IptablesRuleset):
                    rule = next(_rules(one), None)
                elif isinstance(one, NftRuleset):
                    chains = (one.chain(name) for name in one.chain_names)
                    rule = next((r.citation for c in chains for r in c or ()), None)
                if rule is None:
                    continue
                space, _, name = key.partition("/")
                yield finding(
                    "GKT-322",
                    f"There are rules inside pod {key}: they act before and after the node's",
                    [cited(rule, sight.node, str(shot.netns))],
                    remedy="nothing, when a mesh's sidecar made them; else find who did",
                    command=f"gketrace rules pod/{name} -n {space}",
                    subjects=[f"pod {key}"],
                    nodes=[sight.node],
                    cause=f"rules in {key}",
                )


def _rules(one: IptablesRuleset) -> Iterator[Citation]:
    for table in one.tables:
        for name in one.chain_names(table):
            for rule in one.chain(table, name) or ():
                yield rule.citation


def data_planes(world: World) -> Iterator[Finding]:
    """GKT-323."""
    for sight in world.sights.values():
        if sight.plane != "dataplane-v2":
            continue
        yield finding(
            "GKT-323",
            f"Node {sight.node} forwards with Dataplane V2: eBPF programs decide, which the "
            "kernel's rules and connection tracking do not show",
            [evidence(Source.LINK, sight.plane_reason or "cilium_host", node=sight.node)],
            remedy="look at Services and policies with the data plane's own tools",
            command="kubectl -n kube-system exec ds/anetd -- cilium-dbg service list",
            subjects=[f"node {sight.node}"],
            nodes=[sight.node],
            cause="dataplane-v2",
        )


def sandboxes(world: World) -> Iterator[Finding]:
    """GKT-324: what listens in the sandbox is not visible to the node's kernel."""
    for sight in world.sights.values():
        for key, handler in sight.handlers.items():
            if handler != "gvisor":
                continue
            yield finding(
                "GKT-324",
                f"Pod {key} runs in gVisor: its sockets, routes and connections inside are not "
                "visible to its node",
                [
                    evidence(
                        Source.OBJECT, f"runtime handler {handler} of pod {key}", node=sight.node
                    )
                ],
                remedy="look inside the pod itself",
                command=f"kubectl exec -n {key.partition('/')[0]} {key.partition('/')[2]} -- "
                "netstat -ltn",
                subjects=[f"pod {key}"],
                nodes=[sight.node],
            )


def host_network(world: World) -> Iterator[Finding]:
    """GKT-325: the node's own rules, ports and firewall apply to such an endpoint."""
    for one in world.expected.values():
        for end in one.usable:
            pod = world.pod_by_key.get(end.pod_key)
            if pod is None or not pod.host_network:
                continue
            yield finding(
                "GKT-325",
                f"Endpoint {end.address}:{end.port} of Service {one.service.key} is pod {pod.key} "
                f"in the network of its node {pod.node}",
                [
                    of_endpoint(end),
                    evidence(Source.OBJECT, f"Pod {pod.key}: spec.hostNetwork true"),
                ],
                remedy="remember that firewalls and ports of the node apply, and policies do not",
                command=f"gketrace pod {pod.name} -n {pod.namespace}",
                subjects=[f"service {one.service.key}", f"pod {pod.key}"],
                nodes=[pod.node],
                cause=f"hostNetwork {one.service.key} {pod.key}",
            )
