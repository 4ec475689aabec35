"""A Service or a trace → where to capture: walks it first, then plans taps along its paths."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from gketrace.capture.plan import Crossing, Plan, PlannedTap, Wanted, make_plan
from gketrace.errors import GketraceError, UnavailableError
from gketrace.objects import Node, Pod, Service
from gketrace.packet import IPAddress, Packet
from gketrace.trace import Missing
from gketrace_cli.asking import Asker, Result
from gketrace_cli.capture.filtering import join_filters
from gketrace_cli.podref import pod_target
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1 import capture_pb2

if TYPE_CHECKING:
    from gketrace_cli.frontdoors import Door, Question
    from gketrace_cli.render.layout import Page
    from gketrace_cli.session import Session

__all__ = [
    "NodeTaps",
    "Planning",
    "describe",
    "draw_plan",
    "names_of",
    "node_taps",
    "pids_of",
    "plan_document",
    "plan_service",
    "plan_trace",
    "tcpdump_command",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """A plan, and what it rests on."""

    subject: str
    """``Service default/hello-server``, ``pod/default/web-1 to 10.43.246.223:80/tcp``."""
    plan: Plan
    notes: tuple[str, ...] = ()
    missing: tuple[Missing, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTaps:
    """One node's part of a plan, in one order."""

    planned: tuple[PlannedTap, ...]
    taps: tuple[capture_pb2.CaptureTap, ...]
    descriptions: tuple[str, ...]


def plan_service(
    session: Session,
    name: str,
    *,
    sources: Sequence[str] = (),
    door: Door | None = None,
    node: str = "",
    port: str = "",
) -> Planning:
    """Every front door of a Service, to each endpoint and back.

    Without `sources`, clients are open: filters ask for the Service's side alone.
    """
    from gketrace_cli.commands.service import find_service, parse_service_name
    from gketrace_cli.find_pod import find_pod
    from gketrace_cli.frontdoors import Selection, questions
    from gketrace_cli.names import find_node
    from gketrace_cli.senders import resolve_sender

    namespace, wanted = parse_service_name(name, session.namespace)
    session.progress.say(f"reading service {namespace}/{wanted}")
    service, endpoints = find_service(session, namespace, wanted)
    senders = tuple(resolve_sender(session, text, find_pod) for text in sources)
    entry = find_node(node, session.nodes).name if node else ""
    selection = Selection(senders=senders, door=door, node=entry, port=port)
    asked, skipped = questions(service, endpoints, session.nodes, selection)
    for sender in senders:
        if sender.pod is not None:
            session.pods.add(sender.pod)
    result = Asker(session, services=(service,)).ask(asked)
    notes = list(skipped)
    if any(question.sender.assumed for question in asked):
        notes.append(
            "Any client is captured; one in a pod from its node's own interfaces on: "
            "--from pod/NAME adds the pod's."
        )
    return _planning(f"Service {service.key}", result, notes)


def plan_trace(session: Session, source: str, destination: str, node: str = "") -> Planning:
    """One packet from anywhere to anywhere, and its answer."""
    from gketrace_cli.commands.trace import question_of
    from gketrace_cli.find_pod import find_pod
    from gketrace_cli.names import find_node, parse_named
    from gketrace_cli.senders import sender_of
    from gketrace_cli.session import background
    from gketrace_cli.verdict import target_text

    services = background(session.cluster.services, "services")
    sender = sender_of(session, parse_named(source), find_pod)
    entry = find_node(node, session.nodes).name if node else ""
    question = question_of(session, sender, parse_named(destination), entry)
    if sender.pod is not None:
        session.pods.add(sender.pod)
    result = Asker(session, services=services).ask((question,))
    return _planning(f"{sender.text} to {target_text(question)}", result, list(question.notes))


