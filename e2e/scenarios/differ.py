"""A bundle before and one after each fault: does `gketrace diff` name what was changed?"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from e2e.netlab import Lab, LabError
from e2e.scenarios.model import Scenario
from e2e.scenarios.stage import staged
from gketrace.errors import GketraceError
from gketrace_cli.bundle.compare import Compared, Opened, compare, open_bundle
from gketrace_cli.bundle.differences import Difference
from gketrace_cli.bundle.record import record
from gketrace_cli.bundle.store import write_bundle
from gketrace_cli.options import Options
from gketrace_cli.session import Session

__all__ = ["Named", "comparable", "diff_scenario", "take"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """What `gketrace diff` said of one fault."""

    code: str
    title: str
    topology: str
    causes: tuple[str, ...] = ()
    """Put back alone, they take the fault's own finding away: the first few, quoted first."""
    why: str = ""
    """Empty: the change was named, as the first of all differences."""


def comparable(scenario: Scenario) -> bool:
    """Only what is done to the lab and what `check` tells of it can be in a bundle."""
    return scenario.how == "kernel"


def take(lab: Lab) -> Opened:
    """A bundle of the lab as it is now, written and read again."""
    with Session(Options(kubeconfig=str(lab.kubeconfig), timeout=20)) as session:
        saved = record(session, ("-A",), None)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "lab.gkt")
        write_bundle(saved, path)
        return open_bundle(path, Options())


def diff_scenario(lab: Lab, before: Opened, scenario: Scenario) -> Named:
    """Stages it, takes a bundle, puts it back; what goes wrong is part of the answer."""
    try:
        with staged(lab) as stage:
            scenario.fault(stage)
            if scenario.symptom is not None:  # some faults show only while there is traffic
                scenario.symptom(stage)
            after = take(lab)
        found = compare(before, after)
    except (LabError, GketraceError, OSError) as error:
        return _named(lab, scenario, (), f"{type(error).__name__}: {error}")
    return _judge(lab, scenario, found)


def _judge(lab: Lab, scenario: Scenario, found: Compared) -> Named:
    mine = [one for one in found.verdicts if one.name.startswith(f"{scenario.code} ")]
    causes = tuple(_line(cause) for one in mine for cause in one.causes)
    if not mine:
        why = "no verdict of its code differs"
    elif not causes:
        why = "no single difference explains it"
    elif found.differences[0].part not in found.causes:
        why = "the cause is not first"
    else:
        why = ""
    return _named(lab, scenario, causes, why)


def _named(lab: Lab, scenario: Scenario, causes: tuple[str, ...], why: str) -> Named:
    return Named(
        code=scenario.code, title=scenario.title, topology=lab.topology, causes=causes[:3], why=why
    )


def _line(one: Difference) -> str:
    where = f"{one.part.node or 'cluster'} {one.part.pod}".strip()
    return f"{where}, {one.part.noun}: {one.kind} {one.table} {one.name}".replace("  ", " ")
