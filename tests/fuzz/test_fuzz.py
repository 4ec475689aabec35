"""A short run of each target, and proof that the fuzzer finds what it looks for."""

from __future__ import annotations

import time

import pytest

from gketrace.errors import ParseError
from tests.fuzz import fuzzer
from tests.fuzz.fuzzer import fuzz
from tests.fuzz.targets import TARGETS, Target

_LONG = ("iptables-save", "nft-json", "walk-iptables", "walk-nft")


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_nothing_crashes(name: str) -> None:
    long = name in _LONG
    result = fuzz(name, seconds=10 if long else 1.5, seed=1, inputs=101 if long else 1)
    assert [crash.why for crash in result.found.values()] == []
    assert result.rejected > 0
    if long:
        assert 100 < result.inputs > result.rejected


def _spin(_: bytes) -> None:
    end = time.process_time() + 1
    while time.process_time() < end:
        pass


def _fail(_: bytes) -> None:
    raise KeyError("x")


def _refuse(_: bytes) -> None:
    raise ParseError("no", source="", line=1, text="x")


@pytest.mark.parametrize(
    ("run", "why"), [(_spin, "_Hang"), (_fail, "KeyError"), (_refuse, "ParseError without")]
)
def test_a_crash_a_hang_and_a_poor_refusal_are_found(
    monkeypatch: pytest.MonkeyPatch, run: object, why: str
) -> None:
    right = TARGETS["nft-json"]
    wrong = Target(seeds=right.seeds, mutate=right.mutate, run=run)  # type: ignore[arg-type]
    monkeypatch.setitem(TARGETS, "nft-json", wrong)
    monkeypatch.setattr(fuzzer, "LIMIT", 0.05)
    result = fuzz("nft-json", seconds=0.3)
    assert result.crashes == result.inputs > 0
    assert next(iter(result.found)).startswith(why)
