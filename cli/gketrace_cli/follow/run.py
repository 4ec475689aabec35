"""Follows until it is interrupted, its time is over, or nobody reads what it writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

from gketrace.errors import ExitCode, GketraceError
from gketrace.follow.joiner import Joiner
from gketrace.packet import Tuple5
from gketrace_cli.follow.counting import read_counters
from gketrace_cli.follow.intake import Intake
from gketrace_cli.follow.objects import look_again, watch_objects
from gketrace_cli.follow.packet_plan import PacketPlan, plan_packets
from gketrace_cli.follow.packets import PacketWatch
from gketrace_cli.follow.records import Records
from gketrace_cli.follow.request import Request
from gketrace_cli.follow.rulebook import RuleBook
from gketrace_cli.follow.show import Show
from gketrace_cli.follow.streams import Streams
from gketrace_cli.follow.tally import Tally
from gketrace_cli.follow.world import World, read_world
from gketrace_cli.interrupts import interruptible
from gketrace_cli.names import short_names
from gketrace_cli.session import Session, background

if TYPE_CHECKING:
    from gketrace_cli.agents import Fleet
    from gketrace_cli.conntrack_reading import Place as Target
    from gketrace_cli.options import Options

__all__ = ["follow"]

_COUNT_SECONDS: Final = 1.0
_LAST_SECONDS: Final = 5.0
"""For which the last events are waited for while none come."""
_LAST_AT_MOST: Final = 30.0
"""… and while some do."""
_RULES_SECONDS: Final = 20.0
"""… and then the rules that the last records are to cite."""
_PATIENCE: Final = 1.0
"""Seconds of waiting at the end after which it is said what for."""
_NOTES: Final = 100


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
        self._hurry = threading.Event()
        """Interrupted again: what is under way is not waited for."""
        self._side: SimpleQueue[Callable[[], None]] = SimpleQueue()
        """What other threads want done in this one."""
        self._sessions: list[Session] = []
        names = short_names(node.name for node in session.nodes)
        self._show = Show(options, names, jsonl=request.jsonl, steps=request.steps)
        self._rulebook = RuleBook(session, lambda ip: self._world.pods.get(ip))
        self._joiner = Joiner(
            owner=lambda address: self._world.node_of.get(str(address), ""), steps=request.steps
        )
        self._streams = Streams(session.fleet, self._refresh)
        self._intake = Intake(self._joiner, self._streams, self._show.say)
        self._tally = Tally(only=request.chosen.options)
        self._began = time.time()
        self._records = Records(
            request,
            world=self._world,
            rulebook=self._rulebook,
            tally=self._tally,
            show=self._show,
            began=self._began,
        )
        self._packets: PacketWatch | None = None
        self._replanning = False
        self._counting = False
        self._ready = False

    # the loop

    def run(self) -> ExitCode:
        try:
            with interruptible(self._stop.set, self._hurry.set):
                self._hello()
                if self._request.packets:
                    self._packets = PacketWatch(self._session.fleet, self._say_later)
                    self._records.packets = self._packets
                    self._capture(plan_packets(self._session, self._world.scope))
                self._streams.follow(self._all_targets(self._world), self._world.scope.filters)
                background(self._watch, "objects")
                self._loop()
                return self._finish()
        finally:
            if self._packets is not None:
                self._packets.close()
            self._streams.close()
            self._rulebook.close()
            for session in self._sessions:
                session.close()

    def _loop(self) -> None:
        end = None if self._request.duration is None else self._began + self._request.duration
        next_count = self._began
        while not self._stop.is_set() and not self._show.over:
            now = time.time()
            if end is not None and now >= end:
                return
            self._take(0.1)
            self._tell(time.time())
            watched = self._packets is None or self._packets.started
            if not self._ready and watched and self._intake.ready >= len(self._targets):
                self._ready = True
                count = len(self._targets)
                nodes = "the node is" if count == 1 else "all nodes are"
                if self._gaps:  # not all, and which not has been said
                    nodes = "1 node is" if count == 1 else f"{count} nodes are"
                self._show.say(f"{nodes} followed from now on")
            if now >= next_count:
                next_count = now + _COUNT_SECONDS
                self._count()
            self._intake.listen(time.time(), waiting=not self._streams.arrived.empty())
            self._show.tick()

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

    def _tell(self, now: float) -> None:
        for step in self._joiner.steps():
            self._show.step(step)
        told = self._joiner.told(self._intake.now(now))
        if told:
            unseen = self._intake.unseen_nodes(self._gaps)
            for followed in told:
                self._records.take(followed, now, unseen)
        self._records.retry(now)
        self._records.alone(self._knows, self._heard, now)

    def _knows(self, sent: Tuple5) -> bool:
        key = sent.src.packed, sent.dst.packed, sent.protocol, sent.sport or 0, sent.dport or 0
        return self._joiner.knows((*key, 0))

    def _heard(self, until: float) -> bool:
        return self._joiner.heard_all(self._intake.now(until))

    # beside the loop

    def _watch(self) -> None:
        watch_objects(
            self._session,
            self._request,
            lambda: self._world,
            changed=self._changed,
            looked=self._looked,
            failed=lambda text: self._side.put(partial(self._note, text)),
            stop=self._stop,
        )

    def _changed(self, world: World, different: Sequence[str]) -> None:
        self._side.put(partial(self._replan, world, different))

    def _looked(self, at: float) -> None:
        self._side.put(partial(self._records.objects_read, at))

    def _replan(self, world: World, different: Sequence[str]) -> None:
        old, self._world = self._world, world
        self._records.world = world
        for text in different:
            self._note(text)
        self._rulebook.forget()
        if self._stop.is_set():
            return
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

    def _capture(self, plan: PacketPlan) -> None:
        assert self._packets is not None
        for item in plan.missing:
            self._show.say(f"packets: not seen: {item}")
        self._packets.start(plan.routes, plan.taps)

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

    def _look_last(self) -> None:
        """For connections that came after the objects were read last."""
        try:
            look_again(
                self._session,
                self._request,
                self._world,
                changed=self._changed,
                looked=self._looked,
            )
        except GketraceError:  # that it was not told is said of those connections
            self._side.put(self._records.objects_not_read)

    # what is said

    def _hello(self) -> None:
        scope = self._world.scope
        nodes = len(self._targets)
        parts = [f"{nodes} node{'s' if nodes != 1 else ''}"]
        if scope.service is not None:
            parts.append(f"{len(scope.doors)} front doors")
            ends = len({(e.address, e.port) for e in scope.endpoints if e.ready})
            parts.append(f"{ends} ready endpoint{'s' if ends != 1 else ''}")
        self._show.say(
            f"following {scope.title}: {', '.join(parts)}; Ctrl-C ends it with a summary"
        )
        for item in self._gaps:
            self._show.say(f"not seen: {item}")

    def _say_later(self, text: str) -> None:
        """From another thread."""
        self._side.put(partial(self._show.say, text))

    def _note(self, text: str) -> None:
        """Said, and kept for the summary."""
        self._show.say(text)
        if len(self._tally.notes) < _NOTES:
            stamp = time.strftime("%H:%M:%S")
            self._tally.notes.append(f"{stamp} {text}")

    # the end

    def _finish(self) -> ExitCode:
        self._stop.set()
        stopped = time.time()
        seconds = stopped - self._began
        self._wait(stopped)
        now = time.time()
        unseen = self._intake.unseen_nodes(self._gaps)
        ended = self._intake.now(stopped)
        for followed in self._joiner.finish(self._intake.now(now), ended):
            self._records.take(followed, now, unseen)
        if self._records.doubtful:
            background(self._look_last, "objects")
        self._records.finish(now + _RULES_SECONDS, self._run_side, self._hurry)
        self._records.alone(self._knows, self._heard, time.time())
        tally = self._tally
        if self._packets is not None:
            tally.lost_packets.update(self._packets.lost)
            tally.dropped_packets = self._packets.dropped
            tally.passed_over = self._packets.passed_over
        tally.gaps += self._intake.gaps
        tally.lost.update(self._intake.lost)
        tally.forgotten = self._joiner.forgotten
        tally.unheard = self._joiner.unheard
        tally.unwritten = self._show.unwritten
        missing = (*self._gaps, *self._world.missing, *self._records.missing)
        self._show.summary(self._world.scope.title, tally, seconds, missing, self._names())
        if not self._show.close(10.0):
            self._show.say("the reader of the output is too slow: its end was not written")
            return ExitCode.PARTIAL
        if self._show.error:
            raise GketraceError(f"cannot write standard output: {self._show.error}")
        return tally.code(missing=bool(missing))

    def _wait(self, stopped: float) -> None:
        """For the events of what was under way then, and for counters."""
        said, came, before = False, stopped, self._intake.taken
        while not self._show.over and (behind := self._intake.behind(stopped)):
            now = time.time()
            if self._intake.taken != before:
                came, before = now, self._intake.taken
            waited = now - stopped
            if waited > _PATIENCE and not said:
                said = True
                self._show.say("waiting for the nodes' last events; Ctrl-C goes on without them")
            late = waited > _LAST_AT_MOST or now - came > _LAST_SECONDS
            if late or self._hurry.is_set():
                self._tally.behind = tuple(sorted(str(place) for place in behind))
                break
            self._take(0.1)
            self._tell(time.time())
        places = frozenset() if self._show.over else self._joiner.uncounted()
        if places:
            filters = self._world.scope.filters
            for place, records in read_counters(self._session.fleet, places, filters):
                self._joiner.count(place, records)

    def _names(self) -> dict[str, str]:
        found = {}
        for end in self._tally.shares:
            host = end.rpartition(":")[0].strip("[]")
            pod = self._world.pods.get(host)
            if pod is not None:
                found[end] = pod.key.removeprefix(f"{self._world.scope.namespace}/")
        return found
