"""``gketrace diff``: what changed between two bundles, and what it changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gketrace.errors import ExitCode
from gketrace_cli.options import Options

if TYPE_CHECKING:
    from gketrace_cli.bundle.compare import Compared
    from gketrace_cli.bundle.differences import Difference
    from gketrace_cli.render.layout import Page

__all__ = ["diff"]

_SHOWN = 20
"""Differences of one part that are drawn; JSON has all."""


def diff(
    options: Options,
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="A bundle.")],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="A later one.")],
) -> None:
    """Name the rule, route, entry, sysctl, link or object that changed a verdict; then all else
    that differs.

    Exit status 1 when a verdict differs.

    For example:  gketrace diff before.gkt after.gkt
    """
    from gketrace_cli.bundle.compare import compare, open_bundle
    from gketrace_cli.render.documents import dump, envelope
    from gketrace_cli.render.layout import Page, write

    found = compare(open_bundle(before, options), open_bundle(after, options))
    if options.format.machine:
        write(dump(envelope("Difference", diff_document(found)), options.format))
    else:
        page = Page.of(options)
        _draw(page, found)
        write(page.text())
    raise typer.Exit(int(ExitCode.BROKEN if found.verdicts else ExitCode.OK))


def diff_document(found: Compared) -> dict[str, Any]:
    """docs/schema/difference.json."""
    return {
        "verdicts": [
            {
                "name": one.name,
                "before": one.before or None,
                "after": one.after or None,
                "causes": [_document(cause) for cause in one.causes],
            }
            for one in found.verdicts
        ],
        "differences": [
            {**_document(one), "changedVerdict": one.part in found.causes}
            for one in found.differences
        ],
        "notTried": found.untried,
    }


def _document(one: Difference) -> dict[str, Any]:
    return {
        "node": one.part.node or None,
        "pod": one.part.pod or None,
        "noun": one.part.noun,
        "kind": one.kind,
        "name": one.name,
        "table": one.table or None,
        "before": one.before or None,
        "after": one.after or None,
    }


def _draw(page: Page, found: Compared) -> None:
    if not found.differences:
        page.line("Nothing differs that matters to packets.", "bold")
        return
    if not found.verdicts:
        page.line("No verdict differs.", "bold")
    causes = [one for one in found.differences if one.part in found.causes]
    if causes:
        page.line("What changed the verdict:", "bold")
        _draw_some(page, causes)
    if found.verdicts:
        page.blank()
        page.line("Verdicts that differ:", "bold")
        for verdict in found.verdicts:
            change = f"{verdict.before or 'not there'} → {verdict.after or 'not there'}"
            unknown = "" if verdict.causes else "  (no single difference explains it)"
            page.line(f"{verdict.name}: {change}{unknown}", indent=3, hang=2)
    rest = [one for one in found.differences if one.part not in found.causes]
    if rest:
        page.blank()
        page.line("Other differences:", "bold")
        _draw_some(page, rest)
    if found.untried:
        page.line(f"{found.untried} parts were not tried as causes.", "yellow")


def _draw_some(page: Page, differences: list[Difference]) -> None:
    last, count = None, 0
    for one in differences:
        if one.part != last:
            _draw_rest(page, count)
            last, count = one.part, 0
            where = f"node {one.part.node}" if one.part.node else "cluster"
            pod = f", pod {one.part.pod}" if one.part.pod else ""
            page.line(f"{where}{pod}, {one.part.noun}:", indent=3)
        count += 1
        if count <= _SHOWN:
            sign = {"added": "+", "removed": "-"}.get(one.kind, "~")
            change = f": {one.before or '(none)'} → {one.after or '(none)'}"
            value = change if one.kind == "changed" else ""
            table = f"{one.table}  " if one.table else ""
            page.line(f"{sign} {table}{one.name}{value}", indent=5, hang=2)
    _draw_rest(page, count)


def _draw_rest(page: Page, count: int) -> None:
    if count > _SHOWN:
        page.line(f"and {count - _SHOWN} more", "dim", indent=5)
