"""The summary of what was followed, as lines."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from gketrace.follow.outcome import FAILED
from gketrace.trace import Missing
from gketrace_cli.capture.connection_words import span
from gketrace_cli.follow.tally import Tally, percentiles
from gketrace_cli.render.follow import duration_text
from gketrace_cli.render.layout import Page

__all__ = ["summary_lines", "verdict"]


def verdict(title: str, tally: Tally, seconds: float, missing: Sequence[Missing]) -> str:
    """The first line."""
    count, failed = tally.connections, tally.failed
    only_failed = "--failed" in tally.only
    if not count:
        what = "no failed connection" if only_failed else "no connection"
        text = f"{title}: {what} was seen in {seconds:.0f} s"
    elif not failed:
        ones = "1 connection" if count == 1 else f"{count:,} connections"
        text = f"{title}: {ones} in {seconds:.0f} s, none failed"
    else:
        kinds = ", ".join(
            f"{number:,} {outcome.value}"
            for outcome, number in tally.outcomes.most_common()
            if outcome in FAILED
        )
        of = f"{'' if only_failed else f' of {count:,}'} connection{'' if count == 1 else 's'}"
        text = f"{title}: {failed:,}{of} failed in {seconds:.0f} s ({kinds})"
    if tally.only:
        text += f"; others than {' and '.join(tally.only)} ask for are not counted"
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
    for where in tally.behind:
        text = f"Not waited for any longer: {where} was behind with its events at the end"
        page.line(page.short(text), "yellow", hang=3)
    for where, count in tally.lost.items():
        page.line(page.short(f"Lost: {count:,} events on {where}"), "yellow", hang=3)
    if tally.unwritten:
        page.line(f"Not written, as the reader was too slow: {tally.unwritten:,} lines", "yellow")
    if tally.forgotten:
        page.line(f"Given up for want of memory before their end: {tally.forgotten:,}", "yellow")
    if tally.unheard:
        text = (
            f"Told without what a node that was behind or away had still to say: {tally.unheard:,}"
        )
        page.line(text, "yellow")
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
        page.blank()
        page.line(_durations(percent))
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


def _durations(percent: Mapping[int, float]) -> str:
    """Of connections that closed."""
    texts = {p: _at_most(value) for p, value in percent.items()}
    if len(set(texts.values())) == 1:
        return f"Of those that closed {max(texts)} % took {texts[max(texts)]}."
    return f"Of those that closed {', '.join(f'{p} % took {t}' for p, t in texts.items())}."


def _at_most(seconds: float) -> str:
    text = duration_text(seconds)
    return text if text.startswith("<") else f"{text} at most"
