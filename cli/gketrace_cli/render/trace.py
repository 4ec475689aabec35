"""Traces as text: the verdict, one line per way, then each way hop by hop.

What several paths of one way share is printed once; where the kernel draws lots, each endpoint
follows with its probability.  An answer that comes back as it should is told in brief; ``wide``
tells all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from gketrace.trace import Hop, Missing, NetnsKind, Path, Step, StepAction, StepKind
from gketrace_cli.astray import NO_ENDPOINT, is_astray, is_misled, is_relayed, led_to
from gketrace_cli.frontdoors import Door
from gketrace_cli.options import Options, Output
from gketrace_cli.render.brief import cited_form, draw_brief
from gketrace_cli.render.layout import Page
from gketrace_cli.render.steps import STYLES, draw_idle_jumps, draw_step, idle_jumps, minor
from gketrace_cli.verdict import (
    Answer,
    Standing,
    Verdict,
    astray_text,
    outcome_text,
    path_standing,
    relayed_text,
    target_text,
)

__all__ = ["draw_trace", "in_brief"]

_Flat = tuple[int, Hop, Step]


def draw_trace(
    page: Page,
    verdict: Verdict,
    answers: Sequence[Answer],
    *,
    missing: Sequence[Missing] = (),
    notes: Sequence[str] = (),
    brief: bool = False,
) -> None:
    """The whole page.

    `brief`: each way in a few lines, and hop by hop only what does not work, the first of its kind.
    """
    page.line(page.short(verdict.text), verdict.style, "bold")
    if missing:
        page.blank()
        for item in missing:
            page.line(page.short(f"Not seen: {item}"), "yellow", hang=3)
    if brief:
        _draw_brief(page, answers, notes)
        return
    like = _representatives(answers, all_of_them=page.wide)
    if len(answers) > 1:
        page.blank()
        for index, answer in enumerate(answers):
            _overview(page, index, answer, like[index])
        if any(other != index for index, other in enumerate(like)):
            page.line("A way that is like another is told in full by -o wide only.", "dim")
    if notes:
        page.blank()
        for note in notes:
            page.line(note, "dim", hang=2)
    for index, answer in enumerate(answers):
        if like[index] == index:
            page.blank()
            _draw_answer(page, index + 1 if len(answers) > 1 else 0, answer)


def in_brief(options: Options, answers: Sequence[Answer]) -> bool:
    """Several ways are told in brief; one, which was asked for, hop by hop."""
    several = sum(len(answer.paths) for answer in answers) > 1
    return several and options.format is not Output.WIDE


def _draw_brief(page: Page, answers: Sequence[Answer], notes: Sequence[str]) -> None:
    draw_brief(page, answers)
    page.blank()
    unseen = "Not observable: the network's own rules between nodes and outside"
    if any(answer.question.door is Door.LOAD_BALANCER for answer in answers):
        unseen += ", and which node a load balancer picks"
    for note in (*notes, f"{unseen}.", cited_form(page, answers), _MORE):
        if note:
            page.line(note, "dim", hang=2)
    for answer in _telling(answers):
        page.blank()
        _draw_answer(page, 0, answer, telling=True)


_MORE: Final = "-v tells each way hop by hop, -o wide with the text of each rule."


def _telling(answers: Sequence[Answer]) -> list[Answer]:
    """The first way that is broken, the first that is not known, and the first that an existing
    connection's entry decides."""
    found: dict[object, int] = {}
    for number, answer in enumerate(answers):
        for path in answer.paths:
            standing = path_standing(answer, path)
            if standing in (Standing.BROKEN, Standing.UNKNOWN):
                found.setdefault(standing, number)
            elif path.pinned_by is not None:
                found.setdefault("pinned", number)
    return [answers[number] for number in sorted(set(found.values()))]


def _representatives(answers: Sequence[Answer], *, all_of_them: bool) -> list[int]:
    """For each way the first one of its kind: same door, port and family, an endpoint on the node
    or not, and the same ends."""
    first: dict[tuple[Any, ...], int] = {}
    like = []
    for index, answer in enumerate(answers):
        question = answer.question
        kind = (
            question.door,
            question.port_name,
            question.port,
            question.address.version,
            question.address if not question.via else None,
            question.has_endpoint,
            question.sender.outside,
            question.sender.pod is None,
            tuple(
                (p.outcome.disposition, p.endpoint, path_standing(answer, p)) for p in answer.paths
            ),
        )
        like.append(index if all_of_them else first.setdefault(kind, index))
    return like


