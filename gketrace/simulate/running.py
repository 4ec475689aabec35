"""Running a chain of rules for all that one packet may become: what every backend has in common.

The kernel follows one packet; this follows all that it may become.  Each way that is still open in
a chain is a `Thread`; where a draw or an unknown match decides, a thread becomes two.  A jump
runs the called chain with its threads to the end before the caller goes on, so ways that come back
equal meet again there.  Nothing recurses: 1,000 endpoints or a deep stack of jumps do no harm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from fractions import Fraction
from typing import Final, Protocol

from gketrace.packet import Packet
from gketrace.ruleset.model import BaseChain, Rule
from gketrace.simulate.evolve import evolve
from gketrace.simulate.state import CERTAIN, Alternative, PacketState, Verdict, VerdictKind
from gketrace.simulate.targets.base import Effect
from gketrace.simulate.threads import Fork, Link, Thread, common_start, items_of
from gketrace.trace import Citation, Source, Step, StepAction, StepKind

__all__ = ["Chain", "Frame", "Run"]

_MANY: Final = 64
"""Open threads in one chain beyond which draws that lead to the same state are joined."""


class Chain(Protocol):
    """What is run: a chain of any backend."""

    @property
    def name(self) -> str: ...

    def candidates(self, packet: Packet) -> Iterator[Rule]:
        """The rules that the packet may match, in order."""


class Frame:
    """A chain being run."""

    __slots__ = ("active", "caller", "chain", "forks", "goto", "live", "returned", "rules")

    def __init__(
        self, chain: Chain, live: list[Thread], caller: Frame | None, *, goto: bool
    ) -> None:
        self.chain = chain
        self.live = live
        self.caller = caller
        self.goto = goto
        self.rules: Iterator[Rule] = chain.candidates(live[0].state.packet) if live else iter(())
        self.returned: list[Thread] = []
        self.forks: list[Fork] = []
        """Those of the rule that is being run."""
        self.active: frozenset[str] = (
            frozenset((chain.name,)) if caller is None else caller.active | {chain.name}
        )


class Run(ABC):
    """One traversal; what a rule does to a thread is the backend's."""

    def __init__(self, backend: str, base: BaseChain) -> None:
        self.backend, self.base = backend, base
        self.done: list[Alternative] = []

    @abstractmethod
    def find(self, name: str) -> Chain | None:
        """The chain of the base chain's table that is called `name`."""

    @abstractmethod
    def rule(self, frame: Frame, rule: Rule) -> Frame:
        """Runs one rule for all threads of `frame`; the frame to go on with."""

    @abstractmethod
    def policy_text(self) -> str:
        """The base chain's declaration, as its backend's tool prints it."""

    def run(self, chain: Chain, state: PacketState) -> tuple[Alternative, ...]:
        frame: Frame | None = Frame(chain, [Thread(state)], None, goto=False)
        while frame is not None:
            frame = self.advance(frame)
        return tuple(self.done)

    def advance(self, frame: Frame) -> Frame | None:
        """The next rule of `frame`, or its end."""
        rule = next(frame.rules, None) if frame.live else None
        return self.end(frame) if rule is None else self.rule(frame, rule)

    @staticmethod
    def weigh(
        thread: Thread, chance: Fraction | None, fork: Fork | None, rule: Rule, how: str
    ) -> None:
        if chance is None or thread.chance is None:
            thread.chance = None
        else:
            # A product of fractions looks for common factors, also where one of them is 1.
            thread.chance = chance if thread.chance is CERTAIN else thread.chance * chance
        if fork is not None:
            text = f"if it {how} (not known: {fork.reason}): {rule.text}"
            thread.assumed = Link(thread.assumed, text)
            thread.forks = (*thread.forks, fork)

    def step(
        self, thread: Thread, rule: Rule, action: StepAction, after: PacketState, note: str = ""
    ) -> None:
        step = Step(
            kind=StepKind.RULE,
            action=action,
            before=thread.state.packet,
            after=after.packet,
            note=note,
            hook=self.base.hook,
            citation=rule.citation,
        )
        thread.steps = Link(thread.steps, step)
        thread.state = after

    # -- chains -----------------------------------------------------------------------------

    def call(
        self, frame: Frame, rule: Rule, name: str, threads: list[Thread], *, goto: bool
    ) -> Frame:
        """The frame to go on with when `rule` sends `threads` to chain `name`."""
        chain = self.find(name)
        if chain is None or name in frame.active:
            why = "chains that call one another" if chain else "no such chain"
            for thread in threads:
                self._undecided(thread, rule, f"{why}: {name}")
            frame.live = self.meet(frame, frame.live, rule)
            return frame
        return Frame(chain, threads, frame, goto=goto)

    def end(self, frame: Frame) -> Frame | None:
        """The chain is over for all its threads."""
        over = frame.returned + frame.live
        caller = frame.caller
        if caller is None:
            self._policy(over)
            return None
        if frame.goto:
            caller.returned += over
            caller.live = self.meet(caller, caller.live, None)
        else:
            caller.live = self.meet(caller, over + caller.live, None)
        return caller

    def _policy(self, threads: list[Thread]) -> None:
        base = self.base
        citation = Citation(
            source=Source.POLICY,
            text=self.policy_text(),
            backend=self.backend,
            table=base.table,
            chain=base.chain,
            packets=base.packets,
            bytes=base.bytes,
        )
        accept = base.policy == "ACCEPT"
        for thread in threads:
            packet = thread.state.packet
            step = Step(
                kind=StepKind.POLICY,
                action=StepAction.ACCEPT if accept else StepAction.DROP,
                before=packet,
                after=packet,
                hook=base.hook,
                citation=citation,
            )
            thread.steps = Link(thread.steps, step)
            kind = VerdictKind.ACCEPT if accept else VerdictKind.DROP
            self._emit(thread, Verdict(kind=kind, citation=citation))

    # -- ends -------------------------------------------------------------------------------

    def finish(self, thread: Thread, citation: Citation, effect: Effect) -> None:
        assert effect.verdict is not None
        nat = effect.nat
        verdict = Verdict(
            kind=effect.verdict,
            citation=citation,
            reject_with=effect.reject_with,
            detail=effect.note,
            nat=None if nat is None else evolve(nat, citation=citation),
        )
        self._emit(thread, verdict)

    def _undecided(self, thread: Thread, rule: Rule, why: str) -> None:
        verdict = Verdict(kind=VerdictKind.UNKNOWN, citation=rule.citation, detail=why)
        self._emit(thread, verdict)

    def _emit(self, thread: Thread, verdict: Verdict) -> None:
        thread.lose()
        steps = tuple(item for item in items_of(thread.steps) if isinstance(item, Step))
        self.done.append(
            Alternative(
                state=thread.state,
                steps=steps,
                verdict=verdict,
                chance=thread.chance,
                because=thread.because(),
            )
        )

    # -- threads that meet again --------------------------------------------------------------

    def meet(self, frame: Frame, live: list[Thread], rule: Rule | None) -> list[Thread]:
        """Joins what an unknown match split and what came to the same state since."""
        for fork in frame.forks:
            members = [thread for thread in live if fork in thread.forks]
            if any(fork in thread.forks for thread in frame.returned):
                fork.lost = True
            if len(members) < 2 or any(m.state != members[0].state for m in members):
                continue
            live = self._joined_fork(fork, members, live)
        frame.forks = []
        if len(live) > _MANY and rule is not None:
            live = self._joined_draws(live, rule)
        return live

    def _joined_fork(self, fork: Fork, members: list[Thread], live: list[Thread]) -> list[Thread]:
        joined = fork.parent.copy()
        joined.state = members[0].state
        if fork.lost:
            # Some way through the rule decided the packet: this one holds if none of them did.
            joined.chance = None
            joined.assumed = members[-1].assumed
        packet = joined.state.packet
        step = Step(
            kind=StepKind.RULE,
            action=StepAction.UNKNOWN,
            before=packet,
            after=packet,
            note=f"whether it matches is not known ({fork.reason}); the packet goes on the same",
            hook=self.base.hook,
            citation=fork.rule.citation,
        )
        joined.steps = Link(joined.steps, step)
        place = live.index(members[0])
        rest = [thread for thread in live if fork not in thread.forks]
        before = sum(1 for thread in live[:place] if fork not in thread.forks)
        return [*rest[:before], joined, *rest[before:]]

    def _joined_draws(self, live: list[Thread], rule: Rule) -> list[Thread]:
        groups: dict[PacketState, list[Thread]] = {}
        for thread in live:
            groups.setdefault(thread.state, []).append(thread)
        joined: list[Thread] = []
        for group in groups.values():
            first = group[0]
            if len(group) > 1:
                chances = [thread.chance for thread in group]
                known = [chance for chance in chances if chance is not None]
                first.chance = sum(known, Fraction(0)) if len(known) == len(chances) else None
                common = common_start([thread.steps for thread in group])
                packet = first.state.packet
                step = Step(
                    kind=StepKind.RULE,
                    action=StepAction.UNKNOWN,
                    before=packet,
                    after=packet,
                    note=f"{len(group)} ways lead here with the same packet; which rules each met "
                    "since the last common one is left out",
                    hook=self.base.hook,
                    citation=rule.citation,
                )
                first.steps = Link(common, step)
                for thread in group[1:]:
                    first.forks += tuple(f for f in thread.forks if f not in first.forks)
            joined.append(first)
        return joined
