"""The ways into a Service in brief: for each front door, who enters where, which rules rewrite the
packet, the endpoints with their shares, and how the answer comes back.

Ways that lead to the same endpoints by the same rules are told together.  Every line still names
the rules that it rests on; the steps in full are told by `draw_trace`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from gketrace.packet import Packet
from gketrace.trace import SUCCESS, Disposition, NetnsKind, Path, Source, StepKind
from gketrace_cli.astray import NO_ENDPOINT, is_astray, is_misled, is_relayed, whose
from gketrace_cli.frontdoors import Door, Question
from gketrace_cli.render.layout import Page
from gketrace_cli.rewrites import Rewrite, host_nodes, rewrites
from gketrace_cli.verdict import Answer, Standing, outcome_text, path_standing, target_text

__all__ = ["cited_form", "draw_brief"]

_NODES: Final = 4
"""Places of entry that are alike and named one by one; of more, the first are and the rest is
counted."""
_LABEL: Final = 28
"""Columns of the places' names; a longer one has its text right after it."""
_ENDPOINTS: Final = 6
"""Endpoints that are named one by one."""
_STYLES: Final = {Standing.BROKEN: "red", Standing.UNKNOWN: "yellow", Standing.CONFIGURED: "cyan"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """One path of a way, from where it is sorted out to its end, as text."""

    share: str
    rules: tuple[str, ...]
    to: str
    text: str
    taken_by: str
    """The socket that takes it."""
    standing: Standing


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """One answer in brief."""

    answer: Answer
    entry: str
    """Where it comes in, or who sends."""
    told: str
    """The rule that names the Service, and what becomes of the source address."""
    ends: tuple[_End, ...]
    back: str


def draw_brief(page: Page, answers: Sequence[Answer]) -> None:
    """One block for each front door."""
    doors: dict[tuple[Any, ...], list[Answer]] = {}
    for answer in answers:
        doors.setdefault(_door(answer.question), []).append(answer)
    named: set[str] = set()
    before: tuple[_End, ...] = ()
    for found in doors.values():
        page.blank()
        page.line(page.short(_heading(found[0].question)), "bold", hang=2)
        alike: dict[tuple[Any, ...], list[_Way]] = {}
        for way in (_way(page, answer) for answer in found):
            alike.setdefault((way.ends, way.back), []).append(way)
        for ways in alike.values():
            _draw_ways(page, ways, before, named)
            before = ways[0].ends


def cited_form(page: Page, answers: Sequence[Answer]) -> str:
    """What ``CHAIN:N`` means, with the command that shows one of those told; empty: none is."""
    paths = [path for answer in answers for path in answer.paths]
    decided = [(path.outcome.netns, path.outcome.citation) for path in paths]
    rewritten = [
        (hop.netns, step.citation)
        for path in paths
        for hop in path.hops
        for step in hop.steps
        if step.kind is StepKind.NAT
    ]
    for netns, cited in (*rewritten, *decided):
        if cited is None or not cited.position or netns.kind is not NetnsKind.HOST:
            continue
        named = "" if cited.backend == "nftables" else ", of table nat where none is named"
        words = ["gketrace", "rules", page.short(netns.node)]
        if cited.table != "nat" and not cited.backend.startswith("nft"):
            words += ["--table", cited.table]
        command = shlex.join([*words, "--chain", cited.chain])
        return f"CHAIN:N is rule N of that chain{named}; to see one: {command}"
    return ""


def _door(question: Question) -> tuple[Any, ...]:
    """What one block is about."""
    one = None if question.via and question.door is Door.NODE_PORT else question.address
    return (
        question.door,
        one,
        question.address.version,
        question.port,
        question.protocol,
        question.sender.text if question.sender.outside else "",
    )


def _heading(question: Question) -> str:
    text = f"{question.door.value} {target_text(question)}"
    if question.door is Door.NODE_PORT:
        text = f"NodePort {target_text(question).rpartition(':')[2]}"
    if question.port_name:
        text += f" ({question.port_name})"
    if not question.sender.outside:
        return f"{text} from inside the cluster"
    text += f" from {question.sender.text}"
    if question.door is Door.LOAD_BALANCER:
        text += " at the node it picks"
    return text


def _way(page: Page, answer: Answer) -> _Way:
    question = answer.question
    if question.sender.outside:
        entry = f"at {page.short(question.entry or question.via)}" if question.entry else "at"
        if question.door is Door.NODE_PORT:
            entry += f" {question.address}"
    else:
        entry = f"from {page.short(question.sender.text.removeprefix('node/'))}"
        if question.door is Door.NODE_PORT:
            entry += f" to {question.address}"
    found = [rewrites(path) for path in answer.paths]
    ends = tuple(
        _end(page, answer, path, changes) for path, changes in zip(answer.paths, found, strict=True)
    )
    backs = list(dict.fromkeys(filter(None, (_back(page, answer, p) for p in answer.paths))))
    return _Way(
        answer=answer,
        entry=entry,
        told="; ".join(filter(None, (_named_by(found), _source(page, answer, found)))),
        ends=ends,
        back="; or ".join(backs),
    )


def _named_by(found: Sequence[tuple[Rewrite, ...]]) -> str:
    """The rule by which the Service was known: one for all paths of a packet."""
    rules = (one.named_by for changes in found for one in changes if one.of_destination)
    return " or ".join(dict.fromkeys(filter(None, rules)))


def _source(page: Page, answer: Answer, found: Sequence[tuple[Rewrite, ...]]) -> str:
    """``source becomes 10.142.0.7 by KUBE-POSTROUTING:3``; the kept one when all keep it."""
    texts: dict[str, list[str]] = {}
    kept = False
    for path, changes in zip(answer.paths, found, strict=True):
        changed = [one for one in changes if one.of_source]
        for one in changed:
            at = "" if one is changed[0] and not one.pod else f" on {page.short(one.node)}"
            texts.setdefault(f"by {one.by}{at}", []).append(str(one.after.src))
        kept = kept or (not changed and path.outcome.disposition in SUCCESS)
    parts = [f"{' or '.join(dict.fromkeys(to))} {by}" for by, to in texts.items()]
    if kept:
        parts.append("is kept" if not parts else "stays")
    if not parts:
        return ""
    return "source is kept" if parts == ["is kept"] else f"source becomes {', or '.join(parts)}"


def _end(page: Page, answer: Answer, path: Path, changes: tuple[Rewrite, ...]) -> _End:
    standing = path_standing(answer, path)
    to = [one for one in changes if one.of_destination]
    text = outcome_text(path)
    if standing is Standing.CONFIGURED:
        # The node is named by the row; the rest of the reason is the same for all.
        text += f"; as configured: {answer.question.configured_drop.partition(' and node ')[0]}"
    elif standing is Standing.FINE and path.endpoint:
        text = _endpoint(path)
    elif is_astray(answer.question, path):
        text = f"{_endpoint(path)}, {whose(answer.question, path)}"
    elif is_misled(answer.question, path):
        text = f"{NO_ENDPOINT}: {text}"
    elif is_relayed(path):
        text = "a program of the sender's own pod; what that makes of it is not seen"
    elif path.reply is not None and standing is not Standing.FINE:
        text += f"; the answer: {outcome_text(path.reply)}"
        if path.missing:
            text += " (not all of it was seen)"
    for one in to[1:]:
        text += f"; then {one.by} on {page.short(one.pod or one.node)} rewrites to "
        text += _address(one.after)
    return _End(
        share="" if path.chance == 1 else _share(path),
        rules=to[0].rules if to else (),
        to=_address(to[0].after) if to else "",
        text=page.short(text),
        taken_by=_socket(path),
        standing=standing,
    )


def _share(path: Path) -> str:
    return "share ?" if path.chance is None else f"{float(path.chance):.1%}"


def _address(packet: Packet) -> str:
    host = f"[{packet.dst}]" if packet.dst.version == 6 else str(packet.dst)
    return host if packet.dport is None else f"{host}:{packet.dport}"


def _endpoint(path: Path) -> str:
    """``pod/default/web-0 on 2jdh``."""
    name, _, address = path.endpoint.rpartition(" ")
    return f"{name} on {path.outcome.netns.node}" if name.startswith("pod/") else name or address


def _socket(path: Path) -> str:
    """``tcp LISTEN [::]:8080 hello-app (pid 7)``."""
    cited = path.outcome.citation
    return cited.text if cited is not None and cited.source is Source.SOCKET else ""


def _back(page: Page, answer: Answer, path: Path) -> str:
    """How the answer comes back; empty where `_end` tells that it does not."""
    reply = path.reply
    if reply is None or path_standing(answer, path) is not Standing.FINE:
        return ""
    there, back = host_nodes(path), host_nodes(reply)
    text = "by the same nodes"
    if back != tuple(reversed(there)):
        text = f"by {' → '.join(page.short(node) for node in back)}"
    if rewrites(path) and rewrites(reply):
        text += ", rewrites undone by conntrack"
    if reply.outcome.disposition is Disposition.TRANSMITTED:
        text += "; then out of the cluster"
    return text


def _draw_ways(page: Page, ways: Sequence[_Way], before: Sequence[_End], named: set[str]) -> None:
    """Those that end alike: a row for each place of entry, then the ends, then the answer's way."""
    ends = ways[0].ends
    label = _listed([way.entry for way in ways])
    if len(label) <= _LABEL and len(ends) == 1 and not any(way.told for way in ways):
        style = _STYLES.get(ends[0].standing)
        _row(page, label, ends[0].text, *([style] if style else []), column=len(label) + 2)
    else:
        _draw_entries(page, ways)
        if len(ends) > 1 and before == ends:
            _row(page, "then", f"one of {len(ends)}, by the rules and shares above")
        else:
            _draw_ends(page, ends, named)
    if ways[0].back:
        _row(page, "back", ways[0].back)


def _draw_entries(page: Page, ways: Sequence[_Way]) -> None:
    if not any(way.told for way in ways):
        _row(page, _listed([way.entry for way in ways]), "")
        return
    shown = ways if len(ways) <= _NODES else ways[: _NODES - 1]
    column = min(max(len(way.entry) for way in shown), _LABEL) + 2
    for way in shown:
        _row(page, way.entry, way.told, column=column)
    if len(ways) > len(shown):
        _row(page, f"and {len(ways) - len(shown)} more alike", "")


def _listed(names: Sequence[str]) -> str:
    """``at 33fg, m69d and 5 more``."""
    first, *others = names if len(names) <= _NODES else names[: _NODES - 1]
    word = first.split(" ")[0]
    text = ", ".join([first, *(name.removeprefix(f"{word} ") for name in others)])
    left = len(names) - 1 - len(others)
    return f"{text} and {left} more" if left else text


def _draw_ends(page: Page, ends: Sequence[_End], named: set[str]) -> None:
    """A row each; which socket takes it is told where an endpoint is named first."""
    shown = ends if len(ends) <= _ENDPOINTS else _most_telling(ends)
    shared = _shared([end.rules for end in ends]) if len(ends) > 1 else 0
    if shared:
        _row(page, "then", f"{_arrows(ends[0].rules[:shared])}, and one of {len(ends)}:")
    column = max(max(len(end.share) for end in shown) + 2, 6)
    for end in shown:
        text = end.text
        if end.rules:
            text = f"{_arrows(end.rules[shared:])} DNAT to {end.to}, {text}".strip()
        if end.taken_by and end.text not in named:
            text += f" ({end.taken_by})"
        named.add(end.text)
        style = _STYLES.get(end.standing)
        _row(page, end.share or "then", text, *([style] if style else []), column=column)
    if len(ends) > len(shown):
        _row(page, f"and {len(ends) - len(shown)} more endpoints", "")


def _shared(ways: Sequence[tuple[str, ...]]) -> int:
    """How many rules all have in common from the start."""
    count = 0
    for column in zip(*ways, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _arrows(rules: Sequence[str]) -> str:
    return " → ".join(rules)


def _most_telling(ends: Sequence[_End]) -> list[_End]:
    """What is not fine comes first."""
    ordered = sorted(ends, key=lambda end: end.standing is Standing.FINE)
    return ordered[: _ENDPOINTS - 1]


def _row(page: Page, label: str, text: str, *styles: str, column: int = 6) -> None:
    """`text` in a column of its own; none: the label is all there is to tell."""
    if text:
        page.entry(label, text, *styles, indent=2, column=column)
    else:
        page.line(label, *styles, indent=2, hang=2)
