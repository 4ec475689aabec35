"""Which evaluator goes through a base chain: each kind of rule set has its own."""

from __future__ import annotations

from gketrace.ruleset.model import BaseChain, Ruleset
from gketrace.ruleset.nft import NftRuleset
from gketrace.simulate import chains
from gketrace.simulate.nft import run as nft
from gketrace.simulate.nft.scene import NftEnvironment
from gketrace.simulate.recall import Recall
from gketrace.simulate.state import Alternative, PacketState

__all__ = ["traverse"]


def traverse(
    ruleset: Ruleset,
    base: BaseChain,
    state: PacketState,
    env: NftEnvironment,
    recall: Recall | None = None,
) -> tuple[Alternative, ...]:
    """All ways through `base` for a packet in `state`, in the order of the rules that decide."""
    if isinstance(ruleset, NftRuleset):
        return nft.traverse(ruleset, base, state, env, recall)
    return chains.traverse(ruleset, base, state, env)
