"""``python -m tests.fuzz NAME --seconds N --json``: the figures as JSON on the last line.

Exit status 1 when something crashed; ``--keep FOLDER`` writes the inputs that did.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.fuzz.fuzzer import fuzz
from tests.fuzz.targets import TARGETS

_GROWTH = 16 << 20
"""Bytes in a run: caches that fill up, and what a slope of some samples is off by."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write crashing inputs here")
    options = parser.parse_args()
    result = fuzz(options.name, seconds=options.seconds, seed=options.seed)
    for number, crash in enumerate(result.found.values()):
        if not options.json:
            print(crash.why)
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            (options.keep / f"{result.name}-{number}").write_bytes(crash.data)
    print(
        json.dumps(
            {
                "name": result.name,
                "inputs": result.inputs,
                "rejected": result.rejected,
                "crashes": result.crashes,
                "slowest_seconds": round(result.slowest_seconds, 4),
                "growth_bytes": round(result.growth_bytes),
                "found": [crash.why for crash in result.found.values()],
                "goals": {
                    "crashes": {
                        "value": result.crashes,
                        "goal": 0,
                        "met": not result.crashes,
                    },
                    "growth_bytes": {
                        "value": round(result.growth_bytes),
                        "goal": _GROWTH,
                        "met": result.growth_bytes <= _GROWTH,
                    },
                },
            }
        )
    )
    return 1 if result.crashes or result.growth_bytes > _GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
