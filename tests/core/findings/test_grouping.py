"""By cause: what is one finding, and what is listed under which."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

from gketrace.findings.detect import find
from gketrace.findings.grouping import grouped
from gketrace.findings.making import finding
from gketrace.findings.model import Finding, Severity, evidence
from gketrace.findings.ties import entered, led
from gketrace.snapshot import Route, RouteType
from gketrace.trace import Source
from tests.core.findings.worlds import Bench, beyond


def _one(code: str, subject: str, cause: str = "", text: str = "it is so") -> Finding:
    return finding(
        code,
        text,
        [evidence(Source.OBJECT, f"{subject} says so")],
        remedy="mend it",
        command="true",
        subjects=[subject],
        nodes=[subject.partition(" ")[2]] if subject.startswith("node") else [],
        cause=cause,
    )


def test_one_cause_is_one_finding() -> None:
    found = grouped(_one("GKT-303", f"service default/s{n}", "rule X") for n in range(40))
    assert len(found) == 1
    assert len(found[0].subjects) == 40
    assert len(found[0].evidence) == 8
    assert found[0].more == 32


def test_what_another_finding_explains_is_left_out() -> None:
    found = grouped([_one("GKT-113", "node n1"), _one("GKT-112", "node n1"),
                     _one("GKT-113", "node n2")])  # fmt: skip
    assert [(one.code, one.subjects) for one in found] == [
        ("GKT-112", ("node n1",)),
        ("GKT-113", ("node n2",)),
    ]


def test_the_worst_comes_first() -> None:
    error, warning = _one("GKT-210", "node n1"), _one("GKT-101", "service default/x")
    error = replace(error, severity=Severity.ERROR)
    warning = replace(warning, severity=Severity.WARNING)
    assert [one.severity for one in grouped([warning, error])] == [
        Severity.ERROR,
        Severity.WARNING,
    ]


def _way(code: str, cause: str, *trail: str) -> Finding:
    return replace(_one(code, "node n2", cause), trail=frozenset({"a way", *trail}))


def _under(found: tuple[Finding, ...]) -> list[tuple[str, list[str]]]:
    return [(one.code, [each.code for each in one.consequences]) for one in found]


_LED = led("default/web:http", "n1", "10.40.1.99:8080")
_STALE = replace(_one("GKT-111", "service default/web"), faulty=frozenset({_LED}))


def test_a_way_that_met_what_is_wrong_is_its_consequence() -> None:
    """GKT-312 stands before GKT-111 else."""
    assert _under(grouped([_way("GKT-312", "neighbour", _LED), _STALE])) == [
        ("GKT-111", ["GKT-312"])
    ]


def test_without_a_tie_two_findings_stay_apart() -> None:
    other = led("default/web:http", "n3", "10.40.1.99:8080")
    for way in (
        _way("GKT-312", "neighbour", other),  # by another node's rules
        _way("GKT-312", "neighbour"),
        _way("GKT-303", "rule", _LED),  # a rule drops whatever led there
    ):
        assert _under(grouped([way, _STALE])) == [(way.code, []), ("GKT-111", [])]


def test_one_way_that_did_not_meet_it_is_enough_to_stay() -> None:
    found = grouped([_way("GKT-312", "neighbour", _LED), _way("GKT-312", "neighbour"), _STALE])
    assert _under(found) == [("GKT-312", []), ("GKT-111", [])]


def test_what_follows_from_a_consequence_is_listed_under_the_cause() -> None:
    pinned = _one("GKT-117", "service default/web")
    found = grouped([_way("GKT-306", "route", _LED), _STALE, pinned])
    assert _under(found) == [("GKT-117", ["GKT-306", "GKT-111"])]


def test_a_cause_is_as_bad_as_what_it_explains() -> None:
    cause = replace(_one("GKT-112", "node n1"), severity=Severity.WARNING)
    (found,) = grouped([replace(_one("GKT-110", "node n1"), severity=Severity.ERROR), cause])
    assert (found.code, found.severity) == ("GKT-112", Severity.ERROR)


def test_answers_that_were_seen_elsewhere_stand_before_what_a_trace_says() -> None:
    """On whichever node the same door leads into the same chain; a rule that is not there, as the
    node's rules say, explains both."""
    tie = entered("NodePort", "KUBE-SVC-X")
    seen = replace(_one("GKT-208", "node n2"), faulty=frozenset({tie}))
    ways = [_way("GKT-318", "masquerade n2", tie), _way("GKT-318", "masquerade n3", tie)]
    assert _under(grouped([*ways, seen])) == [("GKT-208", ["GKT-318", "GKT-318"])]
    read = _one("GKT-318", "node n2", "masquerade n2", "no MASQUERADE rule")
    found = grouped([ways[0], seen, read])
    assert _under(found) == [("GKT-318", ["GKT-208"])]
    assert found[0].text == "no MASQUERADE rule"


def test_rules_that_lead_to_nobody_explain_who_is_led_there() -> None:
    """Traced, from all nodes: on one that is not behind, connections work."""
    for topology in ("ptp", "bridge"):
        bench = Bench(topology)
        bench.rules("33fg", lambda text: text.replace("10.40.0.10:8080", "10.40.1.99:8080"))
        stale = {one.code: one for one in bench.found(trace=True)}["GKT-111"]
        assert stale.nodes == ("33fg",)
        assert {one.code for one in stale.consequences} == {"GKT-119"}


def test_a_node_without_kube_proxy_s_rules_explains_every_door() -> None:
    """Also that of an external IP, which the node sends out again."""
    bench = Bench("ptp")
    bench.rules("m69d", lambda text: "*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n")
    (found,) = bench.found(trace=True)
    assert found.code == "GKT-112"
    (door,) = found.consequences
    assert door.code == "GKT-110"
    said = " | ".join(proof.note for proof in door.evidence)
    assert "10.142.0.6:" in said


def test_a_route_that_is_wrong_is_one_finding() -> None:
    """What the routes say of pods and what ways met are the same."""
    bench = Bench("ptp")
    bench.host("2jdh").routes.append(
        Route(
            family=4, table=254, text="blackhole 10.40.1.0/25", dst=ip_network("10.40.1.0/25"),
            type=RouteType.BLACKHOLE,
        )
    )  # fmt: skip
    (found,) = beyond(find(bench.world()))
    assert found.code == "GKT-306"
    assert found.subjects[0].startswith("pod ")
    assert any(subject.startswith("service ") for subject in found.subjects)


def test_a_rule_of_one_node_that_takes_a_service_is_found_at_that_node() -> None:
    rule = "-A OUTPUT -d 10.43.240.12/32 -p tcp -j DNAT --to-destination 10.40.0.6:8080\n"
    portals = '-A OUTPUT -m comment --comment "kubernetes service portals"'
    bench = Bench("ptp")
    bench.rules("m69d", lambda text: text.replace(portals, rule + portals))
    (found,) = bench.found(trace=True)
    assert (found.code, found.nodes) == ("GKT-119", ("m69d",))


def test_a_node_without_ipv6_rules_explains_nothing_of_ipv4() -> None:
    none = replace(_one("GKT-112", "node n1"), families=frozenset({6}))
    old, new = (
        replace(_one("GKT-111", "node n1", f"IPv{family}"), families=frozenset({family}))
        for family in (4, 6)
    )
    found = {one.code: one for one in grouped([none, old, new])}
    assert found["GKT-111"].cause == "IPv4"
    assert [one.cause for one in found["GKT-112"].consequences] == ["IPv6"]