def _planning(subject: str, result: Result, notes: list[str]) -> Planning:
    wanted = [
        Wanted(path=path, any_client=_any_client(question), any_port=question.sender.port is None)
        for answer in result.answers
        for question in (answer.question,)
        for path in answer.paths
    ]
    plan = make_plan(wanted)
    if not plan.taps:
        why = next((path.path.outcome.detail for path in wanted), "no path leads there")
        raise UnavailableError(f"nowhere to capture {subject}: {why}")
    return Planning(subject=subject, plan=plan, notes=(*notes, *plan.notes), missing=result.missing)


def _any_client(question: Question) -> bool:
    return question.sender.assumed


def node_taps(session: Session, plan: Plan) -> dict[str, NodeTaps]:
    """The plan as requests, by node; raises `UnavailableError` for a pod that is not known."""
    by_node: dict[str, list[PlannedTap]] = {}
    for tap in plan.taps:
        by_node.setdefault(tap.spot.node, []).append(tap)
    return {
        node: NodeTaps(
            planned=tuple(taps),
            taps=tuple(
                capture_pb2.CaptureTap(
                    target=_target(session, tap), interface=tap.spot.interface, filter=tap.filter
                )
                for tap in taps
            ),
            descriptions=tuple(describe(tap) for tap in taps),
        )
        for node, taps in by_node.items()
    }


def _target(session: Session, tap: PlannedTap) -> pb.Target:
    if not tap.spot.pod:
        return pb.Target(host=True)
    return pod_target(_pod(session, tap))


def _pod(session: Session, tap: PlannedTap) -> Pod:
    for pod in session.pods.of_node(tap.spot.node):
        if pod.key == tap.spot.pod:
            return pod
    raise UnavailableError(f"pod {tap.spot.pod} is not known on node {tap.spot.node}")


def describe(tap: PlannedTap) -> str:
    """``hop 2 in, hop 2 out``: where its crossings are in their paths."""
    words = dict.fromkeys(
        f"hop {c.hop} {c.direction.value}" for c in tap.crossings if not c.back
    ) or dict.fromkeys(f"hop {c.hop} {c.direction.value}, back" for c in tap.crossings)
    return ", ".join(words)


def pids_of(session: Session, plan: Plan) -> dict[str, int]:
    """Pod → a PID in its namespace, as its agent finds it; pods that it does not find are left
    out."""
    wanted = {tap.spot.pod: tap for tap in plan.taps if tap.spot.pod}
    calls: dict[str, tuple[str, str, Any]] = {
        key: (tap.spot.node, "GetNetns", pb.GetNetnsRequest(target=_target(session, tap)))
        for key, tap in wanted.items()
    }
    answers = session.fleet.ask(calls)
    return {
        key: reply.pod.sandbox_pid
        for key, reply in answers.items()
        if not isinstance(reply, GketraceError) and reply.HasField("pod") and reply.pod.sandbox_pid
    }


def tcpdump_command(tap: PlannedTap, pids: dict[str, int], snap: int = 0, typed: str = "") -> str:
    """What to type on the node to capture the same; `typed`: the filter beside the plan's."""
    words = ["tcpdump", "-n", "-i", tap.spot.interface]
    if snap:
        words += ["-s", str(snap)]
    command = shlex.join([*words, join_filters(tap.filter, typed)])
    if not tap.spot.pod:
        return command
    pid = pids.get(tap.spot.pod)
    return f"nsenter -t {pid if pid is not None else 'PID'} -n {command}"


