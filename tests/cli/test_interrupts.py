"""Ctrl-C, once and again."""

from __future__ import annotations

import signal

import pytest

from gketrace_cli import interrupts
from gketrace_cli.interrupts import interruptible


class Clock:
    """In place of the time module: nothing passes between two signals but what a test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(interrupts, "time", made)
    return made


def test_each_is_the_next_step_and_the_last_gives_up(clock: Clock) -> None:
    taken: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with interruptible(lambda: taken.append("stop"), lambda: taken.append("hurry")):
        signal.raise_signal(signal.SIGINT)
        clock.now += 0.35
        signal.raise_signal(signal.SIGTERM)
        assert taken == ["stop", "hurry"]
        clock.now += 0.35
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_two_at_once_are_one(clock: Clock) -> None:
    """As timeout(1) sends them: to the program and to its group."""
    taken: list[str] = []
    with interruptible(lambda: taken.append("stop")):
        signal.raise_signal(signal.SIGINT)
        clock.now += 0.25
        signal.raise_signal(signal.SIGINT)
    assert taken == ["stop"]
