"""By cause: what is one finding, and what is listed under which."""

from __future__ import annotations

from dataclasses import replace

from gketrace.findings.grouping import grouped
from gketrace.findings.making import finding
from gketrace.findings.model import Finding, Severity, evidence
from gketrace.findings.ties import entered, led
from gketrace.trace import Source


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
