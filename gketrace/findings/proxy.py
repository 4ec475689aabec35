"""kube-proxy: what each node's rules lack or have too much of, and signs of its health."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from gketrace.findings.expected import Expected
from gketrace.findings.making import cited, finding, of_endpoint, of_service, proxy_logs
from gketrace.findings.model import Confidence, Evidence, Finding, Severity, evidence
from gketrace.findings.ties import led
from gketrace.findings.world import Sight, World
from gketrace.kubenames import ServicePort, endpoint_chain, endpoint_text
from gketrace.packet import Protocol
from gketrace.ruleset.iptables import IptablesRuleset
from gketrace.ruleset.nft import NftRuleset
from gketrace.snapshot import Unavailable
from gketrace.trace import Citation, Source

__all__ = ["affinity", "backends", "canaries", "drift", "health"]

_HEALTHZ: Final = 10256
"""kube-proxy's --healthz-bind-address (pkg/proxy/apis/config/v1alpha1/defaults.go)."""
_TELL: Final = 3


def drift(world: World) -> Iterator[Finding]:
    """GKT-110, GKT-111 and GKT-112: each node's rules against the API's endpoints."""
    wanted = [one for one in world.expected.values() if one.usable]
    for sight in world.sights.values():
        if not sight.by_rules or sight.programme.unreadable:
            continue
        for family in (4, 6):
            ports = [one for one in wanted if family in one.families and one.addresses(family)]
            if ports and not sight.programme.present_for(family):
                yield _absent(sight, ports, family)
        yield from _node_drift(world, sight)


def _absent(sight: Sight, wanted: list[Expected], family: int) -> Finding:
    bases = [
        f"{one.backend} {one.source}"
        for one in sight.host.rulesets
        if not isinstance(one, Unavailable) and one.family in (family, 0)
    ]
    text = "no chain KUBE-SERVICES and no table kube-proxy"
    text += f" in {', '.join(bases)}" if bases else "; there are no rules at all"
    return finding(
        "GKT-112",
        f"Node {sight.node} has none of kube-proxy's rules for IPv{family}: none of "
        f"{len(wanted)} Service ports works there",
        [cited(Citation(source=Source.RULE, text=text), sight.node)],
        remedy="see why kube-proxy does not run or write its rules on this node",
        command="kubectl -n kube-system get pods -o wide "
        f"--field-selector spec.nodeName={sight.node}",
        subjects=[f"node {sight.node}"],
        nodes=[sight.node],
        cause=f"kube-proxy {sight.node} {family}",
        families=[family],
    )


def _node_drift(world: World, sight: Sight) -> Iterator[Finding]:
    lacking: list[tuple[ServicePort, Expected, int, frozenset[str]]] = []
    extra: list[tuple[ServicePort, Expected, int, frozenset[str]]] = []
    for name, one in world.expected.items():
        for family in one.families:
            if not sight.programme.present_for(family):
                continue
            there = sight.programme.endpoints(name, family)
            missing, surplus = _difference(one, sight.node, family, there)
            if missing:
                lacking.append((name, one, family, missing))
            if surplus:
                extra.append((name, one, family, surplus))
    if lacking:
        first = lacking[0]
        count = sum(len(ends) for *_, ends in lacking)
        yield finding(
            "GKT-110",
            f"kube-proxy on node {sight.node} is behind: its rules lack {_number(count)} of "
            f"{_names(lacking)}",
            [
                *(_shown(sight, *one, note="the rules lack") for one in lacking),
                *_told(first[1], first[3]),
                *_others(world, sight, first),
            ],
            remedy="if it stays so for more than 10 s, restart kube-proxy on this node",
            command=proxy_logs(world.pods, sight.node),
            subjects=[*(f"service {one.service.key}" for _, one, _, _ in lacking)],
            nodes=[sight.node],
            cause=f"kube-proxy {sight.node}",
            families=[family for _, _, family, _ in lacking],
        )
    if extra:
        count = sum(len(ends) for *_, ends in extra)
        stale = finding(
            "GKT-111",
            f"The rules of node {sight.node} still lead to {_addresses(count)} that "
            f"{'is' if count == 1 else 'are'} no ready endpoint of {_names(extra)} any more",
            [
                *(_shown(sight, *one, note="no EndpointSlice has as ready") for one in extra),
                *_others(world, sight, extra[0]),
            ],
            remedy="if it stays so for more than 10 s, restart kube-proxy on this node",
            command=proxy_logs(world.pods, sight.node),
            subjects=[f"service {one.service.key}" for _, one, _, _ in extra],
            nodes=[sight.node],
            cause=f"kube-proxy {sight.node}",
            families=[family for _, _, family, _ in extra],
        )
        ends = frozenset(
            led(str(name), sight.node, end) for name, *_, ends in extra for end in ends
        )
        yield replace(stale, faulty=ends)


