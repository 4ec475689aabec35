"""docs/limitations.md names each thing that is UNKNOWN."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gketrace.simulate.matches.undecided import UNDECIDED
from gketrace.simulate.targets.elsewhere import ELSEWHERE

PAGE = (Path(__file__).parents[2] / "docs" / "limitations.md").read_text()


@pytest.mark.parametrize(
    "name", [*(match.module for match in UNDECIDED), *(target.name for target in ELSEWHERE)]
)
def test_what_cannot_be_decided_is_named(name: str) -> None:
    assert re.search(rf"`{re.escape(name)}\b", PAGE), name
