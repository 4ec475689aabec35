"""``gketrace status``: the agents and what they can see."""

from __future__ import annotations

import typer

from gketrace.errors import ExitCode
from gketrace_cli.options import Options

__all__ = ["status"]


def status(options: Options) -> None:
    """Say which nodes have an agent, what it sees there, and what it does not and why.

    For example:  gketrace status
    """
    from gketrace_cli import __version__
    from gketrace_cli.names import short_names
    from gketrace_cli.node_status import read_status
    from gketrace_cli.render.documents import dump
    from gketrace_cli.render.layout import Page, write
    from gketrace_cli.render.status import draw_status, status_document
    from gketrace_cli.session import Session

    with Session(options) as session:
        names = [node.name for node in session.nodes]
        session.progress.say("asking the agents")
        session.reach(names)
        reading = read_status(session.fleet, names, __version__)
        session.progress.clear()
    if options.format.machine:
        write(dump(status_document(reading), options.format))
    else:
        page = Page.of(options, short_names(names))
        draw_status(page, reading)
        write(page.text())
    raise typer.Exit(int(ExitCode.OK if reading.whole else ExitCode.PARTIAL))
