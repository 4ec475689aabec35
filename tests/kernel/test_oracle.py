"""The short form of the oracle: kernel and simulator on 2,000 packets, and 52 deliberate faults.

The long form is ``python -m tests.kernel.oracle --cases 20000 --seed S --json``.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from gketrace.simulate.walk import walk
from tests.kernel.oracle.dumps import run_fixtures, summary
from tests.kernel.oracle.mutate import FAULTS, Fault, caught_by
from tests.kernel.oracle.random_sets import RandomRun
from tests.kernel.oracle.record import Record
from tests.kernel.oracle.run import Tally

CASES = 1000
SEED = 2026


@dataclass
class Runs:
    dumps: Tally
    made: RandomRun
    records: list[Record]


@pytest.fixture(scope="module")
def runs() -> Runs:
    records: list[Record] = []
    made = RandomRun(seed=SEED, walk=walk, records=records)
    made.run(CASES)
    dumps = run_fixtures(CASES, SEED, records=records)
    return Runs(dumps=dumps, made=made, records=records)


def _told(tally: Tally) -> str:
    stories = [*tally.disagreements, *tally.unknowns][:3]
    return "\n".join([summary(tally), *map(str, stories)])


def test_the_dumps_rules_do_what_the_simulator_says(runs: Runs) -> None:
    tally = runs.dumps
    assert (len(tally.disagreements), tally.unknown, tally.lost) == (0, 0, 0), _told(tally)
    assert tally.agreements == CASES
    assert min(tally.ends[end] for end in ("local", "sent", "gone")) > 20


def test_random_rules_do_what_the_simulator_says(runs: Runs) -> None:
    tally = runs.made.tally
    assert (len(tally.disagreements), tally.lost) == (0, 0), _told(tally)
    assert tally.agreements > 0.9 * CASES, _told(tally)


def test_few_random_rule_sets_are_refused(runs: Runs) -> None:
    assert runs.made.refused <= runs.made.sets
    assert runs.made.refused_rules < 0.1 * runs.made.nft_rules


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught(runs: Runs, fault: Fault) -> None:
    assert caught_by(fault, runs.records) is not None
