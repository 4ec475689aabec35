"""How a packet goes through a base chain of iptables: jumps, goto, RETURN, policy, draws, unknowns.

Source: ipt_do_table() in net/ipv4/netfilter/ip_tables.c and nft_do_chain() in
net/netfilter/nf_tables_core.c, which agree: a user's chain that ends goes back behind the rule
that jumped to it; a goto leaves no place to come back to; RETURN or the end of the base chain asks
its policy.
"""

from __future__ import annotations

from fractions import Fraction

from gketrace.ruleset.iptables import Chain, IptablesRuleset
from gketrace.ruleset.model import BaseChain, Rule, Ruleset
from gketrace.simulate.paths import MOST_PATHS, MOST_STEPS, Chosen, Path, Turn, leads
from gketrace.simulate.running import Frame, Run
from gketrace.simulate.state import CERTAIN, Alternative, Environment, PacketState, Ternary
from gketrace.simulate.targets.base import Effect
from gketrace.simulate.threads import Fork, Link, Thread, joined_exits
from gketrace.trace import StepAction

__all__ = ["traverse"]


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
    known: tuple[Path, ...] = ruleset.paths.get((base.table, base.chain), ())
    for path in known:
        run = _IptablesRun(ruleset, base, env)
        if run.again(path, state):
            if path is not known[0]:
                _keep(ruleset, base, path)
            return tuple(run.done)
    run = _IptablesRun(ruleset, base, env)
    run.enter(chain, state)
    found = run.run(chain, state)
    if run.path is not None and len(found) == 1 and len(run.path) <= MOST_STEPS:
        _keep(ruleset, base, tuple(run.path))
    return found


def _keep(ruleset: IptablesRuleset, base: BaseChain, path: Path) -> None:
    """As the first; a tuple of its own each time, as other threads may be reading the old one."""
    key = (base.table, base.chain)
    others = [other for other in ruleset.paths.get(key, ()) if other is not path]
    ruleset.paths[key] = (path, *others[: MOST_PATHS - 1])


