"""``gketrace capture`` at work: targets → taps → packets → lines or files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gketrace.errors import ExitCode, GketraceError, UsageError
from gketrace.packet import IPAddress
from gketrace_cli.capture.filtering import FilteredStream, check_filter, join_filters
from gketrace_cli.capture.lines import Lines, LineStyle
from gketrace_cli.capture.planning import (
    NodeTaps,
    Planning,
    draw_plan,
    names_of,
    node_taps,
    pids_of,
    plan_document,
    plan_service,
    plan_trace,
)
from gketrace_cli.capture.report import (
    JsonSink,
    LineSink,
    announce,
    summary_document,
    tell_outcome,
)
from gketrace_cli.capture.running import Outcome, Sink, keep_memory, run_capture, tell
from gketrace_cli.capture.stream import Event, Started
from gketrace_cli.capture.targets import ParsedTarget, plain_taps
from gketrace_cli.commands.capture import CaptureOutput
from gketrace_cli.names import short_names
from gketrace_cli.options import Options, Output
from gketrace_cli.render.documents import dump, envelope
from gketrace_cli.render.layout import Page
from gketrace_cli.render.layout import write as write_text
from gketrace_cli.session import Session
from gketrace_proto.v1alpha1 import capture_pb2 as pb

if TYPE_CHECKING:
    from gketrace_cli.capture.files import FileSink
    from gketrace_cli.capture.planned import PlannedCapture

__all__ = ["Wish", "run"]

_ALL: Final = 262_144
"""tcpdump's snap length for whole packets."""
_DIRECTIONS: Final = {
    "in": pb.CAPTURE_DIRECTION_IN,
    "out": pb.CAPTURE_DIRECTION_OUT,
    "inout": pb.CAPTURE_DIRECTION_UNSPECIFIED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """The command line."""

    targets: tuple[ParsedTarget, ...]
    trace: tuple[str, str] | None
    sources: tuple[str, ...]
    port: str
    filter: str
    interfaces: tuple[str, ...]
    count: int
    seconds: float
    most: int
    snap: int | None
    ring_bytes: int
    direction: str
    include_own: bool
    hardware: bool
    write: str
    per_node: bool
    dry_run: bool
    connections: bool
    """Only the connections that packets make, no lines of packets."""
    numeric: bool

    @property
    def named_interfaces(self) -> frozenset[str]:
        return frozenset((*self.interfaces, *(one.interface for one in self.targets))) - {""}

    @property
    def snap_length(self) -> int:
        """As requests have it; 0: the agent's choice, headers."""
        return 0 if self.snap is None else min(self.snap or _ALL, _ALL)


def run(wish: Wish, options: Options, form: CaptureOutput, style: LineStyle) -> ExitCode:
    """Raises `GketraceError`."""
    _check(wish, form)
    unchecked = check_filter(wish.filter, wish.named_interfaces) if wish.dry_run else ""
    begun = False
    try:
        with Session(options) as session:
            planning = _plan(session, wish)
            taps = _taps(session, wish, planning)
            session.progress.clear()
            if wish.dry_run:
                return _show_plan(session, wish, options, form, planning, taps, unchecked)
            for gap in () if planning is None else planning.missing:
                tell(f"not seen: {gap}")
            for note in () if planning is None else planning.notes:
                tell(note)
            session.reach(list(taps))
            begun = True
            return _capture(session, wish, options, form, style, taps, planning)
    except KeyboardInterrupt:
        if not begun:
            tell("interrupted before a capture began: nothing was captured")
        raise


def _check(wish: Wish, form: CaptureOutput) -> None:
    if not wish.targets and wish.trace is None:
        given = f", and {wish.filter.split()[0][:100]!r} is none" if wish.filter.split() else ""
        raise UsageError(
            f"capture needs a target{given}",
            hint="pod/NAME, node/NAME, service/NAME or --trace FROM TO",
        )
    if wish.connections and wish.targets and wish.targets[0].kind != "service":
        raise UsageError(
            "connections are of a service or a trace", hint="capture a service, or --trace FROM TO"
        )
    if wish.per_node and not wish.write:
        raise UsageError("--per-node is about files", hint="give -w FILE")
    if wish.write == "-" and form is not CaptureOutput.TEXT:
        raise UsageError("-w - and -o both want standard output")
    services = [one for one in wish.targets if one.kind == "service"]
    if (wish.sources or wish.port) and not services:
        raise UsageError("--from and --port are about a service")
    if services and (len(wish.targets) > 1 or wish.trace is not None):
        raise UsageError("a service is captured by itself", hint="leave the other targets out")
    if (services or wish.trace is not None) and wish.interfaces:
        raise UsageError("where a path is captured its walk says", hint="leave -i out")
    if wish.trace is not None and wish.targets:
        raise UsageError("a trace is captured by itself", hint="leave the other targets out")


def _plan(session: Session, wish: Wish) -> Planning | None:
    """For what is captured along its paths; None: named places."""
    if wish.trace is not None:
        return plan_trace(session, *wish.trace)
    first = wish.targets[0]
    if first.kind != "service":
        return None
    return plan_service(session, first.name, sources=wish.sources, port=wish.port)


def _taps(session: Session, wish: Wish, planning: Planning | None) -> dict[str, NodeTaps]:
    direction = _DIRECTIONS[wish.direction]
    if planning is None:
        found = plain_taps(
            session,
            wish.targets,
            interfaces=wish.interfaces,
            text=wish.filter,
            snap_length=wish.snap_length,
            direction=direction,
        )
        by_node: dict[str, list[int]] = {}
        for place, tap in enumerate(found):
            by_node.setdefault(tap.node, []).append(place)
        return {
            node: NodeTaps(
                planned=(),
                taps=tuple(found[place].request for place in places),
                descriptions=tuple(found[place].description for place in places),
            )
            for node, places in by_node.items()
        }
    taps = node_taps(session, planning.plan)
    for planned in taps.values():
        for request in planned.taps:
            request.snap_length, request.direction = wish.snap_length, direction
            request.filter = join_filters(request.filter, wish.filter)
    return taps


def _show_plan(
    session: Session,
    wish: Wish,
    options: Options,
    form: CaptureOutput,
    planning: Planning | None,
    taps: Mapping[str, NodeTaps],
    unchecked: str,
) -> ExitCode:
    """`unchecked`: why the filter was not looked at; empty: it was, or there is none."""
    code = ExitCode.PARTIAL if planning is not None and planning.missing else ExitCode.OK
    if planning is not None:
        pids = pids_of(session, planning.plan)
        documents: Any = plan_document(planning, pids, wish.snap_length, wish.filter)
    else:
        documents = [
            {"node": node, "target": text, "interface": tap.interface, "filter": tap.filter}
            for node, one in taps.items()
            for tap, text in zip(one.taps, one.descriptions, strict=True)
        ]
    if form in (CaptureOutput.JSON, CaptureOutput.JSONL, CaptureOutput.YAML):
        output = Output.YAML if form is CaptureOutput.YAML else Output.JSON
        body = {"taps": documents, "filterUnchecked": unchecked or None}
        write_text(dump(envelope("CapturePlan", body), output))
        return code
    page = Page.of(options, short_names(node.name for node in session.nodes))
    if planning is not None:
        draw_plan(page, planning, pids, wish.snap_length, wish.filter)
    else:
        for one in documents:
            what = one["filter"] or "all packets"
            page.line(f"{one['interface']} of {one['target']} on node {one['node']}: {what}")
    if unchecked:
        page.blank()
        page.entry("not checked", f"the filter: {unchecked}", "yellow")
    write_text(page.text())
    return code


def _requests(wish: Wish, taps: Mapping[str, NodeTaps]) -> dict[str, pb.CaptureRequest]:
    limits = pb.CaptureLimits(seconds=wish.seconds, packets=wish.count, bytes=wish.most)
    made = {
        node: pb.CaptureRequest(
            taps=one.taps,
            limits=limits,
            ring_bytes=wish.ring_bytes,
            include_own=wish.include_own,
            hardware_timestamps=wish.hardware,
        )
        for node, one in taps.items()
    }
    if wish.write:
        from gketrace_cli.capture.files import unhurried

        for request in made.values():
            unhurried(request, wish.write, alone=len(made) == 1)
    return made


def _capture(
    session: Session,
    wish: Wish,
    options: Options,
    form: CaptureOutput,
    style: LineStyle,
    taps: Mapping[str, NodeTaps],
    planning: Planning | None,
) -> ExitCode:
    names = _names(session)
    kept: list[dict[str, Any]] = []
    file: FileSink | None = None
    sinks: list[Sink] = []
    planned: PlannedCapture | None = None
    if planning is not None:
        from gketrace_cli.capture.planned import PlannedCapture
        from gketrace_cli.capture.tracking import Tracking

        tracking = Tracking(session.fleet, planning.plan, tell)
        tracking.start()
        planned = PlannedCapture(planning.plan, tracking)
    if len(taps) > 1 and not wish.connections and (planned is None or wish.write in ("", "-")):
        later = "" if planned is None else "; connections have them corrected"
        tell(f"times are by each node's own clock{later}")
    if wish.write:
        from gketrace_cli.capture.files import FileSink

        keep_memory()
        texts = {address: (name,) for address, name in names.items()}

        def make(comments: Callable[[], Sequence[str]] = tuple, suffix: str = ".part") -> FileSink:
            nonlocal file
            file = FileSink(
                wish.write, per_node=wish.per_node, comments=comments, names=texts, suffix=suffix
            )
            return file

        sinks.append(make() if planned is None else planned.files(wish.write, make))
    elif not wish.connections:
        sinks.append(_printer(session, form, style, names, kept))

    said: set[str] = set()

    def watch(event: Event) -> None:
        if planned is not None:
            planned.collector.feed(event)
        if isinstance(event, Started):
            for tap in event.taps:
                announce(tap, said, asked_snap=wish.snap is not None)

    descriptions = {node: one.descriptions for node, one in taps.items()}
    stream = FilteredStream(
        session.fleet, _requests(wish, taps), descriptions=descriptions, typed=wish.filter
    )
    try:
        with stream:
            outcome = run_capture(stream, sinks, count=wish.count, watch=watch)
    except GketraceError:
        if file is not None:
            file.abandon()
        raise
    short = short_names(node.name for node in session.nodes)
    page = Page.of(options, short)
    return _finish(outcome, file, planned, names, page, wish, form, kept)


def _printer(
    session: Session,
    form: CaptureOutput,
    style: LineStyle,
    names: Mapping[IPAddress, str],
    kept: list[dict[str, Any]],
) -> Sink:
    short = short_names(node.name for node in session.nodes)
    if form in (CaptureOutput.TEXT, CaptureOutput.WIDE):
        wide = form is CaptureOutput.WIDE
        lines = Lines(
            style=style,
            short=str if wide else lambda name: short.get(name, name),
            names={} if style.numeric else names,
        )
        return LineSink(lines)
    plain = Lines(style=style, names={} if style.numeric else names, place=False)
    return JsonSink(plain, None if form is CaptureOutput.JSONL else kept.append)


def _finish(
    outcome: Outcome,
    file: FileSink | None,
    planned: PlannedCapture | None,
    names: Mapping[IPAddress, str],
    page: Page,
    wish: Wish,
    form: CaptureOutput,
    kept: Sequence[dict[str, Any]],
) -> ExitCode:
    tell_outcome(outcome)
    if outcome.failures and not outcome.taps:
        raise next(iter(outcome.failures.values()))
    shown = {} if wish.numeric else names
    code = ExitCode.OK
    body = summary_document(outcome, () if file is None else file.paths)
    if planned is not None:
        from gketrace_cli.capture.planned import connections_of, print_connections

        if form in (CaptureOutput.TEXT, CaptureOutput.WIDE):
            if wish.write != "-":
                code = print_connections(page, planned.collection, shown)
        else:
            lines = form is CaptureOutput.JSONL
            found, code = connections_of(planned.collection, shown, lines=lines)
            body |= found
    if form in (CaptureOutput.JSON, CaptureOutput.YAML):
        if file is None:
            body["packets"] = list(kept)
        output = Output.YAML if form is CaptureOutput.YAML else Output.JSON
        write_text(dump(envelope("Capture", body), output))
    return outcome.code if outcome.code is not ExitCode.OK else code


def _names(session: Session) -> dict[IPAddress, str]:
    """What addresses are called.  Without permission to list some of it, the rest."""
    try:
        services = session.cluster.services()
    except GketraceError as error:
        tell(f"Services are not named: {error.message}")
        services = ()
    return names_of(session.nodes, session.pods.known, services)
