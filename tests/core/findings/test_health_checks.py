"""GKT-116 by walking: load balancers' probes that a node's rules, routes or policies stop."""

from __future__ import annotations

import re
from dataclasses import replace
from ipaddress import ip_network

import pytest

from gketrace.findings.model import Finding, Severity
from gketrace.snapshot import Route, RouteType
from gketrace_cli.balancers import only_ports, with_groups
from tests.core.findings.worlds import Bench

_NEG = "cloud.google.com/neg"
_STATUS = "cloud.google.com/neg-status"


def _insert(bench: Bench, node: str, table: str, rule: str) -> None:
    """First in its chain."""
    chain = rule.split()[1]

    def change(text: str) -> str:
        head, mark, rest = text.partition(f"*{table}\n")
        if not mark:
            return f"*{table}\n:{chain} ACCEPT [0:0]\n{rule}\nCOMMIT\n{text}"
        lines = rest.split("\n")
        at = next(n for n, line in enumerate(lines) if not line.startswith(":"))
        return head + mark + "\n".join([*lines[:at], rule, *lines[at:]])

    bench.rules(node, change)


def _only(bench: Bench) -> Finding:
    (found,) = bench.found(trace=True)
    assert found.code == "GKT-116"
    return found


def test_a_rule_that_drops_a_range_is_named() -> None:
    bench = Bench("ptp")
    _insert(bench, "m69d", "filter", "-A INPUT -s 35.191.0.0/16 -j DROP")
    found = _only(bench)
    assert found.severity is Severity.ERROR
    assert found.nodes == ("m69d",)
    assert "from 35.191.0.0/16 do not get through node m69d: filter INPUT:1" in found.text
    (rule, *objects) = found.evidence
    assert (rule.citation.text, rule.node) == ("-A INPUT -s 35.191.0.0/16 -j DROP", "m69d")
    said = " | ".join(proof.citation.text for proof in objects)
    assert "Service default/web-lb-local: spec.healthCheckNodePort 32000" in said
    assert "Service default/hello-server: spec.externalTrafficPolicy Cluster" in said
    assert re.fullmatch(
        r"gketrace trace 35\.191\.0\.1 10\.142\.0\.6:(10256|32000|32001) --node m69d", found.command
    )


def test_one_rule_on_all_nodes_is_one_finding() -> None:
    bench = Bench("bridge")
    for node in bench.nodes:
        _insert(bench, node.name, "filter", "-A INPUT -s 35.191.0.0/16 -j REJECT")
    found = _only(bench)
    assert sorted(found.nodes) == ["2jdh", "33fg", "m69d"]
    assert "INPUT:1 rejects them" in found.text


@pytest.mark.parametrize(
    "rule", ["-A OUTPUT -d 209.85.152.0/22 -j DROP", "-A OUTPUT -d 209.85.152.0/24 -j DROP"]
)
def test_an_answer_that_does_not_leave(rule: str) -> None:
    bench = Bench("ptp")
    _insert(bench, "2jdh", "filter", rule)
    found = _only(bench)
    assert found.text.startswith("The answers to the load balancer's health checks of Services ")
    assert "to 209.85.152.0/22 do not leave node 2jdh: filter OUTPUT:1 drops them" in found.text


def test_a_route_is_named_like_a_rule() -> None:
    bench = Bench("ptp")
    host = bench.host("33fg")
    host.routes.append(
        Route(
            family=4, table=254, dst=ip_network("35.191.0.0/16"), type=RouteType.BLACKHOLE,
            text="blackhole 35.191.0.0/16",
        )
    )  # fmt: skip
    found = _only(bench)
    assert "blackhole 35.191.0.0/16" in " | ".join(p.citation.text for p in found.evidence)
    assert found.nodes == ("33fg",)


def test_what_stops_others_too_is_their_finding() -> None:
    bench = Bench("ptp")
    _insert(bench, "m69d", "raw", "-A PREROUTING -i eth0 -p tcp -j DROP")
    found = bench.found(trace=True)
    assert "GKT-116" not in {one.code for one in found}
    (rule,) = (one for one in found if one.code == "GKT-303")
    # No door of its own was traced to this node; its health check was.
    assert "service default/web-lb-sources" in rule.subjects


def test_elsewhere_nobody_probes_from_there() -> None:
    bench = Bench("ptp")
    bench.nodes = [replace(node, provider_id="kind://docker/lab/n") for node in bench.nodes]
    _insert(bench, "m69d", "filter", "-A INPUT -s 35.191.0.0/16 -j DROP")
    assert bench.found(trace=True) == ()
    assert not any(way.stands_for for way in bench.world().ways)


def test_another_s_balancer_is_not_asked_for() -> None:
    bench = Bench("ptp")
    bench.services = [replace(s, load_balancer_class="metallb.io/metallb") for s in bench.services]
    assert not any(way.stands_for for way in bench.world().ways)


def test_an_internal_balancer_has_ranges_of_its_own() -> None:
    bench = Bench("ptp")
    bench.services = [
        replace(s, annotations={"networking.gke.io/load-balancer-type": "Internal"})
        for s in bench.services
    ]
    ways = bench.world().ways
    assert {way.stands_for for way in ways} == {"", "35.191.0.0/16", "130.211.0.0/22"}


def test_a_container_native_balancer_asks_the_pods() -> None:
    bench = Bench("ptp")
    bench.service("web-nodeport", annotations={_NEG: '{"ingress": true}'})
    for node in bench.nodes:
        _insert(bench, node.name, "filter", "-A FORWARD -s 130.211.0.0/22 -j DROP")
    found = _only(bench)
    assert found.subjects[0] == "service default/web-nodeport"
    assert "from 130.211.0.0/22" in found.text
    said = " | ".join(p.citation.text for p in found.evidence)
    assert "cloud.google.com/neg: the balancer asks pods themselves, on port 8080" in said


@pytest.mark.parametrize(
    ("annotations", "groups"),
    [
        ({}, []),
        ({_NEG: '{"ingress": true}'}, [80]),
        ({_NEG: '{"ingress": false}'}, []),
        ({_NEG: '{"exposed_ports": {"80": {"name": "mine"}}}'}, [80]),
        ({_NEG: '{"exposed_ports": {"443": {}}}'}, []),
        ({_NEG: "no json"}, []),
        ({_NEG: "[1]"}, []),
        pytest.param({_NEG: "[" * 20_000}, [], id="nested too deep"),
        ({_STATUS: '{"network_endpoint_groups": {"80": "k8s1-a"}, "zones": ["b"]}'}, [80]),
        # Of nodes, not of pods: what an internal passthrough balancer with subsetting has.
        ({_NEG: '{"ingress": true}', _STATUS: '{"network_endpoint_groups": {"0": "k8s2-a"}}'}, []),
    ],
)
def test_ports_with_groups(annotations: dict[str, str], groups: list[int]) -> None:
    (service,) = (s for s in Bench("ptp").services if s.name == "web-nodeport")
    service = replace(service, annotations=annotations)
    assert [port.port for port in with_groups(service)] == groups
    kept = {name: only_ports(name, text) for name, text in annotations.items()}
    assert with_groups(replace(service, annotations=kept)) == with_groups(service)
    assert not any(word in str(kept) for word in ("mine", "k8s", "zones"))
