"""What the summary counts.  Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gketrace.errors import ExitCode
from gketrace.follow.joiner import Phase
from gketrace.follow.outcome import Judgement, Outcome
from gketrace.packet import Tuple5
from gketrace_cli.follow.packets import SeenPackets
from gketrace_cli.follow.seen import Hop, times_of
from gketrace_cli.follow.view import View

__all__ = ["Failure", "Gap", "Share", "Tally", "Times", "end_text", "percentiles"]

_FAILURES: Final = 20
"""Kinds of failure that are told apart."""
_DURATIONS: Final = 200_000
"""Of which percentiles are taken: the first ones."""


_HOPS: Final = 500
_TIMES: Final = 20_000
"""Of one hop, of which percentiles are taken: the first ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """A time in which something was not seen."""

    where: str
    why: str
    begin: float
    end: float | None


@dataclass(slots=True)
class Share:
    """Of one endpoint."""

    connections: int = 0
    expected: float = 0.0
    """By the rules' odds."""


@dataclass(slots=True)
class Failure:
    """Failures of one kind."""

    outcome: Outcome
    where: str
    """The endpoint, or the front door."""
    because: str
    death: str
    count: int = 0


@dataclass(slots=True)
class Times:
    """Over one hop."""

    nanoseconds: list[int] = field(default_factory=list)
    packets: int = 0
    bound: int | None = 0
    """By which they may be wrong, at most; None: not known."""

    def add(self, times: list[int], bound: int | None) -> None:
        self.packets += len(times)
        self.nanoseconds += times[: _TIMES - len(self.nanoseconds)]
        known = self.bound is not None and bound is not None
        self.bound = max(self.bound or 0, bound or 0) if known else None


@dataclass(slots=True)
class Tally:
    """Mutable."""

    only: tuple[str, ...] = ()
    """Options that leave connections out, which are not counted then."""
    connections: int = 0
    failed: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    shares: dict[str, Share] = field(default_factory=dict)
    with_odds: int = 0
    """Connections whose rules' odds are known: those that `Share.expected` is about."""
    failures: dict[tuple[Outcome, str, str], Failure] = field(default_factory=dict)
    durations: list[float] = field(default_factory=list)
    bytes: int = 0
    counted: int = 0
    """Connections whose bytes are known."""
    beside: int = 0
    """Connections straight to endpoints, not through the Service."""
    lost: Counter[str] = field(default_factory=Counter)
    """Place → events that its kernel dropped."""
    gaps: list[Gap] = field(default_factory=list)
    behind: tuple[str, ...] = ()
    """Places whose last events had not come when it ended."""
    unwritten: int = 0
    """Records that were not written, as their reader was too slow."""
    forgotten: int = 0
    unheard: int = 0
    """Connections that were told before all nodes had said what they know of them."""
    notes: list[str] = field(default_factory=list)
    hops: dict[Hop, Times] = field(default_factory=dict)
    """With packets, in the order in which they were met."""
    lost_packets: Counter[str] = field(default_factory=Counter)
    """Node → packets that its kernel dropped."""
    dropped_packets: int = 0
    """… that were dropped here for want of room, before their connection was told."""
    passed_over: int = 0
    """Connections whose packets were not looked at, for want of time."""

    def add(self, view: View) -> None:
        """One connection's record."""
        followed = view.followed
        self.connections += 1
        outcome = followed.judgement.outcome
        self.outcomes[outcome] += 1
        end = _end(view)
        if view.failed:
            self.failed += 1
            self._fail(view, end)
        if followed.connection.halves[-1].entry.dst_nat or followed.connection.last != (
            followed.connection.first
        ):
            self.shares.setdefault(end, Share()).connections += 1
            self._expect(view)
        fine = followed.phase is Phase.CLOSED and not view.failed
        if fine and view.duration is not None and len(self.durations) < _DURATIONS:
            self.durations.append(view.duration)
        if view.packets is not None:
            self._time(view.packets)
        counters = followed.connection.halves[0].entry
        if followed.sights[0].counted and counters.orig_bytes is not None:
            self.counted += 1
            self.bytes += counters.orig_bytes + (counters.reply_bytes or 0)

    def add_alone(self, seen: SeenPackets, judgement: Judgement, where: str) -> None:
        """One that only packets tell.  `where`: the front door."""
        self.connections += 1
        self.failed += 1
        self.outcomes[judgement.outcome] += 1
        self._count(judgement, where, "")
        self._time(seen)

    def _time(self, seen: SeenPackets) -> None:
        for hop, times, bound in times_of(seen):
            if times and (hop in self.hops or len(self.hops) < _HOPS):
                self.hops.setdefault(hop, Times()).add(times, bound)

    def _expect(self, view: View) -> None:
        odds = {} if view.way is None else view.way.odds().of
        known = {key: value for key, value in odds.items() if value is not None}
        total = sum(known.values())
        if not total or len(known) < len(odds):
            return
        self.with_odds += 1
        for (address, port), chance in known.items():
            name = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
            self.shares.setdefault(name, Share()).expected += chance / total

    def _fail(self, view: View, end: str) -> None:
        self._count(view.followed.judgement, end, view.death)

    def _count(self, judgement: Judgement, end: str, death: str) -> None:
        last = str(judgement.last or "")
        key = judgement.outcome, end, f"{last} {judgement.next_node} {death}"
        known = self.failures.get(key)
        if known is None:
            if len(self.failures) >= _FAILURES:
                key = judgement.outcome, "other ends", ""
            known = self.failures.setdefault(
                key,
                Failure(
                    outcome=judgement.outcome,
                    where=key[1],
                    because=judgement.because if key[2] else "",
                    death=death if key[2] else "",
                ),
            )
        known.count += 1

    @property
    def shared(self) -> int:
        """Connections that `shares` are of."""
        return sum(share.connections for share in self.shares.values())

    def ordered(self) -> list[tuple[str, Share]]:
        """Endpoints, those with the most connections first."""
        return sorted(self.shares.items(), key=lambda one: (-one[1].connections, one[0]))

    def percentiles(self) -> dict[int, float]:
        """Of the durations, seconds; empty: none are known."""
        return percentiles(self.durations)

    @property
    def blind(self) -> bool:
        """Something was not seen."""
        return bool(
            self.lost
            or self.gaps
            or self.behind
            or self.unwritten
            or self.forgotten
            or self.unheard
            or self.lost_packets
            or self.dropped_packets
        )

    def code(self, *, missing: bool) -> ExitCode:
        if missing or self.blind:
            return ExitCode.PARTIAL
        return ExitCode.BROKEN if self.failed else ExitCode.OK


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """50, 90, 99: nearest rank."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {p: ordered[max(0, -(-len(ordered) * p // 100) - 1)] for p in (50, 90, 99)}


def _end(view: View) -> str:
    return end_text(view.followed.connection.last)


def end_text(last: Tuple5) -> str:
    """Where it goes to."""
    if last.dport is None:
        return str(last.dst)
    return f"[{last.dst}]:{last.dport}" if last.dst.version == 6 else f"{last.dst}:{last.dport}"
