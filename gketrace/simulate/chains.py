"""How a packet goes through one base chain: jumps, goto, RETURN, policy, draws and unknowns.

Source: ipt_do_table() in net/ipv4/netfilter/ip_tables.c and nft_do_chain() in
net/netfilter/nf_tables_core.c, which agree: a user's chain that ends goes back behind the rule
that jumped to it; a goto leaves no place to come back to; RETURN or the end of the base chain asks
its policy.

The kernel follows one packet; this follows all that it may become.  Each way that is still open in
a chain is a `Thread`; where a draw or an unknown match decides, a thread becomes two.  A jump
runs the called chain with its threads to the end before the caller goes on, so ways that come back
equal meet again there.  Nothing recurses: 1,000 endpoints or a deep stack of jumps do no harm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Final

from gketrace.ruleset.iptables import Chain, IptablesRuleset
from gketrace.ruleset.model import BaseChain, Rule, Ruleset
from gketrace.simulate.state import (
    Alternative,
    Environment,
    PacketState,
    Ternary,
    Verdict,
    VerdictKind,
)
from gketrace.simulate.targets.base import Effect
from gketrace.simulate.threads import Fork, Link, Thread, common_start, items_of, joined_exits
from gketrace.trace import Citation, Source, Step, StepAction, StepKind

__all__ = ["traverse"]

_MANY: Final = 64
"""Open threads in one chain beyond which draws that lead to the same state are joined."""


class _Frame:
    """A chain being run."""

    __slots__ = ("active", "caller", "chain", "forks", "goto", "live", "returned", "rules")

    def __init__(
        self, chain: Chain, live: list[Thread], caller: _Frame | None, *, goto: bool
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


def traverse(
    ruleset: Ruleset, base: BaseChain, state: PacketState, env: Environment
) -> tuple[Alternative, ...]:
    """All ways through `base` for a packet in `state`, in the order of the rules that decide.

    The chances sum to 1 when all are known.  Addresses are not rewritten: a nat target gives
    ``Verdict(ACCEPT, nat=…)``.  Raises `TypeError` for a rule set of another kind.
    """
    if not isinstance(ruleset, IptablesRuleset):
        raise TypeError(f"{type(ruleset).__name__} is not an iptables rule set")
    chain = ruleset.chain(base.table, base.chain)
    if chain is None:
        raise ValueError(f"no chain {base.chain} in table {base.table}")
    return _Run(ruleset, base, env).run(chain, state)


class _Run:
    """One traversal."""

    def __init__(self, ruleset: IptablesRuleset, base: BaseChain, env: Environment) -> None:
        self.ruleset, self.base, self.env = ruleset, base, env
        self.done: list[Alternative] = []

    def run(self, chain: Chain, state: PacketState) -> tuple[Alternative, ...]:
        frame: _Frame | None = _Frame(chain, [Thread(state)], None, goto=False)
        while frame is not None:
            rule = next(frame.rules, None) if frame.live else None
            frame = self._end(frame) if rule is None else self._rule(frame, rule)
        return tuple(self.done)

    # -- one rule ---------------------------------------------------------------------------

    def _rule(self, frame: _Frame, rule: Rule) -> _Frame:
        live: list[Thread] = []
        called: list[Thread] = []
        leaving: list[Thread] = []
        for thread in frame.live:
            hit, misses = self._ask(frame, rule, thread)
            effect: Effect | None = None
            if hit is not None and rule.target is None:
                self._step(hit, rule, StepAction.CONTINUE, hit.state)
                live.append(hit)
            elif hit is not None and rule.target is not None:
                effect = rule.target.apply(hit.state, self.env)
            while effect is not None and hit is not None:
                branch = hit
                if effect.otherwise is not None:
                    branch = hit.copy()
                    branch.chance = None
                    branch.assumed = Link(hit.assumed, effect.note)
                    hit.chance = None
                    hit.assumed = Link(hit.assumed, effect.otherwise.note)
                self._step(branch, rule, effect.action, effect.state, effect.note)
                if effect.jump:
                    (leaving if effect.goto else called).append(branch)
                elif effect.returns:
                    frame.returned.append(branch)
                elif effect.verdict is not None:
                    self._finish(branch, rule.citation, effect)
                else:
                    live.append(branch)
                effect = effect.otherwise
            live += misses
        if called or leaving:
            frame.live = live
            return self._call(frame, rule, called or leaving, goto=not called)
        frame.live = self._meet(frame, live, rule)
        return frame

    def _ask(self, frame: _Frame, rule: Rule, thread: Thread) -> tuple[Thread | None, list[Thread]]:
        """The thread for which the rule matches, or None, and those for which it does not.

        The matches are asked from left to right, as the kernel does, so that what has a side
        effect happens only where all before it matched.
        """
        state = thread.state
        chance: Fraction | None = Fraction(1)
        drawn = ""
        reasons: list[str] = []
        # Where a draw or an unknown may leave the rule: with what chance, in which state.
        exits: list[tuple[Fraction | None, PacketState]] = []
        matched = True
        for match in rule.matches:
            answer = match.evaluate(state, self.env)
            if answer.kind is Ternary.NO:
                matched = False
                if answer.state is not None:
                    state = answer.state
                break
            if answer.kind is Ternary.UNKNOWN:
                if answer.chance is None:
                    exits.append((None, state))
                    chance = None
                    reasons.append(answer.reason)
                else:
                    lost = None if chance is None else chance * (1 - answer.chance)
                    exits.append((lost, state))
                    chance = None if chance is None else chance * answer.chance
                    drawn = answer.reason
            if answer.state is not None:
                state = answer.state
        if not exits:
            if state is not thread.state:
                thread.state = state
            return (thread, []) if matched else (None, [thread])
        if not matched:
            exits.append((chance, state))
            if all(left == state for _, left in exits):
                thread.state = state
                return None, [thread]
        fork = None
        if reasons:
            fork = Fork(thread.copy(), rule, "; ".join(reasons))
            if matched:
                frame.forks.append(fork)
        hit = None
        if matched:
            hit = thread.copy()
            hit.state = state
            self._weigh(hit, chance, fork, rule, "matches" if fork else "")
            if drawn:
                hit.drawn, hit.missed = f"{drawn} in {rule.chain} rule {rule.position}", 0
        misses: list[Thread] = []
        for left, states in joined_exits(exits):
            miss = thread.copy()
            miss.state = states
            self._weigh(miss, left, fork, rule, "does not match" if fork else "")
            if drawn and not fork:
                miss.missed += 1
            misses.append(miss)
        return hit, misses

    @staticmethod
    def _weigh(
        thread: Thread, chance: Fraction | None, fork: Fork | None, rule: Rule, how: str
    ) -> None:
        thread.chance = None if chance is None or thread.chance is None else thread.chance * chance
        if fork is not None:
            text = f"if it {how} (not known: {fork.reason}): {rule.text}"
            thread.assumed = Link(thread.assumed, text)
            thread.forks = (*thread.forks, fork)

    def _step(
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

    def _call(self, frame: _Frame, rule: Rule, threads: list[Thread], *, goto: bool) -> _Frame:
        name = getattr(rule.target, "chain", "")
        chain = self.ruleset.chain(self.base.table, name)
        if chain is None or name in frame.active:
            why = "chains that call one another" if chain else "no such chain"
            for thread in threads:
                self._undecided(thread, rule, f"{why}: {name}")
            frame.live = self._meet(frame, frame.live, rule)
            return frame
        return _Frame(chain, threads, frame, goto=goto)

    def _end(self, frame: _Frame) -> _Frame | None:
        """The chain is over for all its threads."""
        over = frame.returned + frame.live
        caller = frame.caller
        if caller is None:
            self._policy(over)
            return None
        if frame.goto:
            caller.returned += over
            caller.live = self._meet(caller, caller.live, None)
        else:
            caller.live = self._meet(caller, over + caller.live, None)
        return caller

    def _policy(self, threads: list[Thread]) -> None:
        base = self.base
        citation = Citation(
            source=Source.POLICY,
            text=f":{base.chain} {base.policy}",
            backend=self.ruleset.backend,
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

    def _finish(self, thread: Thread, citation: Citation, effect: Effect) -> None:
        assert effect.verdict is not None
        nat = effect.nat
        verdict = Verdict(
            kind=effect.verdict,
            citation=citation,
            reject_with=effect.reject_with,
            detail=effect.note,
            nat=None if nat is None else replace(nat, citation=citation),
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

    def _meet(self, frame: _Frame, live: list[Thread], rule: Rule | None) -> list[Thread]:
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
