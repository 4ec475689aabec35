"""``gketrace trace``: one packet from anywhere to anywhere."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated

import typer

from gketrace.errors import NotFoundError, UnsupportedError, UsageError
from gketrace_cli.options import Options, Verbose

if TYPE_CHECKING:
    from gketrace.packet import IPAddress
    from gketrace_cli.frontdoors import Question, Sender
    from gketrace_cli.names import Named
    from gketrace_cli.session import Session

__all__ = ["question_of", "trace"]


def trace(
    options: Options,
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="pod/NAME, node/NAME or an IP address.")
    ],
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DST[:PORT][/PROTOCOL]",
            help="pod/NAME, svc/NAME, node/NAME or an IP address; [ADDRESS]:PORT for IPv6.",
        ),
    ],
    node: Annotated[
        str | None,
        typer.Option(
            "--node",
            metavar="NODE",
            help="Where a packet from outside the cluster arrives, when the address does not say.",
        ),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Follow one packet from any source to any destination, and its answer back.

    For example:  gketrace trace pod/web-0 svc/hello-server:80
    """
    from gketrace_cli.asking import Asker, assumed_port
    from gketrace_cli.checking.single import trace_findings
    from gketrace_cli.find_pod import find_pod
    from gketrace_cli.names import find_node, parse_named, short_names
    from gketrace_cli.senders import sender_of
    from gketrace_cli.session import Session, background
    from gketrace_cli.verdict import judge_trace, target_text

    from_, to = parse_named(source), parse_named(destination)
    with Session(options) as session:
        session.progress.say("reading the cluster")
        services = background(session.cluster.services, "services")
        sender = sender_of(session, from_, find_pod)
        entry = find_node(node, session.nodes).name if node else ""
        question = question_of(session, sender, to, entry)
        if sender.pod is not None:
            session.pods.add(sender.pod)
        result = Asker(session, services=services).ask((question,))
        findings = trace_findings(
            result.answers,
            session.nodes,
            session.pods.known,
            services.result(),
            lambda found: session.cluster.endpoints(found.namespace, service=found.name),
        )
        short = short_names(n.name for n in session.nodes)
        session.progress.clear()
    from gketrace_cli.render.documents import dump
    from gketrace_cli.render.findings import draw_findings
    from gketrace_cli.render.layout import Page, write
    from gketrace_cli.render.trace import draw_trace, in_brief
    from gketrace_cli.render.trace_document import trace_document

    notes = [*question.notes, *assumed_port((question,)), *session.hidden]
    verdict = judge_trace(result.answers[0], result.missing)
    if options.format.machine:
        query = {"from": sender.text, "to": destination, "target": target_text(question)}
        document = trace_document(
            "Trace",
            verdict,
            result.answers,
            query=query,
            missing=result.missing,
            notes=notes,
            findings=findings,
        )
        write(dump(document, options.format))
    else:
        page = Page.of(options, short)
        draw_trace(
            page,
            verdict,
            result.answers,
            missing=result.missing,
            notes=notes,
            brief=not verbose and in_brief(options, result.answers),
        )
        draw_findings(page, findings, heading="Findings")
        write(page.text())
    raise typer.Exit(int(verdict.code))


def question_of(session: Session, sender: Sender, to: Named, entry: str) -> Question:
    """What was typed as destination → the packet.  Raises: `UsageError`, `NotFoundError`."""
    from gketrace_cli.names import Kind

    makers = {
        Kind.POD: _to_pod,
        Kind.SERVICE: _to_service,
        Kind.NODE: _to_node,
        Kind.ADDRESS: _to_address,
    }
    question = makers[to.kind](session, sender, to)
    if sender.address is not None and sender.address.version != question.address.version:
        raise UsageError(f"{sender.address} and {question.address} are not of one address family")
    if sender.outside:
        return replace(question, entry=entry)
    if entry and entry != sender.node:
        raise UsageError(f"{sender.text} sends from node {sender.node}, not from {entry}")
    return question


def _number(to: Named, known: dict[str, int]) -> int | None:
    """The port as a number; None for protocols without ports.  Raises: `UsageError`."""
    from gketrace.packet import PORT_PROTOCOLS

    if to.protocol is not None and to.protocol not in PORT_PROTOCOLS:
        if to.port:
            raise UsageError(f"{to.text!r}: that protocol has no ports")
        return None
    if to.port.isdigit():
        return int(to.port)
    if to.port:
        if to.port not in known:
            names = ", ".join(known)
            raise NotFoundError(
                f"{to.text!r}: no port is named {to.port!r} there",
                hint=f"it has {names}" if names else "use a number",
            )
        return known[to.port]
    bare = f"[{to.address}]" if to.address is not None and to.address.version == 6 else to.text
    raise UsageError(f"{to.text!r} lacks a port", hint=f"for example {bare}:80")


