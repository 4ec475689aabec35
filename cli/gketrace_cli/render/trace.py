"""Traces as text: the verdict, one line per way, then each way hop by hop.

What several paths of one way share is printed once; where the kernel draws lots, each endpoint
follows with its probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gketrace.trace import Hop, Missing, NetnsKind, Path, Step, StepAction, StepKind
from gketrace_cli.frontdoors import Question
from gketrace_cli.render.documents import envelope, missing_document, path_document
from gketrace_cli.render.layout import Page
from gketrace_cli.render.steps import STYLES, draw_step, minor
from gketrace_cli.verdict import Answer, Standing, Verdict, outcome_text, path_standing, target_text

__all__ = ["draw_trace", "trace_document"]

_Flat = tuple[int, Hop, Step]


def draw_trace(
    page: Page,
    verdict: Verdict,
    answers: Sequence[Answer],
    *,
    missing: Sequence[Missing] = (),
    notes: Sequence[str] = (),
    short: Mapping[str, str] | None = None,
) -> None:
    """The whole page.  `short` gives the nodes' short names for the overview."""
    page.line(verdict.text, verdict.style, "bold")
    for note in notes:
        page.line(note, "dim", hang=2)
    if missing:
        page.blank()
        for item in missing:
            page.line(f"Not seen: {item}", "yellow", hang=3)
    detailed = list(range(len(answers))) if page.wide else _representatives(answers)
    if len(answers) > 1:
        page.blank()
        for number, answer in enumerate(answers, 1):
            _overview(page, number, answer, short or {}, number - 1 in detailed)
    for index in detailed:
        page.blank()
        _draw_answer(page, index + 1 if len(answers) > 1 else 0, answers[index])


def _representatives(answers: Sequence[Answer]) -> list[int]:
    """One of each kind of way: same door, port and family, same place of the endpoint, same end."""
    seen: set[tuple[Any, ...]] = set()
    chosen = []
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
            bool(question.sender.pod),
            tuple((p.outcome.disposition, p.endpoint) for p in answer.paths),
        )
        if kind not in seen:
            seen.add(kind)
            chosen.append(index)
    return chosen


def _overview(
    page: Page, number: int, answer: Answer, short: Mapping[str, str], shown: bool
) -> None:
    question = answer.question
    text = f"{number:>2}. {question.door.value} {target_text(question)}"
    if question.via:
        text += f" (node {short.get(question.via, question.via)})"
    sender = question.sender.text
    for name, brief in short.items():
        sender = sender.replace(f"node/{name}", f"node/{brief}")
    text += f" from {sender}"
    if question.entry and not question.via:
        text += f" at node {short.get(question.entry, question.entry)}"
    page.line(text, indent=1, hang=4)
    for line, style in _ends(answer):
        page.line(line + ("" if shown else "  (in full with -o wide)"), style, indent=5, hang=2)


def _ends(answer: Answer) -> list[tuple[str, str]]:
    """One line per end, alike ones joined: (text, style)."""
    question = answer.question
    lines: list[tuple[str, str]] = []
    fine = [p for p in answer.paths if path_standing(question, p) is Standing.FINE]
    if fine:
        seen = sorted({p.source_seen for p in fine if p.source_seen})
        source = f", which sees {' or '.join(seen)}" if seen else ""
        if len(fine) == 1:
            lines.append((f"{_share(fine[0])}{outcome_text(fine[0])}{source}", "green"))
        else:
            shares = ", ".join(f"{_address(p)} {_chance(p)}" for p in fine)
            lines.append((f"delivered to one of {len(fine)}: {shares}{source}", "green"))
    for path in answer.paths:
        standing = path_standing(question, path)
        if standing is Standing.FINE:
            continue
        text = f"{_share(path)}{outcome_text(path)}"
        if standing is Standing.CONFIGURED:
            text += f" (as configured: {question.configured_drop})"
        elif path.reply is not None:
            text += f"; the answer: {outcome_text(path.reply)}"
        color = {Standing.BROKEN: "red", Standing.CONFIGURED: "cyan"}.get(standing, "yellow")
        lines.append((text, color))
    return lines or [("nothing is known", "yellow")]


