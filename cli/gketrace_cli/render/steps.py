"""One step of a trace as a line or two of text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from gketrace.trace import Citation, Disposition, Source, Step, StepAction, StepKind
from gketrace_cli.render.layout import Page
from gketrace_cli.rewrites import where

__all__ = [
    "LABELS",
    "STYLES",
    "counters",
    "draw_idle_jumps",
    "draw_step",
    "idle_jumps",
    "minor",
]

LABELS: Final = {
    StepKind.RECEIVE: "in",
    StepKind.SEND: "send",
    StepKind.CONNTRACK: "conntrack",
    StepKind.RULE: "rule",
    StepKind.POLICY: "policy",
    StepKind.NAT: "rewrite",
    StepKind.ROUTE: "route",
    StepKind.CHECK: "check",
    StepKind.NEIGHBOUR: "neighbour",
    StepKind.BRIDGE: "bridge",
    StepKind.TRANSMIT: "out",
    StepKind.SOCKET: "socket",
    StepKind.NETWORK: "network",
    StepKind.UNKNOWN: "UNKNOWN",
}
STYLES: Final = {
    Disposition.DELIVERED: "green",
    Disposition.TRANSMITTED: "yellow",
    Disposition.UNKNOWN: "yellow",
}
"""By disposition; all others are failures: red."""

_ENDS: Final = frozenset({StepAction.DROP, StepAction.REJECT, StepAction.FAIL})
_JUMP: Final = re.compile(r"(?:^|\s)(?:-j|--jump|-g|--goto|jump|goto)\s+(\S+)(.*)$")
_PROBABILITY: Final = re.compile(r"--probability\s+(\S+)|numgen\s+\S+\s+mod\s+(\d+)")


def counters(cited: Citation) -> str:
    """``[12 packets, 720 bytes]``; empty without counters."""
    if cited.packets is None:
        return ""
    return f"[{cited.packets} packets, {cited.bytes} bytes]"


def idle_jumps(steps: Sequence[Step]) -> tuple[list[Step], int]:
    """The jumps at the head of `steps` that changed and decided nothing: one after the other, from
    the same chain, into chains where no rule matched, or one that only returned.

    Also how many of the steps they make up.
    """
    idle: list[Step] = []
    position = 0
    while position < len(steps):
        step, cited = steps[position], steps[position].citation
        if step.kind is not StepKind.RULE or step.action is not StepAction.JUMP or cited is None:
            break
        first = idle[0].citation if idle else None
        if first is not None and (first.table, first.chain) != (cited.table, cited.chain):
            break
        target = _JUMP.search(cited.text)
        if target is None or position + 1 == len(steps) or step.before != step.after:
            break
        following = position + 1
        if _inside(steps[following], cited.table, target[1]):
            returned = steps[following].action is StepAction.RETURN
            following += 1
            if not returned or following == len(steps):
                break
            if _inside(steps[following], cited.table, target[1]):
                break
        idle.append(step)
        position = following
    return idle, position


def _inside(step: Step, table: str, chain: str) -> bool:
    cited = step.citation
    return cited is not None and (cited.table, cited.chain) == (table, chain)


def draw_idle_jumps(page: Page, steps: Sequence[Step], *, indent: int = 3) -> None:
    """``filter  FORWARD:1,2 → KUBE-FORWARD, KUBE-SERVICES (nothing applies)``."""
    cited = [step.citation for step in steps if step.citation is not None]
    places = ",".join(str(c.position) if c.position else "?" for c in cited)
    targets = [found[1] for c in cited if (found := _JUMP.search(c.text))]
    text = f"{cited[0].chain}:{places} → {', '.join(targets)} (nothing applies)"
    page.entry(cited[0].table or "rule", text, "dim", indent=indent)


def minor(step: Step) -> bool:
    """True for a step that only says that nothing happened: text leaves it out, ``wide`` has it."""
    if step.action in _ENDS or step.action is StepAction.UNKNOWN or step.before != step.after:
        return False
    if step.kind is StepKind.RULE:
        return step.action is StepAction.RETURN
    if step.kind is StepKind.CONNTRACK:
        return step.citation is None or step.citation.source is not Source.CONNTRACK
    return step.kind in (StepKind.POLICY, StepKind.CHECK)


def draw_step(page: Page, step: Step, *, indent: int = 3) -> None:
    """Writes one step."""
    style = ("red",) if step.action in _ENDS else ()
    if step.kind is StepKind.UNKNOWN or step.action is StepAction.UNKNOWN:
        style = ("yellow",)
    drawer = _DRAWERS.get(step.kind, _draw_other)
    drawer(page, step, style, indent)
    cited = step.citation
    if page.wide and cited is not None and step.kind in (StepKind.RULE, StepKind.POLICY):
        page.entry("", f"{cited.text} {counters(cited)}".strip(), "dim", indent=indent)


def _draw_rule(page: Page, step: Step, style: tuple[str, ...], indent: int) -> None:
    cited = step.citation
    if cited is None:
        _draw_other(page, step, style, indent)
        return
    page.entry(
        cited.table or "rule", f"{where(cited)} {_effect(step, cited)}", *style, indent=indent
    )
    if (style or step.kind is StepKind.UNKNOWN) and not page.wide:
        page.entry("", f"rule: {cited.text}", *style, indent=indent)


def _effect(step: Step, cited: Citation) -> str:
    """What the rule does, in the rule's own words."""
    if cited.source is Source.POLICY:
        return f"policy {step.action.value.upper()}"
    found = _JUMP.search(cited.text)
    drawn = _PROBABILITY.search(cited.text)
    chance = ""
    if drawn:
        chance = f" (p={float(drawn[1]):.3f})" if drawn[1] else f" (1 of {drawn[2]})"
    if step.before.mark != step.after.mark:
        return f"mark {step.before.mark:#x} → {step.after.mark:#x}{chance}"
    if found is None and cited.text.startswith("-A "):
        return "matches and has no target"
    if found is None:
        return f"{step.note or cited.text}{chance}"
    if step.action in (StepAction.JUMP, StepAction.GOTO):
        return f"→ {found[1]}{chance}"
    return f"{found[1]}{found[2]}{chance}"


