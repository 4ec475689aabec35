"""The short form of ``python -m tests.races``."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.races.calls import CALLS


def _races(times: int, *kinds: str) -> Any:
    argv = [sys.executable, "-m", "tests.races", f"--times={times}", "--json"]
    argv += [f"--only={kind}" for kind in kinds]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    missed = {name: goal for name, goal in result["goals"].items() if not goal["met"]}
    assert not missed, (result["wrong"], result["failed"], result)
    return result


@pytest.mark.timeout(300)
def test_pods_deleted_in_the_middle_of_calls() -> None:
    result = _races(6, *CALLS)
    assert result["times"] == dict.fromkeys(CALLS, 6)
    # Nearly every time the next pod got the PID of the one before.
    assert result["pid_reused"] > 18


@pytest.mark.timeout(300)
def test_an_agent_restarted_in_the_middle_of_calls() -> None:
    # The first is of a new process, the second of a fork.
    assert _races(2, "restarted")["times"] == {"restarted": 2, "restarted_cold": 1}
