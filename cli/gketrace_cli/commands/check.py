"""``gketrace check``: what is wrong in the cluster; ``gketrace explain``: what a code means."""

from __future__ import annotations

import time
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from gketrace.errors import ExitCode, UsageError
from gketrace_cli.options import Options, Output

if TYPE_CHECKING:
    from gketrace.findings.model import Finding
    from gketrace_cli.checking.whole import Checked

__all__ = ["CheckOutput", "Least", "check", "explain"]


_GAPS: Final = 5
"""What was not seen, of which text names so many; ``wide`` names all."""


class CheckOutput(str, Enum):
    """``--output`` of check."""

    TEXT = "text"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"
    SARIF = "sarif"


class Least(str, Enum):
    """``--severity``."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


def check(
    options: Options,
    output: Annotated[
        CheckOutput | None,
        typer.Option("--output", "-o", help="Output format (default: text)."),
    ] = None,
    severity: Annotated[
        Least, typer.Option("--severity", help="Leave out what is less than this.")
    ] = Least.INFO,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="CODE", help="Leave out this finding; repeatable."),
    ] = None,
    ignore_file: Annotated[
        str | None,
        typer.Option(
            "--ignore-file",
            metavar="FILE",
            help="Lines of CODE [SUBJECT] to leave out (default: .gketrace-ignore, if there).",
        ),
    ] = None,
    watch: Annotated[
        float | None,
        typer.Option(
            "--watch", metavar="SECONDS", min=1.0, help="Check again and again; print changes."
        ),
    ] = None,
) -> None:
    """Look at all nodes and Services, and say what is wrong, with evidence and remedy.

    For example:  gketrace check --severity warning
    """
    from dataclasses import replace

    from gketrace_cli.checking.whole import check_world, read_ignores, read_world
    from gketrace_cli.session import Session

    form = output or CheckOutput((options.output or Output.TEXT).value)
    if form is not CheckOutput.SARIF:
        options = replace(options, output=Output(form.value))
    if watch is not None and options.bundle is not None:
        raise UsageError("a bundle holds one moment: it cannot be watched")
    ignores = read_ignores(ignore or (), ignore_file)
    least = _severity(severity)
    before: tuple[Finding, ...] | None = None
    while True:
        started = time.monotonic()
        with Session(options) as session:
            world, left_out = read_world(session)
            checked = check_world(world, left_out, ignores, least)
            context = session.cluster.context
            session.progress.clear()
        seconds = time.monotonic() - started
        if before is None:
            _show(options, form, checked, context, seconds)
        else:
            _show_changes(options, form, before, checked)
        if watch is None:
            raise typer.Exit(int(checked.code))
        before = checked.findings
        time.sleep(max(0.0, watch - seconds))


def _severity(least: Least) -> Any:
    from gketrace.findings.model import Severity

    return Severity(least.value)


def _verdict(checked: Checked) -> tuple[str, str]:
    """(first line, style)."""
    from gketrace_cli.render.findings import count_text

    world = checked.world
    seen = f"{len(world.sights)} of {len(world.nodes)} nodes"
    if len(world.sights) == len(world.nodes):
        seen = f"{len(world.nodes)} nodes"
    text = (
        f"{seen}, {len(world.services)} Services, {len(world.pods)} pods: "
        f"{count_text(checked.findings)}"
    )
    if checked.ignored:
        text += f"; {checked.ignored} ignored"
    if checked.code is ExitCode.PARTIAL:
        text += "; not everything was seen"
    style = {ExitCode.OK: "green", ExitCode.BROKEN: "red"}.get(checked.code, "yellow")
    return f"{text}.", style


def _notes(checked: Checked) -> list[str]:
    probes = sum(1 for way in checked.world.ways if way.stands_for)
    ways = f"{len(checked.world.ways) - probes} ways"
    if probes:
        ways += f" and {probes} health-check probes"
    text = f"{ways} were traced over what was read of the nodes"
    text += f"; {checked.left_out} more were not." if checked.left_out else "."
    notes = [text]
    if beyond := checked.beyond:
        whose = dict.fromkeys(way.service or way.path.target for way in beyond)
        notes.append(
            f"{len(beyond)} of them end where no node sees them, at an endpoint outside the "
            f"cluster or in a sidecar: {', '.join(whose)}."
        )
    if probes:
        notes.append("VPC firewall rules are not visible here.")
    return notes


def _document(checked: Checked) -> dict[str, Any]:
    from gketrace_cli.checking.whole import missing_of
    from gketrace_cli.render.documents import envelope, missing_document
    from gketrace_cli.render.findings import finding_documents

    world = checked.world
    return envelope(
        "Check",
        {
            "verdict": _verdict(checked)[0],
            "complete": checked.code is not ExitCode.PARTIAL,
            "missing": missing_document(missing_of(checked)),
            "notes": _notes(checked),
            "counts": {
                "nodes": len(world.nodes),
                "nodesSeen": len(world.sights),
                "services": len(world.services),
                "pods": len(world.pods),
                "waysTraced": len(world.ways),
                "waysLeftOut": checked.left_out,
                "ignored": checked.ignored,
            },
            "findings": finding_documents(checked.findings),
        },
    )


def _show(
    options: Options, form: CheckOutput, checked: Checked, context: str, seconds: float
) -> None:
    import json

    from gketrace_cli.checking.whole import missing_of
    from gketrace_cli.names import short_names
    from gketrace_cli.render.documents import dump
    from gketrace_cli.render.findings import draw_findings, sarif_document
    from gketrace_cli.render.layout import Page, write

    if form is CheckOutput.SARIF:
        write(json.dumps(sarif_document(checked.findings, context), indent=2) + "\n")
        return
    if options.format.machine:
        write(dump(_document(checked), options.format))
        return
    page = Page.of(options, short_names(node.name for node in checked.world.nodes))
    text, style = _verdict(checked)
    page.line(text, style, "bold")
    gaps = missing_of(checked)
    if gaps:
        page.blank()
        shown = gaps if page.wide else gaps[:_GAPS]
        for gap in shown:
            page.line(page.short(f"Not seen: {gap}"), "yellow", hang=3)
        if len(gaps) > len(shown):
            more = f"Not seen: {len(gaps) - len(shown)} more like these; -o wide tells them all."
            page.line(more, "yellow", hang=3)
    draw_findings(page, checked.findings)
    page.blank()
    for note in _notes(checked):
        page.line(note, "dim", hang=2)
    if checked.findings:
        page.line("gketrace explain CODE tells more about a finding.", "dim")
    write(page.text())


def _show_changes(
    options: Options, form: CheckOutput, before: tuple[Finding, ...], checked: Checked
) -> None:
    import json
    from datetime import datetime

    from gketrace_cli.names import short_names
    from gketrace_cli.render.findings import draw_findings, finding_documents
    from gketrace_cli.render.layout import Page, write

    known = {(one.code, one.cause): one for one in before}
    now = {(one.code, one.cause): one for one in checked.findings}
    new = [one for key, one in now.items() if key not in known]
    gone = [one for key, one in known.items() if key not in now]
    if not new and not gone:
        return
    at = datetime.now().astimezone()
    if form in (CheckOutput.JSON, CheckOutput.SARIF, CheckOutput.YAML):
        change = {
            "kind": "CheckChange",
            "at": at.isoformat(),
            "new": finding_documents(new),
            "gone": finding_documents(gone),
        }
        write(json.dumps(change) + "\n")
        return
    page = Page.of(options, short_names(node.name for node in checked.world.nodes))
    page.line(f"{at:%H:%M:%S}  {len(new)} new, {len(gone)} gone", "bold")
    for one in gone:
        page.line(page.short(f"gone: {one.code} {one.text}."), "green", hang=3)
    draw_findings(page, new)
    write("\n" + page.text())


def explain(
    options: Options,
    code: Annotated[
        str | None, typer.Argument(metavar="CODE", help="GKT-301, or 301; none: lists them all.")
    ] = None,
) -> None:
    """Show what a finding means, how it is detected, how to confirm and how to fix it.

    For example:  gketrace explain GKT-301
    """
    from gketrace.findings.registry import CODES, Family, code_of
    from gketrace_cli.checking.pages import page_of
    from gketrace_cli.render.documents import dump, envelope
    from gketrace_cli.render.layout import Page, write

    chosen = CODES if code is None else (code_of(code),)
    if options.format.machine:
        listed = [
            {
                "code": one.code,
                "title": one.title,
                "family": one.family.value,
                "severity": one.severity.value,
                "page": page_of(one.code),
            }
            for one in chosen
        ]
        write(dump(envelope("Explanation", {"codes": listed}), options.format))
        return
    if code is not None:
        write(page_of(chosen[0].code))
        return
    page = Page.of(options)
    for family in Family:
        page.blank()
        page.line(family.value, "bold")
        for one in chosen:
            if one.family is family:
                page.entry(one.code, f"{one.title} ({one.severity.value})", column=9)
    write(page.text())
