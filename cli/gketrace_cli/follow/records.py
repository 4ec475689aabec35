"""From what a joiner tells to what is shown and counted: what was asked for, once its rules are
known and its packets have come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final, NamedTuple

from gketrace.follow.joiner import Followed, Phase
from gketrace.follow.outcome import Outcome
from gketrace.packet import Tuple5
from gketrace.trace import Missing
from gketrace_cli.follow.misled import Judged, Misled, find_misled, judge_misled, led_by
from gketrace_cli.follow.packets import PacketWatch
from gketrace_cli.follow.request import Request
from gketrace_cli.follow.rulebook import RuleBook
from gketrace_cli.follow.seen import judge_alone, refine
from gketrace_cli.follow.show import RECORDS, Show
from gketrace_cli.follow.tally import Tally, end_text
from gketrace_cli.follow.view import make_view
from gketrace_cli.follow.world import World

__all__ = ["Records"]

_WALK_SECONDS: Final = 60.0
"""For which a record waits for the rules that it is to cite."""
_WALKED: Final = frozenset(
    {Outcome.UNANSWERED, Outcome.REFUSED, Outcome.NO_RETURN, Outcome.HANDSHAKE}
)


class _Waiting(NamedTuple):
    """A connection that cannot be shown yet."""

    followed: Followed
    asked: float
    deadline: float


class Records:
    """For one thread."""

    def __init__(
        self,
        request: Request,
        *,
        world: World,
        rulebook: RuleBook,
        tally: Tally,
        show: Show,
        began: float,
    ) -> None:
        """`began`: when the following did, seconds since the epoch."""
        self._request = request
        self._rulebook = rulebook
        self._tally = tally
        self._show = show
        self._began = began
        self.world = world
        """Of now."""
        self.packets: PacketWatch | None = None
        """None: nobody asked for them."""
        self._pending: list[_Waiting] = []
        self._read = began
        """When the last reading of the objects began."""
        self._readable = True
        """They will be read again."""
        self._undecided = 0
        """Connections to what was no endpoint of the Service, after the objects were read last."""
        self._alone = 0
        self._died: dict[int, str] = {}
        """Connection → what was wrong when it was first found to fail: by its end that may be
        mended, or broken another way."""

    def take(self, followed: Followed, now: float, unseen: frozenset[str]) -> None:
        """What a joiner has told.  `unseen`: nodes that are not followed now."""
        record = followed.phase in RECORDS
        world = self.world
        if not world.scope.takes(followed.connection):
            # Behind a node that is not seen it may have come through the Service.
            source = world.node_of.get(str(followed.connection.first.src), "")
            if source not in unseen:
                self._tally.beside += record
                return
        # Packets and objects may find that it failed: what is chosen is asked when they have come.
        misled = find_misled(world.scope, followed.connection, world.node_of)
        later = misled is not None or (self.packets is not None and record)
        if not (later or self._request.chosen.takes(followed)) or not self._recent(followed):
            return
        self._try(_Waiting(followed, now, now + _WALK_SECONDS), now)

    def retry(self, now: float) -> None:
        """Those that waited."""
        waiting, self._pending = self._pending, []
        for one in waiting:
            self._try(one, now)

    def objects_read(self, began: float) -> None:
        """`world` is that of a reading which began then, seconds since the epoch."""
        self._read = began

    def objects_not_read(self) -> None:
        """They could not be, and nobody will try again."""
        self._readable = False

    @property
    def doubtful(self) -> bool:
        """One waits, so the objects may be what it waits for."""
        return bool(self._pending)

    @property
    def missing(self) -> tuple[Missing, ...]:
        """What could not be told for want of objects."""
        if not self._undecided:
            return ()
        ones = "1 connection" if self._undecided == 1 else f"{self._undecided:,} connections"
        why = f"{ones} went to what was no endpoint of the Service when they were read last"
        return (Missing(what="endpoints", why=why),)

    def finish(self, until: float, between: Callable[[], None], hurry: threading.Event) -> None:
        """Shows all that wait: when they are ready, or at `until` (seconds since the epoch) or
        after `hurry` as they are.  `between` is called now and then."""
        while self._pending and time.time() < until and not self._show.over:
            if hurry.wait(0.05):
                break
            self._pending = [one._replace(deadline=until) for one in self._pending]
            self.retry(time.time())
            between()
        for one in self._pending:
            self._try(one._replace(deadline=0.0), time.time())

    def alone(
        self, knows: Callable[[Tuple5], bool], heard: Callable[[float], bool], now: float
    ) -> None:
        """Connections that no node has an entry of; `knows` and `heard` as for
        `PacketWatch.alone`."""
        if self.packets is None:
            return
        chosen = self._request.chosen
        for seen in self.packets.alone(knows, heard, now):
            first = seen.connection.first
            if not self.world.scope.concerns(first) or not chosen.takes_alone(first):
                continue
            judgement = judge_alone(seen)
            if chosen.states and judgement.outcome.value not in chosen.states:
                continue
            self._alone -= 1  # beside the joiner's numbers
            self._tally.add_alone(seen, judgement, end_text(first))
            self._show.alone(seen, judgement, self._alone, self._ends)

    def _ends(self, first: Tuple5) -> tuple[str, str]:
        book = self.world.book
        return book.host(first.src), book.door(first.dst, first.dport, first.protocol)

    def _recent(self, followed: Followed) -> bool:
        """False: it was there before, and is not news."""
        began, since = followed.began, self._request.since
        if began is not None and began >= self._began - (since or 0.0):
            return True
        if followed.phase is Phase.CLOSED or followed.judgement.failed:
            return True
        return since is not None and began is None

    def _try(self, waiting: _Waiting, now: float) -> None:
        """Shows it, or keeps it until its rules are known and its packets have come."""
        followed, asked, deadline = waiting
        judgement = followed.judgement
        record = followed.phase in RECORDS
        way = self._rulebook.way(followed.connection, last=now >= deadline)
        walked = judgement.failed and judgement.outcome in _WALKED
        death = self._died.get(followed.number) if walked else ""
        if death is None:
            death = self._rulebook.death(followed.connection, followed.began or self._began)
        watch = self.packets
        behind = watch is not None and not watch.ready(asked, failed=judgement.failed)
        misled = find_misled(self.world.scope, followed.connection, self.world.node_of)
        unread = misled is not None and self._readable and not self._judge(followed, misled).decided
        missing = way is None or death is None or behind or unread
        if missing and now < deadline and not self._show.over:
            self._pending.append(waiting)
            return
        seen, remark = None, ""
        if watch is not None:
            seen = watch.take(followed, final=record)
            if seen is not None:
                followed = replace(followed, judgement=refine(judgement, seen))
        if misled is not None:
            followed, remark, decided = self._judge(followed, misled)
            self._undecided += record and not decided
        if (misled is not None or (record and watch is not None)) and not (
            self._request.chosen.takes(followed)
        ):
            return
        if record:
            self._died.pop(followed.number, None)
        elif walked and death is not None:
            self._died[followed.number] = death
        view = make_view(followed, self.world.book, self.world.node_of, way, death, seen)
        if remark:
            view = replace(view, remarks=(remark, *view.remarks))
        if followed.judgement.outcome is Outcome.ASTRAY:
            view = replace(view, death=led_by(view))
        if record:
            self._tally.add(view)
        self._show.connection(view, self.world.scope.namespace)

    def _judge(self, followed: Followed, misled: Misled) -> Judged:
        return judge_misled(followed, misled, since=self._began, read=self._read)
