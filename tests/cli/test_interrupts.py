"""Ctrl-C, once and again."""

from __future__ import annotations

import signal
import time

import pytest

from gketrace_cli.interrupts import interruptible


def test_each_is_the_next_step_and_the_last_gives_up() -> None:
    taken: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with interruptible(lambda: taken.append("stop"), lambda: taken.append("hurry")):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.35)
        signal.raise_signal(signal.SIGTERM)
        assert taken == ["stop", "hurry"]
        time.sleep(0.35)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_two_at_once_are_one() -> None:
    """As timeout(1) sends them: to the program and to its group."""
    taken: list[str] = []
    with interruptible(lambda: taken.append("stop")):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert taken == ["stop"]