def draw_plan(
    page: Page, planning: Planning, pids: dict[str, int], snap: int = 0, typed: str = ""
) -> None:
    """The plan for people: each tap, why it is there, its filter as a tcpdump command."""
    plan = planning.plan
    nodes = len({tap.spot.node for tap in plan.taps})
    page.line(
        f"{planning.subject}: {_count(len(plan.taps), 'tap')} on {_count(nodes, 'node')}.", "bold"
    )
    for note in planning.notes:
        page.line(note, "dim")
    for number, tap in enumerate(plan.taps, 1):
        page.blank()
        where = f"node {page.short(tap.spot.node)}"
        if tap.spot.pod:
            where = f"pod {tap.spot.pod} on {where}"
        page.line(f"{number}. {tap.spot.interface}, {where}", "cyan", hang=3)
        shown = [c for c in tap.crossings if page.wide or not c.back] or tap.crossings
        hops: dict[tuple[str, str], dict[str, None]] = {}
        for crossing in shown:
            way = f"{crossing.direction.value}{' back' if crossing.back else ''}"
            hop = f"{crossing.path + 1}.{crossing.hop}" if page.wide else str(crossing.hop)
            hops.setdefault((way, _crossing(crossing)), {})[hop] = None
        for (way, text), numbers in hops.items():
            plural = "s" if len(numbers) > 1 else ""
            page.entry(way, page.short(f"{text} (hop{plural} {', '.join(numbers)})"))
        # Not wrapped: it is there to be copied.
        page.lines.append(f"   {tcpdump_command(tap, pids, snap, typed)}")
    for missing in planning.missing:
        page.blank()
        page.entry("not seen", page.short(str(missing)), "yellow")


def _crossing(crossing: Crossing) -> str:
    text = open_packet(crossing)
    if crossing.rewrites:
        done = ", ".join(f"{rewrite.kind} by {rewrite.by}" for rewrite in crossing.rewrites)
        text += f", after {done}"
    return text


def open_packet(crossing: Crossing) -> str:
    """The packet with ``*`` for what the filter leaves open."""
    term = crossing.term

    def end(address: IPAddress | None, port: int | None, ported: bool) -> str:
        if address is None:
            return "any client"
        host = f"[{address}]" if address.version == 6 else str(address)
        shown = "*" if port is None else str(port)
        return f"{host}:{shown}" if ported else host

    ported = crossing.packet.has_ports
    client = end(term.client, term.client_port, ported)
    server = end(term.server, term.server_port, ported)
    return f"{server} → {client}" if crossing.back else f"{client} → {server}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def plan_document(
    planning: Planning, pids: dict[str, int], snap: int = 0, typed: str = ""
) -> list[dict[str, Any]]:
    """``taps`` of the JSON form."""
    return [
        {
            "node": tap.spot.node,
            "pod": tap.spot.pod or None,
            "interface": tap.spot.interface,
            "filter": join_filters(tap.filter, typed),
            "tcpdump": tcpdump_command(tap, pids, snap, typed),
            "crossings": [
                {
                    "path": crossing.path,
                    "title": planning.plan.routes[crossing.path].title,
                    "hop": crossing.hop,
                    "direction": crossing.direction.value,
                    "back": crossing.back,
                    "packet": _packet(crossing.packet),
                    "rewrites": [
                        {
                            "kind": rewrite.kind,
                            "by": rewrite.by,
                            "rule": rewrite.citation.text if rewrite.citation else None,
                            "before": _packet(rewrite.before),
                            "after": _packet(rewrite.after),
                        }
                        for rewrite in crossing.rewrites
                    ],
                }
                for crossing in tap.crossings
            ],
        }
        for tap in planning.plan.taps
    ]


def _packet(packet: Packet) -> dict[str, Any]:
    from gketrace_cli.render.documents import packet_document

    return packet_document(packet)


def names_of(
    nodes: Iterable[Node], pods: Iterable[Pod], services: Iterable[Service]
) -> dict[IPAddress, str]:
    """Address → ``pod/NS/NAME``, ``svc/NS/NAME``, ``node/NAME``, for lines and files."""
    found: dict[IPAddress, str] = {}
    for node in nodes:
        for text in (*node.internal_ips, *node.external_ips):
            found[ip_address(text)] = f"node/{node.name}"
    for pod in pods:
        if not pod.host_network:
            found.update(dict.fromkeys(map(ip_address, pod.pod_ips), f"pod/{pod.key}"))
    for service in services:
        addresses = [*service.cluster_ips, *service.external_ips]
        addresses += [entry.ip for entry in service.ingress if entry.ip]
        found.update(dict.fromkeys(map(ip_address, addresses), f"svc/{service.key}"))
    return found
