"""gRPC to the agents: one channel per node, all nodes asked at the same time, never without a
deadline.

A node whose agent does not answer is a `Missing` in the answer, never a node without findings.
Addresses come from ``--agent``, or from the agents' pods (label
``app.kubernetes.io/name=gketrace-agent``, container port named ``grpc``).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from queue import Empty, Queue, SimpleQueue
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.message import Message

from gketrace.access import DENIED, HIDDEN_HEADER
from gketrace.errors import (
    ExhaustedError,
    GketraceError,
    TimeoutExceeded,
    UnavailableError,
    UsageError,
    error_from_status,
)
from gketrace.objects import Pod
from gketrace.topology import SeenAddress
from gketrace.trace import Missing
from gketrace_cli.agent_access import AgentAccess
from gketrace_cli.portforward import PortForwards, Target, Way
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from gketrace_proto.v1alpha1.agent_pb2_grpc import AgentStub

__all__ = ["PORT_NAME", "Agent", "Fleet", "agent_port", "wrong_address"]

PORT_NAME: Final = "grpc"

_CHANNEL_OPTIONS: Final = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_retries", 0),
    # For captures, whose messages are megabytes: they come in few pieces.
    ("grpc.http2.max_frame_size", (1 << 24) - 1),
    ("grpc.http2.lookahead_bytes", 8 << 20),
    # With so much room gRPC need not find out, by a ping for each message, how much is worth it.
    ("grpc.http2.bdp_probe", 0),
)
K = TypeVar("K")


@dataclass(slots=True, kw_only=True)
class Agent:
    """One node's agent as it is reached."""

    node: str
    address: str
    """The gRPC target."""
    how: str
    """``--agent``, ``direct``, ``port-forward`` or ``--local``, with the pod's name."""
    channel: Any
    """A `grpc.Channel`; None: there is only what the agent once said (see `bundle.replay`)."""
    stub: Any
    """An `AgentStub`; None without a channel."""
    way: Way | None = None
    """The port-forward it goes through."""
    access: AgentAccess | None = None
    """How it is told who asks; None: it is not."""
    info: pb.GetInfoReply | None = None
    """Set once it has answered."""


_AT_ONCE: Final = 8
"""Calls to one agent at the same time: a fraction of what an agent allows (32), which all its
callers share."""
_STREAMS: Final = 32
"""Streaming calls of `Fleet.stream` at the same time, each of which has a thread."""
_AHEAD: Final = 16
"""Replies that are read before they are wanted; beyond that, the agents wait."""
_MOST: Final = 640 << 20
"""Bytes of one call's replies: 4 million connections, an agent's own bound, have 560 MiB.  Whoever
sends more sends without end, and would fill the memory here."""
_ENDLESS: Final = frozenset({"FollowConntrack"})