def _difference(
    one: Expected, node: str, family: int, there: frozenset[str] | None
) -> tuple[frozenset[str], frozenset[str]]:
    """(what the rules lack, what they should not have)."""
    wanted = one.addresses(family)
    if one.service.internal_traffic_policy == "Local":
        wanted = one.local(node, family)
    missing = wanted if there is None else wanted - there
    if missing and one.hinted and there:
        missing = frozenset()
    if not one.usable:
        missing = frozenset()
    # An endpoint that is not ready any more is on its way out: its traffic is lost all the same.
    surplus = (there or frozenset()) - one.addresses(family)
    return missing, surplus


def _number(count: int) -> str:
    return "1 endpoint" if count == 1 else f"{count} endpoints"


def _addresses(count: int) -> str:
    return "1 address" if count == 1 else f"{count} addresses"


def _names(entries: Iterable[tuple[ServicePort, Expected, int, frozenset[str]]]) -> str:
    keys = list(dict.fromkeys(one.service.key for _, one, _, _ in entries))
    more = f" and {len(keys) - _TELL} more Services" if len(keys) > _TELL else ""
    return f"Service{'s' if len(keys) > 1 else ''} {', '.join(keys[:_TELL])}{more}"


def _shown(
    sight: Sight, name: ServicePort, one: Expected, family: int, ends: frozenset[str], *, note: str
) -> Evidence:
    """A rule that shows the difference."""
    there = sight.programme.endpoints(name, family)
    citation = None
    if note.startswith("no Endpoint"):
        citation = sight.programme.cite_endpoint(min(ends))
    citation = citation or sight.programme.cite(name, family)
    if citation is None or there is None:
        citation = sight.programme.cite_absence(name, family)
    said = f"{name}: {note} {', '.join(sorted(ends))}"
    return cited(citation, sight.node, note=said)


def _told(one: Expected, ends: frozenset[str]) -> Iterator[Evidence]:
    for end in one.usable:
        if endpoint_text(end.address, end.port) in ends:
            yield of_endpoint(end)


def _others(
    world: World, sight: Sight, first: tuple[ServicePort, Expected, int, frozenset[str]]
) -> Iterator[Evidence]:
    """The same Service's endpoints on every node: which node differs."""
    name, _, family, _ = first
    for other in world.sights.values():
        there = other.programme.endpoints(name, family)
        ends = "none" if not there else ", ".join(sorted(there))
        text = f"{name} on node {other.node}: {ends}"
        citation = Citation(source=Source.RULE, text=text)
        mark = "this node" if other is sight else ""
        yield cited(citation, other.node, note=mark)


def canaries(world: World) -> Iterator[Finding]:
    """GKT-113 and GKT-118: chains that are made once and watched (pkg/util/iptables Monitor)."""
    for sight in world.sights.values():
        for one in sight.host.rulesets:
            if not isinstance(one, IptablesRuleset) or one.family != 4:
                continue
            if not one.has_chain("nat", "KUBE-SERVICES"):
                continue
            gone = [t for t in ("mangle", "nat", "filter") if not one.has_chain(t, _CANARY)]
            if gone and not (len(gone) == 3 and _is_old(one)):
                yield finding(
                    "GKT-113",
                    f"KUBE-PROXY-CANARY is gone from {', '.join(gone)} on node {sight.node}: "
                    "somebody flushed kube-proxy's rules, and it did not notice yet",
                    [_absence(sight, one, table, _CANARY) for table in gone],
                    remedy="find what flushes iptables on this node; kube-proxy writes its rules "
                    "again when it sees it",
                    command=proxy_logs(world.pods, sight.node),
                    subjects=[f"node {sight.node}"],
                    nodes=[sight.node],
                    families=[one.family],
                )
            if not one.has_chain("mangle", _KUBELET):
                yield finding(
                    "GKT-118",
                    f"Node {sight.node} has no chain {_KUBELET}: its kubelet makes no iptables "
                    "rules, or they were flushed",
                    [_absence(sight, one, "mangle", _KUBELET)],
                    remedy="nothing, unless other chains are gone too",
                    command=f"gketrace rules {sight.node} --table mangle",
                    subjects=[f"node {sight.node}"],
                    nodes=[sight.node],
                    cause="kubelet canary",
                )


