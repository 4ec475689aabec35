"""Events of many places → a record of each connection as it opens, changes and closes.

Within one place events come in order, perhaps some twice, perhaps some not at all; between places
in any order.  What puts entries together is their tuples.  A tuple is used again, so an entry
belongs to that connection of its tuple which was there when the entry began.
What came after a loss is `gketrace.follow.losses`' matter.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from itertools import count
from typing import Final

from gketrace.connections import Place, TupleKey, record_keys
from gketrace.conntrack_records import HAS_COUNTERS, Record
from gketrace.follow.entries import POLLED, EntryKey, EventKind, Seen
from gketrace.follow.flow import Flow
from gketrace.follow.generations import Generations
from gketrace.follow.losses import Losses
from gketrace.follow.model import Followed, Limits, Phase, Step
from gketrace.follow.places import Here
from gketrace.follow.recording import records_of, step_of
from gketrace.follow.remembered import Remembered
from gketrace.packet import IPAddress

__all__ = ["Followed", "Joiner", "Limits", "Phase", "Step"]


class Joiner:
    """Feed it; ask `told` for what is new.  For one thread."""

    def __init__(
        self,
        *,
        owner: Callable[[IPAddress], str] = lambda _: "",
        limits: Limits | None = None,
        steps: bool = False,
    ) -> None:
        """`owner` as for `join_connections`.  `steps`: keep each event for `steps`."""
        self._owner = owner
        self._limits: Final = limits or Limits()
        self._places: dict[Place, Here] = {}
        self._losses = Losses(self._places, self._limits, owner)
        self._flows: dict[int, Flow] = {}
        self._generations = Generations(self._limits.skew)
        self._over = Remembered(self._limits.remembered)
        self._due: list[tuple[float, int, Flow]] = []
        self._next = 1
        self._done = 0
        """Connections that were told and are not dropped yet."""
        self._ties = count()
        self._steps: list[Step] | None = [] if steps else None
        self._told: list[Followed] = []
        self.forgotten = 0
        """Connections that were told before their end, for want of room."""
        self.unheard = 0
        """Connections that were told before all places had said what they know of them."""

    # what comes in

    def feed(
        self,
        place: Place,
        at: float,
        kinds: bytes,
        records: Iterable[Record],
        *,
        after: float | None = None,
    ) -> None:
        """Events of one place, a byte of `kinds` for each of `records`: `EventKind`, plus `POLLED`.

        They were read at `at`, and happened after `after` (None: just before).
        Raises ValueError for a kind that is none.
        """
        here = self._here(place)
        here.after = at if after is None else after
        for kind, record in zip(kinds, records, strict=True):
            taken, let_out = record_keys(record)
            key = (place, taken, record.zone)
            one = self._event(here, key, let_out, kind & ~POLLED, record, at)
            if self._steps is not None and one is not None:
                self._keep_step(one, kind, at)

    def heard(self, place: Place, at: float, *, counts: bool = False) -> None:
        """The place is there, and all its events until `at` have been fed; `counts`: its kernel
        counts packets and bytes, so whoever feeds it will `count` the entries of `uncounted`."""
        here = self._here(place)
        here.heard = max(here.heard, at)
        here.counts = counts

    def read_whole(self, place: Place, at: float) -> None:
        """All entries of the place have been fed as EXISTING since `lose`, or since it is followed:
        what was not among them has ended unseen."""
        here = self._here(place)
        for key, one in list(here.live.items()):
            if key not in here.met:
                del here.live[key]
                one.vanish(at)
                self._changed(one, at)
        here.met = set()
        here.complete = True
        here.recovering = False

    def begin_reading(self, place: Place) -> None:
        """From here on until `read_whole` all entries of the place come as EXISTING."""
        here = self._here(place)
        here.met, here.complete = set(), False

    def lose(self, place: Place, *, widened: bool = False) -> None:
        """Events of the place were lost: what is open there may have changed or ended.  `widened`:
        what comes from there now may be of more connections than before."""
        self._here(place)
        self._losses.add(place, widened=widened)

    def count(self, place: Place, records: Iterable[Record]) -> None:
        """Packets and bytes, as read from the table after the events that were fed."""
        here = self._here(place)
        for record in records:
            if not record.has & HAS_COUNTERS:
                continue
            taken, _ = record_keys(record)
            one = here.live.get((place, taken, record.zone))
            if one is not None and one.record.id == record.id:
                one.count(record)

    # what comes out

    def told(self, now: float) -> list[Followed]:
        """What is news by `now`."""
        self._over.forget(now)
        self._losses.now = now
        self._place_found()
        while self._due and self._due[0][0] <= now:
            when, _, flow = heapq.heappop(self._due)
            if flow.merged is not None or flow.due != when:
                continue
            flow.due = None
            if not flow.done:
                self._consider(flow, now)
            elif now < flow.told_at + self._limits.late:
                self._wait(flow, flow.told_at + self._limits.late)
            elif self._stays(flow, now):
                self._wait(flow, now + self._limits.late)
            else:
                self._drop(flow, now)
        while len(self._flows) > self._limits.flows:
            oldest = min(self._flows.values(), key=lambda flow: flow.changed)
            self.forgotten += 1
            self._tell(oldest, Phase.STILL_OPEN, now)
        news, self._told = self._told, []
        return news

    def heard_all(self, until: float) -> bool:
        """Whether no place that is followed has more to say of what was before `until`; one that
        lost events is waited for as long as connections wait for it."""
        return all(
            here.heard >= until if place not in self._losses else not self._losses.awaits(here)
            for place, here in self._places.items()
        )

    def heard_until(self, place: Place) -> float | None:
        """By its clock; None: it was not heard, or not since events of it were lost."""
        here = self._places.get(place)
        return here.heard if here is not None and here.heard and not here.recovering else None

    def behind(self, until: float) -> frozenset[Place]:
        """Places that are followed and may have more to say of what was before `until`."""
        return frozenset(
            place
            for place, here in self._places.items()
            if place in self._losses or here.heard < until
        )

    def finish(self, now: float, until: float | None = None) -> list[Followed]:
        """The records of all that is not over, after those that are.  `until`: when the following
        ended; of what began later not all places may have told."""
        self._place_found(all_of_it=True)
        for flow in list(self._flows.values()):
            if until is not None and flow.earliest > until + self._limits.skew:
                continue
            self._tell(flow, Phase.CLOSED if flow.over_at is not None else Phase.STILL_OPEN, now)
        news, self._told = self._told, []
        return news

    def knows(self, taken: TupleKey) -> bool:
        """Whether an entry of this tuple, or of its answers, has come lately."""
        return self._generations.knows(taken)

    def steps(self) -> list[Step]:
        """The events since the last time; empty without ``steps=True``."""
        found = self._steps or []
        if self._steps is not None:
            self._steps = []
        return found

    @property
    def patience(self) -> float:
        """Seconds that a connection waits for a place that lost events, from the loss."""
        return self._limits.recover_at_most

    @property
    def open(self) -> int:
        """Connections that have not been told as closed."""
        return len(self._flows)

    def uncounted(self) -> frozenset[Place]:
        """Places with entries of connections that are over and wait for their counters."""
        return frozenset(
            one.place
            for flow in self._flows.values()
            if flow.over_at is not None
            for one in flow.seen
            if self._counters_due(one)
        )

    def _counters_due(self, one: Seen) -> bool:
        here = self._places.get(one.place)
        return not one.counted and one.ended is None and here is not None and here.counts

    # one event

    def _event(
        self,
        here: Here,
        key: EntryKey,
        let_out: TupleKey,
        kind: int,
        record: Record,
        at: float,
    ) -> Seen | None:
        """The entry that it is about; None: one that is not followed any more."""
        known = here.live.get(key)
        if known is not None and known.record.id != record.id:
            if kind == EventKind.DESTROY:
                return None  # of an earlier one, whose tuple is used again
            known.vanish(at)
            self._changed(known, at)
            known = None
        if kind == EventKind.DESTROY:
            return self._ended(here, known, key, let_out, record, at)
        if kind not in (EventKind.NEW, EventKind.UPDATE, EventKind.EXISTING):
            raise ValueError(f"{kind} is no kind of event")
        here.met.add(key)
        if known is None:
            if kind == EventKind.NEW:
                self._over.remove(key, record)
            elif self._over.has(key, record):
                return None
            known = self._first(here, key, let_out, kind, record, at)
            here.live[key] = known
        elif kind == EventKind.NEW:
            # A second time, or after a reading of the table that had it already.
            if known.began is None:
                known.began, known.since = at, here.after
        else:
            known.update(record, at, told=kind != EventKind.EXISTING)
            self._changed(known, at)
        return known

    def _ended(
        self,
        here: Here,
        known: Seen | None,
        key: EntryKey,
        let_out: TupleKey,
        record: Record,
        at: float,
    ) -> Seen | None:
        here.met.discard(key)
        told = self._over.has(key, record)
        self._over.add(key, record, at + self._limits.late)  # it may come twice
        if known is not None:
            del here.live[key]
            known.end(record, at)
            self._changed(known, at)
        elif not told:
            known = self._first(here, key, let_out, EventKind.DESTROY, record, at)
            known.end(record, at)
        return known

    def _first(
        self, here: Here, key: EntryKey, let_out: TupleKey, kind: int, record: Record, at: float
    ) -> Seen:
        """One that was not known."""
        if kind == EventKind.NEW:
            one = Seen(key[0], key, let_out, record, at, at, here.after)
        elif here.recovering:
            one = Seen(key[0], key, let_out, record, at, None, here.known_until)
            here.unplaced.append((one, kind, at))
            return one
        else:
            one = Seen(key[0], key, let_out, record, at, None)
            # What is removed before the table was read was there before: else it would be known.
            gone = kind == EventKind.DESTROY and not here.complete
            one.old = gone or (kind == EventKind.EXISTING and one.over_at is not None)
            one.end_seen = kind == EventKind.UPDATE and one.over_at is not None
        self._place(one, at)
        return one

    def _place_found(self, *, all_of_it: bool = False) -> None:
        """What came without its beginning after a loss."""
        for one, kind, at in self._losses.found(all_of_it=all_of_it):
            self._place(one, at, late=one.began is None)
            if self._steps is not None:
                self._keep_step(one, kind, at)

    def _place(self, one: Seen, at: float, *, late: bool = False) -> None:
        flow, gone = self._generations.place(one, at, Flow(self._next), late=late)
        if flow.number == self._next:
            self._flows[flow.number] = flow
            self._next += 1
        for other in gone:
            self._done -= other.done
            self._flows.pop(other.number, None)
        self._look(flow, at)

    def _changed(self, one: Seen, at: float) -> None:
        flow = self._generations.flow(one)
        if flow is not None:
            self._look(flow, at)

    # when to tell

    def _look(self, flow: Flow, at: float) -> None:
        """Something about it changed."""
        flow.changed = max(flow.changed, at)
        if flow.done:
            return
        limits = self._limits
        if flow.over_at is not None:
            self._wait(flow, at + limits.settle)
        elif not flow.replied and not flow.waiting:
            self._wait(flow, at + limits.unanswered_after)
        elif flow.replied and not flow.opened:
            self._wait(flow, at + limits.opened_after)

    def _wait(self, flow: Flow, until: float) -> None:
        """Looks at it then, or earlier: one waits for most of its events only once."""
        if flow.due is not None and flow.due <= until:
            return
        flow.due = until
        heapq.heappush(self._due, (until, next(self._ties), flow))

    def _consider(self, flow: Flow, now: float) -> None:
        limits = self._limits
        over_at = flow.over_at
        if over_at is not None:
            last = max(one.over_at or 0.0 for one in flow.seen)
            waited = now - over_at
            whole = flow.over and not any(map(self._counters_due, flow.seen))
            heard = self._heard_of(flow, over_at + limits.skew)
            settled = now >= last + limits.settle and (whole or waited >= limits.settle_at_most)
            if (heard and settled) or waited >= limits.behind_at_most:
                self.unheard += not heard or self._losses.more_of(flow)
                self._tell(flow, Phase.CLOSED, now)
            else:
                until = last + limits.settle
                self._wait(flow, until if until > now else now + limits.settle)
        elif not flow.replied and not flow.waiting:
            until = flow.first_heard + limits.unanswered_after
            if now >= until:
                flow.waiting = True
                self._told += self._records(flow, Phase.UNANSWERED, now)
            else:
                self._wait(flow, until)
        elif flow.replied and not flow.opened:
            until = flow.first_heard + limits.opened_after
            if now >= until:
                flow.opened = True
                self._told += self._records(flow, Phase.OPENED, now)
            else:
                self._wait(flow, until)

    def _heard_of(self, flow: Flow, until: float) -> bool:
        """Whether all has come that it waits for."""
        for place, here in self._places.items():
            if here.heard < until and place not in self._losses:
                return False
        return not self._losses.hold(flow)

    def _tell(self, flow: Flow, phase: Phase, now: float) -> None:
        """Its record; from then on it is only remembered."""
        self._done += 1
        flow.done, flow.told_at = True, now
        del self._flows[flow.number]
        if not all(one.old for one in flow.seen):
            self._told += self._records(flow, phase, now)
        self._wait(flow, now + self._limits.late)

    def _stays(self, flow: Flow, now: float) -> bool:
        """Whether what was told is remembered for what a place that lost events may have of it."""
        limits = self._limits
        if self._done > limits.flows or now >= flow.told_at + limits.remember_for:
            return False
        return self._losses.more_of(flow)

    def _drop(self, flow: Flow, now: float) -> None:
        """Keeps of it only what its last events are known by."""
        until = now + self._limits.remember_for
        self._generations.drop(flow)
        self._done -= 1
        for one in flow.seen:
            here = self._places.get(one.place)
            if one.ended is None and here is not None and here.live.get(one.key) is one:
                del here.live[one.key]
                self._over.add(one.key, one.record, until)

    def _records(self, flow: Flow, phase: Phase, now: float) -> list[Followed]:
        return records_of(flow, phase, now, self._places, self._owner)

    def _keep_step(self, one: Seen, kind: int, at: float) -> None:
        assert self._steps is not None
        flow = self._generations.flow(one)
        if flow is not None and not flow.done:
            self._steps.append(step_of(flow, one, kind, at))

    def _here(self, place: Place) -> Here:
        here = self._places.get(place)
        if here is None:
            here = self._places[place] = Here()
        return here
