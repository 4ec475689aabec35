"""``python -m tests.kernel.oracle --cases N --seed S --json``."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time

from gketrace.simulate.walk import walk
from tests.kernel.oracle.bed import Bed
from tests.kernel.oracle.fixtures import worlds
from tests.kernel.oracle.run import Tally, rig, run_cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--world", default="", help="only worlds whose name contains this")
    parser.add_argument("--show", type=int, default=10, help="disagreements to print")
    options = parser.parse_args()
    chosen = [world for world in worlds() if options.world in world.name]
    total = Tally()
    started = time.monotonic()
    for index, world in enumerate(chosen):
        share = options.cases // len(chosen) + (index < options.cases % len(chosen))
        rng = random.Random(f"{options.seed}/{world.name}")
        with Bed(node=world.node) as bed:
            world.restore(bed)
            with rig(bed, walk, legacy=world.backend == "legacy") as machine:
                tally = run_cases(machine, world.name, world.cases(rng), share)
        if not options.json:
            print(
                f"{world.name}: {tally.cases} cases, {tally.agreements} agreements, "
                f"{len(tally.disagreements)} disagreements, {tally.unknown} unknown, "
                f"{tally.lost} lost; {dict(tally.ends)}"
            )
        total.add(tally)
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
                "ends": dict(total.ends),
                "seconds": round(time.monotonic() - started, 1),
                "seed": options.seed,
            }
        )
    )
    return 1 if total.disagreements or total.lost else 0


if __name__ == "__main__":
    sys.exit(main())