class Fleet:
    """The agents of one command.  A context manager; `close` ends every channel and way."""

    def __init__(self, *, timeout: float) -> None:
        self._timeout = timeout
        self._agents: dict[str, Agent] = {}
        self._missing: dict[str, GketraceError] = {}
        self._forwards: PortForwards | None = None
        self.hidden: dict[str, str] = {}
        """Node → what its agent said that this caller may not see."""

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for agent in self._agents.values():
            if agent.channel is not None:
                agent.channel.close()
        if self._forwards is not None:
            self._forwards.close()

    # reaching them

    def add_address(
        self,
        node: str,
        address: str,
        how: str = "--agent",
        *,
        access: AgentAccess | None = None,
    ) -> None:
        """An agent at HOST:PORT or unix:///PATH.  Nothing is sent to it yet.

        `access` None: in the clear, as to a unix socket, where no one is asked for a token.
        """
        self._add(node, address, how, None, access)

    def add_pods(
        self,
        pods: Sequence[Pod],
        *,
        forwards: PortForwards | None,
        access: AgentAccess | None = None,
    ) -> None:
        """Agents' pods: through `forwards`, or directly at the pod's address when it is None.

        A node that has an address already keeps it.  The fleet closes `forwards`.
        """
        self._forwards = forwards
        chosen: dict[str, Pod] = {}
        for pod in sorted(pods, key=lambda p: (not p.ready, bool(p.deletion_timestamp), p.name)):
            if pod.node and pod.node not in self._agents:
                chosen.setdefault(pod.node, pod)
        targets: dict[str, Target] = {}
        for node, pod in chosen.items():
            port = agent_port(pod)
            if pod.phase != "Running":
                why = f"its pod {pod.key} is {pod.phase or 'not scheduled'}"
                self._missing[node] = UnavailableError(why)
            elif not port:
                why = f"its pod {pod.key} has no container port named {PORT_NAME}"
                self._missing[node] = UnavailableError(why)
            else:
                targets[node] = Target(namespace=pod.namespace, pod=pod.name, port=port)
        if forwards is None:
            for node, target in targets.items():
                ip = next(iter(chosen[node].pod_ips), "")
                address = f"[{ip}]:{target.port}" if ":" in ip else f"{ip}:{target.port}"
                self._add(node, address, f"direct, pod {chosen[node].key}", None, access)
            return
        for node, way in zip(targets, forwards.open(list(targets.values())), strict=True):
            self._add(node, way.address, f"port-forward, pod {chosen[node].key}", way, access)

    def _add(
        self, node: str, address: str, how: str, way: Way | None, access: AgentAccess | None
    ) -> None:
        target = address.replace("unix:///", "unix:/") if address.startswith("unix:") else address
        if access is None:
            channel = grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
        else:
            channel = access.channel(node, target, _CHANNEL_OPTIONS)
        self._missing.pop(node, None)
        self._agents[node] = Agent(
            node=node,
            address=address,
            how=how,
            channel=channel,
            stub=AgentStub(channel),
            way=way,
            access=access,
        )

    def greet(self, nodes: Iterable[str] | None = None) -> None:
        """Asks those not yet asked who they are, all at once.  Who fails becomes missing.

        Raises: `UsageError` when an address given for one node is another node's agent.
        """
        wanted = [
            name
            for name in (self._agents if nodes is None else nodes)
            if name in self._agents and self._agents[name].info is None
        ]
        answers = self.ask({name: (name, "GetInfo", pb.GetInfoRequest()) for name in wanted})
        for name, answer in answers.items():
            agent = self._agents[name]
            if isinstance(answer, GketraceError):
                self._drop(name, answer)
            elif answer.node != name:
                wrong = f"the agent at {agent.address} ({agent.how}) is node {answer.node}'s"
                if agent.how == "--agent":
                    raise UsageError(f"{wrong}, not {name}'s")
                self._drop(name, UnavailableError(f"{wrong}, not this node's"))
            elif (text := wrong_address(answer)) is not None:
                why = f"the agent says that its node has address {text!r:.60}"
                self._drop(name, UnavailableError(why))
            else:
                agent.info = answer

    def _drop(self, node: str, why: GketraceError) -> None:
        agent = self._agents.pop(node)
        if agent.channel is not None:
            agent.channel.close()
        self._missing[node] = why

    # who is there

    @property
    def nodes(self) -> tuple[str, ...]:
        """Nodes with an agent that answered, or was not asked yet."""
        return tuple(self._agents)

    def addresses(self, node: str) -> tuple[SeenAddress, ...]:
        """What the node's agent said of the node's own addresses; empty: it was not asked."""
        agent = self._agents.get(node)
        if agent is None or agent.info is None:
            return ()
        return tuple(
            SeenAddress(address=ip_address(one.address), interface=one.interface)
            for one in agent.info.addresses
        )

    def agent(self, node: str) -> Agent:
        """Raises: what stood in the way."""
        if node in self._agents:
            return self._agents[node]
        raise self._missing.get(
            node,
            UnavailableError(
                f"no agent on node {node}",
                hint=f"is the DaemonSet's pod running there?  Or give --agent {node}=ADDR",
            ),
        )

    def failure(self, node: str) -> GketraceError | None:
        """Why the node has no agent; None when it has one."""
        try:
            self.agent(node)
        except GketraceError as error:
            return error
        return None

    def missing(self, nodes: Iterable[str]) -> tuple[Missing, ...]:
        """A `Missing` for each of the nodes that has no answering agent."""
        found = []
        for node in nodes:
            error = self.failure(node)
            if error is not None:
                found.append(Missing(what="agent", why=error.message, node=node))
        return tuple(found)

    # asking

    def call(self, node: str, method: str, request: Message) -> Any:
        """One call.  Raises: `GketraceError`."""
        answer = self.ask({node: (node, method, request)})[node]
        if isinstance(answer, GketraceError):
            raise answer
        return answer

    def ask(self, calls: Mapping[K, tuple[str, str, Message]]) -> dict[K, Any]:
        """Many calls (node, method, request) at the same time, up to `_AT_ONCE` of a node.

        Each answer is the reply (a list of replies for a streaming method), or the `GketraceError`
        that came instead.
        """
        answers: dict[K, Any] = {}
        queues: dict[str, deque[K]] = {}
        for key, (node, _, _) in calls.items():
            try:
                self.agent(node)
            except GketraceError as error:
                answers[key] = error
            else:
                queues.setdefault(node, deque()).append(key)
        for node, failed in self._prepare(queues).items():
            answers |= dict.fromkeys(queues.pop(node), failed)
        ended: SimpleQueue[tuple[K, Any, float]] = SimpleQueue()

        def start(key: K) -> None:
            node, method, request = calls[key]
            bound, begun = getattr(self.agent(node).stub, method), time.monotonic()
            if hasattr(bound, "future"):
                running = bound.future(request, timeout=self._timeout)
                running.add_done_callback(lambda done: ended.put((key, done, begun)))
            else:
                ended.put((key, bound(request, timeout=self._timeout), begun))

        for queue in queues.values():
            for _ in range(min(_AT_ONCE, len(queue))):
                start(queue.popleft())
        while len(answers) < len(calls):
            key, running, begun = ended.get()
            node, method, _ = calls[key]
            try:
                # A stream's call has a result() too, which waits for an end that never comes.
                streamed = not hasattr(getattr(self._agents[node].stub, method), "future")
                answers[key] = list(self._bounded(node, running)) if streamed else running.result()
                self._note(node, running)
            except ExhaustedError as error:
                answers[key] = error
            except grpc.RpcError as error:
                answers[key] = self.explain(node, error, time.monotonic() - begun)
            if queues[node]:
                start(queues[node].popleft())
        return {key: answers[key] for key in calls}

    def _bounded(self, node: str, replies: Any) -> Iterator[Any]:
        """Raises `ExhaustedError` when they are more than `_MOST`, with the call cancelled."""
        size = 0
        for reply in replies:
            size += reply.ByteSize()
            if size > _MOST:
                replies.cancel()
                raise ExhaustedError(
                    f"the agent of node {node} sends more than {_MOST >> 20} MiB in one answer"
                )
            yield reply

    def _prepare(self, nodes: Iterable[str]) -> dict[str, GketraceError]:
        """Gets tokens for these agents beforehand; those that there are none for, and why."""
        accesses: dict[AgentAccess, list[str]] = {}
        for node in nodes:
            agent = self._agents.get(node)
            if agent is not None and agent.access is not None:
                accesses.setdefault(agent.access, []).append(node)
        failed: dict[str, GketraceError] = {}
        for access, names in accesses.items():
            failed |= access.prepare(names)
        return failed

    def _note(self, node: str, call: Any) -> None:
        """Keeps what the agent says that it hides from this caller."""
        for key, value in call.initial_metadata() or ():
            if key == HIDDEN_HEADER and isinstance(value, bytes):
                self.hidden[node] = value.decode(errors="replace")

    def stream(
        self, calls: Mapping[K, tuple[str, str, Message]], *, silence: float | None = None
    ) -> Iterator[tuple[K, Any]]:
        """Streaming calls (node, method, request) at the same time: each reply as it comes.

        What ends a call comes last for its key: None, or the `GketraceError` that broke it off.
        There is no deadline for a whole call, only for the time in which no agent sends anything:
        `silence` seconds, or as long as for any other answer.
        """
        silence = self._timeout if silence is None else silence
        arrived: Queue[tuple[K, Any]] = Queue(maxsize=_AHEAD)
        waiting = deque(calls)
        running: dict[K, tuple[threading.Thread, Any]] = {}

        def read(key: K, replies: Any, begun: float) -> None:
            end: GketraceError | None = None
            noted = False
            try:
                node, method, _ = calls[key]
                for reply in replies if method in _ENDLESS else self._bounded(node, replies):
                    if not noted:
                        self._note(node, replies)
                        noted = True
                    arrived.put((key, reply))
            except grpc.RpcError as error:
                end = self.explain(calls[key][0], error, time.monotonic() - begun)
            except ExhaustedError as error:
                end = error
            arrived.put((key, end))

        def start(key: K) -> None:
            node, method, request = calls[key]
            replies = getattr(self.agent(node).stub, method)(request)
            thread = threading.Thread(
                target=read,
                args=(key, replies, time.monotonic()),
                name=f"stream-{node}",
                daemon=True,
            )
            running[key] = thread, replies
            thread.start()

        failed = self._prepare(dict.fromkeys(node for node, _, _ in calls.values()))
        for key in [key for key in waiting if calls[key][0] in failed]:
            waiting.remove(key)
            yield key, failed[calls[key][0]]
        try:
            while waiting or running:
                while waiting and len(running) < _STREAMS:
                    key = waiting.popleft()
                    try:
                        start(key)
                    except GketraceError as error:
                        yield key, error
                if not running:
                    continue
                try:
                    key, reply = arrived.get(timeout=silence)
                except Empty:
                    for key in (*running, *waiting):
                        yield key, self._too_late(calls[key][0], silence)
                    return
                if reply is None or isinstance(reply, GketraceError):
                    del running[key]
                yield key, reply
        finally:
            threads = [thread for thread, _ in running.values()]
            for _, replies in running.values():
                replies.cancel()
            while any(thread.is_alive() for thread in threads):
                try:  # a full queue would keep them
                    arrived.get(timeout=0.01)
                except Empty:
                    continue

    def _too_late(self, node: str, silence: float) -> GketraceError:
        return TimeoutExceeded(
            f"the agent of node {node} sent nothing for {silence:g} s",
            hint="--timeout SECONDS waits longer",
        )

    def explain(self, node: str, error: grpc.RpcError, seconds: float) -> GketraceError:
        """A failed call as an exception of the one tree."""
        call: Any = error  # every RpcError of a call is the call too, which grpc's types do not say
        status, details = call.code().name, call.details() or ""
        agent = self._agents.get(node)
        reached = f"the agent of node {node}"
        if agent is not None:
            reached += f" ({agent.address}, {agent.how})"
            if agent.way is not None:
                reached = f"the agent of node {node} ({agent.how})"
                if status == "UNAVAILABLE" and (broken := agent.way.error) is not None:
                    return type(broken)(f"{reached}: {broken.message}", hint=broken.hint)
        if status == "DEADLINE_EXCEEDED":
            return TimeoutExceeded(
                f"{reached} did not answer within {self._timeout:g} s",
                hint="--timeout SECONDS waits longer",
            )
        if status == "UNAVAILABLE" and details.startswith(DENIED):
            return UnavailableError(f"{reached} lets nobody in: {details.removeprefix(DENIED)}")
        if status == "UNAVAILABLE":
            reason = details.rpartition("last error: ")[2] or "no answer"
            for noise in ("UNKNOWN: ", "UNAVAILABLE: "):
                reason = reason.replace(noise, "")
            if why := reason.partition("CERTIFICATE_VERIFY_FAILED: ")[2]:
                return UnavailableError(
                    f"{reached} is not trusted: {why.removesuffix(': OK')}",
                    hint="--agent-ca FILE names its certificate's CA; 'gketrace install --apply "
                    "--renew' makes a new one",
                )
            return UnavailableError(f"{reached} does not answer: {reason}")
        return error_from_status(status, f"node {node}: {details or status}")


def wrong_address(info: pb.GetInfoReply) -> str | None:
    """The first of the node's addresses that is none; None: all are."""
    for one in info.addresses:
        try:
            ip_address(one.address)
        except ValueError:
            return one.address
    return None


def agent_port(pod: Pod) -> int:
    """The container port named ``grpc``; 0: there is none."""
    for container in pod.containers:
        for port in container.ports:
            if port.name == PORT_NAME:
                return port.port
    return 0
