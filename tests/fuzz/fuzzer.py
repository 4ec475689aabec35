"""Runs one target for a while and counts."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from gketrace.errors import ParseError
from tests.fuzz.targets import TARGETS, Target
from tests.soak.gauges import slope

__all__ = ["LIMIT", "Crash", "Result", "fuzz"]

LIMIT = 5.0
"""Seconds of processor time that one input may take: what others do on the machine is no hang."""
_PAGE = os.sysconf("SC_PAGESIZE")
_KEPT = 20
"""Different crashes that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash:
    """One input that was neither read nor refused."""

    data: bytes
    why: str
    """The last line of the traceback, and where it was raised."""


@dataclass(slots=True, kw_only=True)
class Result:
    """Figures of a run."""

    name: str
    inputs: int = 0
    rejected: int = 0
    crashes: int = 0
    slowest_seconds: float = 0.0
    growth_bytes: float = 0.0
    """By which the memory of what was fuzzed grew, after a quarter of the time, as a line fitted
    through it has it."""
    found: dict[str, Crash] = field(default_factory=dict)
    """The first input of each kind of crash."""


class _Hang(BaseException):
    """Not an `Exception`, so that nothing between can take it for its own."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise _Hang(f"took more than {seconds} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fuzz(name: str, *, seconds: float, seed: int = 0, inputs: int = 0) -> Result:
    """Inputs of the target `name` until the time is over and it has had `inputs` of them, whatever
    else the machine does; main thread only (it uses SIGPROF)."""
    target: Target = TARGETS[name]
    rng = random.Random(seed)
    seeds = target.seeds()
    result = Result(name=name)
    memory = _Memory(target.pid(), seconds)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or result.inputs < inputs:
        data = target.mutate(rng, seeds)
        begun = time.process_time()
        try:
            with _limited(LIMIT):
                target.run(data)
        except target.refusals as error:
            result.rejected += 1
            if isinstance(error, ParseError) and (problem := _incomplete(error, data)):
                _note(result, data, f"ParseError {problem}: {error}")
        except (Exception, _Hang) as error:  # noqa: BLE001 - every one of them is what we look for
            _note(result, data, _where(error))
        result.inputs += 1
        result.slowest_seconds = max(result.slowest_seconds, time.process_time() - begun)
        memory.look()
    result.growth_bytes = memory.growth()
    return result


class _Memory:
    """A process's resident pages, looked at a hundred times."""

    def __init__(self, pid: int, seconds: float) -> None:
        self._file = Path("/proc", str(pid), "statm")
        self._seconds = seconds
        self._begun = time.monotonic()
        self._times: list[float] = []
        self._values: list[float] = []

    def look(self) -> None:
        at = time.monotonic() - self._begun
        if at >= self._seconds * (0.25 + 0.0075 * len(self._times)):
            self._times.append(at)
            self._values.append(int(self._file.read_text().split()[1]) * _PAGE)

    def growth(self) -> float:
        return slope(self._times, self._values) * self._seconds * 0.75


def _incomplete(error: ParseError, data: bytes) -> str:
    """What a refusal lacks: it must name the source, the line and the text."""
    if not error.source:
        return "without a source"
    if error.line < 0 or error.line > data.count(b"\n") + 1:
        return "with a line that is not there"
    if not error.text and data.strip():
        return "without the text"
    return ""


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/gketrace/" in frame.filename] or frames
    last = ours[-1]
    message = " ".join(str(error).split())[:120]
    place = f"{last.filename.rpartition('/gketrace/')[2]}:{last.lineno} {last.name}"
    return f"{type(error).__name__} at {place}: {message}"


def _note(result: Result, data: bytes, why: str) -> None:
    result.crashes += 1
    kind = why.partition(": ")[0]
    if kind not in result.found and len(result.found) < _KEPT:
        result.found[kind] = Crash(data=data, why=why)
