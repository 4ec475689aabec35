"""Followed connections as lines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from gketrace.connections import Half
from gketrace.follow.entries import Sight
from gketrace.follow.joiner import Followed, Phase
from gketrace.follow.outcome import Judgement, Outcome
from gketrace.packet import Tuple5
from gketrace.trace import Citation
from gketrace_cli.follow.packets import SeenPackets
from gketrace_cli.follow.seen import packet_lines
from gketrace_cli.follow.view import View
from gketrace_cli.render.layout import Page

__all__ = ["alone_lines", "connection_lines", "duration_text", "end_text"]

_COARSE = 0.05
"""Seconds: what durations are known to."""
_TOLD = 10_000
"""Rules whose text is known to have been said."""
_STYLES = {Outcome.CLOSED: "green", Outcome.OPEN: "cyan", Outcome.OPENING: "cyan"}


def connection_lines(page: Page, view: View, namespace: str, told: set[str] | None = None) -> str:
    """One connection: a line, and for failures what is known of where it died.

    `page` gives colours, names and width; nothing is kept in it.  `told`: rules whose text was
    said before; then their place is enough.
    """
    out = Page(colored=page.colored, wide=page.wide, width=page.width, names=page.names)
    followed = view.followed
    judgement = followed.judgement
    word = judgement.outcome.value
    if followed.phase is Phase.STILL_OPEN and judgement.outcome is Outcome.OPEN:
        word = "still open"
    style = "red" if judgement.failed else _STYLES.get(judgement.outcome, "yellow")
    head = f"{_clock(followed)} {word.upper() if judgement.failed else word}"
    brief = not page.wide and not view.failed
    text = "; ".join([_way(view, namespace, brief=brief), *_facts(view)])
    _head(out, head, style, page.short(text))
    for line in _why(view):
        out.line(page.short(line), indent=9, hang=2)
    if view.packets is not None:
        for line in packet_lines(view.packets, judgement.because):
            out.line(page.short(line), indent=9, hang=2)
    for remark in view.remarks:
        out.line(page.short(remark), "yellow", indent=9, hang=2)
    if page.wide:
        for half, sight, rules in zip(
            followed.connection.halves, followed.sights, view.rules, strict=True
        ):
            out.entry(str(half.place), _half_text(half, sight), indent=9, column=10)
            for line in _rules(rules, set() if told is None else told):
                out.line(line, "dim", indent=21)
    return "\n".join(out.lines) + "\n"


def alone_lines(page: Page, seen: SeenPackets, judgement: Judgement) -> str:
    """One that only packets tell."""
    out = Page(colored=page.colored, wide=page.wide, width=page.width, names=page.names)
    at = seen.connection.begin / 1e9
    head = f"{time.strftime('%H:%M:%S', time.localtime(at))}.{int(at * 10) % 10} "
    first = seen.connection.first
    way = f"{end_text(first, source=True)} → {end_text(first)}"
    _head(out, head + judgement.outcome.value.upper(), "red", way)
    for line in (judgement.because, *packet_lines(seen, judgement.because)):
        out.line(page.short(line), indent=9, hang=2)
    return "\n".join(out.lines) + "\n"


def _head(out: Page, head: str, style: str, text: str) -> None:
    """A connection's own line: when and how it ended, in colour; from whom to whom."""
    out.line(f"{head}: {text}", hang=4)
    out.lines[0] = out.paint(head, style) + out.lines[0][len(head) :]


def _clock(followed: Followed) -> str:
    at = followed.ended or followed.began or time.time()
    return time.strftime("%H:%M:%S", time.localtime(at)) + f".{int(at * 10) % 10}"


def _way(view: View, namespace: str, *, brief: bool) -> str:
    """`brief`: a pod by its name alone."""
    first, last = view.followed.connection.first, view.followed.connection.last
    parts = [end_text(first, source=True, name=view.client, namespace=namespace, brief=brief)]
    parts.append(end_text(first, name="" if view.door.startswith("svc/") else view.door))
    if (last.dst, last.dport) != (first.dst, first.dport):
        parts.append(end_text(last, name=view.endpoint, namespace=namespace, brief=brief))
    return " → ".join(parts)


def end_text(
    half: Tuple5,
    *,
    source: bool = False,
    name: str = "",
    namespace: str = "",
    brief: bool = False,
) -> str:
    """``web-0 10.40.0.10:8080``; `brief`: ``web-0:8080``, of a pod."""
    address, port = (half.src, half.sport) if source else (half.dst, half.dport)
    host = f"[{address}]" if address.version == 6 and port is not None else str(address)
    text = host if port is None else f"{host}:{port}"
    short = name.removeprefix(f"pod/{namespace}/").removeprefix("pod/").removeprefix("node/")
    if brief and name.startswith("pod/"):
        return short if port is None else f"{short}:{port}"
    return f"{short} {text}" if short else text


def _facts(view: View) -> list[str]:
    followed = view.followed
    facts: list[str] = []
    first, last = followed.connection.first, followed.connection.last
    answered = any(sight.replied for sight in followed.sights)
    if answered and (first.src, first.sport) != (last.src, last.sport):
        facts.append(f"seen as {end_text(last, source=True)}")
    if view.duration is not None and not view.failed:
        facts.append(f"took {duration_text(view.duration)}")
    elif followed.began is None:
        facts.append("begun before")
    half, sight = followed.connection.halves[0], followed.sights[0]
    entry = half.entry
    if sight.counted and entry.orig_bytes is not None:
        facts.append(f"{entry.orig_bytes or 0:,} bytes out, {entry.reply_bytes or 0:,} back")
    return facts


def _why(view: View) -> list[str]:
    judgement = view.followed.judgement
    lines = []
    if judgement.because:
        lines.append(judgement.because + _died(judgement))
    if view.death:
        lines.append(view.death)
    return lines


def _died(judgement: Judgement) -> str:
    if judgement.outcome is not Outcome.UNANSWERED or judgement.last is None:
        return ""
    text = f"; last seen leaving {judgement.last}"
    if judgement.next_node:
        text += f", and {judgement.next_node} has no entry of it"
    return text


def duration_text(seconds: float) -> str:
    """Times are of when events were read, which is up to some ten milliseconds after them."""
    if seconds < _COARSE:
        return f"< {_COARSE * 1000:.0f} ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _half_text(half: Half, sight: Sight) -> str:
    entry = half.entry
    out = entry.reply.inverted()
    changes = []
    if (out.dst, out.dport) != (entry.orig.dst, entry.orig.dport):
        changes.append(f"to {end_text(out)}")
    if (out.src, out.sport) != (entry.orig.src, entry.orig.sport):
        changes.append(f"from {end_text(out, source=True)}")
    parts = [" ".join(sight.states) or ("answered" if sight.replied else "no answer")]
    if changes:
        parts.append("translated " + " ".join(changes))
    return ", ".join(parts)


def _rules(rules: Sequence[Citation], told: set[str]) -> Iterator[str]:
    """Each rule's text where it has not been said: the same ones take part in each connection, and
    are read once; those in between by their places."""
    known: list[str] = []
    for cited in rules:
        position = f":{cited.position}" if cited.position else ""
        place = f"{cited.table} {cited.chain}{position}"
        whole = f"{place}  {cited.text}"
        if whole in told:
            known.append(place)
            continue
        if known:
            yield f"{', '.join(known)} (as above)"
            known = []
        if len(told) >= _TOLD:
            told.clear()
        told.add(whole)
        yield whole
    if known:
        yield f"{', '.join(known)} (as above)"
