"""``python -m tests.kernel.oracle --cases N --seed S --json``.

Half of the cases go over the kube-proxy dumps, half over random rule sets.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter

from gketrace.simulate.walk import walk
from tests.kernel.oracle.dumps import run_fixtures, summary
from tests.kernel.oracle.generate import MATCHES, TARGETS
from tests.kernel.oracle.generate_nft_actions import ACTIONS
from tests.kernel.oracle.generate_nft_conditions import CONDITIONS
from tests.kernel.oracle.random_sets import RandomRun
from tests.kernel.oracle.run import Tally


def _print_coverage(
    coverage: Counter[str], absent: frozenset[str], absent_nft: frozenset[str]
) -> None:
    names = [f"match {part.name}" for part in MATCHES]
    names += [f"target {part.name}" for part in TARGETS] + ["target jump", "target goto"]
    for name in names:
        lacking = sorted(where for where in absent if where.endswith("/" + name.split()[1]))
        note = f"  (absent here: {', '.join(lacking)})" if lacking else ""
        print(f"{name:24} {coverage[name]:7}{note}")
    for part in (*CONDITIONS, *ACTIONS):
        name = f"nft {part.name}"
        note = "  (absent here)" if part.name in absent_nft else ""
        print(f"{name:24} {coverage[name]:7}{note}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--world", default="", help="only dumps whose name contains this")
    parser.add_argument("--only", choices=("fixtures", "random"), help="only this half")
    parser.add_argument("--show", type=int, default=10, help="disagreements to print")
    options = parser.parse_args()
    started = time.monotonic()
    fixture_cases = {"fixtures": options.cases, "random": 0}.get(options.only, options.cases // 2)
    fixed = Tally()
    if fixture_cases:
        fixed = run_fixtures(fixture_cases, options.seed, options.world, quiet=options.json)
    made = RandomRun(seed=options.seed, walk=walk)
    if fixture_cases < options.cases:
        made.run(options.cases - fixture_cases)
        if not options.json:
            print(f"random rule sets ({made.sets}, {made.refused} refused): {summary(made.tally)}")
            _print_coverage(made.coverage, made.absent, made.absent_nft)
    total = Tally()
    total.add(fixed)
    total.add(made.tally)
    for story in [*total.disagreements, *total.unknowns][: options.show]:
        print(story, file=sys.stderr)
    print(
        json.dumps(
            {
                "cases": total.cases,
                "agreements": total.agreements,
                "disagreements": len(total.disagreements),
                "unknown": total.unknown,
                "lost": total.lost,
                "fixtures": {
                    "cases": fixed.cases,
                    "disagreements": len(fixed.disagreements),
                    "unknown": fixed.unknown,
                },
                "random": {
                    "cases": made.tally.cases,
                    "rule_sets": made.sets,
                    "disagreements": len(made.tally.disagreements),
                    "unknown": made.tally.unknown,
                    "coverage": dict(sorted(made.coverage.items())),
                    "absent": sorted(made.absent),
                },
                "ends": dict(total.ends),
                "seconds": round(time.monotonic() - started, 1),
                "seed": options.seed,
            }
        )
    )
    return 1 if total.disagreements or total.lost else 0


if __name__ == "__main__":
    sys.exit(main())