def _overview(page: Page, index: int, answer: Answer, like: int) -> None:
    question = answer.question
    text = f"{index + 1}. {question.door.value} {target_text(question)}"
    if question.via:
        text += f" on {page.short(question.via)}"
    text += f" from {page.short(question.sender.text)}"
    if question.entry and not question.via:
        text += f" at node {page.short(question.entry)}"
    if like != index:
        text += f" (like {like + 1})"
    page.line(text, hang=4)
    for line, style in _ends(answer):
        page.line(page.short(line), style, indent=4, hang=2)


def _ends(answer: Answer) -> list[tuple[str, str]]:
    """One line per end, alike ones joined: (text, style)."""
    question = answer.question
    lines: list[tuple[str, str]] = []
    fine = [p for p in answer.paths if path_standing(answer, p) is Standing.FINE]
    if fine:
        seen = sorted({p.source_seen for p in fine if p.source_seen})
        source = f"; source seen: {' or '.join(seen)}" if seen else ""
        if len(fine) == 1:
            lines.append((f"{_share(fine[0])}delivered to {_address(fine[0])}{source}", "green"))
        else:
            shares = ", ".join(f"{_address(p)} ({_chance(p)})" for p in fine)
            lines.append((f"delivered to one of {len(fine)}: {shares}{source}", "green"))
    for path in answer.paths:
        standing = path_standing(answer, path)
        if standing is Standing.FINE:
            continue
        text = f"{_share(path)}{outcome_text(path)}"
        if standing is Standing.CONFIGURED:
            text = f"{_share(path)}dropped as configured: {question.configured_drop}"
        elif is_astray(question, path):
            text = f"{_share(path)}{astray_text(question, path)}"
        elif is_misled(question, path):
            text = f"{_share(path)}led to {led_to(path)}, {NO_ENDPOINT}; {outcome_text(path)}"
        elif is_relayed(path):
            text = f"{_share(path)}{relayed_text(path)}"
        elif path.reply is not None:
            text += f"; the answer: {outcome_text(path.reply)}"
            if path.missing:
                text += " (not all of it was seen)"
        color = {Standing.BROKEN: "red", Standing.CONFIGURED: "cyan"}.get(standing, "yellow")
        lines.append((text, color))
    return lines or [("nothing is known", "yellow")]


def _address(path: Path) -> str:
    """The endpoint's address alone."""
    return path.endpoint.rpartition(" ")[2] or "?"


def _chance(path: Path) -> str:
    return "share not known" if path.chance is None else f"{float(path.chance):.1%}"


def _share(path: Path) -> str:
    return "" if path.chance == 1 else f"({_chance(path)}) "


def _draw_answer(page: Page, number: int, answer: Answer, *, telling: bool = False) -> None:
    """`telling`: only the paths that do not simply work."""
    question = answer.question
    head = f"{question.door.value} {target_text(question)} from {question.sender.text}"
    if question.entry and not question.via:
        head += f", arriving at node {question.entry}"
    page.line(f"[{number}] {head}" if number else head, "bold", hang=4)
    paths = answer.paths
    flats = [_flatten(path) for path in paths]
    shared = _shared(flats) if len(paths) > 1 else 0
    hop = -1
    if shared:
        hop = _draw_steps(page, flats[0][:shared], hop)
        page.line(f"then one of {len(paths)}:", "bold", indent=3)
    for place, (path, flat) in enumerate(zip(paths, flats, strict=True), 1):
        if telling and path_standing(answer, path) is Standing.FINE and path.pinned_by is None:
            continue
        if len(paths) > 1:
            text = f"({place} of {len(paths)}, {_chance(path)}) {outcome_text(path)}"
            page.line(page.short(text), "bold", indent=1, hang=5)
            if page.wide or path.chance is None:
                for why in path.because:
                    page.entry("because", why)
        last = _draw_steps(page, flat[shared:], hop)
        _draw_end(page, answer, path)
        if path.reply is not None:
            _draw_back(page, path.reply, last + 1)


def _flatten(path: Path, start: int = 0) -> list[_Flat]:
    return [
        (number, hop, step) for number, hop in enumerate(path.hops, start) for step in hop.steps
    ]


