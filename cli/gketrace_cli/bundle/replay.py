"""A bundle in the place of a cluster and its agents: the same calls, answered from the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

from google.protobuf.message import Message

from gketrace.conntrack_filter import ConntrackFilter
from gketrace.conntrack_records import RECORD, record_of
from gketrace.conntrack_text import render_entry
from gketrace.errors import GketraceError, NotFoundError, UnavailableError, UsageError
from gketrace.packet import Packet
from gketrace.ruleset.cut import cut_iptables, cut_nftables
from gketrace.trace import Flow
from gketrace_cli.agents import Agent, Fleet
from gketrace_cli.apiserver import ApiServer
from gketrace_cli.bundle.model import HOST, Bundle, Listed, NodeRecord
from gketrace_cli.bundle.namespaces import SavedNode
from gketrace_cli.bundle.store import read_bundle
from gketrace_cli.cluster import Cluster
from gketrace_cli.kubeconfig import Credentials, Settings
from gketrace_proto import codec
from gketrace_proto.conntrack_filters import filters_from_proto
from gketrace_proto.v1alpha1 import agent_pb2 as pb

__all__ = ["Replay"]

K = TypeVar("K")


class Replay:
    """One opened bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle: Final = bundle

    @classmethod
    def open(cls, path: str) -> Replay:
        """Raises: `UsageError`."""
        return cls(read_bundle(path))

    def cluster(self) -> Cluster:
        return Cluster(_SavedApi(self.bundle))

    def fleet(self) -> Fleet:
        return _SavedFleet(self.bundle)


# the Kubernetes API


def _no_credentials() -> Credentials:
    raise UsageError("a bundle has no API server")


class _SavedApi(ApiServer):
    """Answers reads of the kinds that were saved; knows the selectors that this program uses."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(
            Settings(
                context=bundle.context,
                server="https://bundle.invalid",
                namespace=bundle.namespace,
                user="",
                source="bundle",
                ca_pem="",
                verify=True,
                tls_server_name="",
                proxy_url="",
                credentials=_no_credentials,
            )
        )
        self._lists = bundle.lists

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        if method != "GET":
            raise UsageError("a bundle only answers what can be read")
        words = path.strip("/").split("/")[2:]  # after api/v1
        if path.startswith("/apis/"):
            words = words[1:]
        namespace = ""
        if len(words) > 2 and words[0] == "namespaces":
            namespace, words = words[1], words[2:]
        plural, name = words[0], words[1] if len(words) > 1 else ""
        listed = self._list(plural, namespace)
        if listed.error is not None:
            raise listed.error
        found = [item for item in listed.items if _within(item, namespace)]
        if not name:
            return {"items": [item for item in found if _selected(item, query or {})]}
        for item in found:
            if item["metadata"]["name"] == name:
                return item
        raise NotFoundError(f'{plural} "{name}" not found')

    def _list(self, plural: str, namespace: str) -> Listed:
        whole = self._lists.get(plural)
        if namespace and (whole is None or whole.error is not None):
            whole = self._lists.get(f"{plural}@{namespace}", whole)
        if whole is None:
            return Listed(error=NotFoundError(f"{plural} are not in this bundle"))
        return whole


def _within(item: Mapping[str, Any], namespace: str) -> bool:
    return not namespace or item["metadata"].get("namespace") == namespace


def _selected(item: Mapping[str, Any], query: Mapping[str, str]) -> bool:
    """``labelSelector`` and ``fieldSelector`` with ``=``."""
    for selector, read in (("labelSelector", _label), ("fieldSelector", _field)):
        for term in filter(None, query.get(selector, "").split(",")):
            key, _, wanted = term.partition("=")
            if read(item, key) != wanted:
                return False
    return True


def _label(item: Mapping[str, Any], key: str) -> Any:
    return (item["metadata"].get("labels") or {}).get(key)


def _field(item: Mapping[str, Any], path: str) -> Any:
    value: Any = item
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


# the agents


class _SavedFleet(Fleet):
    """The agents as they answered when the bundle was made."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(timeout=0.0)
        self._saved: dict[str, SavedNode] = {}
        for name, record in bundle.nodes.items():
            if record.error is not None:
                self._missing[name] = record.error
                continue
            self._saved[name] = SavedNode(record)
            self._agents[name] = Agent(
                node=name,
                address=record.address,
                how=record.how,
                channel=None,
                stub=None,
                info=record.info,
            )
            if record.hidden:
                self.hidden[name] = record.hidden

    def ask(self, calls: Mapping[K, tuple[str, str, Message]]) -> dict[K, Any]:
        answers: dict[K, Any] = {}
        for key, (node, method, request) in calls.items():
            try:
                replies = self._answer(node, method, request)
                answers[key] = list(replies) if method in _STREAMS else next(iter(replies))
            except UsageError:
                raise
            except GketraceError as error:
                answers[key] = error
        return answers

    def stream(
        self, calls: Mapping[K, tuple[str, str, Message]], *, silence: float | None = None
    ) -> Iterator[tuple[K, Any]]:
        for method in {method for _, method, _ in calls.values()}:
            _method(method)
        for key, (node, method, request) in calls.items():
            try:
                for reply in self._answer(node, method, request):
                    yield key, reply
            except UsageError:
                raise
            except GketraceError as error:
                yield key, error
            else:
                yield key, None

    def _answer(self, node: str, method: str, request: Message) -> Iterator[Message]:
        answer = _method(method)
        self.agent(node)
        return answer(self._saved[node], request)


