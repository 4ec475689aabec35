"""Runs scenarios on labs; see `python -m e2e.scenarios --help`."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from e2e.answers import run_cli
from e2e.netlab import Lab, LabError
from e2e.scenarios.baseline import beyond, read_baseline
from e2e.scenarios.model import Scenario
from e2e.scenarios.paste import is_elsewhere, paste
from e2e.scenarios.stage import Stage, staged
from gketrace.errors import GketraceError
from gketrace.findings.model import Finding
from gketrace.findings.world import World

__all__ = ["Outcome", "PairOutcome", "matrix", "run_pair", "run_scenario"]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of one scenario on one lab."""

    code: str
    title: str
    how: str
    topology: str
    first: str = ""
    """The first finding beyond the baseline."""
    found: tuple[str, ...] = ()
    """All codes beyond the baseline."""
    false_alarms: tuple[str, ...] = ()
    proved: bool = False
    """Its evidence says what was done."""
    symptom: str = "none"
    """``shown``, ``not shown``; ``none``: nothing fails yet."""
    removed: bool = False
    """Gone within one run after the fault was removed, and traffic flows again."""
    pasted: bool = True
    """The command that it says to run ran."""
    mended: bool | None = None
    """Where that is run on a node or in a pod: whether the finding went with it."""
    why: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return (
            self.first == self.code
            and self.proved
            and not self.false_alarms
            and self.symptom != "not shown"
            and self.removed
            and self.pasted
        )


def run_scenario(lab: Lab, scenario: Scenario) -> Outcome:
    """Stages it, looks, puts it back, looks again.  What goes wrong is part of the outcome."""
    try:
        return _run(lab, scenario)
    except (LabError, GketraceError, OSError) as error:
        return Outcome(
            code=scenario.code,
            title=scenario.title,
            how=scenario.how,
            topology=lab.topology,
            why=[f"{type(error).__name__}: {error}"],
        )


def _run(lab: Lab, scenario: Scenario) -> Outcome:
    started = time.monotonic()
    outcome = Outcome(
        code=scenario.code, title=scenario.title, how=scenario.how, topology=lab.topology
    )
    known = read_baseline(lab.topology, lab.era, lab.backend)
    with staged(lab) as stage:
        scenario.fault(stage)
        if scenario.symptom is not None:
            outcome.symptom = "shown" if scenario.symptom(stage) else "not shown"
        if scenario.ask:
            _asked(lab, scenario, outcome)
        else:
            new, gone = beyond(stage.check(scenario.alter), known)
            _judge(scenario, outcome, new)
            outcome.why += [f"baseline lost {line}" for line in sorted(gone)]
            outcome.why += [f"not seen: {text}" for text in stage.missing]
            _do_as_told(stage, scenario, outcome, new)
    if scenario.ask:
        outcome.removed = True
    else:
        new, gone = beyond(Stage(lab).check(), known)
        outcome.removed = not new and not gone
        outcome.why += [f"left over: {one.code} {one.text}" for one in new]
        outcome.why += [f"baseline lost after: {line}" for line in sorted(gone)]
        if scenario.symptom is not None and not scenario.own and scenario.symptom(stage):
            outcome.removed = False
            outcome.why.append("the symptom is still there")
        stage.undo()
    outcome.seconds = time.monotonic() - started
    return outcome


def _judge(scenario: Scenario, outcome: Outcome, new: Sequence[Finding]) -> None:
    outcome.found = tuple(dict.fromkeys(one.code for one in new))
    outcome.first = new[0].code if new else ""
    allowed = {scenario.code, *scenario.also}
    outcome.false_alarms = tuple(code for code in outcome.found if code not in allowed)
    mine = [one for one in new if one.code == scenario.code]
    said = " | ".join(f"{p.note}: {p.citation.text}" for one in mine for p in one.evidence)
    lacking = [text for text in scenario.proof if text not in said]
    outcome.proved = bool(mine) and not lacking
    outcome.why += [f"evidence lacks {text!r}: {said}" for text in lacking if mine]
    outcome.why += [f"{one.code} {one.text}" for one in new if one.code not in allowed]


def _do_as_told(stage: Stage, scenario: Scenario, outcome: Outcome, new: Sequence[Finding]) -> None:
    """Runs the finding's command, and looks again where that may mend something."""
    command = next((one.command for one in new if one.code == scenario.code), "")
    wrong = paste(stage.lab, command) if command else ""
    outcome.pasted = not wrong
    outcome.why += [wrong] if wrong else []
    if command and not wrong and scenario.alter is None and is_elsewhere(command):
        outcome.mended = all(one.code != scenario.code for one in stage.check())


