"""Through a base chain of nftables: nft_do_chain() in net/netfilter/nf_tables_core.c."""

from __future__ import annotations

from gketrace.errors import ParseError
from gketrace.ruleset.model import BaseChain, Rule
from gketrace.ruleset.nft import NftChain, NftRule, NftRuleset
from gketrace.simulate.nft.scene import NftEnvironment
from gketrace.simulate.nft.statements import run_rule
from gketrace.simulate.nft.ways import Way, carried
from gketrace.simulate.recall import Recall
from gketrace.simulate.running import Frame, Run
from gketrace.simulate.state import Alternative, PacketState, Verdict, VerdictKind
from gketrace.simulate.threads import Fork, Thread
from gketrace.simulate.watched import noted
from gketrace.trace import Citation, Source, StepAction

__all__ = ["traverse"]


def traverse(
    ruleset: NftRuleset,
    base: BaseChain,
    state: PacketState,
    env: NftEnvironment,
    recall: Recall | None = None,
) -> tuple[Alternative, ...]:
    """All ways through `base` for a packet in `state`, in the order of the rules that decide."""
    chain = ruleset.chain(base.chain)
    if chain is None:
        raise ValueError(f"no chain {base.chain} in table {base.table}")
    try:
        return _NftRun(ruleset, base, env, recall).run(chain, state)
    except ParseError as error:
        # A rule or set that the packet came to is not as nft prints it.
        citation = Citation(
            source=Source.RULE,
            text=error.text,
            backend=ruleset.backend,
            table=base.table,
            chain=base.chain,
        )
        verdict = Verdict(kind=VerdictKind.UNKNOWN, citation=citation, detail=str(error))
        return (Alternative(state=state, steps=(), verdict=verdict, chance=None),)


class _NftRun(Run):
    """One traversal."""

    def __init__(
        self, ruleset: NftRuleset, base: BaseChain, env: NftEnvironment, recall: Recall | None
    ) -> None:
        super().__init__(ruleset.backend, base)
        self.ruleset, self.env, self.recall = ruleset, env, recall
        self._waiting: dict[Frame, list[tuple[NftRule, str, bool, list[Thread]]]] = {}
        """Chains that a rule of a frame sends threads to, still to be run: a verdict map whose key
        is drawn leads to several."""

    def find(self, name: str) -> NftChain | None:
        return self.ruleset.chain(name)

    def policy_text(self) -> str:
        base = self.base
        return (
            f"type {base.type.value} hook {base.hook.value.lower()} priority {base.priority}; "
            f"policy {base.policy.lower()};"
        )

    def advance(self, frame: Frame) -> Frame | None:
        waiting = self._waiting.get(frame)
        if waiting:
            rule, name, goto, threads = waiting.pop(0)
            return self.call(frame, rule, name, threads, goto=goto)
        return super().advance(frame)

    def rule(self, frame: Frame, rule: Rule) -> Frame:
        if not isinstance(rule, NftRule):
            raise TypeError(f"{type(rule).__name__} is not an nftables rule")
        live: list[Thread] = []
        calls: dict[tuple[str, bool], list[Thread]] = {}
        for thread in frame.live:
            ways = self._ways(rule, thread.state)
            for branch, way in self._threads(frame, rule, thread, ways):
                self._apply(frame, rule, branch, way, live, calls)
        frame.live = live
        if calls:
            self._waiting[frame] = [
                (rule, name, goto, threads) for (name, goto), threads in calls.items()
            ]
        else:
            frame.live = self.meet(frame, live, rule)
        return frame

    def _ways(self, rule: NftRule, state: PacketState) -> list[Way]:
        env, ruleset = self.env, self.ruleset
        if self.recall is None or noted(state) is not None:
            return run_rule(rule, state, env, ruleset)
        return self.recall.rule(rule, state, lambda s: run_rule(rule, s, env, ruleset), carried)

    def _threads(
        self, frame: Frame, rule: NftRule, thread: Thread, ways: list[Way]
    ) -> list[tuple[Thread, Way]]:
        """A thread for each way; the last one is `thread` itself where there is only one."""
        if len(ways) == 1 and not ways[0].unknown:
            return [(thread, ways[0])]
        reasons = dict.fromkeys(reason for way in ways for reason in way.unknown)
        fork = Fork(thread.copy(), rule, "; ".join(reasons)) if reasons else None
        if fork is not None:
            frame.forks.append(fork)
        found: list[tuple[Thread, Way]] = []
        for way in ways:
            branch = thread.copy()
            how = ""
            if way.unknown and fork is not None:
                how = "does not match" if way.broken else "matches"
            self.weigh(branch, way.chance, fork if way.unknown else None, rule, how)
            if way.drawn and not way.unknown:
                if way.broken:
                    branch.missed += 1
                else:
                    where = f"{way.drawn} in {rule.chain} rule {rule.position}"
                    branch.drawn, branch.missed = where, 0
            found.append((branch, way))
        return found

    def _apply(
        self,
        frame: Frame,
        rule: NftRule,
        thread: Thread,
        way: Way,
        live: list[Thread],
        calls: dict[tuple[str, bool], list[Thread]],
    ) -> None:
        if way.broken:
            # Nothing to cite: the rule has not matched.  What it changed before stays changed.
            thread.state = way.state
            live.append(thread)
            return
        effect = way.effect
        note = "; ".join((*way.notes, *([effect.note] if effect and effect.note else ())))
        if effect is None:
            action = _action(thread.state, way.state)
            self.step(thread, rule, action, way.state, note)
            live.append(thread)
            return
        self.step(thread, rule, effect.action, way.state, note)
        if effect.jump:
            calls.setdefault((effect.jump, effect.goto), []).append(thread)
        elif effect.returns:
            frame.returned.append(thread)
        elif effect.verdict is not None:
            self.finish(thread, rule.citation, effect)


def _action(before: PacketState, after: PacketState) -> StepAction:
    if before.packet.mark != after.packet.mark or (
        before.ct is not after.ct and before.ct != after.ct
    ):
        return StepAction.MARK
    if before.packet is not after.packet and before.packet != after.packet:
        return StepAction.REWRITE
    return StepAction.CONTINUE
