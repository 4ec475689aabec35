"""``python -m tests.races --times N [--only KIND] [--json]``: the figures as JSON on the last line.

Each kind of race N times; exit status 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from tests.races.calls import CALLS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.races")
    parser.add_argument("--times", type=int, default=1000, metavar="N", help="of each kind")
    parser.add_argument("--only", action="append", choices=(*CALLS, "restarted"), metavar="KIND")
    parser.add_argument("--seed", type=int, default=1, metavar="S")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    given = parser.parse_args()
    argv = ["unshare", "--fork", "--pid", "--mount-proc", "--mount", "--net", sys.executable]
    argv += ["-m", "tests.races.inside", str(given.times), str(given.seed), str(given.json)]
    return subprocess.run(argv + (given.only or [*CALLS, "restarted"])).returncode


if __name__ == "__main__":
    sys.exit(main())