_CANARY: Final = "KUBE-PROXY-CANARY"
_KUBELET: Final = "KUBE-KUBELET-CANARY"


def _is_old(one: IptablesRuleset) -> bool:
    """kube-proxy has canaries since 1.17; before, nothing can be said."""
    return not one.has_chain("nat", "KUBE-PROXY-CANARY") and not any(
        one.has_chain("filter", name) for name in ("KUBE-PROXY-FIREWALL", "KUBE-EXTERNAL-SERVICES")
    )


def _absence(sight: Sight, one: IptablesRuleset, table: str, chain: str) -> Evidence:
    text = f"no chain {chain} in {table} ({one.source})"
    citation = Citation(source=Source.RULE, text=text, backend=one.backend, table=table)
    return cited(citation, sight.node)


def backends(world: World) -> Iterator[Finding]:
    """GKT-115: the kernel runs both, legacy and nft, by turns at each hook."""
    for sight in world.sights.values():
        holding: dict[str, list[IptablesRuleset | NftRuleset]] = {}
        for one in sight.host.rulesets:
            if isinstance(one, IptablesRuleset) and b"\n-A " in b"\n" + one.text.replace(
                b"] -A ", b"]\n-A "
            ):
                holding.setdefault(one.backend, []).append(one)
            elif isinstance(one, NftRuleset) and one.table.endswith(" kube-proxy"):
                holding.setdefault("nftables", []).append(one)
        iptables = [name for name in holding if name.startswith("iptables")]
        proxies = [
            name
            for name, sets in holding.items()
            if any(
                isinstance(one, NftRuleset) or one.has_chain("nat", "KUBE-SERVICES") for one in sets
            )
        ]
        if len(iptables) < 2 and len(proxies) < 2:
            continue
        both = len(proxies) > 1
        names = proxies if both else iptables
        what = "kube-proxy's rules are" if both else "There are rules"
        yield finding(
            "GKT-115",
            f"{what} in {' and '.join(names)} on node {sight.node}: the kernel runs both",
            [
                cited(
                    Citation(source=Source.RULE, text=f"{one.source}: rules", backend=one.backend),
                    sight.node,
                    note="holds KUBE-SERVICES" if name in proxies else "",
                )
                for name in names
                for one in holding[name]
            ],
            remedy="let everything on the node use one backend, and flush the other",
            command=f"gketrace rules {sight.node}",
            subjects=[f"node {sight.node}"],
            nodes=[sight.node],
            severity=Severity.ERROR if both else None,
        )


def health(world: World) -> Iterator[Finding]:
    """GKT-114 and GKT-116: ports that kube-proxy serves itself."""
    silent: list[tuple[Sight, Evidence]] = []
    for sight in world.sights.values():
        if not sight.by_rules or not sight.programme.present:
            continue
        if isinstance(sight.host.sockets, Unavailable):
            continue
        ports = {
            s.port: s
            for s in sight.host.sockets
            if s.protocol == Protocol.TCP and s.state == "LISTEN"
        }
        proxy = ports.get(_HEALTHZ)
        if proxy is None:
            text = f"no TCP socket listens on port {_HEALTHZ} of node {sight.node}"
            silent.append((sight, evidence(Source.SOCKET, text, node=sight.node)))
        elif proxy.queue is not None and proxy.backlog and proxy.queue >= proxy.backlog:
            text = f"port {_HEALTHZ}: {proxy.queue} connections wait, room for {proxy.backlog}"
            silent.append((sight, evidence(Source.SOCKET, text, node=sight.node)))
        yield from _check_ports(world, sight, set(ports))
    if silent:
        names = [sight.node for sight, _ in silent]
        yield finding(
            "GKT-114",
            f"kube-proxy does not serve its health port {_HEALTHZ} on {', '.join(names)}: it does "
            "not run, hangs, or uses another port",
            [proof for _, proof in silent],
            remedy="see whether kube-proxy runs on these nodes",
            command="kubectl -n kube-system get pods -o wide -l component=kube-proxy",
            subjects=[f"node {name}" for name in names],
            nodes=names,
            cause="health port",
            confidence=Confidence.LIKELY,
        )


