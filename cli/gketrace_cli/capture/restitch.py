"""``gketrace capture -r FILE --connections``: the connections of what was captured before."""

from __future__ import annotations

import itertools
from ipaddress import ip_address

from gketrace.errors import ExitCode, UsageError
from gketrace_cli.capture.planned import connections_of, print_connections
from gketrace_cli.capture.reader import CaptureReader
from gketrace_cli.capture.reading import wanted
from gketrace_cli.capture.stitching import collect_packets
from gketrace_cli.commands.capture import CaptureOutput
from gketrace_cli.names import short_names
from gketrace_cli.options import Options, Output
from gketrace_cli.render.documents import dump, envelope
from gketrace_cli.render.layout import Page
from gketrace_cli.render.layout import write as write_text

__all__ = ["restitch"]

_MOST = 2_000_000
"""Packets that are held."""


def restitch(
    source: str, text: str, form: CaptureOutput, options: Options, *, numeric: bool
) -> ExitCode:
    """Raises `UsageError`, `GketraceError`."""
    reader = CaptureReader(source)
    try:
        packets = list(itertools.islice(wanted(reader, text, 0), _MOST + 1))
    finally:
        reader.close()
    if len(packets) > _MOST:
        raise UsageError(f"{source} has more than {_MOST} packets", hint="give a filter")
    done = any(comment.startswith("clocks against") for comment in reader.comments)
    collection = collect_packets(packets, corrected=done)
    names = {} if numeric else {ip_address(a): texts[0] for a, texts in reader.names.items()}
    if form in (CaptureOutput.TEXT, CaptureOutput.WIDE):
        nodes = {packet.tap.node for packet in packets} - {""}
        page = Page.of(options, short_names(nodes))
        ordered = sorted(packets, key=lambda packet: packet.time_ns)
        said = [packet.comment for packet in ordered] if done else ()
        return print_connections(page, collection, names, said)
    body, code = connections_of(collection, names, lines=form is CaptureOutput.JSONL)
    if form is not CaptureOutput.JSONL:
        output = Output.YAML if form is CaptureOutput.YAML else Output.JSON
        write_text(dump(envelope("Capture", {"file": source, **body}), output))
    return code