def _pick(addresses: list[IPAddress], sender: Sender, what: str) -> IPAddress:
    """The first address of the sender's family."""
    family = sender.address.version if sender.address is not None else None
    fitting = [ip for ip in addresses if family in (None, ip.version)]
    if not fitting:
        raise NotFoundError(f"{what} has no address{f' of IPv{family}' if family else ''}")
    return fitting[0]


def _to_pod(session: Session, sender: Sender, to: Named) -> Question:
    from gketrace.packet import protocol_number
    from gketrace_cli.find_pod import find_pod, refuse_ended
    from gketrace_cli.frontdoors import Door, Question

    pod = find_pod(session, to.namespace or session.namespace, to.name)
    refuse_ended(pod)
    if not pod.node:
        raise UsageError(f"pod {pod.key} is not on any node yet")
    ports = [p for c in pod.containers for p in c.ports]
    notes: tuple[str, ...] = ()
    protocol = to.protocol
    if not to.port and protocol is None and len(ports) == 1:
        to = replace(to, port=str(ports[0].port), protocol=protocol_number(ports[0].protocol))
        notes = (f"Assumed {ports[0].port}/{ports[0].protocol.lower()}, the only port declared.",)
    port = _number(to, {p.name: p.port for p in ports if p.name})
    return Question(
        door=Door.POD,
        sender=sender,
        address=_pick([ip_address(ip) for ip in pod.pod_ips], sender, f"pod {pod.key}"),
        port=port,
        protocol=to.protocol or protocol_number("tcp"),
        asked=True,
        notes=notes,
        pod=pod.key,
    )


def _to_service(session: Session, sender: Sender, to: Named) -> Question:
    from gketrace.packet import protocol_number
    from gketrace_cli.astray import known_ends, known_takers
    from gketrace_cli.commands.service import find_service
    from gketrace_cli.frontdoors import Door, Question, select_ports

    service, endpoints = find_service(session, to.namespace or session.namespace, to.name)
    if not service.cluster_ips:
        if service.type == "ExternalName":
            raise UnsupportedError(
                f"service {service.key} is of type ExternalName: a DNS name for "
                f"{service.external_name}, with no address and no rules on any node",
                hint=f"trace to an address of {service.external_name}",
            )
        raise UnsupportedError(
            f"service {service.key} is headless and has no address of its own",
            hint=f"gketrace service {service.name} follows each endpoint",
        )
    ports = select_ports(service, to.port)
    if to.protocol is not None:
        ports = tuple(p for p in ports if protocol_number(p.protocol) == to.protocol)
    if len(ports) != 1:
        known = ", ".join(f"{p.port}/{p.protocol.lower()}" for p in ports or service.ports)
        what = ("matches several ports" if to.port else "lacks a port") if ports else "is no port"
        raise UsageError(f"{to.text!r} {what}", hint=f"service {service.key} has {known}")
    return Question(
        door=Door.CLUSTER_IP,
        sender=sender,
        address=_pick([ip_address(i) for i in service.cluster_ips], sender, service.key),
        port=ports[0].port,
        protocol=protocol_number(ports[0].protocol),
        port_name=ports[0].name,
        asked=True,
        ends=known_ends(endpoints, ports[0]),
        takers=known_takers(endpoints, ports[0]),
    )


def _to_node(session: Session, sender: Sender, to: Named) -> Question:
    from gketrace.packet import protocol_number
    from gketrace_cli.frontdoors import Door, Question
    from gketrace_cli.names import find_node

    node = find_node(to.name, session.nodes)
    return Question(
        door=Door.ADDRESS,
        sender=sender,
        address=_pick([ip_address(i) for i in node.internal_ips], sender, f"node {node.name}"),
        port=_number(to, {}),
        protocol=to.protocol or protocol_number("tcp"),
        asked=True,
    )


def _to_address(_: Session, sender: Sender, to: Named) -> Question:
    from gketrace.packet import protocol_number
    from gketrace_cli.frontdoors import Door, Question

    assert to.address is not None  # what Kind.ADDRESS means
    return Question(
        door=Door.ADDRESS,
        sender=sender,
        address=to.address,
        port=_number(to, {}),
        protocol=to.protocol or protocol_number("tcp"),
        asked=True,
    )