def _method(name: str) -> Callable[[SavedNode, Any], Iterator[Message]]:
    if name not in _METHODS:
        raise UsageError(
            "a bundle holds one moment: nothing can be followed, captured or deleted on it"
        )
    return _METHODS[name]


def _target(node: SavedNode, target: pb.Target) -> str:
    """Whose namespace is meant: `HOST`, or the pod's key.  Raises what was raised then."""
    if target.WhichOneof("target") != "pod":
        return HOST
    key = f"{target.pod.namespace}/{target.pod.name}"
    _known(node.record, key)
    return key


def _known(record: NodeRecord, key: str) -> pb.GetNetnsReply:
    found = record.pods.get(key)
    if found is None:
        raise UnavailableError(
            f"pod {key} is not in this bundle", hint="gketrace bundle -A saves all pods"
        )
    if isinstance(found, GketraceError):
        raise found
    return found


def _get_info(node: SavedNode, request: pb.GetInfoRequest) -> Iterator[Message]:
    yield node.record.info


def _snapshot(node: SavedNode, request: pb.SnapshotRequest) -> Iterator[Message]:
    """The node's own namespace, and those of the pods that were asked for."""
    wanted = {HOST, *(f"{pod.namespace}/{pod.name}" for pod in request.pods)}
    sent: set[str] = set()
    here = HOST
    for reply in node.record.replies:
        if reply.HasField("pod"):
            here = f"{reply.pod.namespace}/{reply.pod.name}"
        if here in wanted and not (
            here == HOST and request.without_rules and reply.HasField("rules")
        ):
            sent.add(here)
            yield reply
    for pod in request.pods:
        key = f"{pod.namespace}/{pod.name}"
        if key not in sent and key not in node.record.pods:
            yield pb.SnapshotReply(pod=pod, unavailable=f"pod {key} is not in this bundle")
    if node.record.snapshot_error is not None:
        raise node.record.snapshot_error


def _get_netns(node: SavedNode, request: pb.GetNetnsRequest) -> Iterator[Message]:
    if request.target.WhichOneof("target") == "pod":
        yield _known(node.record, f"{request.target.pod.namespace}/{request.target.pod.name}")
        return
    named = {f"{pod.namespace}/{pod.name}" for pod in request.pods}
    for reply in node.record.replies:
        if reply.HasField("snapshot") and not reply.HasField("pod"):
            found = pb.GetNetnsReply(snapshot=reply.snapshot)
            for link in found.snapshot.links:
                # The agent names the peers that it was told of.
                if link.peer.HasField("netns") and link.peer.netns.pod not in named:
                    link.peer.ClearField("netns")
            yield found
            return
    raise node.record.snapshot_error or UnavailableError("the node's own namespace was not sent")