def _address(path: Path) -> str:
    """The endpoint's address alone."""
    return path.endpoint.rpartition(" ")[2] or "?"


def _chance(path: Path) -> str:
    return "(share not known)" if path.chance is None else f"{float(path.chance):.1%}"


def _share(path: Path) -> str:
    return "" if path.chance == 1 else f"{_chance(path)} "


def _draw_answer(page: Page, number: int, answer: Answer) -> None:
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
        if len(paths) > 1:
            text = f"{place}/{len(paths)}  {_chance(path)}  {outcome_text(path)}"
            page.line(text, "bold", indent=3, hang=5)
            for why in path.because:
                page.entry("because", why, indent=3)
        _draw_steps(page, flat[shared:], hop)
        _draw_end(page, question, path)


def _flatten(path: Path) -> list[_Flat]:
    return [(number, hop, step) for number, hop in enumerate(path.hops) for step in hop.steps]


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


def _draw_steps(page: Page, flat: Sequence[_Flat], last: int, *, back: bool = False) -> int:
    """Writes the steps, with a heading where a new hop begins.  Returns the last hop's number."""
    for number, hop, step in flat:
        if number != last:
            last = number
            page.line(f"{number + 1}. {_place(hop)}", "cyan", indent=0, hang=3)
        if page.wide or not (minor(step) or (back and _routine(step))):
            draw_step(page, step)
    return last


def _place(hop: Hop) -> str:
    ref = hop.netns
    if not ref.node:
        return "the network between the nodes"
    if ref.kind is NetnsKind.HOST:
        return f"node {ref.node}"
    return f"{ref} on node {ref.node}"


def _routine(step: Step) -> bool:
    """On the way back, jumps and accepts say nothing: tracking has decided already."""
    return step.kind is StepKind.RULE and step.action in (
        StepAction.JUMP,
        StepAction.GOTO,
        StepAction.ACCEPT,
        StepAction.CONTINUE,
        StepAction.RETURN,
    )


def _draw_end(page: Page, question: Question, path: Path) -> None:
    style = STYLES.get(path.outcome.disposition, "red")
    text = outcome_text(path)
    if path.source_seen:
        text += f"; it sees the source {path.source_seen}"
    if path_standing(question, path) is Standing.CONFIGURED:
        text += f" (as configured: {question.configured_drop})"
    page.entry("end", text, style, "bold")
    cited = path.outcome.citation
    if cited is not None and path.outcome.disposition.value not in ("delivered", "transmitted"):
        page.entry("", f"because of: {cited.text}", style)
    for item in path.missing:
        page.entry("not seen", str(item), "yellow")
    if path.reply is None:
        return
    page.line("and back:", "bold", indent=3)
    _draw_steps(page, _flatten(path.reply), -1, back=True)
    back = path.reply.outcome
    page.entry("end", outcome_text(path.reply), STYLES.get(back.disposition, "red"), "bold")


def trace_document(
    kind: str,
    verdict: Verdict,
    answers: Sequence[Answer],
    *,
    query: Mapping[str, Any],
    missing: Sequence[Missing] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The envelope of kind ``ServiceTrace`` or ``Trace``."""
    paths = []
    for answer in answers:
        for path in answer.paths:
            document = path_document(path)
            standing = path_standing(answer.question, path)
            document["standing"] = standing.name.lower()
            document["configuredDrop"] = (
                answer.question.configured_drop if standing is Standing.CONFIGURED else None
            )
            document["entryNode"] = (
                answer.question.via or answer.question.entry or answer.question.sender.node or None
            )
            document["port"] = answer.question.port_name or None
            paths.append(document)
    unknown = any(
        path_standing(a.question, p) is Standing.UNKNOWN for a in answers for p in a.paths
    )
    return envelope(
        kind,
        {
            "query": dict(query),
            "verdict": verdict.text,
            "complete": not missing and not unknown and bool(paths),
            "missing": missing_document(missing),
            "notes": list(notes),
            "paths": paths,
        },
    )
