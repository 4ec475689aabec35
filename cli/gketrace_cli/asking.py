"""Questions → answers: drives the stitcher, and asks each node's agent for the walks it needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Final

from gketrace.crossing import ASSUMED_PORT
from gketrace.errors import ForbiddenError, GketraceError, UnavailableError
from gketrace.objects import Node, Pod, Service
from gketrace.packet import PORT_PROTOCOLS, IPAddress, Packet, Protocol
from gketrace.snapshot import Maybe, Unavailable
from gketrace.stitch import Inquiry, NodeQuery, stitch
from gketrace.topology import NodeFacts, PodFacts, SeenAddress, ServiceFacts, Topology
from gketrace.trace import Missing, Path, Walk
from gketrace_cli.frontdoors import Question
from gketrace_cli.verdict import Answer, target_text

if TYPE_CHECKING:
    from gketrace_cli.session import Session

__all__ = ["Asker", "Result", "assumed_port", "inquiry", "make_topology"]

_UNSPECIFIED: Final = {4: ip_address("0.0.0.0"), 6: ip_address("::")}
_ECHO: Final = {Protocol.ICMP: 8, Protocol.ICMPV6: 128}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The answers, in the questions' order, and what they lack."""

    answers: tuple[Answer, ...]
    missing: tuple[Missing, ...]


class Asker:
    """Asks the agents of one session."""

    def __init__(
        self,
        session: Session,
        *,
        services: Future[tuple[Service, ...]] | tuple[Service, ...] = (),
    ) -> None:
        """`services` are those whose addresses a packet may meet between the nodes."""
        self._session = session
        self._services = services
        self._failed: list[GketraceError] = []
        self._answered = 0

    def ask(self, questions: Sequence[Question]) -> Result:
        """Raises: `ForbiddenError`, `UnavailableError` when no agent at all could be asked."""
        session = self._session
        pods = session.pods
        services = self._services.result() if isinstance(self._services, Future) else self._services
        fleet = session.fleet
        fleet.greet(dict.fromkeys(name for q in questions for name in _met(q)))
        seen = {node.name: fleet.addresses(node.name) for node in session.nodes}
        topology = make_topology(session.nodes, pods.known, services, seen)
        run = stitch(topology, [inquiry(question) for question in questions])
        paths: tuple[tuple[Path, ...], ...]
        try:
            batch = next(run)
            while True:
                session.progress.say(f"following {len(batch)} packets")
                batch = run.send(self._walk(batch))
        except StopIteration as done:
            paths = done.value
        if self._failed and not self._answered:
            raise _worst(self._failed)
        answers = tuple(
            Answer(question=question, paths=found)
            for question, found in zip(questions, paths, strict=True)
        )
        missing = [*pods.missing]
        for answer in answers:
            for path in answer.paths:
                missing += path.missing
                missing += path.reply.missing if path.reply is not None else ()
        return Result(answers=answers, missing=tuple(dict.fromkeys(missing)))

    @property
    def unanswered(self) -> str:
        """Why an agent did not answer, when that may pass; empty: all did."""
        passing = (error for error in self._failed if isinstance(error, UnavailableError))
        return next((error.message for error in passing), "")

    def _walk(self, batch: Sequence[NodeQuery]) -> list[Maybe[Walk]]:
        """One walk for each query, all nodes at the same time."""
        from gketrace_cli.podref import pod_ref
        from gketrace_proto.codec import decode, encode
        from gketrace_proto.v1alpha1 import agent_pb2 as pb

        session = self._session
        session.fleet.greet(dict.fromkeys(query.node for query in batch))
        calls = {}
        for number, query in enumerate(batch):
            on_node = session.pods.of_node(query.node)
            start = next((p for p in on_node if p.key == query.pod), None) if query.pod else None
            if query.pod and start is None:
                raise UnavailableError(f"pod {query.pod} is not known on node {query.node}")
            target = pb.Target(host=True) if start is None else pb.Target(pod=pod_ref(start))
            request = pb.WalkRequest(
                target=target,
                packet=encode(query.packet),
                flows=[encode(flow) for flow in query.flows],
                pods=[pod_ref(pod) for pod in on_node],
                arrives=query.arrives,
                use_conntrack=query.use_conntrack,
            )
            calls[number] = (query.node, "Walk", request)
        walks: list[Maybe[Walk]] = []
        for reply in session.fleet.ask(calls).values():
            if isinstance(reply, GketraceError):
                self._failed.append(reply)
                walks.append(Unavailable(reason=reply.message))
                continue
            try:
                walks.append(decode(Walk, reply.walk))
                self._answered += 1
            except GketraceError as error:  # a newer agent: said, like anything else not understood
                self._failed.append(error)
                walks.append(Unavailable(reason=error.message))
        return walks


