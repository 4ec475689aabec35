"""Before and after each call: who, whether, how much of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import Message

from gketrace.access import METHODS, CallClass, Need
from gketrace.errors import ForbiddenError, NotFoundError
from gketrace.packet import IPAddress
from gketrace_agent.access.bounds import Bounds
from gketrace_agent.access.edge import is_namespace
from gketrace_agent.access.identity import LOCAL, Caller, Identities
from gketrace_agent.access.masking import Masker
from gketrace_agent.access.permission import Action, Permissions, refusal
from gketrace_agent.access.scope import Objects, Scope, addresses_of
from gketrace_proto.v1alpha1 import agent_pb2, packet_pb2, target_pb2

if TYPE_CHECKING:
    from gketrace_agent.access.apiserver import KubeApi

__all__ = ["CALLER", "IN_NODE", "OWN", "Granted", "Guard"]

CALLER: Final[ContextVar[Caller]] = ContextVar("caller", default=LOCAL)
"""In a call: who makes it."""

IN_NODE: Final[ContextVar[Callable[[], None]]] = ContextVar("in_node")
"""In a call: to be called when a pod turns out to be in the node's own network, which needs the
permission for the node.  Raises `ForbiddenError`, `UnavailableError`."""

OWN: Final[ContextVar[Callable[[], frozenset[IPAddress]] | None]] = ContextVar("own", default=None)
"""In a call: gives the addresses, as they are now, of which one must be in a connection for the
caller to learn of it; None: the caller may see all.  What is left out by it is in no count, bound,
or moment at which something is sent."""

_NAMED: Final = 16
"""Namespaces that one call may name."""
_MASKED: Final = frozenset({"Walk", "ListConntrack", "FollowConntrack", "GetNetns", "GetRules"})
"""Calls whose replies hold other namespaces' addresses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """A call that may go on."""

    scope: Scope | None = None
    """None: everything may be seen."""
    masker: Masker | None = None
    own: frozenset[IPAddress] | None = None
    """Connections without one of these addresses are left out; None: none are."""
    in_node: Action | None = None
    """What else is needed if a pod turns out to be in the node's own network."""
    filters: list[Callable[[Message], None]] = field(default_factory=list)
    again: Callable[[Masker | None], Granted] | None = None
    """Grants it again, as things are now; None: there is nothing to ask."""

    @property
    def hidden(self) -> str:
        """One sentence on what the caller does not see; empty: nothing is hidden."""
        if self.masker is None:
            return ""
        return (
            f"only {self.scope} may be seen: addresses of others are masked "
            "(0.0.0.0/8 and 100::/64 stand for them), and their connections are left out"
        )

    def filter(self, reply: Message) -> None:
        """Takes out of `reply`, in place, what the caller may not see."""
        for one in self.filters:
            one(reply)


