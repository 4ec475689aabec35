"""The short form of ``python -m tests.soak``."""

from __future__ import annotations

import os

import pytest

from tests.soak.gauges import slope
from tests.soak.run import soak


@pytest.mark.timeout(400)
def test_two_minutes_leave_nothing_behind() -> None:
    result = soak(f"soak{os.getpid()}", seconds=120, rate=10, seed=1)
    missed = {name: goal for name, goal in result["goals"].items() if not goal["met"]}
    assert not missed, result["errors"] or result["growth"]
    assert sum(result["calls"].values()) > 600
    assert result["stream_messages"]["FollowConntrack"] > 0
    assert result["stream_messages"]["Capture"] > 0


def test_a_leak_has_a_slope() -> None:
    times = [5.0 * n for n in range(40)]
    assert slope(times, [10 + n % 3 for n in range(40)]) == 0
    assert slope(times, [10 + n // 4 for n in range(40)]) * 195 == pytest.approx(9.75, abs=2)
