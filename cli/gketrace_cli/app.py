"""The typer application: the commands, each with where it is.

A command's module is imported when it is called, or when help is asked for: it must import little;
what it works with (grpc, the cluster reader) it imports when it runs.
"""

from __future__ import annotations

from typing import Annotated, Final

import typer

from gketrace_cli import __version__
from gketrace_cli.lazy_group import LazyCommand, lazy_group
from gketrace_cli.options import NOT_FROM_AGENTS, NOT_FROM_CLUSTER, Options, with_options

__all__ = ["app"]

EPILOG: Final = (
    "Exit status: 0 fine, 1 something is broken, 2 usage or not found, 3 could not tell, "
    "4 forbidden, 5 nobody answered."
)


def _at(where: str, short_help: str, cls: str = "", unlisted: tuple[str, ...] = ()) -> LazyCommand:
    package = "gketrace_cli.commands."
    return LazyCommand(
        target=package + where,
        short_help=short_help,
        cls=package + cls if cls else "",
        unlisted=unlisted,
    )


_COMMANDS: Final = {
    "bundle": _at("bundle:bundle", "Save what answers need, in one file."),
    "capture": _at("capture:capture", "Capture packets at several places at once."),
    "check": _at("check:check", "Say what is wrong in the whole cluster."),
    "connections": _at("connections:connections", "List connections, from client to pod."),
    "conntrack": _at(
        "conntrack:conntrack",
        "List, count, follow or delete conntrack entries.",
        "conntrack:ConntrackCommand",
    ),
    "diff": _at(
        "diff:diff",
        "Name what changed between two bundles.",
        unlisted=tuple(
            name for name in NOT_FROM_CLUSTER if name not in ("namespace", "all_namespaces")
        ),
    ),
    "explain": _at(
        "check:explain", "Tell more about a finding, by its code.", unlisted=NOT_FROM_CLUSTER
    ),
    "install": _at("install:install", "Put the agents into the cluster.", unlisted=NOT_FROM_AGENTS),
    "pod": _at("pod:pod", "Show where a pod is and how it is wired."),
    "rules": _at("rules:rules", "Draw the rules of a node or pod, with counters."),
    "service": _at("service:service", "Follow packets to a Service; --follow: live ones."),
    "status": _at("status:status", "Say which nodes have an agent that answers."),
    "trace": _at("trace:trace", "Follow one packet from any SRC to any DST."),
    "uninstall": _at(
        "install:uninstall", "Take out what install put in.", unlisted=NOT_FROM_AGENTS
    ),
}
_AUTH: Final = {
    "can-i": _at("auth:can_i", "Say what you and your agents' account may do."),
}


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
    cls=lazy_group(_COMMANDS, EPILOG),
    help=_root.__doc__,
    epilog=EPILOG,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
app.callback()(_root)
app.add_typer(
    typer.Typer(
        cls=lazy_group(_AUTH, EPILOG),
        help="Say what you may do: auth can-i.",
        rich_markup_mode=None,
    ),
    name="auth",
)