def _asked(lab: Lab, scenario: Scenario, outcome: Outcome) -> None:
    """By the command that asks for just this way."""
    import json

    ran = run_cli(lab, *scenario.ask, "-o", "json")
    found = json.loads(ran.out)["findings"] if ran.out else []
    codes = [one["code"] for one in found if one["severity"] == "error"]
    outcome.found, outcome.first = tuple(codes), codes[0] if codes else ""
    said = " | ".join(p["text"] for one in found for p in one["evidence"])
    outcome.proved = all(text in said for text in scenario.proof)
    outcome.false_alarms = tuple(code for code in codes if code != scenario.code)
    if not codes:
        outcome.why.append(f"exit {ran.code}: {ran.err.strip()} {[o['code'] for o in found]}")


@dataclass(slots=True, kw_only=True)
class PairOutcome:
    """Two faults at once."""

    codes: tuple[str, str]
    found: tuple[str, ...]
    why: str = ""
    """What went wrong in staging or looking."""

    @property
    def good(self) -> bool:
        return set(self.codes) <= set(self.found)


def run_pair(lab: Lab, first: Scenario, second: Scenario) -> PairOutcome:
    """What goes wrong is part of the outcome, as it is with one."""
    try:
        return _run_pair(lab, first, second)
    except (LabError, GketraceError, OSError) as error:
        why = f"{type(error).__name__}: {error}"
        return PairOutcome(codes=(first.code, second.code), found=(), why=why)


def _run_pair(lab: Lab, first: Scenario, second: Scenario) -> PairOutcome:
    known = read_baseline(lab.topology, lab.era, lab.backend)
    with staged(lab) as stage:
        first.fault(stage)
        second.fault(stage)
        for scenario in (first, second):
            if scenario.symptom is not None:  # some faults show only while there is traffic
                scenario.symptom(stage)
        alter: Callable[[World], World] | None = first.alter or second.alter
        if first.alter is not None and second.alter is not None:
            one, two = first.alter, second.alter
            alter = lambda world: two(one(world))  # noqa: E731
        new, _ = beyond(stage.check(alter), known)
    return PairOutcome(
        codes=(first.code, second.code), found=tuple(dict.fromkeys(one.code for one in new))
    )


def pairs(scenarios: Sequence[Scenario], count: int, seed: int) -> list[tuple[Scenario, Scenario]]:
    """Random ones that do not undo each other: those that only this command's own Service, or a
    node's rules as a whole, keep apart are left out by `clash`."""
    usable = [s for s in scenarios if not s.ask]
    chosen = random.Random(seed)
    found: list[tuple[Scenario, Scenario]] = []
    while len(found) < count:
        one, two = chosen.sample(usable, 2)
        if not _clash(one, two):
            found.append((one, two))
    return found


def _clash(one: Scenario, two: Scenario) -> bool:
    """Both make the Service of their own, with one address; or one puts a node's rules back as they
    were before it, or hides the other by what it breaks."""
    own = {"GKT-101", "GKT-102", "GKT-105", "GKT-106", "GKT-107", "GKT-109", "GKT-111", "GKT-117",
           "GKT-325"}  # fmt: skip
    whole = {"GKT-110", "GKT-112"}
    codes = {one.code, two.code}
    return codes <= own or bool(codes & {"GKT-112"}) or codes <= whole


def matrix(outcomes: Sequence[Outcome]) -> str:
    """Staged × found, as a table: only codes that occur."""
    columns = sorted({code for one in outcomes for code in (one.code, *one.found)})
    counts: dict[str, Counter[str]] = {}
    for one in outcomes:
        counts.setdefault(one.code, Counter()).update(one.found or ("none",))
    short = [code.removeprefix("GKT-") for code in columns]
    lines = ["staged \\ found " + " ".join(short) + " none"]
    for code in sorted(counts):
        cells = [str(counts[code].get(column, 0) or ".").rjust(3) for column in columns]
        lines.append(
            f"{code:<15}" + " ".join(cells) + " " + str(counts[code].get("none", 0) or ".").rjust(4)
        )
    return "\n".join(lines)


__all__ += ["pairs"]
