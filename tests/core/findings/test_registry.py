"""Each code has a page, a detector and a scenario."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.scenarios.__main__ import ALL
from gketrace.errors import NotFoundError
from gketrace.findings.detect import DETECTORS, load
from gketrace.findings.registry import CODES, code_of

PAGES = Path(__file__).parents[3] / "docs/findings"
SECTIONS = (
    "## What it means",
    "## How it is detected",
    "## How to confirm",
    "## How to fix",
    "## What can look like it",
)


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.code)
def test_each_code_has_a_whole_page(code) -> None:
    text = (PAGES / f"{code.code}.md").read_text()
    assert text.startswith(f"# {code.code}: {code.title}\n")
    places = [text.index(section) for section in SECTIONS]
    assert places == sorted(places)
    assert max(map(len, text.splitlines())) <= 100


def test_there_is_no_page_of_another_code() -> None:
    pages = {path.stem for path in PAGES.glob("GKT-*.md")}
    assert pages == {code.code for code in CODES}


def test_each_code_has_a_detector() -> None:
    assert {code for codes, *_ in DETECTORS for code in codes} == {code.code for code in CODES}
    assert all(callable(load(name)) for *_, name in DETECTORS)


def test_each_code_has_a_scenario() -> None:
    assert {scenario.code for scenario in ALL} == {code.code for code in CODES}


@pytest.mark.parametrize("text", ["GKT-301", "gkt301", "301"])
def test_a_code_is_found_however_it_is_typed(text: str) -> None:
    assert code_of(text).code == "GKT-301"


@pytest.mark.parametrize("text", ["GKT-999", "", "301x", "forwarding"])
def test_no_code_is_made_up(text: str) -> None:
    with pytest.raises(NotFoundError):
        code_of(text)
