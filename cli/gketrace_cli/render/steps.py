"""One step of a trace as a line or two of text."""

from __future__ import annotations

import re
from typing import Final

from gketrace.packet import Packet
from gketrace.trace import Citation, Disposition, Source, Step, StepAction, StepKind
from gketrace_cli.render.layout import Page

__all__ = ["LABELS", "STYLES", "counters", "draw_step", "minor", "where"]

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
_SET_MARK: Final = re.compile(r"^MARK\b")


def where(cited: Citation) -> str:
    """``KUBE-SERVICES:24``; the rule's place as it is counted by ``--line-numbers``."""
    if cited.position:
        return f"{cited.chain}:{cited.position}"
    if cited.handle is not None:
        return f"{cited.chain} handle {cited.handle}"
    return cited.chain


def counters(cited: Citation) -> str:
    """``[12 packets, 720 bytes]``; empty without counters."""
    if cited.packets is None:
        return ""
    return f"[{cited.packets} packets, {cited.bytes} bytes]"


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
        chance = f"  (drawn: {drawn[1]})" if drawn[1] else f"  (drawn: 1 of {drawn[2]})"
    if step.before.mark != step.after.mark:
        return f"mark {step.before.mark:#x} → {step.after.mark:#x}{chance}"
    if found is None:
        return f"{step.note or cited.text}{chance}"
    if step.action in (StepAction.JUMP, StepAction.GOTO):
        return f"→ {found[1]}{chance}"
    return f"{found[1]}{found[2]}{chance}"


def _draw_rewrite(page: Page, step: Step, style: tuple[str, ...], indent: int) -> None:
    by = ""
    if step.citation is not None:
        by = where(step.citation) if step.citation.chain else step.citation.text
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
    table = f" (table {cited.table})" if cited.table else ""
    page.entry("route", f"{cited.text}{table}", *style, indent=indent)
    if step.note and (style or page.wide):
        page.entry("", step.note, *style, indent=indent)


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
}


def same_header(one: Packet, other: Packet) -> bool:
    """True when what the wire carries is the same (the mark is not on the wire)."""
    return one.tuple5 == other.tuple5


__all__ += ["same_header"]
