"""Followed connections as lines, and their summary."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from gketrace.connections import Half
from gketrace.follow.entries import Sight
from gketrace.follow.joiner import Followed, Phase
from gketrace.follow.outcome import FAILED, Judgement, Outcome
from gketrace.packet import Tuple5
from gketrace.trace import Citation, Missing
from gketrace_cli.capture.connections import span
from gketrace_cli.follow.packets import SeenPackets
from gketrace_cli.follow.seen import packet_lines
from gketrace_cli.follow.tally import Tally, percentiles
from gketrace_cli.follow.view import View
from gketrace_cli.render.layout import Page

__all__ = ["alone_lines", "connection_lines", "end_text", "summary_lines", "verdict"]

_COARSE = 0.05
"""Seconds: what durations are known to."""
_STYLES = {Outcome.CLOSED: "green", Outcome.OPEN: "cyan", Outcome.OPENING: "cyan"}


def connection_lines(page: Page, view: View, namespace: str) -> str:
    """One connection: a line, and for failures what is known of where it died.

    `page` gives colours, names and width; nothing is kept in it.
    """
    out = Page(colored=page.colored, wide=page.wide, width=page.width, names=page.names)
    followed = view.followed
    judgement = followed.judgement
    word = judgement.outcome.value
    if followed.phase is Phase.STILL_OPEN and judgement.outcome is Outcome.OPEN:
        word = "still open"
    style = "red" if judgement.failed else _STYLES.get(judgement.outcome, "yellow")
    head = f"{_clock(followed)} {word.upper() if judgement.failed else word}"
    way = _way(view, namespace)
    facts = ", ".join(_facts(view))
    text = page.short(f"{way}  {facts}" if facts else way)
    out.lines.append(f"{out.paint(head, style)}  {text}")
    for line in _why(view):
        out.line(page.short(line), indent=9, hang=2)
    if view.packets is not None:
        for line in packet_lines(view.packets):
            out.line(page.short(line), indent=9, hang=2)
    for remark in view.remarks:
        out.line(page.short(remark), "yellow", indent=9, hang=2)
    if page.wide:
        for half, sight, rules in zip(
            followed.connection.halves, followed.sights, view.rules, strict=True
        ):
            out.entry(str(half.place), _half_text(half, sight), indent=9, column=10)
            for rule in rules:
                out.line(_rule(rule), "dim", indent=21)
    return "\n".join(out.lines) + "\n"


def alone_lines(page: Page, seen: SeenPackets, judgement: Judgement) -> str:
    """One that only packets tell."""
    out = Page(colored=page.colored, wide=page.wide, width=page.width, names=page.names)
    at = seen.connection.begin / 1e9
    head = f"{time.strftime('%H:%M:%S', time.localtime(at))}.{int(at * 10) % 10} "
    first = seen.connection.first
    way = f"{end_text(first, source=True)} → {end_text(first)}"
    out.lines.append(f"{out.paint(head + judgement.outcome.value.upper(), 'red')}  {way}")
    for line in (judgement.because, *packet_lines(seen)):
        out.line(page.short(line), indent=9, hang=2)
    return "\n".join(out.lines) + "\n"


def _clock(followed: Followed) -> str:
    at = followed.ended or followed.began or time.time()
    return time.strftime("%H:%M:%S", time.localtime(at)) + f".{int(at * 10) % 10}"


def _way(view: View, namespace: str) -> str:
    first, last = view.followed.connection.first, view.followed.connection.last
    parts = [end_text(first, source=True, name=view.client, namespace=namespace)]
    parts.append(end_text(first, name="" if view.door.startswith("svc/") else view.door))
    if (last.dst, last.dport) != (first.dst, first.dport):
        parts.append(end_text(last, name=view.endpoint, namespace=namespace))
    return " → ".join(parts)


def end_text(half: Tuple5, *, source: bool = False, name: str = "", namespace: str = "") -> str:
    """``web-0 10.40.0.10:8080``."""
    address, port = (half.src, half.sport) if source else (half.dst, half.dport)
    host = f"[{address}]" if address.version == 6 and port is not None else str(address)
    text = host if port is None else f"{host}:{port}"
    short = name.removeprefix(f"pod/{namespace}/").removeprefix("pod/").removeprefix("node/")
    return f"{short} {text}" if short else text


def _facts(view: View) -> list[str]:
    followed = view.followed
    facts: list[str] = []
    first, last = followed.connection.first, followed.connection.last
    answered = any(sight.replied for sight in followed.sights)
    if answered and (first.src, first.sport) != (last.src, last.sport):
        facts.append(f"seen as {end_text(last, source=True)}")
    if view.duration is not None and not view.failed:
        facts.append(duration_text(view.duration))
    elif followed.began is None:
        facts.append("begun before")
    half, sight = followed.connection.halves[0], followed.sights[0]
    entry = half.entry
    if sight.counted and entry.orig_bytes is not None:
        facts.append(f"{entry.orig_bytes}/{entry.reply_bytes} bytes out/back")
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


def _at_most(seconds: float) -> str:
    text = duration_text(seconds)
    return text if text.startswith("<") else f"{text} at most"


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


def _rule(cited: Citation) -> str:
    place = f":{cited.position}" if cited.position else ""
    return f"{cited.table} {cited.chain}{place}  {cited.text}"


# documents


def verdict(title: str, tally: Tally, seconds: float, missing: Sequence[Missing]) -> str:
    """The first line."""
    count, failed = tally.connections, tally.failed
    if not count:
        text = f"{title}: no connection was seen in {seconds:.0f} s"
    elif not failed:
        ones = "1 connection" if count == 1 else f"{count:,} connections"
        text = f"{title}: {ones} in {seconds:.0f} s, none failed"
    else:
        kinds = ", ".join(
            f"{number:,} {outcome.value}"
            for outcome, number in tally.outcomes.most_common()
            if outcome in FAILED
        )
        text = f"{title}: {failed:,} of {count:,} connections failed in {seconds:.0f} s ({kinds})"
    if missing or tally.blind:
        text += "; not everything was seen"
    return text + "."


def summary_lines(
    page: Page,
    title: str,
    tally: Tally,
    seconds: float,
    missing: Sequence[Missing],
    names: Mapping[str, str],
) -> None:
    page.blank()
    bad = tally.failed > 0
    style = "yellow" if missing or tally.blind else "red" if bad else "green"
    page.line(verdict(title, tally, seconds, missing), style, "bold")
    for item in missing:
        page.line(page.short(f"Not seen: {item}"), "yellow", hang=3)
    for gap in tally.gaps:
        end = "and it did not come back" if gap.end is None else f"for {gap.end - gap.begin:.1f} s"
        when = time.strftime("%H:%M:%S", time.localtime(gap.begin))
        page.line(page.short(f"Gap: {gap.where} from {when} {end}: {gap.why}"), "yellow", hang=3)
    for where, count in tally.lost.items():
        page.line(page.short(f"Lost: {count:,} events on {where}"), "yellow", hang=3)
    if tally.unwritten:
        page.line(f"Not written, as the reader was too slow: {tally.unwritten:,} lines", "yellow")
    if tally.forgotten:
        page.line(f"Given up for want of memory before their end: {tally.forgotten:,}", "yellow")
    if tally.failures:
        page.blank()
        page.line("Failures", "bold")
        for one in sorted(tally.failures.values(), key=lambda f: -f.count):
            parts = [one.because, one.death]
            why = "; ".join(part for part in parts if part)
            name = names.get(one.where, "")
            where = f"{name} {one.where}" if name else one.where
            page.entry(
                f"{one.count:,} ×",
                page.short(f"{one.outcome.value} {where}{f': {why}' if why else ''}"),
                indent=2,
                column=9,
            )
    if tally.shares:
        page.blank()
        page.line("Endpoints", "bold")
        page.lines.append(page.paint("  connections   share  by rules", "dim"))
        whole = tally.shared
        for end, share in tally.ordered():
            expected = "not known"
            if tally.with_odds:
                expected = f"{share.expected / tally.with_odds:.1%}"
            name = names.get(end, "")
            label = f"{name} {end}" if name else end
            part = f"{share.connections / whole:.1%}" if whole else ""
            page.lines.append(f"  {share.connections:>11,}  {part:>6}  {expected:>8}  {label}")
    percent = tally.percentiles()
    if percent:
        texts = (f"{p} % took {_at_most(value)}" for p, value in percent.items())
        page.blank()
        page.line(f"Of those that closed {', '.join(texts)}.")
    if tally.hops:
        page.blank()
        page.line("Hops, by packets (50 %, 90 %, 99 %)", "bold")
        for (before, here), times in tally.hops.items():
            spans = ", ".join(span(value) for value in percentiles(times.nanoseconds).values())
            doubt = "; clocks not known" if times.bound is None else ""
            if times.bound:
                doubt = f" ± {span(times.bound)}"
            page.line(page.short(f"{before} → {here}: {spans}{doubt}"), indent=2, hang=2)
    for where, count in tally.lost_packets.items():
        page.line(page.short(f"Lost: {count:,} packets on {where}"), "yellow", hang=3)
    if tally.dropped_packets:
        page.line(
            f"Dropped for want of memory before they were looked at: {tally.dropped_packets:,} "
            "packets",
            "yellow",
        )
    if tally.passed_over:
        page.line(
            f"{tally.passed_over:,} connections that ended well came too fast for their packets "
            "to be looked at.",
            "dim",
        )
    if tally.beside:
        page.line(
            f"{tally.beside:,} more went straight to endpoints, not through the Service.", "dim"
        )
    for note in tally.notes:
        page.line(page.short(note), "dim", hang=2)
