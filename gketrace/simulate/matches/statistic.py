"""``statistic``: random draws with the probability that the kernel holds, and every n-th packet.

Source: statistic_mt() in net/netfilter/xt_statistic.c; extensions/libxt_statistic.c for how
``--probability`` becomes a number of 31 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Final

from gketrace.ruleset.model import Match
from gketrace.ruleset.options import Option, integer
from gketrace.simulate.matches.base import by_name, negation
from gketrace.simulate.state import Answer, Environment, PacketState, decide, lot, unknown

if TYPE_CHECKING:
    from typing import Self

__all__ = ["StatisticMatch"]

_SCALE: Final = 1 << 31


def _chance(threshold: int, negated: bool) -> Fraction:
    drawn = Fraction(threshold, _SCALE)
    return 1 - drawn if negated else drawn


@lru_cache(maxsize=1024)
def _draw(threshold: int, negated: bool) -> Answer:
    """kube-proxy draws 1/n: few answers serve all Services, and fractions take their time."""
    chance = _chance(threshold, negated)
    return lot(chance, f"statistic {float(chance):.11f}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticMatch(Match):
    """``-m statistic``."""

    module: ClassVar[str] = "statistic"
    OPTIONS: ClassVar[Mapping[str, int]] = {
        "--mode": 1,
        "--probability": 1,
        "--every": 1,
        "--packet": 1,
    }

    threshold: int | None = None
    """Mode random: matches when 31 random bits are below it, so with chance threshold / 2^31."""
    every: int = 0
    """Mode nth."""
    packet: int = 0
    negated: bool = False

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        found = by_name(options)
        mode = found.get("--mode")
        if mode is None:
            raise ValueError("statistic without --mode")
        if mode.value == "random":
            option = found.get("--probability")
            if option is None:
                raise ValueError("statistic random without --probability")
            value = float(option.value)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"no probability: {option.value}")
            # lround(0x80000000 * p): a double times a power of two is exact; half goes up.
            threshold = int(Fraction(value) * _SCALE + Fraction(1, 2))
            return cls(threshold=threshold, negated=option.negated)
        if mode.value == "nth" and "--every" in found:
            option = found["--every"]
            every = integer(option.value, 1)
            packet = integer(found["--packet"].value) if "--packet" in found else 0
            return cls(every=every, packet=packet, negated=option.negated)
        raise ValueError(f"statistic mode {mode.value}")

    @property
    def chance(self) -> Fraction:
        """Probability of a match, for mode random."""
        return _chance(self.threshold or 0, self.negated)

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        if self.threshold is not None:
            return _draw(self.threshold, self.negated)
        if self.every == 1:
            return decide(True, negated=self.negated)
        return unknown(f"statistic nth: which of each {self.every} packets this is, nobody tells")

    def render(self) -> str:
        mark = negation(self.negated)
        if self.threshold is not None:
            shown = f"{self.threshold / _SCALE:.11f}"
            return f"-m statistic --mode random {mark}--probability {shown}"
        return f"-m statistic --mode nth {mark}--every {self.every} --packet {self.packet}"