def _get_rules(node: SavedNode, request: pb.GetRulesRequest) -> Iterator[Message]:
    wanted = _target(node, request.target)
    if wanted != HOST and _is_host(node.record, wanted):
        wanted = HOST
    here = HOST
    for reply in node.record.replies:
        if reply.HasField("pod"):
            here = f"{reply.pod.namespace}/{reply.pod.name}"
        if not reply.HasField("rules") or here != wanted:
            continue
        rules = reply.rules
        nft = rules.backend == "nftables" and rules.table
        if nft and request.table and request.table not in (rules.table, rules.table.split()[-1]):
            continue
        cut = pb.GetRulesReply()
        cut.CopyFrom(rules)
        if not rules.unavailable:
            cut.text = (
                cut_nftables(rules.text, request.chain)
                if nft
                else cut_iptables(rules.text, request.table, request.chain)
            )
        yield cut


def _is_host(record: NodeRecord, key: str) -> bool:
    found = record.pods.get(key)
    return isinstance(found, pb.GetNetnsReply) and found.pod.host_network


def _list_conntrack(node: SavedNode, request: pb.ListConntrackRequest) -> Iterator[Message]:
    key = _target(node, request.target)
    table = node.record.tables.get(key)
    if table is None:
        raise UnavailableError("its connections are not in this bundle")
    if table.entries_error is not None:
        raise table.entries_error
    summary = pb.ConntrackSummary()
    for reply in table.entries:
        if reply.HasField("summary"):
            summary.CopyFrom(reply.summary)
    filters = filters_from_proto(ConntrackFilter, request)
    everything = node.conntrack(key).entries
    found = [entry for entry in everything if any(one.takes(entry) for one in filters)]
    if request.limit and len(found) > request.limit:
        found, summary.truncated = found[: request.limit], True
    elif summary.sent and len(found) < summary.sent and summary.truncated:
        summary.consistent = False
    summary.sent = len(found)
    reply = pb.ListConntrackReply()
    if request.format == pb.CONNTRACK_FORMAT_TEXT:
        lines = (f"{render_entry(entry, now=summary.at)}\n" for entry in found)
        reply.text = "".join(lines).encode()
    else:
        packed = bytearray()
        for entry in found:
            record = record_of(entry) if request.format == pb.CONNTRACK_FORMAT_RECORDS else None
            if record is not None:
                packed += RECORD.pack(*record)
            else:
                reply.entries.append(codec.encode(entry))
        reply.records = bytes(packed)
    yield reply
    yield pb.ListConntrackReply(summary=summary)


def _get_statistics(node: SavedNode, request: pb.GetConntrackStatsRequest) -> Iterator[Message]:
    table = node.record.tables.get(_target(node, request.target))
    if table is None or table.statistics is None:
        raise UnavailableError("its statistics are not in this bundle")
    if isinstance(table.statistics, GketraceError):
        raise table.statistics
    yield table.statistics


def _walk(node: SavedNode, request: pb.WalkRequest) -> Iterator[Message]:
    pod = _target(node, request.target)
    if pod and _is_host(node.record, pod):
        pod = HOST
    flows = tuple(codec.decode(Flow, flow) for flow in request.flows)
    walked, arrival = node.walk(
        codec.decode(Packet, request.packet),
        pod=pod,
        pods={
            f"{one.namespace}/{one.name}": tuple(one.pod_ips)
            for one in request.pods
            if not one.host_network
        },
        interface=request.interface,
        arrives=request.arrives,
        flows=flows,
        use_conntrack=request.use_conntrack,
    )
    yield pb.WalkReply(walk=codec.encode(walked), arrival=arrival)


_METHODS: Final[dict[str, Callable[[SavedNode, Any], Iterator[Message]]]] = {
    "GetInfo": _get_info,
    "Snapshot": _snapshot,
    "GetNetns": _get_netns,
    "GetRules": _get_rules,
    "ListConntrack": _list_conntrack,
    "GetConntrackStats": _get_statistics,
    "Walk": _walk,
}
_STREAMS: Final = frozenset({"Snapshot", "GetRules", "ListConntrack"})
