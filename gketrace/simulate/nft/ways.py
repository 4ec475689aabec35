"""What may come of one nftables statement: the ways on through its rule."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, TypeAlias

from gketrace.quick import quick
from gketrace.ruleset.nft_text import statement_text
from gketrace.simulate.evolve import copier, evolve
from gketrace.simulate.nft.values import Branch, times
from gketrace.simulate.state import CERTAIN, PacketState, VerdictKind
from gketrace.simulate.targets.base import Effect
from gketrace.simulate.watched import Rebase
from gketrace.trace import StepAction

__all__ = [
    "Json",
    "Way",
    "along",
    "carried",
    "decide",
    "either",
    "not_modelled",
    "queue",
    "single",
    "stop",
    "verdict",
    "without_doubles",
]

Json: TypeAlias = Any


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way through one rule."""

    state: PacketState
    chance: Fraction | None = CERTAIN
    drawn: str = ""
    unknown: tuple[str, ...] = ()
    """What is not known on this way: it is one of several."""
    notes: tuple[str, ...] = ()
    """Evidence, and what the rule did beside its verdict."""
    broken: bool = False
    """The rule has not matched."""
    effect: Effect | None = None
    """The verdict; None: on to the next rule."""


_way_of: Final = copier(Way, "state", "effect")
_effect_of: Final = copier(Effect, "state")


def carried(ways: list[Way], rebase: Rebase) -> list[Way]:
    """What `run_rule` gave for a watched state, for the one that it is carried over to."""
    found: list[Way] = []
    for way in ways:
        effect = way.effect
        if effect is not None:
            effect = _effect_of(effect, rebase.state(effect.state))
        found.append(_way_of(way, rebase.state(way.state), effect))
    return found


def without_doubles(ways: list[Way]) -> list[Way]:
    """Ways on which the rule has not matched and changed the same are one way.

    Where that is all of them, nothing was drawn and nothing is unknown.
    """
    if len(ways) == 1:
        return ways
    groups: dict[PacketState, list[Way]] = {}
    for way in ways:
        if way.broken:
            groups.setdefault(way.state, []).append(way)
    if len(ways) == len(groups):
        return ways
    if len(groups) == 1 and all(way.broken for way in ways):
        return [Way(state=ways[0].state, broken=True)]
    found = [way for way in ways if not way.broken]
    for group in groups.values():
        chances = [way.chance for way in group if way.chance is not None]
        chance = sum(chances, Fraction(0)) if len(chances) == len(group) else None
        unknown = tuple(dict.fromkeys(why for way in group for why in way.unknown))
        found.append(evolve(group[0], chance=chance, unknown=unknown))
    return found


def single(statement: Json) -> tuple[str, Json]:
    if isinstance(statement, dict) and len(statement) == 1:
        ((kind, body),) = statement.items()
        return str(kind), body
    return "", statement


def along(way: Way, branch: Branch, **changes: Any) -> Way:
    """`way` as it goes on with one branch of an expression."""
    if branch.chance is CERTAIN and not branch.note and not branch.drawn:
        return evolve(way, **changes) if changes else way
    notes = (*way.notes, branch.note) if branch.note and branch.note not in way.notes else way.notes
    unknown, drawn = way.unknown, branch.drawn or way.drawn
    if branch.chance is None:
        unknown, drawn = (*unknown, branch.drawn or "a value that is not known"), way.drawn
    return evolve(
        way,
        chance=times(way.chance, branch.chance),
        drawn=drawn,
        notes=notes,
        unknown=unknown,
        **changes,
    )


def either(way: Way, reason: str) -> list[Way]:
    """It matches or does not; nobody knows."""
    unsure = evolve(way, chance=None, unknown=(*way.unknown, reason))
    return [unsure, evolve(unsure, broken=True)]


def stop(way: Way, why: str) -> Way:
    """What becomes of the packet is not known."""
    effect = Effect(
        action=StepAction.UNKNOWN, state=way.state, verdict=VerdictKind.UNKNOWN, note=why
    )
    return evolve(way, effect=effect)


def not_modelled(statement: Json, way: Way, why: str) -> list[Way]:
    """A statement that may match, decide, or do nothing."""
    reason = f"{statement_text(statement)}: {why}"
    unsure = evolve(way, chance=None, unknown=(*way.unknown, reason))
    if single(statement)[0] in ("match", "limit", "quota", "vmap"):
        return [unsure, evolve(unsure, broken=True)]
    return [unsure, evolve(unsure, broken=True), stop(unsure, f"{reason} is not understood")]


def verdict(way: Way, kind: VerdictKind, action: StepAction, **more: Any) -> Way:
    effect = Effect(action=action, state=way.state, verdict=kind, **more)
    return evolve(way, effect=effect)


def decide(kind: str, body: Json, way: Way) -> Way:
    """A verdict statement, or the data of a verdict map."""
    if kind == "accept":
        return verdict(way, VerdictKind.ACCEPT, StepAction.ACCEPT)
    if kind == "drop":
        return verdict(way, VerdictKind.DROP, StepAction.DROP)
    if kind == "return":
        effect = Effect(action=StepAction.RETURN, state=way.state, returns=True)
        return evolve(way, effect=effect)
    if kind in ("jump", "goto"):
        action = StepAction.JUMP if kind == "jump" else StepAction.GOTO
        effect = Effect(
            action=action, state=way.state, jump=str(body["target"]), goto=kind == "goto"
        )
        return evolve(way, effect=effect)
    if kind == "queue":
        return queue(way)
    if kind != "continue":
        raise ValueError(f"no such verdict: {kind}")
    return way


def queue(way: Way) -> Way:
    note = "handed to a program in user space; what it decides is not known"
    return verdict(way, VerdictKind.QUEUE, StepAction.UNKNOWN, note=note)
