"""How far the nodes' clocks are apart, from packets that were seen on two of them.

A packet is seen on the sending node before it is seen on the receiving one.  So with θ for what a
node's clock is ahead of the true time::

    θ(receiver) - θ(sender)  ≤  time at the receiver - time at the sender

Packets in both directions bound the difference from both sides, and the smallest of each count.
These bounds add up along chains of nodes, so all of them together are a system of difference
constraints, solved by shortest paths.  The estimate is the middle; what is stated as its bound is
half the width, which holds for as long as the clocks' difference does not change.  Nothing is
assumed about delays being equal in both directions.

Which way a packet went is told by its TTL, and where that is the same, by its direction at the two
taps: out of one node, into the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from gketrace.capture.packets import Direction
from gketrace.capture.segments import SYN, Sighting

__all__ = ["HERE", "ClockBounds", "Clocks", "Offset", "observe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offset:
    """One node's clock."""

    node: str
    ahead_ns: int
    """What its clock is ahead of the reference's, as estimated: to be taken from its times."""
    bound_ns: int | None
    """How far the estimate can be off; None: not known, nothing was seen in one of the
    directions, and nothing is corrected."""

    def __str__(self) -> str:
        if self.bound_ns is None:
            return f"{self.node}: not known"
        return f"{self.node}: {_signed(self.ahead_ns)} ± {_plain(self.bound_ns)}"


def _plain(ns: int) -> str:
    for unit, size in (("s", 10**9), ("ms", 10**6), ("µs", 10**3)):
        if abs(ns) >= size:
            return f"{ns / size:.3g} {unit}" if ns < 1000 * size else f"{ns / size:.0f} {unit}"
    return f"{ns} ns"


def _signed(ns: int) -> str:
    return ("-" if ns < 0 else "+") + _plain(abs(ns))


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocks:
    """All nodes' clocks against one of them."""

    reference: str
    """The node whose clock is taken as it is; empty: there is none."""
    offsets: Mapping[str, Offset] = field(default_factory=dict)
    widths: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """(node, node) → how far their corrected clocks can be apart."""
    contradiction: str = ""
    """Why bounds exclude each other: a clock was set, or drifted, meanwhile.  Nothing is corrected
    then."""

    def corrected(self, node: str, time_ns: int) -> int:
        """A time of the node's clock by the reference's."""
        offset = self.offsets.get(node)
        return time_ns if offset is None else time_ns - offset.ahead_ns

    def width(self, one: str, other: str) -> int | None:
        """How far corrected times of two nodes can be off against each other; None: not known."""
        return 0 if one == other else self.widths.get((one, other))

    def certain(self, one: str, time_one: int, other: str, time_other: int) -> bool:
        """Whether the order of two corrected times is beyond doubt."""
        width = self.width(one, other)
        return width is not None and (one == other or abs(time_one - time_other) > width)

    def text(self, nodes: Iterable[str] | None = None) -> str:
        """For the section header: the correction of each node (None: all), and its bound."""
        if self.contradiction:
            return f"clocks not corrected: {self.contradiction}"
        wanted = None if nodes is None else frozenset(nodes)
        others = [
            str(offset)
            for node, offset in sorted(self.offsets.items())
            if node not in (self.reference, HERE) and (wanted is None or node in wanted)
        ]
        if not others:
            return ""
        return f"clocks against {self.reference}, ahead by (corrected): {'; '.join(others)}"


HERE: Final = ""
"""The node name of who asks, whose clock bounds others by their messages."""
_WIDE: Final = 5 * 10**6
"""Half a width in nanoseconds, beyond which a clock is corrected no more than it must be: clocks
that are kept by NTP are nearer to each other than the middle of wide bounds."""


def _middle(low: int, high: int) -> int:
    if high - low <= 2 * _WIDE:
        return (high + low) // 2
    return min(max(low, 0), high)