class Guard:
    """Of one agent.  Without an API server there is no access control: callers are let in."""

    def __init__(
        self,
        api: KubeApi | None,
        node: str,
        bounds: Bounds,
        *,
        node_addresses: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        """`node_addresses`: this node's own, and its gateways'."""
        self._node = node
        self.bounds: Final = bounds
        self._identities = None if api is None else Identities(api, node)
        self._permissions = None if api is None else Permissions(api)
        self._objects = None if api is None else Objects(api)
        self._node_addresses = node_addresses

    @property
    def checks(self) -> bool:
        """Whether callers are asked who they are."""
        return self._identities is not None

    def caller(self, metadata: Iterable[tuple[str, Any]], peer: str = "") -> Caller:
        """Raises `UnauthenticatedError`, `UnavailableError`."""
        if self._identities is None:
            return LOCAL
        token = ""
        for key, value in metadata:
            if key == "authorization" and isinstance(value, str):
                scheme, _, rest = value.partition(" ")
                token = rest.strip() if scheme.lower() == "bearer" else ""
        return self._identities.caller(token, peer)

    def admit(self, caller: Caller, method: str) -> AbstractContextManager[None]:
        need = METHODS.get(method)
        return self.bounds.admit(caller.user, CallClass.QUICK if need is None else need.call_class)

    def renew(self, granted: Granted) -> Granted:
        """For a stream that goes on: permission may be gone, pods may have come and gone, and an
        address may have become another's.  Raises as `grant`."""
        return granted if granted.again is None else granted.again(granted.masker)

    def grant(
        self,
        caller: Caller,
        method: str,
        request: Message,
        named: str,
        before: Masker | None = None,
    ) -> Granted:
        """Whether the call may go on, and with how much of its reply.  `request` may be narrowed.

        `named`: the namespaces that the caller asks about, comma-separated.  `before`: of the same
        call, whose stand-ins stay.
        Raises `ForbiddenError`, `UnavailableError`.
        """
        granted = self._grant(caller, method, request, named, before)
        if caller.local or self._permissions is None:
            return granted
        return replace(
            granted, again=lambda masker: self.grant(caller, method, request, named, masker)
        )

    def _grant(
        self, caller: Caller, method: str, request: Message, named: str, before: Masker | None
    ) -> Granted:
        need = METHODS.get(method)
        if need is None:
            raise ForbiddenError(f"{method} is not in the table of calls; nobody may make it")
        permissions = self._permissions
        if caller.local or permissions is None:
            return Granted()
        targets = list(_targets(request))
        on_node = Action(verb=need.verb, resource="nodes", sub=need.sub, name=self._node)
        if method == "GetInfo":
            permissions.require(caller, on_node)
            return Granted()
        if method == "FinishCapture":  # who may is looked up with the capture (`Finishes`)
            return Granted()
        everywhere = Action(verb=need.verb, resource="pods", sub=need.sub)
        hosts = any(target is None for target in targets) or not targets
        pods = [target for target in targets if target is not None]
        all_pods = not pods or permissions.may(caller, everywhere)
        the_node = not hosts or permissions.may(caller, on_node)
        if all_pods and the_node:
            # A pod in the node's own network is the node; see also `IN_NODE`.
            if pods and any(pod.host_network for pod in pods):
                permissions.require(caller, on_node)
            return Granted(in_node=on_node if pods and not hosts else None)
        no_node = hosts and not the_node
        return self._narrow(caller, method, need, request, pods, no_node, named, before)

    def _narrow(
        self,
        caller: Caller,
        method: str,
        need: Need,
        request: Message,
        pods: list[target_pb2.PodRef],
        no_node: bool,
        named: str,
        before: Masker | None,
    ) -> Granted:
        """For whoever has permission in some namespaces only."""
        assert self._permissions is not None
        assert self._objects is not None
        on_node = Action(verb=need.verb, resource="nodes", sub=need.sub, name=self._node)
        allowed = []
        for namespace in self._asked(caller, pods, named):
            action = Action(verb=need.verb, resource="pods", sub=need.sub, namespace=namespace)
            if self._permissions.may(caller, action):
                allowed.append(namespace)
            elif any(pod.namespace == namespace for pod in pods):
                raise refusal(caller, action)
        if no_node and not (need.scoped and allowed):
            raise refusal(caller, on_node)
        if not allowed:  # pods without a namespace: nothing says whose they are
            raise refusal(caller, Action(verb=need.verb, resource="pods", sub=need.sub))
        scope = self._objects.scope(allowed)
        for pod in pods:
            pod.CopyFrom(self._verified(caller, pod, scope, on_node))
        if isinstance(request, agent_pb2.WalkRequest):
            # From an own pod, too: a packet goes on from there over the node's rules and entries.
            self._check_packet(caller, request.packet, scope, on_node, in_pod=not no_node)
        if isinstance(request, agent_pb2.WalkRequest | agent_pb2.GetNetnsRequest):
            # Pods of other namespaces are not entered, and not named.
            del request.pods[:]
            request.pods.extend(
                found
                for node, found in scope.pods.values()
                if node == self._node and not found.host_network
            )
        if (
            isinstance(request, agent_pb2.ListConntrackRequest | agent_pb2.FollowConntrackRequest)
            and request.format == agent_pb2.CONNTRACK_FORMAT_RECORDS
        ):
            request.format = agent_pb2.CONNTRACK_FORMAT_UNSPECIFIED  # records are not searched
        if method not in _MASKED:
            return Granted(scope=scope, in_node=on_node)
        visible = scope.own | scope.common | addresses_of(self._node_addresses())
        visible |= _said(request)
        masker = Masker(visible.__contains__, scope.namespaces, before)
        filters: list[Callable[[Message], None]] = []
        if no_node:
            filters.append(lambda reply: _leave_out(reply, scope.own, masker))
        filters.append(lambda reply: _mask(reply, masker, visible))
        own = scope.own if no_node else None
        return Granted(scope=scope, masker=masker, own=own, in_node=on_node, filters=filters)

    def _asked(self, caller: Caller, pods: list[target_pb2.PodRef], named: str) -> list[str]:
        """Namespaces that the call is about, and that of the caller's own ServiceAccount."""
        found = [pod.namespace for pod in pods]
        found += [one.strip() for one in named.split(",")]
        found.append(caller.namespace)
        return [one for one in dict.fromkeys(found) if is_namespace(one)][:_NAMED]

    def _verified(
        self, caller: Caller, pod: target_pb2.PodRef, scope: Scope, on_node: Action
    ) -> target_pb2.PodRef:
        """The pod as the API has it, whatever the request says of it."""
        node, found = scope.pods.get((pod.namespace, pod.name), ("", None))
        if found is None or node != self._node or (pod.uid and pod.uid != found.uid):
            raise NotFoundError(
                f"the API server has no pod {pod.namespace}/{pod.name} on node {self._node}"
            )
        if found.host_network:
            assert self._permissions is not None
            self._permissions.require(caller, on_node)
        return found

    def _check_packet(
        self,
        caller: Caller,
        packet: packet_pb2.Packet,
        scope: Scope,
        on_node: Action,
        *,
        in_pod: bool,
    ) -> None:
        """Packets of others are not walked.  `in_pod`: from inside of an own pod, which may leave
        it to the kernel to find the source, and talk to itself."""
        ends = addresses_of((packet.src, packet.dst))
        if ends & scope.own:
            return
        if in_pod and any(one.is_unspecified or one.is_loopback for one in ends):
            return
        to_node = addresses_of((packet.dst,)) & scope.common
        if not (to_node and packet.dport in scope.node_ports):
            raise ForbiddenError(
                f"{caller.user} may trace on the node only packets of a pod or Service in {scope}",
                hint=f"or needs {on_node}",
            )

    def in_node(self, caller: Caller, granted: Granted) -> None:
        """A pod turned out to be in the node's own network."""
        if granted.in_node is not None and self._permissions is not None:
            self._permissions.require(caller, granted.in_node)


def _targets(request: Message) -> Iterator[target_pb2.PodRef | None]:
    """The pods (None: the host) that a request is about, wherever in it they are named."""
    for descriptor, value in request.ListFields():
        if descriptor.message_type is None:
            continue
        for one in value if descriptor.is_repeated else (value,):
            if isinstance(one, target_pb2.Target):
                yield one.pod if one.WhichOneof("target") == "pod" else None
            elif isinstance(one, target_pb2.PodRef):
                if descriptor.name == "pod":
                    yield one
            elif isinstance(one, Message):
                yield from _targets(one)


def _said(request: Message) -> frozenset[IPAddress]:
    """Addresses that the caller said, and so knows."""
    found: set[str] = set()

    def look(message: Message) -> None:
        for descriptor, value in message.ListFields():
            values = value if descriptor.is_repeated else (value,)
            for one in values:
                if isinstance(one, str):
                    found.add(one.partition("/")[0])
                elif isinstance(one, Message):
                    look(one)

    look(request)
    return addresses_of(found)


def _mask(reply: Message, masker: Masker, visible: frozenset[IPAddress]) -> None:
    if isinstance(reply, agent_pb2.GetNetnsReply):
        # What the pod's own namespace is made of: its addresses, and the gateway.
        local = [one.address for one in reply.snapshot.addresses]
        for route in reply.snapshot.routes:
            local += [hop.gateway for hop in route.next_hops]
        own = Masker((visible | addresses_of(local)).__contains__, masker._namespaces)
        own.message(reply)
        return
    masker.message(reply)


def _leave_out(reply: Message, own: frozenset[IPAddress], masker: Masker) -> None:
    """Connections between others."""
    if isinstance(reply, agent_pb2.ListConntrackReply):
        kept = [entry for entry in reply.entries if _touches(entry, own)]
        masker.withheld += len(reply.entries) - len(kept)
        del reply.entries[:]
        reply.entries.extend(kept)
        reply.text = _lines(reply.text, own, masker)
        if reply.HasField("summary"):
            reply.summary.sent -= min(masker.withheld, reply.summary.sent)
            reply.summary.read = 0
    elif isinstance(reply, agent_pb2.FollowConntrackReply):
        events = [event for event in reply.events if _touches(event.entry, own)]
        masker.withheld += len(reply.events) - len(events)
        del reply.events[:]
        reply.events.extend(events)
        reply.text = _lines(reply.text, own, masker)
        if reply.HasField("status"):
            reply.status.sent -= min(masker.withheld, reply.status.sent)


def _touches(entry: Any, own: frozenset[IPAddress]) -> bool:
    tuples = (entry.orig, entry.reply)
    return any(ip_address(text) in own for one in tuples for text in (one.src, one.dst) if text)


def _lines(text: bytes, own: frozenset[IPAddress], masker: Masker) -> bytes:
    if not text:
        return text
    lines = text.decode(errors="replace").splitlines(keepends=True)
    kept = [
        line
        for line in lines
        if addresses_of(w[4:] for w in line.split() if w[:4] in ("src=", "dst=")) & own
    ]
    masker.withheld += len(lines) - len(kept)
    return "".join(kept).encode()