def _shared(flats: Sequence[list[_Flat]]) -> int:
    """How many steps all have in common from the start."""
    count = 0
    for column in zip(*flats, strict=False):
        first = column[0]
        if any(
            (place, hop.ingress, step) != (first[0], first[1].ingress, first[2])
            for place, hop, step in column
        ):
            break
        count += 1
    return count


def _draw_steps(page: Page, flat: Sequence[_Flat], last: int) -> int:
    """Writes the steps, with a heading where a new hop begins.  Returns the last hop's number."""
    position = 0
    while position < len(flat):
        number, hop, step = flat[position]
        if number != last:
            last = number
            page.line(f"{number + 1}. {_place(page, hop)}", "cyan", hang=3)
        if page.wide:
            draw_step(page, step)
            position += 1
            continue
        idle, consumed = idle_jumps([s for n, _, s in flat[position:] if n == number])
        if idle:
            draw_idle_jumps(page, idle)
            position += consumed
            continue
        if not minor(step):
            draw_step(page, step)
        position += 1
    return last


def _place(page: Page, hop: Hop) -> str:
    ref = hop.netns
    if not ref.node:
        return "the network"
    if ref.kind is NetnsKind.HOST:
        return f"node {ref.node}"
    return page.short(f"{ref} on node {ref.node}")


def _draw_end(page: Page, answer: Answer, path: Path) -> None:
    style = STYLES.get(path.outcome.disposition, "red")
    text = outcome_text(path)
    if path.source_seen:
        text += f"; source seen: {path.source_seen}"
    if path_standing(answer, path) is Standing.CONFIGURED:
        text += f" (as configured: {answer.question.configured_drop})"
    if is_astray(answer.question, path):
        who = astray_text(answer.question, path)
        text, style = f"{who}; source seen: {path.source_seen}", "red"
    elif is_relayed(path):
        text, style = relayed_text(path), "yellow"
    elif is_misled(answer.question, path):
        text, style = f"{text}; {led_to(path)} is no endpoint of the Service", "red"
    page.entry("end", text, style, "bold")
    cited = path.outcome.citation
    last = path.hops[-1].steps[-1].citation if path.hops and path.hops[-1].steps else None
    shown = cited == last or path.outcome.disposition.value in _FINE_BACK
    if cited is not None and not shown:
        page.entry("", f"because of: {cited.text}", style)
    for item in path.missing:
        page.entry("not seen", str(item), "yellow")
    if path.pinned_by is not None:
        ends = ", or ".join(f"{_share(new)}{outcome_text(new)}" for new in path.fresh)
        page.entry("new ones", page.short(f"(not of this connection) {ends}"))


def _draw_back(page: Page, reply: Path, start: int) -> None:
    """The answer's way; in brief when it comes back as it should."""
    page.line("and back:", "bold", indent=3)
    back = reply.outcome
    brief = not page.wide and not reply.missing and back.disposition.value in _FINE_BACK
    if brief:
        for number, hop in enumerate(reply.hops, start):
            page.line(f"{number + 1}. {_place(page, hop)}", "cyan", hang=3)
            _draw_hop_in_brief(page, hop)
    else:
        _draw_steps(page, _flatten(reply, start), -1)
    page.entry("end", outcome_text(reply), STYLES.get(back.disposition, "red"), "bold")
    cited = back.citation
    if not brief and cited is not None:
        page.entry("", f"because of: {cited.text}", STYLES.get(back.disposition, "red"))


_FINE_BACK = frozenset({"delivered", "transmitted"})


def _draw_hop_in_brief(page: Page, hop: Hop) -> None:
    """What changed in the packet, and where it went."""
    rewrites = [step for step in hop.steps if step.kind is StepKind.NAT]
    for step in hop.steps[:1]:
        if step.kind in (StepKind.SEND, StepKind.RECEIVE):
            draw_step(page, step)
    if rewrites:
        page.entry("rewrite", f"becomes {rewrites[-1].after}", "bold")
        page.entry("", "by the connection's conntrack entry")
    for step in hop.steps:
        if step.kind is StepKind.NETWORK or _decides(step):
            draw_step(page, step)
        elif step.kind is StepKind.TRANSMIT:
            to = f" to next hop {step.next_hop}" if step.next_hop else ""
            page.entry("out", f"{step.interface}{to}")


def _decides(step: Step) -> bool:
    return step.action in (
        StepAction.DROP,
        StepAction.REJECT,
        StepAction.FAIL,
        StepAction.UNKNOWN,
    )