class _IptablesRun(Run):
    """One traversal."""

    def __init__(self, ruleset: IptablesRuleset, base: BaseChain, env: Environment) -> None:
        super().__init__(ruleset.backend, base)
        self.ruleset, self.env = ruleset, env
        self.path: list[Turn | Chosen] | None = []
        """The way so far; None once it has forked."""

    def again(self, path: Path, state: PacketState) -> bool:
        """Goes `path`; False, and nothing done, when this packet takes another way."""
        thread, env = Thread(state), self.env
        for turn in path:
            state = thread.state
            if isinstance(turn, Chosen):
                if turn.chain.selection(state.packet) != turn.positions:
                    return False
                continue
            for match in turn.yes:
                answer = match.evaluate(state, env)
                if answer.kind is not Ternary.YES or answer.state is not None:
                    return False
            if turn.no is not None:
                answer = turn.no.evaluate(state, env)
                if answer.kind is not Ternary.NO or answer.state is not None:
                    return False
                continue
            rule = turn.rule
            if rule.target is None:
                self.step(thread, rule, StepAction.CONTINUE, state)
                continue
            effect = rule.target.apply(state, env)
            if effect.otherwise is not None or leads(effect) != turn.leads:
                return False
            self.step(thread, rule, effect.action, effect.state, effect.note)
            if effect.verdict is not None:
                self.finish(thread, rule.citation, effect)
                return True
        self._policy([thread])
        return True

    def call(
        self, frame: Frame, rule: Rule, name: str, threads: list[Thread], *, goto: bool
    ) -> Frame:
        entered = super().call(frame, rule, name, threads, goto=goto)
        if entered is frame:
            self.path = None  # no such chain, or a loop
        elif self.path is not None and (chain := self.find(name)) is not None:
            self.enter(chain, threads[0].state)
        return entered

    def enter(self, chain: Chain, state: PacketState) -> None:
        """The next part of the path is in `chain`."""
        positions = chain.selection(state.packet)
        if positions is not None and self.path is not None:
            self.path.append(Chosen(chain, positions))

    def find(self, name: str) -> Chain | None:
        return self.ruleset.chain(self.base.table, name)

    def policy_text(self) -> str:
        return f":{self.base.chain} {self.base.policy}"

    def rule(self, frame: Frame, rule: Rule) -> Frame:
        live: list[Thread] = []
        called: list[Thread] = []
        leaving: list[Thread] = []
        for thread in frame.live:
            hit, misses = self._ask(frame, rule, thread)
            effect: Effect | None = None
            if hit is not None and rule.target is None:
                self.step(hit, rule, StepAction.CONTINUE, hit.state)
                live.append(hit)
                self._turn(rule, len(rule.matches), None)
            elif hit is not None and rule.target is not None:
                effect = rule.target.apply(hit.state, self.env)
                self._turn(rule, len(rule.matches), effect)
            while effect is not None and hit is not None:
                branch = hit
                if effect.otherwise is not None:
                    branch = hit.copy()
                    branch.chance = None
                    branch.assumed = Link(hit.assumed, effect.note)
                    hit.chance = None
                    hit.assumed = Link(hit.assumed, effect.otherwise.note)
                self.step(branch, rule, effect.action, effect.state, effect.note)
                if effect.jump:
                    (leaving if effect.goto else called).append(branch)
                elif effect.returns:
                    frame.returned.append(branch)
                elif effect.verdict is not None:
                    self.finish(branch, rule.citation, effect)
                else:
                    live.append(branch)
                effect = effect.otherwise
            live += misses
        if called or leaving:
            frame.live = live
            name = getattr(rule.target, "chain", "")
            return self.call(frame, rule, name, called or leaving, goto=not called)
        frame.live = self.meet(frame, live, rule)
        return frame

    def _turn(self, rule: Rule, asked: int, effect: Effect | None) -> None:
        """A rule is part of the path: so many of its matches said yes."""
        if self.path is None:
            return
        if effect is not None and effect.otherwise is not None:
            self.path = None
            return
        no = rule.matches[asked] if asked < len(rule.matches) else None
        to = None if effect is None else leads(effect)
        self.path.append(Turn(rule, rule.matches[:asked], no, to))

    def _ask(self, frame: Frame, rule: Rule, thread: Thread) -> tuple[Thread | None, list[Thread]]:
        """The thread for which the rule matches, or None, and those for which it does not.

        The matches are asked from left to right, as the kernel does, so that what has a side
        effect happens only where all before it matched.
        """
        state = thread.state
        chance: Fraction | None = CERTAIN
        drawn = ""
        reasons: list[str] = []
        # Where a draw or an unknown may leave the rule: with what chance, in which state.
        exits: list[tuple[Fraction | None, PacketState]] = []
        matched = True
        asked = 0
        for asked, match in enumerate(rule.matches):  # noqa: B007 used below
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
                    lost = 1 - answer.chance
                    if chance is CERTAIN:
                        chance = answer.chance
                    elif chance is not None:
                        lost, chance = chance * lost, chance * answer.chance
                    exits.append((None if chance is None else lost, state))
                    drawn = answer.reason
            if answer.state is not None:
                state = answer.state
        if not exits:
            if state is not thread.state:
                self.path = None
                thread.state = state
            elif not matched:
                self._turn(rule, asked, None)
            return (thread, []) if matched else (None, [thread])
        self.path = None
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
            self.weigh(hit, chance, fork, rule, "matches" if fork else "")
            if drawn:
                hit.drawn, hit.missed = f"{drawn} in {rule.chain} rule {rule.position}", 0
        misses: list[Thread] = []
        for left, states in joined_exits(exits):
            miss = thread.copy()
            miss.state = states
            self.weigh(miss, left, fork, rule, "does not match" if fork else "")
            if drawn and not fork:
                miss.missed += 1
            misses.append(miss)
        return hit, misses
