"""The options of ``--follow``, for the commands that have it.  Imports little."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from ipaddress import ip_network
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from gketrace.errors import NotFoundError, UsageError
from gketrace_cli.durations import seconds_of
from gketrace_cli.options import Options, Output

if TYPE_CHECKING:
    from gketrace_cli.follow.scope import Scope
    from gketrace_cli.follow.view import Named
    from gketrace_cli.session import Session

__all__ = [
    "DurationOption",
    "EventsOption",
    "FailedOption",
    "FollowOption",
    "FollowOutput",
    "Followed",
    "OutputOption",
    "PacketsOption",
    "SinceOption",
    "StateOption",
    "ToOption",
    "follow_pod",
    "follow_service",
    "plain_output",
]


class FollowOutput(str, Enum):
    """``--output`` of commands with ``--follow``."""

    TEXT = "text"
    WIDE = "wide"
    JSON = "json"
    JSONL = "jsonl"
    YAML = "yaml"


FollowOption = Annotated[
    bool, typer.Option("--follow", "-f", help="Follow live connections until Ctrl-C.")
]
OutputOption = Annotated[
    FollowOutput | None,
    typer.Option("--output", "-o", help="Output format (default: text); jsonl with --follow."),
]
ToOption = Annotated[
    list[str] | None,
    typer.Option(
        "--to", metavar="ENDPOINT", help="With --follow: only to this pod, node or address."
    ),
]
SinceOption = Annotated[
    str | None,
    typer.Option(
        "--since",
        metavar="DURATION",
        help="With --follow: also those open already, not older than 30s, 5m, 1h.",
    ),
]
StateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--state", metavar="STATE", help="With --follow: only these: established, reset, closed …"
    ),
]
FailedOption = Annotated[bool, typer.Option("--failed", help="With --follow: only failures.")]
DurationOption = Annotated[
    str | None,
    typer.Option("--duration", metavar="DURATION", help="With --follow: end after 30s, 5m, 1h."),
]
EventsOption = Annotated[
    bool, typer.Option("--events", help="With --follow -o jsonl: each step, too.")
]
PacketsOption = Annotated[
    bool,
    typer.Option(
        "--packets", help="With --follow: also capture headers: hop times, who reset, ICMP errors."
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """What was typed."""

    follow: bool
    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    since: str | None = None
    states: tuple[str, ...] = ()
    failed: bool = False
    duration: str | None = None
    events: bool = False
    packets: bool = False
    output: FollowOutput | None = None


def plain_output(options: Options, typed: Followed) -> Options:
    """The options of a command that does not follow.  Raises `UsageError` for what goes only with
    ``--follow``."""
    given = {
        "--to": typed.targets,
        "--since": typed.since,
        "--state": typed.states,
        "--failed": typed.failed,
        "--duration": typed.duration,
        "--events": typed.events,
        "--packets": typed.packets,
    }
    for name, value in given.items():
        if value:
            raise UsageError(f"{name} goes with --follow only")
    if typed.output is FollowOutput.JSONL:
        raise UsageError("-o jsonl goes with --follow only", hint="-o json prints one document")
    return options if typed.output is None else replace(options, output=Output(typed.output.value))


def follow_service(options: Options, typed: Followed, name: str) -> NoReturn:
    """Raises: `typer.Exit`, `GketraceError`."""

    def reader(session: Session) -> Callable[[Session, Scope | None], Scope]:
        from gketrace_cli.commands.service import find_service, parse_service_name
        from gketrace_cli.follow.scope import service_scope

        namespace, wanted = parse_service_name(name, session.namespace)

        def read(session: Session, before: Scope | None) -> Scope:
            found, endpoints = find_service(session, namespace, wanted)
            if found.type == "ExternalName":
                raise UsageError(
                    f"service {found.key} is of type ExternalName: no node has connections to it"
                )
            return service_scope(session, found, endpoints, before, now=time.time())

        return read

    _follow(options, typed, reader)


def follow_pod(options: Options, typed: Followed, name: str) -> NoReturn:
    """Raises: `typer.Exit`, `GketraceError`."""

    def reader(session: Session) -> Callable[[Session, Scope | None], Scope]:
        from gketrace_cli.find_pod import find_pod
        from gketrace_cli.follow.scope import pod_scope
        from gketrace_cli.names import parse_pod_name

        namespace, wanted = parse_pod_name(name, session.namespace)

        def read(session: Session, before: Scope | None) -> Scope:
            pod = find_pod(session, namespace, wanted)
            if pod.host_network:
                raise UsageError(
                    f"pod {pod.key} uses its node's network: its connections are not told from "
                    "the node's",
                    hint=f"gketrace conntrack {pod.node} -E follows the node's",
                )
            if not pod.pod_ips:
                raise NotFoundError(f"pod {pod.key} has no address yet")
            return pod_scope(pod, before)

        return read

    _follow(options, typed, reader)


def _follow(
    options: Options,
    typed: Followed,
    reader: Callable[[Session], Callable[[Session, Scope | None], Scope]],
) -> NoReturn:
    form = typed.output or FollowOutput(options.format.value)
    if form in (FollowOutput.JSON, FollowOutput.YAML):
        raise UsageError(f"--follow does not end, so it has no -o {form.value}", hint="-o jsonl")
    jsonl = form is FollowOutput.JSONL
    if typed.events and not jsonl:
        raise UsageError("--events goes with -o jsonl only")
    since = seconds_of("--since", typed.since)
    duration = seconds_of("--duration", typed.duration)
    from gketrace_cli.follow.request import Request
    from gketrace_cli.follow.run import follow
    from gketrace_cli.follow.view import Chosen, parse_state
    from gketrace_cli.session import Session

    states = frozenset(map(parse_state, typed.states))
    shown = options if jsonl else replace(options, output=Output(form.value))
    with Session(options) as session:
        session.progress.say("reading what to follow")
        chosen = Chosen(
            sources=tuple(_named(session, text) for text in typed.sources),
            targets=tuple(_named(session, text) for text in typed.targets),
            states=states,
            failed=typed.failed,
        )
        code = follow(
            session,
            shown,
            Request(
                read=reader(session),
                chosen=chosen,
                jsonl=jsonl,
                steps=typed.events,
                since=since,
                duration=duration,
                packets=typed.packets,
            ),
        )
    raise typer.Exit(int(code))


def _named(session: Session, text: str) -> Named:
    """An address or network, a pod's addresses, or a node's and its pods'.  Raises `UsageError`,
    `NotFoundError`."""
    from gketrace_cli.find_pod import find_pod
    from gketrace_cli.follow.view import Named
    from gketrace_cli.names import Kind, find_node, parse_named

    try:
        return Named(text=text, networks=(ip_network(text, strict=False),))
    except ValueError:
        named = parse_named(text)
    if named.kind is Kind.POD:
        pod = find_pod(session, named.namespace or session.namespace, named.name)
        ips = pod.pod_ips
    elif named.kind is Kind.NODE:
        node = find_node(named.name, session.nodes)
        seen = (str(one.address) for one in session.fleet.addresses(node.name))
        ips = (*node.internal_ips, *node.external_ips, *seen, *node.pod_cidrs)
    elif named.kind is Kind.ADDRESS and named.address is not None:
        raise UsageError(f"{text!r}: connections are chosen by address, without a port")
    else:
        raise UsageError(f"{text!r} is no end of a connection", hint="an address, pod or node")
    return Named(text=text, networks=tuple(ip_network(ip, strict=False) for ip in ips))
