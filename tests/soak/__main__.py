"""``python -m tests.soak --minutes N [--rate R] [--json]``

A lab's three agents under R calls a second of every kind, with a follow, a capture and scrapes of
/metrics running beside, and connections through the lab.  Every five seconds it is read what each
agent holds.  After a warm-up, memory, threads, file descriptors, namespaces, rings, children,
zombies and mounts must stay flat, and no call may fail.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from tests.soak.run import soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--minutes", type=float, default=30.0, metavar="N")
    parser.add_argument("--rate", type=float, default=10.0, metavar="R", help="calls a second")
    parser.add_argument("--seed", type=int, default=1, metavar="S")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    given = parser.parse_args()
    result = soak(
        f"soak{os.getpid()}",
        seconds=given.minutes * 60,
        rate=given.rate,
        seed=given.seed,
        progress=None if given.json else lambda text: print(text, flush=True),
    )
    print(json.dumps(result))
    return 0 if all(goal["met"] for goal in result["goals"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
