"""``gketrace capture``: packets at pods', nodes' and a path's interfaces, with tcpdump's habits."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from gketrace.errors import UsageError
from gketrace_cli.durations import seconds_of
from gketrace_cli.options import Options

__all__ = ["CaptureOutput", "TimeFormat", "Way", "capture"]

if TYPE_CHECKING:
    from gketrace_cli.capture.lines import LineStyle


class CaptureOutput(str, Enum):
    """``--output`` of this command."""

    TEXT = "text"
    WIDE = "wide"
    JSON = "json"
    JSONL = "jsonl"
    YAML = "yaml"


class Way(str, Enum):
    """``--direction``, as the interface's own namespace sees it."""

    IN = "in"
    OUT = "out"
    INOUT = "inout"


class TimeFormat(str, Enum):
    """``--time``; tcpdump's -t, -tt, … are in parentheses."""

    CLOCK = "clock"
    NONE = "none"
    EPOCH = "epoch"
    DELTA = "delta"
    DATE = "date"
    FIRST = "first"


def capture(
    options: Options,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET… [FILTER]",
            help="pod/NAME, node/NAME (each with :INTERFACE), service/NAME; then a filter as "
            "tcpdump has it.",
            show_default=False,
        ),
    ] = None,
    trace: Annotated[
        tuple[str, str] | None,
        typer.Option("--trace", metavar="FROM TO", help="Along the path of such a packet."),
    ] = None,
    from_: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="SOURCE", help="With a service: who asks; repeatable."),
    ] = None,
    port: Annotated[
        str | None, typer.Option("--port", metavar="PORT", help="With a service: only this one.")
    ] = None,
    interface: Annotated[
        list[str] | None,
        typer.Option("--interface", "-i", metavar="NAME", help="Or any; repeatable."),
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", "-c", metavar="N", min=1, help="Ends after N packets.")
    ] = None,
    duration: Annotated[
        str | None,
        typer.Option("--duration", metavar="DURATION", help="Ends after 30s, 5m, 1h."),
    ] = None,
    most: Annotated[
        int | None,
        typer.Option("--bytes", metavar="N", min=1, help="Ends after so many bytes of a node."),
    ] = None,
    snap: Annotated[
        int | None,
        typer.Option(
            "--snapshot-length",
            "-s",
            metavar="BYTES",
            min=0,
            help="Of each packet; 0: all (default: headers).",
        ),
    ] = None,
    buffer: Annotated[
        int | None,
        typer.Option("--buffer-size", "-B", metavar="KIB", min=1, help="Of each interface's ring."),
    ] = None,
    direction: Annotated[
        Way, typer.Option("--direction", "-Q", help="Packets that come in, go out, or both.")
    ] = Way.INOUT,
    include_own: Annotated[
        bool,
        typer.Option("--include-own", help="Also the agents' own and the metadata server's."),
    ] = False,
    hardware: Annotated[
        bool, typer.Option("--hardware-timestamps", help="The device's, where it makes them.")
    ] = False,
    write: Annotated[
        str | None,
        typer.Option("--write", "-w", metavar="FILE", help="Write pcapng; - is standard output."),
    ] = None,
    per_node: Annotated[
        bool, typer.Option("--per-node", help="With -w: a file for each node.")
    ] = False,
    read: Annotated[
        str | None,
        typer.Option("--read", "-r", metavar="FILE", help="Read a file; capture nothing."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be captured where.")
    ] = False,
    connections: Annotated[
        bool,
        typer.Option("--connections", help="Only the connections that packets make, no lines."),
    ] = False,
    numeric: Annotated[bool, typer.Option("--numeric", help="No names (tcpdump's -n).")] = False,
    link: Annotated[bool, typer.Option("--link", "-e", help="Show the link header.")] = False,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="More of each packet; repeatable.")
    ] = 0,
    absolute: Annotated[
        bool, typer.Option("--absolute", "-S", help="Absolute TCP sequence numbers.")
    ] = False,
    hexadecimal: Annotated[
        int, typer.Option("--hex", "-x", count=True, help="Bytes; twice: with the link header.")
    ] = 0,
    hex_ascii: Annotated[
        int, typer.Option("--hex-ascii", "-X", count=True, help="Bytes and text.")
    ] = 0,
    ascii_: Annotated[bool, typer.Option("--ascii", help="Text (tcpdump's -A).")] = False,
    time: Annotated[
        TimeFormat, typer.Option("--time", "-t", help="How times are shown.")
    ] = TimeFormat.CLOCK,
    nanoseconds: Annotated[
        bool, typer.Option("--nanoseconds", help="Times with nine digits.")
    ] = False,
    output: Annotated[
        CaptureOutput | None, typer.Option("--output", "-o", help="Format (default: text).")
    ] = None,
) -> None:
    """Capture packets at several places at once, in time order, as lines or a pcapng file.

    For example:  gketrace capture pod/web-0 node/2jdh:cbr0 -w web.pcapng tcp port 80
    """
    from gketrace_cli.capture.targets import parse_targets

    targets, text = parse_targets(words or ())
    form = output or CaptureOutput(options.format.value)
    style = _style(numeric, link, verbose, absolute, hexadecimal, hex_ascii, ascii_, time)
    if nanoseconds:
        from dataclasses import replace

        style = replace(style, nanoseconds=True)
    if read is not None:
        if targets or trace:
            raise UsageError("-r reads a file; it has no targets", hint="leave them out")
        from gketrace_cli.capture.reading import read_back

        if connections:
            from gketrace_cli.capture.restitch import restitch

            raise typer.Exit(int(restitch(read, text, form, options, numeric=numeric)))
        raise typer.Exit(int(read_back(read, text, form, style, write=write, count=count or 0)))
    from gketrace_cli.capture.command import Wish, run

    wish = Wish(
        targets=targets,
        trace=trace,
        sources=tuple(from_ or ()),
        port=port or "",
        filter=text,
        interfaces=tuple(interface or ()),
        count=count or 0,
        seconds=seconds_of("--duration", duration) or 0.0,
        most=most or 0,
        snap=snap,
        ring_bytes=(buffer or 0) << 10,
        direction=direction.value,
        include_own=include_own,
        hardware=hardware,
        write=write or "",
        per_node=per_node,
        dry_run=dry_run,
        connections=connections,
        numeric=numeric,
    )
    raise typer.Exit(int(run(wish, options, form, style)))


def _style(
    numeric: bool,
    link: bool,
    verbose: int,
    absolute: bool,
    hexadecimal: int,
    hex_ascii: int,
    ascii_: bool,
    time: TimeFormat,
) -> LineStyle:
    from gketrace_cli.capture.lines import LineStyle, TimeStyle

    times = {
        TimeFormat.CLOCK: TimeStyle.CLOCK,
        TimeFormat.NONE: TimeStyle.NONE,
        TimeFormat.EPOCH: TimeStyle.EPOCH,
        TimeFormat.DELTA: TimeStyle.DELTA,
        TimeFormat.DATE: TimeStyle.DATE,
        TimeFormat.FIRST: TimeStyle.SINCE_FIRST,
    }
    return LineStyle(
        numeric=numeric,
        link=link,
        verbose=verbose,
        absolute=absolute,
        time=times[time],
        hex=min(hexadecimal, 2),
        hex_ascii=min(hex_ascii, 2),
        ascii=ascii_,
    )
