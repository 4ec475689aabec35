"""A handful of the scenarios (`python -m e2e.scenarios` runs them all), on one lab."""

from __future__ import annotations

import json

import pytest

from e2e.answers import run_cli
from e2e.netlab import Lab
from e2e.scenarios.__main__ import ALL
from e2e.scenarios.baseline import beyond, read_baseline
from e2e.scenarios.run import run_scenario
from e2e.scenarios.stage import Stage

SOME = ("GKT-106", "GKT-110", "GKT-201", "GKT-301", "GKT-314", "GKT-322")


@pytest.mark.parametrize("code", SOME)
def test_the_fault_is_named_first_and_goes_with_it(lab: Lab, code: str) -> None:
    scenario = next(one for one in ALL if one.code == code)
    outcome = run_scenario(lab, scenario)
    assert outcome.good, outcome


def test_an_untouched_lab_reports_its_own_faults_only(lab: Lab) -> None:
    known = read_baseline(lab.topology, lab.era, lab.backend)
    new, gone = beyond(Stage(lab).check(), known)
    assert not new, [f"{one.code} {one.text}" for one in new]
    assert not gone


def test_the_command_says_the_same(lab: Lab) -> None:
    ran = run_cli(lab, "check", "-o", "json")
    assert ran.code == 1, ran.err
    found = {
        (one["code"], one["severity"], one["subjects"][0])
        for one in json.loads(ran.out)["findings"]
    }
    assert found == read_baseline(lab.topology, lab.era, lab.backend)
