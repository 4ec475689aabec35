"""The options that every command understands.

They may stand before or after the command (``gketrace -n shop pod web-0`` and ``gketrace pod web-0
-n shop`` are the same).  A command declares one parameter ``options: Options`` and is wrapped by
`with_options`, which puts the options into its signature; so each is declared here, once.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from gketrace.access import AGENT_NAMESPACE, DEFAULT_ACCOUNT
from gketrace.errors import UsageError
from gketrace_cli.account import Account, parse_account

__all__ = [
    "NOT_FROM_AGENTS",
    "NOT_FROM_CLUSTER",
    "Color",
    "Connect",
    "Options",
    "Output",
    "Verbose",
    "parse_agents",
    "with_options",
]

NOT_FROM_AGENTS: Final = (
    "agent",
    "agent_ca",
    "all_namespaces",
    "as_serviceaccount",
    "bundle",
    "connect",
    "local",
    "namespace",
    "plaintext",
)
"""What means nothing to a command that asks the API server alone."""
NOT_FROM_CLUSTER: Final = (*NOT_FROM_AGENTS, "agent_namespace", "context", "kubeconfig", "timeout")
"""What means nothing to a command that asks nobody."""

ON_BUNDLES: Final = ("check", "connections", "conntrack", "pod", "rules", "service", "trace")
"""Commands that answer from a bundle as they do from a cluster."""
DEFAULT_TIMEOUT: Final = 10.0
"""Seconds for the whole answer of one API or agent call."""
_MOST: Final[Mapping[type, float]] = {int: 2**53, float: 1e9}
"""What an option's number may be at most: counts and bytes; seconds."""


class Output(str, Enum):
    """How the answer is written."""

    TEXT = "text"
    """For people, 80 columns."""
    WIDE = "wide"
    """For people: every rule with counters and its full text."""
    JSON = "json"
    YAML = "yaml"

    @property
    def machine(self) -> bool:
        return self in (Output.JSON, Output.YAML)


Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Tell each way hop by hop, rule by rule.")
]
"""``-v`` of the commands that trace."""


class Color(str, Enum):
    """When text is coloured."""

    AUTO = "auto"
    """On a terminal, unless NO_COLOR is set."""
    ALWAYS = "always"
    NEVER = "never"


class Connect(str, Enum):
    """How agents that were found as pods are reached."""

    PORT_FORWARD = "port-forward"
    """Through the API server."""
    DIRECT = "direct"
    """Straight to the agent pod's address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The common options as given; None: not given."""

    namespace: Annotated[
        str | None,
        typer.Option(
            "--namespace",
            "-n",
            metavar="NAME",
            help="Namespace (default: the context's).",
        ),
    ] = None
    all_namespaces: Annotated[
        bool | None,
        typer.Option("--all-namespaces", "-A", help="Look in all namespaces."),
    ] = None
    context: Annotated[
        str | None, typer.Option("--context", metavar="NAME", help="Context of the kubeconfig.")
    ] = None
    kubeconfig: Annotated[
        str | None,
        typer.Option(
            "--kubeconfig",
            metavar="FILE",
            help="Default: $KUBECONFIG, ~/.kube/config.",
        ),
    ] = None
    agent: Annotated[
        list[str] | None,
        typer.Option(
            "--agent",
            metavar="NODE=ADDR",
            help="Agent of a node at HOST:PORT or unix:///PATH; repeatable.",
        ),
    ] = None
    connect: Annotated[
        Connect | None,
        typer.Option("--connect", help="How to reach agents (default: port-forward)."),
    ] = None
    as_serviceaccount: Annotated[
        str | None,
        typer.Option(
            "--as-serviceaccount",
            metavar="NS/NAME",
            envvar="GKETRACE_AS_SERVICEACCOUNT",
            show_envvar=False,
            help="Ask agents as this ServiceAccount (default: gketrace-user of theirs).",
        ),
    ] = None
    agent_namespace: Annotated[
        str | None,
        typer.Option(
            "--agent-namespace",
            metavar="NAME",
            envvar="GKETRACE_AGENT_NAMESPACE",
            show_envvar=False,
            help=f"Where the agents are (default: {AGENT_NAMESPACE}).",
        ),
    ] = None
    agent_ca: Annotated[
        Path | None,
        typer.Option(
            "--agent-ca", metavar="FILE", help="Agents' CA (default: from their ConfigMap)."
        ),
    ] = None
    plaintext: Annotated[
        bool | None,
        typer.Option(
            "--plaintext", help="No TLS and no token, for agents started with --insecure."
        ),
    ] = None
    local: Annotated[
        bool | None,
        typer.Option("--local", help="Start an agent on this node for this one command."),
    ] = None
    bundle: Annotated[
        str | None,
        typer.Option(
            "--bundle",
            metavar="FILE",
            help="Answer from a file that 'gketrace bundle' made, not from a cluster.",
        ),
    ] = None
    output: Annotated[
        Output | None, typer.Option("--output", "-o", help="Output format (default: text).")
    ] = None
    color: Annotated[
        Color | None, typer.Option("--color", help="Colour (default: auto; NO_COLOR is honoured).")
    ] = None
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            min=0.1,
            max=600.0,
            help=f"For each call to the API server or an agent (default: {DEFAULT_TIMEOUT:g}).",
        ),
    ] = None

    def over(self, outer: Options) -> Options:
        """These, and where one is not given, the outer one (given before the command)."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(outer, **{name: value for name, value in given.items() if value is not None})

    def check_bundle(self, command: str) -> None:
        """Raises: `UsageError` when a bundle cannot answer, or more than it is asked."""
        if command not in ON_BUNDLES:
            raise UsageError(
                f"gketrace {command} cannot be run on a bundle",
                hint="on a bundle: " + ", ".join(ON_BUNDLES),
            )
        live = {
            "--context": self.context,
            "--kubeconfig": self.kubeconfig,
            "--agent": self.agent,
            "--local": self.local,
        }
        for name, value in live.items():
            if value:
                raise UsageError(f"{name} and --bundle exclude each other")

    def check_files(self) -> None:
        """Raises: `UsageError` for an empty name, as an unset variable leaves it."""
        if self.bundle == "":
            raise UsageError("--bundle lacks the name of a file")
        if self.agent_ca is not None and self.agent_ca.is_dir():
            # typer reads an empty name as the directory that one is in.
            raise UsageError("--agent-ca names no file, but an empty name or a directory")

    def check_namespace(self) -> None:
        """Raises: `UsageError` for what no namespace is called (IsDNS1123Label)."""
        name = self.namespace or ""
        if name and not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
            raise UsageError(f"-n {name[:100]!r} cannot be a namespace's name")

    def check_own_namespace(self, command: str) -> None:
        """Raises: `UsageError` for a namespace where the agents' own is what counts."""
        if self.namespace is not None or self.all_namespaces:
            given = "-A" if self.all_namespaces else f"-n {self.namespace}"
            raise UsageError(
                f"{given} is not about {command}, which knows the agents' namespace alone",
                hint="--agent-namespace NAME",
            )

    def check_live(self, done: str) -> None:
        """Raises: `UsageError` on a bundle, of which nothing can be `done`."""
        if self.bundle is not None:
            raise UsageError(f"a bundle holds one moment: nothing can be {done} on it")

    @property
    def agents_in(self) -> str:
        """The agents' namespace."""
        return self.agent_namespace or AGENT_NAMESPACE

    @property
    def account(self) -> Account:
        """The ServiceAccount that agents are asked as.  Raises `UsageError`."""
        if self.as_serviceaccount:
            return parse_account(self.as_serviceaccount)
        return Account(namespace=self.agents_in, name=DEFAULT_ACCOUNT)

    @property
    def format(self) -> Output:
        return self.output or Output.TEXT

    @property
    def seconds(self) -> float:
        return DEFAULT_TIMEOUT if self.timeout is None else self.timeout

    @property
    def colored(self) -> bool:
        """Whether what goes to standard output is coloured."""
        if self.color in (Color.ALWAYS, Color.NEVER):
            return self.color is Color.ALWAYS
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            return False
        return sys.stdout.isatty()

    def agents(self) -> Mapping[str, str]:
        """``--agent`` as node → address.  Raises `UsageError`."""
        return parse_agents(self.agent or [])