def _worst(errors: Sequence[GketraceError]) -> GketraceError:
    """The one that decides the exit code when nothing was answered."""
    for kind in (ForbiddenError, UnavailableError):
        for error in errors:
            if isinstance(error, kind):
                return error
    return errors[0]


def inquiry(question: Question) -> Inquiry:
    """A question as the stitcher takes it."""
    sender = question.sender
    pod = sender.pod.key if sender.pod is not None and not sender.pod.host_network else ""
    source = sender.address or _UNSPECIFIED[question.address.version]
    return Inquiry(
        front_door=question.door.value,
        source=sender.text,
        target=target_text(question),
        packet=_packet(question, source),
        node=sender.node,
        pod=pod,
        entry=question.entry if sender.outside else "",
        entry_because=_why_there(question),
        use_conntrack=question.use_conntrack,
    )


def _why_there(question: Question) -> str:
    """What it rests on that a packet from outside comes to `Question.entry`."""
    if question.via and question.via == question.entry:
        return f"it has {question.address}"
    return "a node that a load balancer may pick; which one it picks is not observable"


def _packet(question: Question, source: IPAddress) -> Packet:
    echo = _ECHO.get(Protocol(question.protocol)) if question.protocol in _ECHO else None
    return Packet(
        src=source,
        dst=question.address,
        protocol=question.protocol,
        sport=question.sender.port,
        dport=question.port,
        icmp_type=echo,
        icmp_code=None if echo is None else 0,
    )


def _met(question: Question) -> Iterable[str]:
    """The nodes that give the packet its source address: their own addresses must be known before
    the answer is followed."""
    return filter(None, (question.sender.node, question.entry, question.via))


def assumed_port(questions: Sequence[Question]) -> list[str]:
    """Says which source port stands for all, where none was given."""
    if any(q.sender.port is None and q.protocol in PORT_PROTOCOLS for q in questions):
        return [f"Source port {ASSUMED_PORT} stands for any; --from ADDRESS:PORT names one."]
    return []


def make_topology(
    nodes: Iterable[Node],
    pods: Iterable[Pod],
    services: Iterable[Service],
    seen: Mapping[str, tuple[SeenAddress, ...]],
) -> Topology:
    """The objects' addresses; `seen`: node → what its agent says that it has beside them."""
    return Topology(
        nodes=tuple(
            NodeFacts(
                name=node.name,
                addresses=tuple(map(ip_address, node.internal_ips)),
                external=tuple(map(ip_address, node.external_ips)),
                pod_cidrs=tuple(ip_network(cidr, strict=False) for cidr in node.pod_cidrs),
                seen=seen.get(node.name, ()),
            )
            for node in nodes
        ),
        pods=tuple(
            PodFacts(
                key=pod.key,
                node=pod.node,
                addresses=tuple(map(ip_address, pod.pod_ips)),
                host_network=pod.host_network,
            )
            for pod in pods
        ),
        services=tuple(
            ServiceFacts(
                key=service.key,
                cluster_ips=tuple(map(ip_address, service.cluster_ips)),
                load_balancer_ips=tuple(ip_address(e.ip) for e in service.ingress if e.ip),
                external_ips=tuple(map(ip_address, service.external_ips)),
            )
            for service in services
        ),
    )