def _draw_rewrite(page: Page, step: Step, style: tuple[str, ...], indent: int) -> None:
    by = ""
    if step.citation is not None:
        by = where(step.citation) if step.citation.chain else step.citation.text
        if step.citation.source is Source.CONNTRACK and not page.wide:
            by = "the conntrack entry above"
    page.entry("rewrite", str(step.before), *(style or ("bold",)), indent=indent)
    page.entry("", f"becomes {step.after}", *(style or ("bold",)), indent=indent)
    says = "; ".join(part for part in (step.note, f"by {by}" if by else "") if part)
    if says:
        page.entry("", says, indent=indent)


def _draw_packet(page: Page, step: Step, style: tuple[str, ...], indent: int) -> None:
    on = f" on {step.interface}" if step.interface else ""
    page.entry(LABELS[step.kind], f"{step.after}{on}", *style, indent=indent)
    if style and step.note:
        page.entry("", step.note, *style, indent=indent)


def _draw_transmit(page: Page, step: Step, style: tuple[str, ...], indent: int) -> None:
    to = f" to next hop {step.next_hop}" if step.next_hop else ""
    page.entry("out", f"{step.interface}{to}: {step.after}", *style, indent=indent)


def _draw_route(page: Page, step: Step, style: tuple[str, ...], indent: int) -> None:
    cited = step.citation
    if cited is None:
        _draw_other(page, step, style, indent)
        return
    table = ""
    if cited.table not in ("", "main", "254") and f"table {cited.table}" not in cited.text:
        table = f" (table {cited.table})"
    page.entry("route", f"{cited.text}{table}", *style, indent=indent)
    if step.note and (style or page.wide):
        page.entry("", step.note, *style, indent=indent)


def _draw_network(page: Page, step: Step, style: tuple[str, ...], indent: int) -> None:
    if step.before.tuple5 != step.after.tuple5:
        _draw_rewrite(page, step, style, indent)
        return
    page.entry("network", page.short(step.note), *style, indent=indent)
    if step.citation is not None and page.wide:
        page.entry("", f"by {step.citation.text}", "dim", indent=indent)


def _draw_bridge(page: Page, step: Step, style: tuple[str, ...], indent: int) -> None:
    if page.wide or style:
        _draw_other(page, step, style, indent)
    else:
        page.entry("bridge", step.note or step.interface, indent=indent)


def _draw_other(page: Page, step: Step, style: tuple[str, ...], indent: int) -> None:
    cited = step.citation
    text = step.note or step.action.value
    if cited is not None and cited.text and cited.text not in text:
        text = f"{text}: {cited.text}" if step.note else cited.text
    page.entry(LABELS[step.kind], text, *style, indent=indent)


_DRAWERS: Final = {
    StepKind.RULE: _draw_rule,
    StepKind.POLICY: _draw_rule,
    StepKind.NAT: _draw_rewrite,
    StepKind.RECEIVE: _draw_packet,
    StepKind.SEND: _draw_packet,
    StepKind.TRANSMIT: _draw_transmit,
    StepKind.ROUTE: _draw_route,
    StepKind.NETWORK: _draw_network,
    StepKind.BRIDGE: _draw_bridge,
}
