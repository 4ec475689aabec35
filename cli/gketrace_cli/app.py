"""The typer application: the commands, registered one by one.

A command's module is imported when the program starts, so it must import little; what it works
with (grpc, the cluster reader) it imports when it runs.
"""

from __future__ import annotations

from typing import Annotated, Final

import typer

from gketrace_cli import __version__
from gketrace_cli.commands import (
    auth,
    bundle,
    capture,
    check,
    connections,
    conntrack,
    diff,
    install,
    pod,
    rules,
    service,
    status,
    trace,
)
from gketrace_cli.options import Options, with_options

__all__ = ["app"]

EPILOG: Final = (
    "Exit status: 0 fine, 1 something is broken, 2 usage or not found, 3 could not tell, "
    "4 forbidden, 5 nobody answered."
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gketrace {__version__}")
        raise typer.Exit


@with_options
def _root(
    ctx: typer.Context,
    options: Options,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Explain why a packet does or does not arrive, from the nodes' own rules and routes.

    It never guesses: each line cites the rule, route or entry that it was read from, and what
    could not be seen is said.
    """
    ctx.obj = options


app: Final = typer.Typer(
    name="gketrace",
    help=_root.__doc__,
    epilog=EPILOG,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
app.callback()(_root)
_auth: Final = typer.Typer(help="Say what you may do: auth can-i.", rich_markup_mode=None)
_auth.command("can-i", epilog=EPILOG, short_help="Say what you and your agents' account may do.")(
    with_options(auth.can_i)
)
app.add_typer(_auth, name="auth")
app.command("bundle", epilog=EPILOG, short_help="Save what answers need, in one file.")(
    with_options(bundle.bundle)
)
app.command("capture", epilog=EPILOG, short_help="Capture packets at several places at once.")(
    with_options(capture.capture)
)
app.command("check", epilog=EPILOG, short_help="Say what is wrong in the whole cluster.")(
    with_options(check.check)
)
app.command("connections", epilog=EPILOG, short_help="List connections, from client to pod.")(
    with_options(connections.connections)
)
app.command(
    "conntrack",
    cls=conntrack.ConntrackCommand,
    epilog=EPILOG,
    short_help="List, count, follow or delete conntrack entries.",
)(with_options(conntrack.conntrack))
app.command("diff", epilog=EPILOG, short_help="Name what changed between two bundles.")(
    with_options(diff.diff)
)
app.command("explain", epilog=EPILOG, short_help="Tell more about a finding, by its code.")(
    with_options(check.explain)
)
app.command("install", epilog=EPILOG, short_help="Put the agents into the cluster.")(
    with_options(install.install)
)
app.command("pod", epilog=EPILOG, short_help="Show where a pod is and how it is wired.")(
    with_options(pod.pod)
)
app.command("rules", epilog=EPILOG, short_help="Draw the rules of a node or pod, with counters.")(
    with_options(rules.rules)
)
app.command(
    "service", epilog=EPILOG, short_help="Follow packets to a Service; --follow: live ones."
)(with_options(service.service))
app.command("status", epilog=EPILOG, short_help="Say which nodes have an agent that answers.")(
    with_options(status.status)
)
app.command("trace", epilog=EPILOG, short_help="Follow one packet from any SRC to any DST.")(
    with_options(trace.trace)
)
app.command("uninstall", epilog=EPILOG, short_help="Take out what install put in.")(
    with_options(install.uninstall)
)
