"""Follows until it is interrupted, its time is over, or nobody reads what it writes."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Final, NamedTuple

from gketrace.errors import ExitCode, GketraceError, NotFoundError
from gketrace.follow.joiner import Followed, Joiner, Phase
from gketrace.follow.outcome import Outcome
from gketrace.packet import Tuple5
from gketrace_cli.follow.counting import read_counters
from gketrace_cli.follow.intake import Intake
from gketrace_cli.follow.output import Output, Sampler
from gketrace_cli.follow.packet_plan import PacketPlan, plan_packets
from gketrace_cli.follow.packets import PacketWatch
from gketrace_cli.follow.rulebook import RuleBook
from gketrace_cli.follow.scope import Scope, changes
from gketrace_cli.follow.seen import judge_alone, refine
from gketrace_cli.follow.streams import Streams
from gketrace_cli.follow.tally import Tally, end_text
from gketrace_cli.follow.view import Chosen, View, make_view
from gketrace_cli.follow.world import World, read_world
from gketrace_cli.names import short_names
from gketrace_cli.render.follow import alone_lines, connection_lines, summary_lines
from gketrace_cli.render.follow_documents import (
    alone_document,
    connection_document,
    step_document,
    summary_document,
)
from gketrace_cli.render.layout import Page
from gketrace_cli.session import Session, background

if TYPE_CHECKING:
    from gketrace_cli.agents import Fleet
    from gketrace_cli.conntrack_reading import Place as Target
    from gketrace_cli.options import Options

__all__ = ["Request", "follow"]

_REREAD_SECONDS: Final = 2.0
_COUNT_SECONDS: Final = 1.0
_WALK_SECONDS: Final = 15.0
"""For which a record waits for the rules that it is to cite."""
_LAST_SECONDS: Final = 5.0
"""For which the last events are waited for."""
_LINES: Final = 12
"""On a terminal, in a second: of those that ended well, and as many that failed."""
_RECORDS: Final = (Phase.CLOSED, Phase.STILL_OPEN)
_WALKED: Final = frozenset(
    {Outcome.UNANSWERED, Outcome.REFUSED, Outcome.NO_RETURN, Outcome.HANDSHAKE}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for."""

    read: Callable[[Session, Scope | None], Scope]
    """Reads the objects; the scope of before, when there was one."""
    chosen: Chosen
    jsonl: bool
    steps: bool = False
    since: float | None = None
    """Seconds; None: what was there before and does not end is not shown."""
    duration: float | None = None
    """Seconds; None: until it is interrupted."""
    packets: bool = False
    """Captures them, too."""


class _Waiting(NamedTuple):
    """A connection that cannot be shown yet."""

    followed: Followed
    asked: float
    deadline: float


def follow(session: Session, options: Options, request: Request) -> ExitCode:
    """Raises: `GketraceError` when it cannot begin."""
    return _Follow(session, options, request).run()