def _check_numbers(ctx: typer.Context) -> None:
    """Raises: `UsageError` for one that fits no clock and no message; NaN is in every range."""
    for option in ctx.command.params:
        value: Any = ctx.params.get(option.name or "")
        most = _MOST.get(type(value))
        if most is not None and not abs(value) <= most:
            raise UsageError(f"{option.opts[0]} {value}: no number that it can be")


def parse_agents(texts: list[str]) -> dict[str, str]:
    """``["n1=10.0.0.1:9090"]`` → ``{"n1": "10.0.0.1:9090"}``.  Raises `UsageError`."""
    agents: dict[str, str] = {}
    for text in texts:
        node, equals, address = text.partition("=")
        if not (equals and node and address):
            raise UsageError(
                f"--agent {text}: not NODE=ADDR", hint="for example --agent n1=10.0.0.1:9090"
            )
        if node in agents:
            raise UsageError(f"--agent {node} is given twice")
        if not address.startswith("unix:"):
            host, colon, port = address.rpartition(":")
            if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
                raise UsageError(f"--agent {text}: {address} is not HOST:PORT or unix:///PATH")
        agents[node] = address
    return agents


def with_options(
    command: Callable[..., None], unlisted: Collection[str] = ()
) -> Callable[..., None]:
    """Gives `command` the common options in place of its parameter ``options``.

    The options before the command arrive as the typer context's object (see `app`).  `unlisted`:
    those that its help does not list; they are taken all the same, as an alias may have them.
    """
    own = typing.get_type_hints(command, include_extras=True)
    common = typing.get_type_hints(Options, include_extras=True)
    # A command that has more output formats than the others declares --output itself.
    names = [f.name for f in fields(Options) if f.name not in own]

    @functools.wraps(command)
    def wrapper(ctx: typer.Context, **values: Any) -> None:
        given = Options(**{name: values.pop(name) for name in names})
        outer = ctx.obj if isinstance(ctx.obj, Options) else Options()
        if "ctx" in own:
            values["ctx"] = ctx
        options = given.over(outer)
        _check_numbers(ctx)
        options.check_namespace()
        options.check_files()
        if options.bundle is not None and ctx.invoked_subcommand is None:
            options.check_bundle(str(ctx.command.name))
            if values.get("follow"):
                options.check_live("followed")
        command(options=options, **values)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("ctx", keyword, annotation=typer.Context)]
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name not in ("options", "ctx"):
            parameters.append(parameter.replace(kind=keyword, annotation=own[parameter.name]))
    for name in names:
        declared = _hidden(common[name]) if name in unlisted else common[name]
        parameters.append(inspect.Parameter(name, keyword, default=None, annotation=declared))
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def _hidden(declared: Any) -> Any:
    """An option's annotation, for help that does not list it."""
    kind, option = typing.get_args(declared)
    hidden = copy.copy(option)
    hidden.hidden = True
    return Annotated[kind, hidden]
