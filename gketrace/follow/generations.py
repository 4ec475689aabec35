"""Which connection an entry is of, among those that use or used its tuples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from gketrace.connections import TupleKey, inverted_key
from gketrace.follow.entries import Seen
from gketrace.follow.flow import Flow

__all__ = ["Generations"]

_CLOCKS: Final = 1.0
"""Seconds by which two clocks may differ that nobody has corrected."""


class Generations:
    """Flows by the tuples of their entries."""

    def __init__(self, skew: float) -> None:
        """`skew`: seconds by which the times of two places may differ."""
        self._skew = skew
        self._by_key: dict[TupleKey, list[Flow]] = {}
        self._of: dict[Seen, Flow] = {}

    def flow(self, one: Seen) -> Flow | None:
        """The one that it was put to; None: that one is dropped."""
        return self._of.get(one)

    def knows(self, key: TupleKey) -> bool:
        """Whether a flow has this tuple, either way."""
        return _either_way(key) in self._by_key

    def place(
        self, one: Seen, at: float, fresh: Flow, *, late: bool = False
    ) -> tuple[Flow, list[Flow]]:
        """Puts an entry to its connection, or to `fresh`; also those that it showed to be the same
        one, and that are no more.  `late`: when it began is not known, and all is that others have
        seen until it was read."""
        around = self._around(one)
        self._give_way(one, around)
        found = [flow for flow in around if self._fits(flow, one)]
        if late:
            found = [flow for flow in found if self._alike(flow, one, at)]
        flow = self._choose(found, one, at) if found else fresh
        self._add(flow, one)
        gone = []
        # Those that began at about the same time are rather one than others.
        for other in sorted(found, key=lambda other: abs(_age(other) - _age(flow))):
            # The one that stays may be the other one: then the chosen one is no more.
            if other is flow or other.merged is not None:
                continue
            if self._same_time(flow, other) and not self._backwards(one, flow, other):
                flow, less = self._merge(flow, other)
                gone.append(less)
        if len(found) < len(around):
            self._adopt(flow, one, around)
        return flow, gone

    def drop(self, flow: Flow) -> None:
        """Forgets it."""
        self._unindex(flow, _keys(flow.seen))
        for one in flow.seen:
            self._of.pop(one, None)

    def _choose(self, found: list[Flow], one: Seen, at: float) -> Flow:
        """The one that was there when this began; of several, the youngest."""
        same = [flow for flow in found if self._together(flow, one)]
        if same:  # read together after a while: within one place they came in their order
            return min(same, key=_age)
        begun = [flow for flow in found if flow.first_heard <= at + self._skew]
        if one.began is None:  # when it began is not known: those that are as far as it is
            over = one.over_at is not None
            begun = [flow for flow in begun if (flow.over_at is not None) == over] or begun
        return max(begun, key=_age) if begun else min(found, key=_age)

    def _together(self, flow: Flow, one: Seen) -> bool:
        """Whether both may have begun at the same time."""
        if one.since is None or one.began is None:
            return False
        begun = flow.earliest - self._skew, flow.first_heard + self._skew
        return begun[0] <= one.began and one.since <= begun[1]

    def _around(self, one: Seen) -> list[Flow]:
        keys = _keys([one])
        found = {flow.number: flow for key in keys for flow in self._by_key.get(key, ())}
        return list(found.values())

    def _fits(self, flow: Flow, one: Seen) -> bool:
        if flow.rival(one) is not None:
            return False
        over = flow.over_at
        return over is None or one.since is None or one.since <= over + self._skew

    def _alike(self, flow: Flow, one: Seen, at: float) -> bool:
        """Whether an entry, as it was read at `at`, can be of this connection.

        Packets that end one pass all of its places, and so do answers.  Where one was lost on the
        way this says no of what is one: then it is told in two parts, which is no false path.
        """
        sure = not any(seen.lossy for seen in flow.seen)
        before = at - self._skew
        if flow.over_at is None:
            if one.over_at is not None and one.over_at <= at and sure:
                return False
        elif one.over_at is None and flow.over_at < before:
            return False
        shaken = [seen.shaken_at for seen in flow.seen if seen.shaken_at is not None]
        if shaken and min(shaken) < before and not one.replied:
            return False
        return flow.replied or not sure or one.shaken_at is None or one.shaken_at > at

    def _same_time(self, one: Flow, other: Flow) -> bool:
        """Whether two connections that an entry has shown to be on one way are one."""
        if any(other.rival(seen) is not None for seen in one.seen):
            return False
        first, second = sorted((one, other), key=_age)
        over = first.over_at
        return over is None or second.earliest <= over + self._skew

    def _backwards(self, one: Seen, flow: Flow, other: Flow) -> bool:
        """Whether what the entry lets out had begun before what it takes in: then they are not one,
        however their tuples meet in it."""
        if one.taken == one.let_out:
            return False
        before = [seen for seen in (*flow.seen, *other.seen) if seen.let_out == one.taken]
        behind = [seen for seen in (*flow.seen, *other.seen) if seen.taken == one.let_out]
        sent = [seen.since for seen in before if seen.began is not None and seen.since is not None]
        came = [seen.began for seen in behind if seen.began is not None]
        return bool(sent and came) and min(came) < min(sent) - _CLOCKS

    def _give_way(self, one: Seen, around: Iterable[Flow]) -> None:
        """Moves an entry that was put to the connection that this one began with, for want of
        knowing its own beginning, to the one that used the tuple before."""
        for flow in around:
            old = flow.rival(one)
            if old is None or old.began is not None or len(flow.seen) < 2:
                continue
            if not self._together(flow, one):
                continue
            before = [
                other
                for other in around
                if other.earliest < flow.earliest and other.rival(old) is None
            ]
            if before:
                flow.seen.remove(old)
                self._unindex(flow, _keys([old]) - _keys(flow.seen))
                self._add(max(before, key=_age), old)

    def _adopt(self, flow: Flow, one: Seen, around: Iterable[Flow]) -> None:
        """Takes entries over that came before this one and were put to the connection that used the
        tuple before, for want of this."""
        if one.began is None:
            return
        for earlier in around:
            old = earlier.rival(one)
            if earlier is flow or earlier.done or old is None or old.began is None:
                continue
            for seen in list(earlier.seen):
                late = seen.began is not None and seen.began >= one.began - self._skew
                early = seen.began is not None and seen.began > old.began + self._skew
                if seen is not old and late and early and flow.rival(seen) is None:
                    earlier.seen.remove(seen)
                    # A tuple that it has no entry of any more must not lead to it.
                    self._unindex(earlier, _keys([seen]) - _keys(earlier.seen))
                    self._add(flow, seen)

    def _add(self, flow: Flow, one: Seen) -> None:
        flow.seen.append(one)
        self._of[one] = flow
        for key in _keys([one]):
            flows = self._by_key.setdefault(key, [])
            if flow not in flows:
                flows.append(flow)

    def _merge(self, one: Flow, other: Flow) -> tuple[Flow, Flow]:
        """Two that turned out to be one; what was told of either was told of it."""
        stay, go = (
            (other, one)
            if (other.done, -other.number) > (one.done, -one.number)
            else (
                one,
                other,
            )
        )
        for seen in go.seen:
            self._add(stay, seen)
        stay.opened |= go.opened
        stay.waiting |= go.waiting
        go.merged = stay
        self._unindex(go, _keys(go.seen))
        go.seen = []
        return stay, go

    def _unindex(self, flow: Flow, keys: Iterable[TupleKey]) -> None:
        for key in keys:
            flows = self._by_key.get(key)
            if flows is not None and flow in flows:
                flows.remove(flow)
                if not flows:
                    del self._by_key[key]


def _age(flow: Flow) -> float:
    return flow.first_heard


def _keys(seen: Iterable[Seen]) -> set[TupleKey]:
    """What flows of these entries are found by."""
    return {_either_way(key) for one in seen for key in (one.taken, one.let_out)}


def _either_way(key: TupleKey) -> TupleKey:
    """The same for a tuple and for its answers': an answer may have made the entry."""
    return min(key, inverted_key(key))
