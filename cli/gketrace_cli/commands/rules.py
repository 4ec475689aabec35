"""``gketrace rules``: the chain tree of a node or pod, and the rules that one packet meets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from gketrace.errors import ExitCode, GketraceError, NotFoundError, UsageError
from gketrace_cli.options import Options

if TYPE_CHECKING:
    from gketrace.objects import Pod
    from gketrace.trace import Missing, Walk
    from gketrace_cli.render.layout import Page
    from gketrace_cli.ruletree import Owner, RuleText, RuleTree
    from gketrace_cli.session import Session

__all__ = ["rules"]

_LARGE: Final = 50_000
"""Rules beyond which a node's set is not fetched whole: it may have 100 MB."""


def rules(
    options: Options,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NODE|pod/NAME",
            help="A node's full name, unique suffix or address; or pod/NAME.",
        ),
    ],
    chain: Annotated[
        str | None,
        typer.Option("--chain", metavar="CHAIN", help="Only this chain and what is below it."),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option("--table", metavar="TABLE", help='Only this table: nat, "ip kube-proxy".'),
    ] = None,
    packet: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="DST[:PORT][/PROTOCOL]",
            help="Only the rules that a packet to this address, or svc/NAME, meets.",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="SRC",
            help="With --for, who sends it: pod/NAME, node/NAME or an IP address.",
        ),
    ] = None,
) -> None:
    """Draw the chain tree with counters, and whose each of kube-proxy's chains is.

    For example:  gketrace rules 2jdh --for 10.43.246.223:80/tcp
    """
    from gketrace_cli.session import Session

    if source and not packet:
        raise UsageError("--from needs --for", hint="say where the packet goes")
    if packet and (chain or table):
        raise UsageError("--for finds the rules itself", hint="leave out --chain and --table")
    query = {"chain": chain, "table": table, "for": packet, "from": source}
    with Session(options) as session:
        node, pod = _whose_rules(session, name)
        session.fleet.greet([node])
        session.fleet.agent(node)
        session.progress.say(f"asking the agent of node {node}")
        whose, gaps = _owners(session)
        about = _About(options=options, node=node, pod=pod, query=query, whose=whose, gaps=gaps)
        if packet:
            walk, title, notes = _walk(session, node, pod, packet, source)
            session.progress.clear()
            _show_walk(about, walk, title, notes)
        else:
            tree, notes = _tree(session, about, chain or "", table or "")
            session.progress.clear()
            _show_tree(about, tree, notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _About:
    """Whose rules were asked for, and how."""

    options: Options
    node: str
    pod: Pod | None
    query: dict[str, str | None]
    whose: dict[str, Owner]
    gaps: tuple[Missing, ...]

    @property
    def place(self) -> str:
        at = f"node {self.node}"
        return at if self.pod is None else f"pod {self.pod.key} on {at}"


def _whose_rules(session: Session, name: str) -> tuple[str, Pod | None]:
    """Raises: `NotFoundError`, `UsageError`, `GketraceError`."""
    from gketrace_cli.find_pod import find_pod
    from gketrace_cli.names import find_node, parse_pod_name

    kind, slash, rest = name.partition("/")
    if slash and kind in ("node", "nodes", "no"):
        return find_node(rest, session.nodes).name, None
    if not slash:
        return find_node(name, session.nodes).name, None
    pod = find_pod(session, *parse_pod_name(name, session.namespace))
    if not pod.node:
        raise UsageError(f"pod {pod.key} is not on any node yet, so it has no rules")
    return pod.node, pod


def _owners(session: Session) -> tuple[dict[str, Owner], tuple[Missing, ...]]:
    """Without the right to list Services, the chains are drawn without their names."""
    from gketrace.trace import Missing
    from gketrace_cli.ruletree import owners

    try:
        read = session.read(
            {"services": session.cluster.services, "endpoints": session.cluster.endpoints}
        )
    except GketraceError as error:
        why = f"whose chains these are is not known: {error.message}"
        return {}, (Missing(what="services", why=why),)
    return owners(read["services"], read["endpoints"]), ()


def _target(pod: Pod | None) -> Any:
    from gketrace_cli.podref import pod_target
    from gketrace_proto.v1alpha1 import agent_pb2 as pb

    return pb.Target(host=True) if pod is None or pod.host_network else pod_target(pod)


def _tree(session: Session, about: _About, chain: str, table: str) -> tuple[RuleTree, list[str]]:
    """Raises: `NotFoundError` for a table or chain that is not there, `GketraceError`."""
    from gketrace_cli.names import close_names
    from gketrace_cli.ruletree import make_tree, select_chain

    node, pod, whose = about.node, about.pod, about.whose
    notes: list[str] = []
    info = session.fleet.agent(node).info
    count = 0 if info is None or pod is not None else sum(one.rules for one in info.rulesets)
    part = ""
    if count > _LARGE:
        if not chain:
            raise UsageError(
                f"node {node} holds {count} rules, too many to draw",
                hint="--chain NAME draws one chain, --for ADDRESS:PORT what one packet meets",
            )
        part = chain
        notes.append(
            f"Of {count} rules only this chain was read: who calls it and what is below it is not "
            "shown."
        )
    tree = make_tree(_read(session, node, pod, table, part), whose, node=node)
    if table and not tree.tables and not tree.missing:
        everything = make_tree(_read(session, node, pod, "", chain), {}, node=node)
        names = {one.name for one in everything.tables}
        raise NotFoundError(f'table "{table}" not found on {node}', hint=close_names(table, names))
    if chain and (tree.tables or not tree.missing):
        tree = select_chain(tree, chain)
    if len(tree.backends) > 1:
        both = " and ".join(tree.backends)
        notes.append(f"{both} all hold rules: the kernel runs every one of them.")
    return tree, notes


def _read(session: Session, node: str, pod: Pod | None, table: str, chain: str) -> list[RuleText]:
    """The agent's replies, joined to one text for each rule set."""
    from gketrace_cli.ruletree import RuleText
    from gketrace_proto.v1alpha1 import agent_pb2 as pb

    request = pb.GetRulesRequest(target=_target(pod), table=table, chain=chain)
    pieces: dict[tuple[str, int, str], list[Any]] = {}
    for number, reply in enumerate(session.fleet.call(node, "GetRules", request)):
        # What could not be read has no family or table to tell it from its like.
        key = reply.table or (f"{number}" if reply.unavailable else "")
        pieces.setdefault((reply.backend, reply.family, key), []).append(reply)
    return [
        RuleText(
            backend=backend,
            family=family,
            table=replies[0].table,
            text=b"".join(reply.text for reply in replies),
            unavailable=replies[0].unavailable,
            taken_at=replies[0].taken_at,
            source=replies[0].source or backend,
        )
        for (backend, family, _), replies in pieces.items()
    ]


def _walk(
    session: Session, node: str, pod: Pod | None, packet: str, source: str | None
) -> tuple[Walk, str, list[str]]:
    """The walk, what was walked, and what was assumed."""
    from gketrace.packet import PORT_PROTOCOLS, Packet, Protocol
    from gketrace.trace import Walk
    from gketrace_cli.find_pod import find_pod
    from gketrace_cli.frontdoors import Sender
    from gketrace_cli.podref import pod_ref
    from gketrace_cli.senders import resolve_sender
    from gketrace_proto.codec import decode, encode
    from gketrace_proto.v1alpha1 import agent_pb2 as pb

    notes: list[str] = []
    if source:
        sender = resolve_sender(session, source, find_pod)
    else:
        sender = Sender(node=node, pod=pod)
        what = f"pod {pod.key}" if pod is not None else f"node {node} itself"
        notes.append(f"Assumed {what} as the sender; --from names another.")
    if sender.node and sender.node != node:
        # Another node's packet reaches this one from the network, from that address.
        raise UsageError(
            f"{sender.text} sends from node {sender.node}, not from {node}",
            hint=f"gketrace rules {sender.node}, or gketrace trace for the whole path",
        )
    if not sender.node and pod is not None:
        raise UsageError(f"{sender.text} is outside: its packets reach the node, not the pod")
    address, port, protocol = _destination(session, packet)
    if protocol in PORT_PROTOCOLS and port is None:
        raise UsageError(f"{packet!r} lacks a port", hint=f"for example {packet}:80")
    echo = {Protocol.ICMP: 8, Protocol.ICMPV6: 128}.get(protocol)
    unspecified = ip_address("0.0.0.0" if address.version == 4 else "::")
    asked = Packet(
        src=sender.address or unspecified,
        dst=address,
        protocol=protocol,
        sport=sender.port,
        dport=port,
        icmp_type=echo,
        icmp_code=None if echo is None else 0,
    )
    if sender.pod is not None:
        session.pods.add(sender.pod)
    from_pod = sender.pod if sender.pod is not None and not sender.pod.host_network else None
    request = pb.WalkRequest(
        target=_target(from_pod),
        packet=encode(asked),
        pods=[pod_ref(one) for one in session.pods.of_node(node)],
        arrives=not sender.node,
        use_conntrack=False,
    )
    reply = session.fleet.call(node, "Walk", request)
    if reply.arrival:
        notes.append(f"It arrives by {reply.arrival}.")
    notes.append("A new connection; an existing one is decided by connection tracking.")
    title = f"{packet} from {sender.text}"
    return decode(Walk, reply.walk), title, notes


def _destination(session: Session, text: str) -> tuple[Any, int | None, Any]:
    """``--for`` → address, port, protocol.  Raises: `UsageError`, `NotFoundError`."""
    from gketrace.packet import Protocol, protocol_number
    from gketrace_cli.commands.service import find_service
    from gketrace_cli.frontdoors import select_ports
    from gketrace_cli.names import Kind, parse_named

    to = parse_named(text)
    if to.kind is Kind.ADDRESS:
        if to.port and not to.port.isdigit():
            raise UsageError(f"{text!r}: an address has no named ports")
        protocol = Protocol.TCP if to.protocol is None else to.protocol
        return to.address, int(to.port) if to.port else None, protocol
    if to.kind is not Kind.SERVICE:
        raise UsageError(f"{text!r} is neither an address nor svc/NAME")
    service, _ = find_service(session, to.namespace or session.namespace, to.name)
    ports = select_ports(service, to.port)
    if to.protocol is not None:
        ports = tuple(p for p in ports if protocol_number(p.protocol) == to.protocol)
    if len(ports) != 1 or not service.cluster_ips:
        known = ", ".join(f"{p.port}/{p.protocol.lower()}" for p in service.ports)
        raise UsageError(f"{text!r} is not one port of one address", hint=f"it has {known}")
    return ip_address(service.cluster_ips[0]), ports[0].port, protocol_number(ports[0].protocol)


def _show_tree(about: _About, tree: RuleTree, notes: Sequence[str]) -> None:
    from gketrace_cli.render.rules import draw_rules
    from gketrace_cli.ruletree import RuleTree

    tree = RuleTree(tables=tree.tables, missing=tree.missing + about.gaps)
    chain = about.query["chain"] or ""
    _write(
        about,
        lambda page: draw_rules(page, about.place, tree, chain=chain, notes=notes),
        tree=tree,
        walk=None,
        missing=tree.missing,
        notes=notes,
    )
    raise typer.Exit(int(ExitCode.PARTIAL if tree.missing else ExitCode.OK))


def _show_walk(about: _About, walk: Walk, title: str, notes: Sequence[str]) -> None:
    from gketrace.trace import Disposition
    from gketrace_cli.render.rules import draw_walk

    walk = replace(walk, missing=walk.missing + about.gaps)
    _write(
        about,
        lambda page: draw_walk(page, about.place, title, walk, about.whose, notes=notes),
        tree=None,
        walk=walk,
        missing=walk.missing,
        notes=notes,
    )
    unknown = any(leaf.outcome.disposition is Disposition.UNKNOWN for leaf in walk.leaves())
    raise typer.Exit(int(ExitCode.PARTIAL if unknown or walk.missing else ExitCode.OK))


def _write(
    about: _About,
    draw: Callable[[Page], None],
    *,
    tree: RuleTree | None,
    walk: Walk | None,
    missing: tuple[Missing, ...],
    notes: Sequence[str],
) -> None:
    """As a document of either, or as `draw` draws it."""
    from gketrace_cli.render.documents import dump
    from gketrace_cli.render.layout import Page, write
    from gketrace_cli.render.rules import rules_document

    if about.options.format.machine:
        document = rules_document(
            node=about.node,
            pod=about.pod.key if about.pod is not None else "",
            query=about.query,
            tree=tree,
            walk=walk,
            whose=about.whose,
            missing=missing,
            notes=notes,
        )
        write(dump(document, about.options.format))
        return
    page = Page.of(about.options)
    draw(page)
    write(page.text())