class _Follow:
    def __init__(self, session: Session, options: Options, request: Request) -> None:
        from gketrace_cli.commands.conntrack import find_places

        self._session = session
        self._options = options
        self._request = request
        self._targets, self._gaps = find_places(session, None, None)
        self._world = read_world(session, request.read, None)
        session.progress.mute()
        self._stop = threading.Event()
        self._side: SimpleQueue[Callable[[], None]] = SimpleQueue()
        """What other threads want done in this one."""
        self._sessions: list[Session] = []
        self._rulebook = RuleBook(session, lambda ip: self._world.pods.get(ip))
        self._joiner = Joiner(
            owner=lambda address: self._world.node_of.get(str(address), ""), steps=request.steps
        )
        self._streams = Streams(session.fleet, self._refresh)
        self._intake = Intake(self._joiner, self._streams, self._say)
        self._tally = Tally()
        self._output = Output()
        names = short_names(node.name for node in session.nodes)
        self._page = Page.of(options, names)
        self._page.width = max(shutil.get_terminal_size().columns, 80)
        self._sampler: Sampler | None = None
        if sys.stdout.isatty() and not request.jsonl:
            self._sampler = Sampler(self._output.write, _LINES, time.monotonic)
        self._pending: list[_Waiting] = []
        self._packets: PacketWatch | None = None
        self._replanning = False
        self._alone = 0
        self._warned: set[int] = set()
        """Connections of which a failure was shown before their end."""
        self._died: dict[int, str] = {}
        """Connection → what was wrong when it was first found to fail: by its end that may be
        mended, or broken another way."""
        self._counting = False
        self._ready = False
        self._began = time.time()

    # the loop

    def run(self) -> ExitCode:
        before = [(s, signal.signal(s, self._interrupt)) for s in (signal.SIGINT, signal.SIGTERM)]
        try:
            self._hello()
            if self._request.packets:
                self._packets = PacketWatch(self._session.fleet, self._say_later)
                self._capture(plan_packets(self._session, self._world.scope))
            self._streams.follow(self._all_targets(self._world), self._world.scope.filters)
            background(self._watch, "objects")
            self._loop()
            return self._finish()
        finally:
            for number, handler in before:
                signal.signal(number, handler)
            if self._packets is not None:
                self._packets.close()
            self._streams.close()
            self._rulebook.close()
            for session in self._sessions:
                session.close()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._stop.is_set():
            raise KeyboardInterrupt
        self._stop.set()

    def _loop(self) -> None:
        end = None if self._request.duration is None else self._began + self._request.duration
        next_count = self._began
        while not self._stop.is_set() and not self._output.broken.is_set():
            now = time.time()
            if end is not None and now >= end:
                return
            self._take(0.1)
            self._show(time.time())
            watched = self._packets is None or self._packets.started
            if not self._ready and watched and self._intake.ready >= len(self._targets):
                self._ready = True
                nodes = "the node is" if len(self._targets) == 1 else "all nodes are"
                self._say(f"{nodes} followed from now on")
            if now >= next_count:
                next_count = now + _COUNT_SECONDS
                self._count()
            if self._sampler is not None:
                self._sampler.tick()

    def _take(self, seconds: float) -> None:
        """What has come, for at most so long when nothing has."""
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            self._run_side()
            try:
                arrived = self._streams.arrived.get(timeout=seconds)
            except Empty:
                return
            self._intake.take(arrived)

    def _run_side(self) -> None:
        try:
            while True:
                self._side.get_nowait()()
        except Empty:
            return

    def _show(self, now: float) -> None:
        if self._request.steps:
            for step in self._joiner.steps():
                self._output.write(_line(step_document(step)))
        for followed in self._joiner.told(self._intake.now(now)):
            self._consider(followed, now)
        waiting, self._pending = self._pending, []
        for one in waiting:
            self._try(one, now)
        if self._packets is not None:
            self._only_packets(self._packets, now)

    def _consider(self, followed: Followed, now: float) -> None:
        """Whether it is to be shown at all."""
        record = followed.phase in _RECORDS
        world = self._world
        if not world.scope.takes(followed.connection):
            # Behind a node that is not seen it may have come through the Service.
            source = world.node_of.get(str(followed.connection.first.src), "")
            if source not in self._intake.unseen_nodes(self._gaps):
                self._tally.beside += record
                return
        # Packets may find that it failed, so what is chosen is asked when they have come.
        later = self._packets is not None and record
        if not (later or self._request.chosen.takes(followed)) or not self._recent(followed):
            return
        self._try(_Waiting(followed, now, now + _WALK_SECONDS), now)

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
        way = self._rulebook.way(followed.connection)
        judgement = followed.judgement
        walked = judgement.failed and judgement.outcome in _WALKED
        death = self._died.get(followed.number) if walked else ""
        if death is None:
            death = self._rulebook.death(followed.connection, followed.began or self._began)
        watch = self._packets
        fails = judgement.failed
        behind = watch is not None and not watch.ready(asked, failed=fails)
        missing = way is None or death is None or behind
        if missing and now < deadline and not self._output.broken.is_set():
            self._pending.append(waiting)
            return
        seen = None
        if watch is not None:
            seen = watch.take(followed, final=followed.phase in _RECORDS)
            if seen is not None:
                followed = replace(followed, judgement=refine(judgement, seen))
            if followed.phase in _RECORDS and not self._request.chosen.takes(followed):
                return
        if followed.phase in _RECORDS:
            self._died.pop(followed.number, None)
        elif walked and death is not None:
            self._died[followed.number] = death
        world = self._world
        self._emit(make_view(followed, world.book, world.node_of, way, death, seen))

    def _only_packets(self, watch: PacketWatch, now: float) -> None:
        """Connections that no node has an entry of."""

        def knows(sent: Tuple5) -> bool:
            key = sent.src.packed, sent.dst.packed, sent.protocol, sent.sport or 0, sent.dport or 0
            return self._joiner.knows((*key, 0))

        def heard(until: float) -> bool:
            return self._joiner.heard_all(self._intake.now(until))

        for seen in watch.alone(knows, heard, now):
            first = seen.connection.first
            chosen = self._request.chosen
            if not self._world.scope.concerns(first) or not chosen.takes_alone(first):
                continue
            judgement = judge_alone(seen)
            if chosen.states and judgement.outcome.value not in chosen.states:
                continue
            self._alone -= 1  # beside the joiner's numbers
            self._tally.add_alone(seen, judgement, end_text(first))
            if self._request.jsonl:
                document = alone_document(seen, judgement, self._alone, self._ends)
                self._output.write(_line(document))
                continue
            text = partial(alone_lines, self._page, seen, judgement)
            if self._sampler is None:
                self._output.write(text())
            else:
                self._sampler.offer(text, failed=True)

    def _ends(self, first: Tuple5) -> tuple[str, str]:
        book = self._world.book
        return book.host(first.src), book.door(first.dst, first.dport, first.protocol)

    def _capture(self, plan: PacketPlan) -> None:
        assert self._packets is not None
        for item in plan.missing:
            self._say(f"packets: not seen: {item}")
        self._packets.start(plan.routes, plan.taps)

    def _emit(self, view: View) -> None:
        followed = view.followed
        record = followed.phase in _RECORDS
        if record:
            self._tally.add(view)
        if self._request.jsonl:
            if record or self._request.steps:
                self._output.write(_line(connection_document(view)))
            return
        if record and followed.number in self._warned:
            self._warned.discard(followed.number)
            if view.failed:
                return
        if followed.phase is Phase.UNANSWERED and view.failed:
            self._warned.add(followed.number)
        if self._sampler is None:
            self._output.write(self._text(view))
        else:
            self._sampler.offer(lambda: self._text(view), failed=view.failed)

    def _text(self, view: View) -> str:
        return connection_lines(self._page, view, self._world.scope.namespace)

    # beside the loop

    def _watch(self) -> None:
        """Reads the objects again and again."""
        failed = ""
        while not self._stop.wait(_REREAD_SECONDS):
            old = self._world
            try:
                scope = self._request.read(self._session, old.scope)
                different = changes(old.scope, scope)
                if different:
                    world = read_world(self._session, self._request.read, old.scope)
                    self._side.put(partial(self._replan, world, different))
                if failed:
                    self._side.put(partial(self._say, "objects are read again"))
                failed = ""
            except GketraceError as error:
                why = error.message
                if isinstance(error, NotFoundError):
                    why = f"{old.scope.title} is not there any more: {why}"
                if not failed:
                    text = f"changes of objects are not seen: {why}"
                    self._side.put(partial(self._note, text))
                failed = why

    def _replan(self, world: World, different: Sequence[str]) -> None:
        old, self._world = self._world, world
        for text in different:
            self._note(text)
        self._rulebook.forget()
        if self._packets is not None:
            self._plan_anew()
        if list(old.scope.filters) != list(world.scope.filters):
            self._intake.switch()
            self._streams.follow(self._all_targets(world), world.scope.filters)

    def _plan_anew(self) -> None:
        """Where packets are captured, beside the loop: it takes walks."""
        if self._replanning:
            return
        self._replanning = True

        def plan() -> None:
            try:
                found = plan_packets(self._session, self._world.scope)
            except GketraceError as error:
                text = f"packets are captured as before: {error.message}"
                self._side.put(partial(self._note, text))
            else:
                self._side.put(partial(self._capture, found))
            self._replanning = False

        background(plan, "packets")

    def _all_targets(self, world: World) -> list[Target]:
        from gketrace_cli.conntrack_reading import Place as Target

        pod = world.scope.pod
        if pod is None or pod.host_network or not pod.node:
            return list(self._targets)
        return [*self._targets, Target(node=pod.node, pod=pod)]

    def _count(self) -> None:
        """Reads the counters of what is over, where the kernel counts."""
        places = self._joiner.uncounted()
        if not places or self._counting:
            return
        self._counting = True
        filters = self._world.scope.filters

        def read() -> None:
            found = read_counters(self._session.fleet, places, filters)

            def done() -> None:
                self._counting = False
                for place, records in found:
                    self._joiner.count(place, records)

            self._side.put(done)

        background(read, "counters")

    def _refresh(self) -> Fleet:
        """Reaches the agents anew."""
        session = Session(self._options)
        session.progress.mute()
        try:
            fleet = session.fleet
        except GketraceError:
            session.close()
            raise
        self._sessions.append(session)
        self._rulebook.use(session)
        if self._packets is not None:
            self._packets.use(fleet)
        return fleet

    # what is said

    def _hello(self) -> None:
        scope = self._world.scope
        nodes = len(self._targets)
        parts = [f"{nodes} node{'s' if nodes != 1 else ''}"]
        if scope.service is not None:
            parts.append(f"{len(scope.doors)} front doors")
            ends = len({(e.address, e.port) for e in scope.endpoints if e.ready})
            parts.append(f"{ends} ready endpoint{'s' if ends != 1 else ''}")
        self._say(f"following {scope.title}: {', '.join(parts)}; Ctrl-C ends it with a summary")
        for item in self._gaps:
            self._say(f"not seen: {item}")

    def _say(self, text: str) -> None:
        """To people, beside the answer."""
        stamp = time.strftime("%H:%M:%S")
        print(self._page.short(f"{stamp} {text}"), file=sys.stderr, flush=True)  # noqa: T201

    def _say_later(self, text: str) -> None:
        """From another thread."""
        self._side.put(partial(self._say, text))

    def _note(self, text: str) -> None:
        """Said, and kept for the summary."""
        self._say(text)
        if len(self._tally.notes) < 100:
            stamp = time.strftime("%H:%M:%S")
            self._tally.notes.append(f"{stamp} {text}")

    # the end

    def _finish(self) -> ExitCode:
        stopped = time.time()
        seconds = stopped - self._began
        # What was under way when it was stopped has events that are still to come.
        while time.time() < stopped + _LAST_SECONDS and not self._output.broken.is_set():
            if self._joiner.heard_all(self._intake.now(stopped)):
                break
            self._take(0.1)
            self._show(time.time())
        if not self._output.broken.is_set():
            places = self._joiner.uncounted()
            if places:
                filters = self._world.scope.filters
                for place, records in read_counters(self._session.fleet, places, filters):
                    self._joiner.count(place, records)
        now = time.time()
        for followed in self._joiner.finish(self._intake.now(now)):
            self._consider(followed, now)
        deadline = now + 8.0
        while self._pending and time.time() < deadline:
            time.sleep(0.05)
            waiting, self._pending = self._pending, []
            for one in waiting:
                self._try(one._replace(deadline=deadline), time.time())
            self._run_side()
        for one in self._pending:
            self._try(one._replace(deadline=0.0), now)
        if self._packets is not None:
            self._only_packets(self._packets, time.time())
            self._tally.lost_packets.update(self._packets.lost)
            self._tally.dropped_packets = self._packets.dropped
            self._tally.passed_over = self._packets.passed_over
        tally = self._tally
        tally.gaps += self._intake.gaps
        tally.lost.update(self._intake.lost)
        tally.forgotten = self._joiner.forgotten
        tally.unwritten = self._output.unwritten
        if self._sampler is not None:
            self._sampler.tick()
        missing = (*self._gaps, *self._world.missing)
        names = self._names()
        title = self._world.scope.title
        if self._request.jsonl:
            document = summary_document(title, tally, seconds, missing, names)
            self._output.write(_line(document), must=True)
            self._say(str(document["verdict"]))
        else:
            page = Page.of(self._options, self._page.names)
            summary_lines(page, title, tally, seconds, missing, names)
            self._output.write("\n" + page.text(), must=True)
        if not self._output.close(10.0) and not self._output.broken.is_set():
            self._say("the reader of the output is too slow: its end was not written")
            return ExitCode.PARTIAL
        return tally.code(missing=bool(missing))

    def _names(self) -> dict[str, str]:
        found = {}
        for end in self._tally.shares:
            host = end.rpartition(":")[0].strip("[]")
            pod = self._world.pods.get(host)
            if pod is not None:
                found[end] = pod.key.removeprefix(f"{self._world.scope.namespace}/")
        return found


def _line(document: object) -> str:
    return json.dumps(document, ensure_ascii=False) + "\n"
