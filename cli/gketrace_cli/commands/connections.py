"""``gketrace connections``: the entries of all nodes, joined to connections."""

from __future__ import annotations

from ipaddress import ip_network
from typing import TYPE_CHECKING, Annotated

import typer

from gketrace.errors import ExitCode, UsageError
from gketrace_cli.options import Options

if TYPE_CHECKING:
    from gketrace.objects import Pod, Service

__all__ = ["connections"]


def connections(
    options: Options,
    service: Annotated[
        str | None,
        typer.Option("--service", metavar="NAME", help="Only those to its front doors."),
    ] = None,
    pod: Annotated[
        str | None,
        typer.Option("--pod", metavar="NAME", help="Only those that this pod is an end of."),
    ] = None,
    sender: Annotated[
        str | None,
        typer.Option("--from", metavar="ADDRESS[/LENGTH]", help="Only those of these clients."),
    ] = None,
    pods: Annotated[
        bool,
        typer.Option("--pods", help="Also the tables of all pods' own network namespaces."),
    ] = False,
) -> None:
    """List connections, each from its first client to its last pod, over all nodes.

    For example:  gketrace connections --service hello-server
    """
    from gketrace_cli.commands.conntrack import find_places, find_service_named
    from gketrace_cli.connection_reading import read_connections
    from gketrace_cli.find_pod import find_pod_named
    from gketrace_cli.names import short_names
    from gketrace_cli.render.connections import connections_document, draw_connections
    from gketrace_cli.render.documents import dump
    from gketrace_cli.render.layout import Page, write
    from gketrace_cli.session import Session

    clients = None
    if sender:
        try:
            clients = ip_network(sender, strict=False)
        except ValueError:
            raise UsageError(f"not an address or network: {sender!r}") from None
    with Session(options) as session:
        places, gaps = find_places(session, None, None)
        of_pod: Pod | None = find_pod_named(session, pod) if pod else None
        of_service: Service | None = None
        endpoints = None
        if service:
            of_service, endpoints = find_service_named(session, service)
        session.progress.say("reading connection tracking")
        found = read_connections(
            session,
            places,
            gaps,
            service=of_service,
            endpoints=endpoints or (),
            pod=of_pod,
            clients=clients,
            all_pods=pods,
        )
        nodes = session.nodes
        session.progress.clear()
    if options.format.machine:
        query = {"service": service, "pod": pod, "from": sender, "pods": pods}
        write(dump(connections_document(found, query), options.format))
    else:
        page = Page.of(options, short_names(node.name for node in nodes))
        draw_connections(page, found)
        write(page.text())
    code = ExitCode.OK
    if any(one.breaks for one in found.connections):
        code = ExitCode.BROKEN
    raise typer.Exit(int(ExitCode.PARTIAL if found.missing else code))
