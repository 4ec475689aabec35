"""How long an SRE waits for the answer: ``python -m tests.bench.answer --json``.

``gketrace service hello-server`` as a cold process on the lab, beside what it replaces at the very
least: ``iptables-save`` on the three nodes, one after the other.  Both in the same run, by turns.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from e2e.netlab import Lab
from e2e.netlab.targets import resolve
from tests.bench.report import arguments, goal, report

NODES = ("2jdh", "m69d", "33fg")


def _timed(argv: Sequence[str], env: dict[str, str] | None = None) -> float:
    start = time.perf_counter()
    done = subprocess.run(argv, check=False, capture_output=True, env=env)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.decode()}")
    return time.perf_counter() - start


def main() -> None:
    options = arguments(__doc__, runs=7)
    python_bin = os.path.dirname(sys.executable)
    with Lab(name=f"bench-{os.getpid()}") as lab, tempfile.TemporaryDirectory() as compiled:
        env = {**os.environ, "KUBECONFIG": str(lab.kubeconfig)}
        # As installed, whatever is set here: compiled once, not at each start.
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        env["PYTHONPYCACHEPREFIX"] = compiled
        answers: list[float] = []
        saves: list[float] = []
        for turn in range(options.runs + 1):
            answer = _timed([f"{python_bin}/gketrace", "service", "hello-server"], env)
            save = sum(
                _timed(resolve(lab.state, f"node/{node}").argv(["iptables-nft-save", "-c"], "/"))
                for node in NODES
            )
            if turn:  # the first warms the page cache for both
                answers.append(answer)
                saves.append(save)
    answer, save = statistics.median(answers), statistics.median(saves)
    report(
        options,
        figures={
            "answer_seconds": [round(value, 4) for value in answers],
            "iptables_save_three_nodes_seconds": [round(value, 4) for value in saves],
            "ratio_answer_to_iptables_save": round(answer / save, 2),
        },
        goals={"answer_seconds_median": goal(round(answer, 3), at_most=1.5)},
    )


if __name__ == "__main__":
    main()
