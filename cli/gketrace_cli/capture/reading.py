"""``gketrace capture -r``: a file's packets as lines, documents, or another file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gketrace.capture.packets import CapturedPacket
from gketrace.errors import ExitCode, GketraceError
from gketrace_cli.capture.batch import batch_from_packets
from gketrace_cli.capture.lines import Lines, LineStyle
from gketrace_cli.capture.merge import Chunk
from gketrace_cli.capture.offline import OfflineFilter
from gketrace_cli.capture.reader import CaptureReader
from gketrace_cli.capture.report import JsonSink, LineSink, link_name
from gketrace_cli.capture.running import Outcome, Sink, TapOutcome, tell
from gketrace_cli.commands.capture import CaptureOutput
from gketrace_cli.options import Output
from gketrace_cli.render.documents import dump, envelope
from gketrace_cli.render.layout import write as write_text

__all__ = ["read_back", "wanted"]

_TOGETHER = 512
"""Packets that are handed on together."""


def read_back(
    source: str,
    text: str,
    form: CaptureOutput,
    style: LineStyle,
    *,
    write: str | None,
    count: int,
) -> ExitCode:
    """Raises `UsageError`, `GketraceError`."""
    reader = CaptureReader(source)
    kept: list[dict[str, Any]] = []
    outcome = Outcome()
    sink: Sink | None = None
    try:
        for packets in _runs(wanted(reader, text, count)):
            tap = packets[0].tap
            if sink is None:
                tell(f"reading from file {source}, link-type {link_name(tap.link_type)}")
                sink = _sink(reader, form, style, write, kept)
            if tap not in outcome.taps:
                outcome.taps[tap] = TapOutcome()
                sink.started((tap,))
            outcome.taps[tap].captured += len(packets)
            sink.write(Chunk(batches=(batch_from_packets(tap, packets),)))
    except GketraceError as error:
        if sink is None:
            raise
        outcome.failures[""] = error
        tell(str(error))
    finally:
        reader.close()
    if sink is None:
        sink = _sink(reader, form, style, write, kept)
    for tap, one in outcome.taps.items():
        one.statistics = reader.statistics.get(tap, one.statistics)
    sink.finish(outcome)
    if form in (CaptureOutput.JSON, CaptureOutput.YAML) and not write:
        output = Output.YAML if form is CaptureOutput.YAML else Output.JSON
        body = {"file": source, "comments": reader.comments, "packets": kept}
        write_text(dump(envelope("Capture", body), output))
    return ExitCode.PARTIAL if outcome.failures else ExitCode.OK


def wanted(reader: CaptureReader, text: str, count: int) -> Iterator[CapturedPacket]:
    filters: dict[int, OfflineFilter] = {}
    taken = 0
    for packet in reader:
        if text:
            link_type = packet.tap.link_type
            if link_type not in filters:
                filters[link_type] = OfflineFilter(link_type, text)
            if not filters[link_type].matches(packet):
                continue
        yield packet
        taken += 1
        if taken == count:
            return


def _runs(packets: Iterator[CapturedPacket]) -> Iterator[list[CapturedPacket]]:
    """Packets of one tap that stand together.  What was read before an error comes before it."""
    run: list[CapturedPacket] = []
    try:
        for packet in packets:
            if run and (run[0].tap != packet.tap or len(run) >= _TOGETHER):
                yield run
                run = []
            run.append(packet)
    except GketraceError:
        if run:
            yield run
        raise
    if run:
        yield run


def _sink(
    reader: CaptureReader,
    form: CaptureOutput,
    style: LineStyle,
    write: str | None,
    kept: list[dict[str, Any]],
) -> Sink:
    if write:
        from gketrace_cli.capture.files import FileSink

        names = {address: tuple(texts) for address, texts in reader.names.items()}
        return FileSink(write, comments=lambda: reader.comments, names=names)
    names_shown = {} if style.numeric else {a: texts[0] for a, texts in reader.names.items()}
    named = any(tap.node for tap in reader.taps)
    if form in (CaptureOutput.TEXT, CaptureOutput.WIDE):
        return LineSink(Lines(style=style, names=names_shown, place=named))
    lines = Lines(style=style, names=names_shown, place=False)
    return JsonSink(lines, None if form is CaptureOutput.JSONL else kept.append)
