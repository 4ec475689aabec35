"""``gketrace service``: every front door of a Service, hop by hop, to each endpoint and back."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Final

import typer

from gketrace.errors import NotFoundError, UsageError
from gketrace_cli.follow import options as following
from gketrace_cli.options import Options, Verbose

if TYPE_CHECKING:
    from gketrace.objects import Endpoint, Service
    from gketrace_cli.frontdoors import Question, Sender
    from gketrace_cli.liveness import LiveReading
    from gketrace_cli.session import Session

__all__ = ["Via", "find_service", "parse_service_name", "service"]


_BESIDE: Final = 16
"""Of a cluster with up to so many nodes the session has read all pods and greeted all agents before
the first question, so that connections can be read while packets are followed."""


class Via(str, Enum):
    """``--via``."""

    CLUSTERIP = "clusterip"
    NODEPORT = "nodeport"
    LOADBALANCER = "loadbalancer"
    EXTERNALIP = "externalip"


def service(
    options: Options,
    name: Annotated[str, typer.Argument(metavar="NAME", help="NAME, svc/NAME or NAMESPACE/NAME.")],
    sources: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="SOURCE",
            help="Who asks: an IP address, node/NAME or pod/NAME; repeatable.",
        ),
    ] = None,
    via: Annotated[
        Via | None,
        typer.Option("--via", case_sensitive=False, help="Only through this front door."),
    ] = None,
    node: Annotated[
        str | None,
        typer.Option(
            "--node",
            metavar="NODE",
            help="The node that is met first: a full name, a unique suffix or an address.",
        ),
    ] = None,
    port: Annotated[
        str | None,
        typer.Option("--port", metavar="PORT", help="Only this port, by name or number."),
    ] = None,
    verbose: Verbose = False,
    follow: following.FollowOption = False,
    to: following.ToOption = None,
    since: following.SinceOption = None,
    state: following.StateOption = None,
    failed: following.FailedOption = False,
    duration: following.DurationOption = None,
    events: following.EventsOption = False,
    packets: following.PacketsOption = False,
    output: following.OutputOption = None,
) -> None:
    """Follow a packet through each front door of a Service to each endpoint, and back.

    With --follow: its live connections on all nodes, each with rules, NAT, endpoint and end.

    For example:  gketrace service hello-server --via nodeport --node 2jdh
    """
    typed = following.Followed(
        follow=follow,
        sources=tuple(sources or ()),
        targets=tuple(to or ()),
        since=since,
        states=tuple(state or ()),
        failed=failed,
        duration=duration,
        events=events,
        packets=packets,
        output=output,
    )
    if follow:
        if verbose:
            raise UsageError("-v tells a trace hop by hop", hint="--follow has -o wide")
        if via or node or port:
            raise UsageError(
                "--via, --node and --port choose packets to trace, not connections to follow",
                hint="--from, --to, --state and --failed choose connections",
            )
        following.follow_service(options, typed, name)
    options = following.plain_output(options, typed)
    from gketrace_cli.asking import Asker, assumed_port
    from gketrace_cli.find_pod import find_pod
    from gketrace_cli.frontdoors import Door, Selection, questions
    from gketrace_cli.liveness import live_document, read_live
    from gketrace_cli.names import find_node, short_names
    from gketrace_cli.senders import resolve_sender
    from gketrace_cli.session import Session, background

    doors = {
        Via.CLUSTERIP: Door.CLUSTER_IP,
        Via.NODEPORT: Door.NODE_PORT,
        Via.LOADBALANCER: Door.LOAD_BALANCER,
        Via.EXTERNALIP: Door.EXTERNAL_IP,
    }
    with Session(options) as session:
        namespace, wanted = parse_service_name(name, session.namespace)
        session.progress.say(f"reading service {namespace}/{wanted}")
        found, endpoints = find_service(session, namespace, wanted)
        nodes = session.nodes
        senders = tuple(resolve_sender(session, text, find_pod) for text in sources or [])
        entry = find_node(node, nodes).name if node else ""
        selection = Selection(
            senders=senders, door=doors[via] if via else None, node=entry, port=port or ""
        )
        asked, skipped = questions(found, endpoints, nodes, selection)
        for sender in senders:
            if sender.pod is not None:
                session.pods.add(sender.pod)
        asker = Asker(session, services=(found,))

        def look() -> LiveReading:
            fleet = session.fleet
            there = [name for name in fleet.nodes if fleet.agent(name).info]
            return read_live(session, found, endpoints, there)

        few = len(nodes) <= _BESIDE and session.fleet.nodes
        reading = background(look, "live") if few else None
        result = asker.ask(asked)
        session.progress.say("reading live connections")
        live = reading.result() if reading is not None else look()
        session.progress.clear()
    from gketrace_cli.checking.single import service_findings
    from gketrace_cli.render.connections import draw_live
    from gketrace_cli.render.documents import dump
    from gketrace_cli.render.findings import draw_findings
    from gketrace_cli.render.layout import Page, write
    from gketrace_cli.render.trace import draw_trace, in_brief
    from gketrace_cli.render.trace_document import trace_document
    from gketrace_cli.verdict import judge_service, with_live

    notes = [*_notes(asked, len(nodes)), *skipped, *assumed_port(asked), *session.hidden]
    verdict = judge_service(f"Service {found.key}", result.answers, result.missing)
    verdict = with_live(verdict, live)
    findings = service_findings(found, endpoints, nodes, session.pods.known, result.answers, live)
    if options.format.machine:
        query = {
            "service": found.key,
            "from": [sender.text for sender in senders],
            "via": via.value if via else None,
            "node": entry or None,
            "port": port,
        }
        document = trace_document(
            "ServiceTrace",
            verdict,
            result.answers,
            query=query,
            missing=result.missing,
            notes=notes,
            live=live_document(live),
            findings=findings,
        )
        write(dump(document, options.format))
    else:
        page = Page.of(options, short_names(n.name for n in nodes))
        draw_trace(
            page,
            verdict,
            result.answers,
            missing=result.missing,
            notes=notes,
            brief=not verbose and in_brief(options, result.answers),
        )
        draw_live(page, live)
        draw_findings(page, findings, heading="Findings")
        write(page.text())
    raise typer.Exit(int(verdict.code))


def parse_service_name(text: str, namespace: str) -> tuple[str, str]:
    """``NAME``, ``svc/NAME``, ``NS/NAME``, ``svc/NS/NAME`` → (namespace, name)."""
    parts = text.split("/")
    if len(parts) > 1 and parts[0] in ("svc", "service", "services"):
        parts = parts[1:]
    if len(parts) > 2 or not all(parts):
        raise UsageError(f"{text!r} is no name of a service", hint="use NAME or NAMESPACE/NAME")
    return (parts[0], parts[1]) if len(parts) == 2 else (namespace, parts[0])


def find_service(
    session: Session, namespace: str, name: str
) -> tuple[Service, tuple[Endpoint, ...]]:
    """The Service and its endpoints.  Raises: `NotFoundError` with the names that come close."""
    from gketrace.errors import GketraceError
    from gketrace_cli.names import close_names

    try:
        read = session.read(
            {
                "service": lambda: session.cluster.service(namespace, name),
                "endpoints": lambda: session.cluster.endpoints(namespace, service=name),
            }
        )
    except NotFoundError as error:
        absent = session.check_namespace(namespace)
        if absent is not None:
            raise absent from error
        try:
            listed = [s.name for s in session.cluster.services(namespace)]
        except GketraceError:  # the hint is a courtesy; the answer is that there is no such service
            raise error from None
        raise NotFoundError(
            f'service "{name}" not found in namespace "{namespace}"',
            hint=close_names(name, listed),
        ) from error
    return read["service"], read["endpoints"]


def _notes(asked: tuple[Question, ...], nodes: int) -> list[str]:
    """What was assumed, said."""
    notes = []
    assumed: dict[str, list[Sender]] = {"outside": [], "inside": []}
    for question in asked:
        if question.sender.assumed:
            key = "outside" if question.sender.outside else "inside"
            if question.sender not in assumed[key]:
                assumed[key].append(question.sender)
    if assumed["outside"]:
        clients = " and ".join(sender.text for sender in assumed["outside"])
        notes.append(f"Assumed {clients} as the source outside; --from names another.")
    if assumed["inside"]:
        notes.append(
            f"Assumed {len(assumed['inside'])} of {nodes} nodes as sources inside the cluster; "
            "--from pod/NAME names a pod."
        )
    for note in dict.fromkeys(n for q in asked for n in q.notes):
        notes.append(f"Assumed {note}.")
    return notes