def _check_ports(world: World, sight: Sight, listening: set[int]) -> Iterator[Finding]:
    """A load balancer asks healthCheckNodePort; kube-proxy answers on every node."""
    for service in world.services:
        port = service.health_check_node_port
        if not port or port in listening:
            continue
        text = f"no TCP socket listens on port {port} of node {sight.node}"
        yield finding(
            "GKT-116",
            f"Nothing answers the load balancer's health check of Service {service.key} on its "
            f"port {port}: the balancer takes the node out",
            [
                of_service(service, f"spec.healthCheckNodePort {port}"),
                evidence(Source.SOCKET, text, node=sight.node),
            ],
            remedy="see whether kube-proxy runs and could bind the port",
            command=f"kubectl -n kube-system get pods -o wide --field-selector "
            f"spec.nodeName={sight.node}",
            subjects=[f"service {service.key}"],
            nodes=[sight.node],
            cause=f"health check port {service.key}",
            confidence=Confidence.LIKELY,
        )


def affinity(world: World) -> Iterator[Finding]:
    """GKT-117: clients that a node remembers for an endpoint that does not take connections."""
    for sight in world.sights.values():
        for name, one in world.expected.items():
            if one.service.session_affinity != "ClientIP":
                continue
            for family in one.families:
                there = sight.programme.endpoints(name, family) or frozenset()
                for end in sorted(there - one.addresses(family)):
                    yield from _pinned(world, sight, name, one, end)


def _pinned(
    world: World, sight: Sight, name: ServicePort, one: Expected, end: str
) -> Iterator[Finding]:
    remembered = []
    if not isinstance(sight.host.recent, Unavailable):
        listed = endpoint_chain(name, end)
        for entry in sight.host.recent.get(listed, ()):
            if entry.ages and entry.ages[0] <= one.service.affinity_seconds:
                text = f"/proc/net/xt_recent/{listed}: {entry.text or entry.address}"
                remembered.append((str(entry.address), text, Source.RECENT))
    host, _, port = end.rpartition(":")
    host = host.strip("[]").replace(":", ".")
    for table in sight.programme.nft:
        for set_name in table.set_names:
            if set_name.startswith("affinity-") and set_name.endswith(f"__{host}/{port}"):
                found = table.set(set_name)
                for element in found.elements if found is not None else ():
                    value = element.get("elem", element) if isinstance(element, dict) else element
                    client = value.get("val") if isinstance(value, dict) else value
                    text = f"{table.table} set {set_name}: {client}"
                    remembered.append((str(client), text, Source.SET))
    if not remembered:
        return
    clients = [client for client, _, _ in remembered]
    pinned = finding(
        "GKT-117",
        f"Session affinity of Service {one.service.key} on node {sight.node} pins "
        f"{', '.join(clients[:3])} to {end}, which is no endpoint any more",
        [
            of_service(
                one.service, f"spec.sessionAffinity ClientIP, {one.service.affinity_seconds} s"
            ),
            *(evidence(source, text, node=sight.node) for _, text, source in remembered),
        ],
        remedy="restart kube-proxy on the node, so that its rules lose the endpoint",
        command=proxy_logs(world.pods, sight.node),
        subjects=[f"service {one.service.key}"],
        nodes=[sight.node],
        cause=f"affinity {name} {end}",
    )
    yield replace(pinned, faulty=frozenset({led(str(name), sight.node, end)}))
