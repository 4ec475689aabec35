"""``gketrace conntrack``: the nodes' and pods' connection-tracking tables, as conntrack(8) has
them."""

from __future__ import annotations

import re
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperCommand

from gketrace.errors import NotFoundError, UsageError
from gketrace_cli.options import Options

if TYPE_CHECKING:
    from gketrace.objects import Endpoint, Service
    from gketrace.trace import Missing
    from gketrace_cli.conntrack_reading import Place
    from gketrace_cli.session import Session
    from gketrace_proto.v1alpha1 import agent_pb2 as pb

__all__ = [
    "ConntrackCommand",
    "ConntrackOutput",
    "conntrack",
    "find_places",
    "find_service_named",
]

_NAT_FLAGS: Final = frozenset({"--src-nat", "--dst-nat", "-g"})


class ConntrackCommand(TyperCommand):
    """Takes ``--src-nat`` and ``--dst-nat`` with and without an address, as conntrack(8) does.

    The word behind the flag belongs to it when it is an address; typer has no such options.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        made: list[str] = []
        waiting = deque(args)
        while waiting:
            word = waiting.popleft()
            if word == "--":
                made += [word, *waiting]
                break
            if word in _NAT_FLAGS:
                takes = bool(waiting) and _ADDRESS.fullmatch(waiting[0])
                name = "--dst-nat" if word == "-g" else word
                word = f"{name}={waiting.popleft() if takes else ''}"
            made.append(word)
        return super().parse_args(ctx, made)


_ADDRESS: Final = re.compile(
    r"\d+\.\d+\.\d+\.\d+(/\d+)?(:\d+)?|:\d+|[0-9a-fA-F]*:[0-9a-fA-F:.]*(/\d+)?"
    r"|\[[0-9a-fA-F:.]+(/\d+)?\](:\d+)?"
)


class ConntrackOutput(str, Enum):
    """``--output`` of this command."""

    TEXT = "text"
    WIDE = "wide"
    CONNTRACK = "conntrack"
    JSON = "json"
    JSONL = "jsonl"
    YAML = "yaml"


def conntrack(
    options: Options,
    where: Annotated[
        str | None,
        typer.Argument(
            metavar="[NODE|pod/NAME]",
            help="Whose table: a node's, or the pod's own (default: all nodes').",
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", "-L", help="List entries (default).")] = False,
    count: Annotated[bool, typer.Option("--count", "-C", help="Only how many.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", "-S", help="How full, and the kernel's counters.")
    ] = False,
    events: Annotated[
        bool, typer.Option("--event", "-E", help="Follow events, until interrupted.")
    ] = False,
    event_mask: Annotated[
        str | None,
        typer.Option(
            "--event-mask",
            "-e",
            metavar="NEW,UPDATES,DESTROY",
            help="With -E: only these (default: all).",
        ),
    ] = None,
    delete: Annotated[
        bool,
        typer.Option("--delete", "-D", help="Delete entries that fit the filters; asks first."),
    ] = False,
    src: Annotated[
        str | None,
        typer.Option(
            "--orig-src",
            "--src",
            "-s",
            metavar="ADDRESS[/LENGTH]",
            help="Client: source when it was opened.",
        ),
    ] = None,
    dst: Annotated[
        str | None,
        typer.Option(
            "--orig-dst",
            "--dst",
            "-d",
            metavar="ADDRESS[/LENGTH]",
            help="Destination that the client asked for.",
        ),
    ] = None,
    reply_src: Annotated[
        str | None,
        typer.Option(
            "--reply-src", "-r", metavar="ADDRESS[/LENGTH]", help="Source of the answers."
        ),
    ] = None,
    reply_dst: Annotated[
        str | None,
        typer.Option(
            "--reply-dst", "-q", metavar="ADDRESS[/LENGTH]", help="Destination of the answers."
        ),
    ] = None,
    proto: Annotated[
        str | None, typer.Option("--proto", "-p", metavar="PROTOCOL", help="Name or number.")
    ] = None,
    sport: Annotated[
        int | None,
        typer.Option(
            "--sport", "--orig-port-src", metavar="PORT", min=0, max=65535, help="Client's port."
        ),
    ] = None,
    dport: Annotated[
        int | None,
        typer.Option(
            "--dport", "--orig-port-dst", metavar="PORT", min=0, max=65535, help="Port asked for."
        ),
    ] = None,
    reply_sport: Annotated[
        int | None,
        typer.Option(
            "--reply-port-src", metavar="PORT", min=0, max=65535, help="Port that answers."
        ),
    ] = None,
    reply_dport: Annotated[
        int | None,
        typer.Option(
            "--reply-port-dst", metavar="PORT", min=0, max=65535, help="Port that is answered."
        ),
    ] = None,
    state: Annotated[
        str | None, typer.Option("--state", metavar="STATE", help="Of TCP or SCTP: ESTABLISHED …")
    ] = None,
    mark: Annotated[
        str | None, typer.Option("--mark", "-m", metavar="VALUE[/MASK]", help="The entry's mark.")
    ] = None,
    zone: Annotated[
        int | None,
        typer.Option(
            "--zone", "-w", metavar="ZONE", min=0, max=65535, help="Connection-tracking zone."
        ),
    ] = None,
    src_nat: Annotated[
        str | None,
        typer.Option(
            "--src-nat",
            metavar="[ADDRESS[:PORT]]",
            help="Only those whose source is translated; to this.",
        ),
    ] = None,
    dst_nat: Annotated[
        str | None,
        typer.Option(
            "--dst-nat",
            "-g",
            metavar="[ADDRESS[:PORT]]",
            help="Only those whose destination is translated; to this.",
        ),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option("--family", "-f", metavar="ipv4|ipv6", help="Default: both."),
    ] = None,
    pod: Annotated[
        str | None, typer.Option("--pod", metavar="NAME", help="To, from or by way of this pod.")
    ] = None,
    service: Annotated[
        str | None,
        typer.Option(
            "--service", metavar="NAME", help="To its front doors, or answered by its endpoints."
        ),
    ] = None,
    node: Annotated[
        str | None,
        typer.Option("--node", metavar="NODE", help="A full name, a unique suffix or an address."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help="At most N entries of each table."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With -D: only show what would be deleted.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With -D: do not ask.")] = False,
    output: Annotated[
        ConntrackOutput | None,
        typer.Option("--output", "-o", help="Output format (default: text)."),
    ] = None,
) -> None:
    """List, count, sum up, follow or delete connection tracking entries, of any node or pod, or of
    all nodes.

    For example:  gketrace conntrack -p tcp --dport 31830 -o conntrack
    """
    from gketrace_cli.conntrack_filter import typed_filter
    from gketrace_cli.session import Session

    if sum((list_, count, stats, events, delete)) > 1:
        raise UsageError("-L, -C, -S, -E and -D exclude each other")
    if (yes or dry_run) and not delete:
        raise UsageError("--yes and --dry-run belong to -D")
    if event_mask and not events:
        raise UsageError("--event-mask belongs to -E")
    typed = typed_filter(
        family=family,
        protocol=proto,
        addresses={
            "orig_src": src,
            "orig_dst": dst,
            "reply_src": reply_src,
            "reply_dst": reply_dst,
        },
        ports={
            "orig_sport": sport,
            "orig_dport": dport,
            "reply_sport": reply_sport,
            "reply_dport": reply_dport,
        },
        mark=mark,
        zone=zone,
        state=state,
        src_nat=src_nat,
        dst_nat=dst_nat,
    )
    fitting = typed.ByteSize() > 0 or bool(pod or service)
    if stats and fitting:
        raise UsageError("-S is about the whole table", hint="leave the filters out")
    form = _form(output, options)
    kinds = _kinds(event_mask)
    if delete:
        from gketrace_cli.conntrack_delete import require_confirmation, require_filter

        if limit:
            raise UsageError("-D deletes all that fit", hint="leave --limit out")
        require_filter(typed, named=bool(pod or service))
        require_confirmation(yes=yes, dry_run=dry_run)
    from gketrace_cli import conntrack_show as show

    with Session(options) as session:
        places, gaps = find_places(session, where, node)
        if stats or (count and not fitting):
            show.show_statistics(session, places, gaps, options, form, brief=count)
        filters = _filters(session, places, typed, pod, service)
        if events:
            from gketrace_cli.conntrack_follow import follow

            session.progress.clear()
            follow(session, gaps, filters, form, kinds)
        asked = {
            "where": where,
            "node": node,
            "pod": pod,
            "service": service,
            "filter": show.filter_document(typed),
            "limit": limit,
        }
        if delete:
            from gketrace_cli.conntrack_delete import Removal

            Removal(
                session=session,
                places=places,
                gaps=gaps,
                filters=filters,
                form=form,
                yes=yes,
                dry_run=dry_run,
                query=asked,
            ).run()
        listing = show.Listing(
            session=session,
            options=options,
            places=places,
            gaps=gaps,
            filters=filters,
            limit=limit or 0,
            fitting=fitting,
            query=asked,
        )
        if count:
            listing.show_count(form)
        listing.show(form)


def _kinds(text: str | None) -> frozenset[str]:
    """``-e``: of news, updates and destroys; empty: all."""
    kinds = set()
    for word in (text or "ALL").upper().split(","):
        if word not in _KINDS:
            raise UsageError(f"no such event: {word!r}", hint="NEW, UPDATES, DESTROY or ALL")
        kinds.add(_KINDS[word])
    return frozenset() if "" in kinds else frozenset(kinds)


_KINDS: Final = {
    "ALL": "",
    "NEW": "news",
    "UPDATE": "updates",
    "UPDATES": "updates",
    "DESTROY": "destroys",
}


def _form(output: ConntrackOutput | None, options: Options) -> ConntrackOutput:
    """``-o`` may also stand before the command, where it has fewer choices."""
    return output or ConntrackOutput(options.format.value)


def find_places(
    session: Session, where: str | None, node: str | None
) -> tuple[list[Place], tuple[Missing, ...]]:
    """Whose tables are to be read, and those whose agent does not answer.

    Raises: `NotFoundError`, `UsageError`; `UnavailableError` when no agent answers.
    """
    from gketrace_cli.conntrack_reading import Place
    from gketrace_cli.find_pod import find_pod_named
    from gketrace_cli.names import find_node

    nodes = session.nodes
    if where and "/" in where and where.partition("/")[0] not in ("node", "nodes", "no"):
        pod = find_pod_named(session, where)
        if node and find_node(node, nodes).name != pod.node:
            raise UsageError(f"pod {pod.key} is on node {pod.node}, not on {node}")
        if not pod.node:
            raise UsageError(f"pod {pod.key} is not on any node yet, so it has no table")
        session.reach([pod.node])
        session.fleet.agent(pod.node)
        return [Place(node=pod.node, pod=None if pod.host_network else pod)], ()
    given = (where or "").removeprefix("nodes/").removeprefix("node/").removeprefix("no/")
    if given and node and find_node(given, nodes) != find_node(node, nodes):
        raise UsageError(f"{where} and --node {node} are two nodes")
    if given or node:
        name = find_node(given or node or "", nodes).name
        session.reach([name])
        session.fleet.agent(name)
        return [Place(node=name)], ()
    names = [one.name for one in nodes]
    session.reach(names)
    gaps = session.fleet.missing(names)
    there = [Place(node=name) for name in names if session.fleet.failure(name) is None]
    if not there:
        session.fleet.agent(names[0])
    return there, gaps


def _filters(
    session: Session,
    places: list[Place],
    typed: pb.ConntrackFilter,
    pod: str | None,
    service: str | None,
) -> dict[Place, tuple[pb.ConntrackFilter, ...]]:
    """For each table, the alternatives that its agent is sent."""
    from gketrace_cli.conntrack_filter import both, door_filters, endpoint_filters, pod_filters
    from gketrace_cli.find_pod import find_pod_named

    base: tuple[pb.ConntrackFilter, ...] = (typed,)
    if pod:
        of_pod = pod_filters(find_pod_named(session, pod))
        base = tuple(made for one in of_pod if (made := both(typed, one)) is not None)
    if not service:
        return dict.fromkeys(places, base)
    found, endpoints = find_service_named(session, service)
    ends = endpoint_filters(endpoints)
    by_name = {one.name: one for one in session.nodes}
    filters = {}
    for place in places:
        node = by_name[place.node]
        own = (str(seen.address) for seen in session.fleet.addresses(place.node))
        doors = door_filters(found, (*node.internal_ips, *node.external_ips, *own))
        filters[place] = tuple(
            made
            for one in base
            for other in (*doors, *ends)
            if (made := both(one, other)) is not None
        )
    return filters


def find_service_named(session: Session, text: str) -> tuple[Service, tuple[Endpoint, ...]]:
    """A Service by NAME, svc/NAME or NAMESPACE/NAME; with ``-A`` in any namespace."""
    from gketrace_cli.commands.service import find_service, parse_service_name
    from gketrace_cli.names import close_names

    namespace, name = parse_service_name(text, session.namespace)
    if session.options.all_namespaces and "/" not in text.removeprefix("svc/"):
        listed = session.cluster.services()
        spaces = [one.namespace for one in listed if one.name == name]
        if not spaces:
            hint = close_names(name, [one.name for one in listed])
            raise NotFoundError(f'service "{name}" not found in any namespace', hint=hint)
        if len(spaces) > 1:
            hint = f"-n one of {', '.join(spaces)}"
            raise UsageError(f'service "{name}" is in several namespaces', hint=hint)
        namespace = spaces[0]
    return find_service(session, namespace, name)
