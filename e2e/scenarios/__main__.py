"""``python -m e2e.scenarios [--json] [--only CODE] [--pairs N] [--topology T] [--diff]``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable

from e2e.netlab import Lab
from e2e.scenarios import balancers, connections, path, services, snapshots
from e2e.scenarios.baseline import beyond, read_baseline
from e2e.scenarios.differ import Named, comparable, diff_scenario, take
from e2e.scenarios.model import BOTH, Scenario
from e2e.scenarios.run import Outcome, matrix, pairs, run_pair, run_scenario
from e2e.scenarios.stage import Stage
from gketrace.findings.registry import CODES

ALL: tuple[Scenario, ...] = (
    *services.SCENARIOS,
    *balancers.SCENARIOS,
    *connections.SCENARIOS,
    *path.SCENARIOS,
    *snapshots.SCENARIOS,
)
KINDS = (("1.36", "nft"), ("1.36", "legacy"), ("1.36", "nftables"), ("1.30", "nft"),
         ("1.20", "legacy"))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Each finding staged by a real fault.")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--only", action="append", metavar="CODE", help="only these; repeatable")
    parser.add_argument("--topology", choices=BOTH, help="only this one")
    parser.add_argument("--pairs", type=int, default=20, help="two faults at once (default 20)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-baseline", action="store_true", help="not the untouched labs")
    parser.add_argument(
        "--diff", action="store_true", help="instead: what gketrace diff names, fault by fault"
    )
    options = parser.parse_args()

    def say(text: str) -> None:
        if not options.json:
            print(text, flush=True)

    wanted = [s for s in ALL if not options.only or s.code in options.only]
    if options.diff:
        return _diff(wanted, [options.topology] if options.topology else BOTH, say)
    outcomes: list[Outcome] = []
    paired = []
    for topology in [options.topology] if options.topology else BOTH:
        mine = [s for s in wanted if topology in s.topologies]
        with Lab(name=f"scn-{topology}-{os.getpid()}", topology=topology) as lab:
            for scenario in mine:
                outcome = run_scenario(lab, scenario)
                outcomes.append(outcome)
                say(_line(outcome))
            count = options.pairs // (1 if options.topology else 2)
            for one, two in pairs(mine, count, options.seed) if len(mine) > 2 else []:
                pair = run_pair(lab, one, two)
                paired.append(pair)
                state = "both" if pair.good else f"NOT both: {' '.join(pair.found)} {pair.why}"
                say(f"pair {' + '.join(pair.codes)}: {state}")
    strange = [] if options.no_baseline or options.only else _baselines(say)
    say("\n" + matrix(outcomes))
    found = [one for one in outcomes if one.good]
    alarms = sum(len(one.false_alarms) for one in outcomes)
    say(f"\n{len(found)} of {len(outcomes)} found first, proved, shown and removed")
    result = {
        "faults": len(outcomes),
        "found": len(found),
        "named": sum(one.code in one.found for one in outcomes),
        "false_alarms": alarms + len(strange),
        "codes": len({one.code for one in outcomes}),
        "codes_in_registry": len(CODES),
        "pairs": len(paired),
        "pairs_found": sum(pair.good for pair in paired),
        "baseline_differences": strange,
        "commands_failed": sum(not one.pasted for one in outcomes),
        "mended_by_command": sorted({one.code for one in outcomes if one.mended}),
        "on_kernel": sum(one.how != "snapshot" for one in outcomes),
        "on_snapshot": sum(one.how == "snapshot" for one in outcomes),
        "failed": [
            {"code": one.code, "topology": one.topology, "found": list(one.found), "why": one.why}
            for one in outcomes
            if not one.good
        ],
        "pairs_failed": [
            {"codes": list(pair.codes), "found": list(pair.found), "why": pair.why}
            for pair in paired
            if not pair.good
        ],
    }
    print(json.dumps(result))
    return 0 if len(found) == len(outcomes) and not strange else 1


def _diff(wanted: Iterable[Scenario], topologies: Iterable[str], say: Callable[[str], None]) -> int:
    """A bundle before and after each fault that can be in one."""
    named: list[Named] = []
    for topology in topologies:
        mine = [s for s in wanted if topology in s.topologies and comparable(s)]
        with Lab(name=f"dif-{topology}-{os.getpid()}", topology=topology) as lab:
            before = take(lab)
            for scenario in mine:
                one = diff_scenario(lab, before, scenario)
                named.append(one)
                state = f"NOT named: {one.why}" if one.why else "named"
                say(f"{one.code} {one.topology:<6} {state}  {one.title}")
                for cause in one.causes:
                    say(f"        {cause}")
    good = sum(not one.why for one in named)
    say(f"\ndiff named the change of {good} of {len(named)} faults")
    failed = [
        {"code": one.code, "topology": one.topology, "title": one.title, "why": one.why}
        for one in named
        if one.why
    ]
    print(json.dumps({"faults": len(named), "diff_named": good, "failed": failed}))
    return 1 if failed else 0


def _line(one: Outcome) -> str:
    state = "found" if one.good else "FAILED"
    text = f"{one.code} {one.topology:<6} {one.how:<8} {state:<6} symptom {one.symptom:<9} "
    text += f"{one.seconds:4.1f}s  {one.title}{'; mended as told' if one.mended else ''}"
    for why in [] if one.good else one.why:
        text += f"\n        {why}"
    if not one.good:
        text += f"\n        first {one.first or 'none'}; found {' '.join(one.found) or 'none'}; "
        text += f"proved {one.proved}; removed {one.removed}"
    return text


def _baselines(say: object) -> list[str]:
    """Untouched labs of every kind report just the baseline."""
    assert callable(say)
    strange = []
    for topology in BOTH:
        for era, backend in KINDS:
            name = f"base-{os.getpid()}"
            with Lab(name=name, topology=topology, era=era, backend=backend) as lab:
                new, gone = beyond(Stage(lab).check(), read_baseline(topology, era, backend))
            kind = f"{topology} {era} {backend}"
            strange += [f"{kind}: {one.code} {one.text}" for one in new]
            strange += [f"{kind}: not found: {' '.join(line)}" for line in sorted(gone)]
            say(f"baseline {kind}: {'as listed' if not new and not gone else 'DIFFERS'}")
    for text in strange:
        say(f"    {text}")
    return strange


if __name__ == "__main__":
    sys.exit(main())