class ClockBounds:
    """Collects bounds; `clocks` solves them."""

    def __init__(self) -> None:
        self._least: dict[tuple[str, str], int] = {}
        """(a, b) → upper bound of θ(b) - θ(a)."""
        self.used = 0
        """Observations."""

    def before(self, earlier: str, earlier_ns: int, later: str, later_ns: int) -> None:
        """Something that happened at `earlier_ns` by one node's clock was before what happened at
        `later_ns` by another one's."""
        if earlier == later:
            return
        self.used += 1
        key = (earlier, later)
        bound = later_ns - earlier_ns
        if key not in self._least or bound < self._least[key]:
            self._least[key] = bound

    def clocks(self, nodes: Iterable[str] = (), reference: str | None = None) -> Clocks:
        """`reference`: by default the node with most neighbours, the first by name of several."""
        names = sorted({*nodes, *(name for pair in self._least for name in pair)})
        if not names:
            return Clocks(reference="")
        distance = self._distances(names)
        for name in names:
            if distance[name, name] < 0:
                why = f"packets arrive before they are sent, by {_plain(-distance[name, name])}"
                first = names[0] if reference is None else reference
                return Clocks(reference=first, contradiction=why)
        if reference is None:
            reference = max(
                names,
                key=lambda name: sum(self._both(distance, name, other) for other in names),
            )
        offsets = _solve(names, reference, distance)
        widths: dict[tuple[str, str], int] = {}
        for one in names:
            for other in names:
                high, low = distance.get((one, other)), distance.get((other, one))
                if one == other or high is None or low is None:
                    continue
                ahead = offsets[other].ahead_ns - offsets[one].ahead_ns
                widths[one, other] = max(high - ahead, ahead + low)
        return Clocks(reference=reference, offsets=offsets, widths=widths)

    @staticmethod
    def _both(distance: Mapping[tuple[str, str], int], one: str, other: str) -> bool:
        return (one, other) in distance and (other, one) in distance

    def _distances(self, names: list[str]) -> dict[tuple[str, str], int]:
        """Shortest paths between all (Floyd and Warshall)."""
        distance = {**self._least, **{(name, name): 0 for name in names}}
        for via in names:
            for one in names:
                first = distance.get((one, via))
                if first is None:
                    continue
                for other in names:
                    second = distance.get((via, other))
                    if second is None:
                        continue
                    known = distance.get((one, other))
                    if known is None or first + second < known:
                        distance[one, other] = first + second
        return distance


def _solve(
    names: list[str], reference: str, distance: Mapping[tuple[str, str], int]
) -> dict[str, Offset]:
    """One clock after the other, the best known first: the middle of what bounds and the clocks
    before leave.  So no packet arrives before it was sent."""
    known = [
        (distance[reference, name] + distance[name, reference], name)
        for name in names
        if (reference, name) in distance and (name, reference) in distance
    ]
    ahead = {reference: 0}
    for _, name in sorted(known):
        if name == reference:
            continue
        low = max(at - distance[name, one] for one, at in ahead.items() if (name, one) in distance)
        high = min(at + distance[one, name] for one, at in ahead.items() if (one, name) in distance)
        ahead[name] = _middle(low, high)
    offsets: dict[str, Offset] = {}
    for name in names:
        at = ahead.get(name)
        if at is None:
            offsets[name] = Offset(node=name, ahead_ns=0, bound_ns=None)
            continue
        bound = max(distance[reference, name] - at, at + distance[name, reference])
        offsets[name] = Offset(node=name, ahead_ns=at, bound_ns=bound)
    return offsets


def observe(bounds: ClockBounds, seen: Iterable[Sighting]) -> None:
    """Packets that were seen on two nodes → bounds.

    Only packets whose `Sighting.key` was seen once at each tap in each direction of each flow
    count, and that have something to tell them apart by.
    """
    groups: dict[tuple[int, ...], dict[tuple[object, ...], Sighting | None]] = {}
    for one in seen:
        if not _telling(one):
            continue
        places = groups.setdefault(one.key, {})
        place = (one.tap.node, one.tap.pod, one.tap.interface, one.direction, one.flow)
        places[place] = None if place in places else one
    for places in groups.values():
        found = [one for one in places.values() if one is not None]
        if len(found) < len(places) or len({one.tap.node for one in found}) < 2:
            continue
        _pairs(bounds, found)


def _telling(one: Sighting) -> bool:
    """Whether two packets with this key are the same: it must hold something random."""
    if one.flags & SYN:
        return True
    if one.flags:
        return one.stamp >= 0 or one.identity > 0
    return one.size > 0 and one.identity > 0


def _pairs(bounds: ClockBounds, found: list[Sighting]) -> None:
    by_node: dict[str, list[Sighting]] = {}
    for one in found:
        by_node.setdefault(one.tap.node, []).append(one)
    names = sorted(by_node)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            order = _order(by_node[name], by_node[other])
            if order is None:
                continue
            first, second = order
            last = max(one.time for one in first)
            begin = min(one.time for one in second)
            bounds.before(first[0].tap.node, last, second[0].tap.node, begin)


def _order(
    one: list[Sighting], other: list[Sighting]
) -> tuple[list[Sighting], list[Sighting]] | None:
    """Which node had it first: None when neither TTL nor direction says so."""
    for first, second in ((one, other), (other, one)):
        lowest = min(s.ttl for s in first)
        highest = max(s.ttl for s in second)
        if lowest > highest:
            return first, second
        if lowest == highest:
            leaving = any(s.ttl == lowest and s.direction is Direction.OUT for s in first)
            arriving = all(s.direction is Direction.IN for s in second if s.ttl == highest)
            if leaving and arriving:
                return first, second
    return None
