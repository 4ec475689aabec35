"""The RPCs: each unpacks its request, asks the packages below, packs the reply."""

# ruff: noqa: N802 - the generated base class names the methods

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Final, cast

import grpc

from gketrace.errors import GketraceError, ReadOnlyError, UnavailableError, UsageError
from gketrace.packet import Packet
from gketrace.snapshot import Unavailable
from gketrace.trace import Flow, NetnsKind
from gketrace_agent.access.guard import CALLER, OWN
from gketrace_agent.capture_finish import FINISHES
from gketrace_agent.config import Config
from gketrace_agent.info import NOUNS as INFO_NOUNS
from gketrace_agent.info import detect_data_plane, own_addresses
from gketrace_agent.kernel.netns import NetnsHandle
from gketrace_agent.messages import (
    conntrack_filters,
    pod_ref,
    request_part,
    resolved_to_proto,
    target_pod,
)
from gketrace_agent.namespaces import NodeNamespaces, OpenTarget
from gketrace_agent.observe.conntrack import Conntrack
from gketrace_agent.observe.iptables import IptablesDump, IptablesDumps
from gketrace_agent.observe.nftables import NftablesDump
from gketrace_agent.observe.snapshot import Namespace, Observer
from gketrace_agent.resolve.model import PodRef
from gketrace_agent.resolve.resolver import Resolver
from gketrace_agent.rulesets import rule_chunks, summaries
from gketrace_agent.snapshots import snapshot_replies
from gketrace_agent.stall import until_stalled
from gketrace_proto import codec
from gketrace_proto.v1alpha1 import agent_pb2, agent_pb2_grpc, capture_pb2

if TYPE_CHECKING:
    from gketrace_agent.observe.conntrack_names import Destination, ServiceNames
    from gketrace_agent.observe.conntrack_table import ConntrackTable
    from gketrace_agent.observe.pod_tables import PodTables

__all__ = ["AgentService"]

_API_VERSION: Final = "gketrace.dev/v1alpha1"
_VERSION: Final = metadata.version("gketrace")
_POLL_SECONDS: Final = 2.0
"""The least time between readings of a table that sends no events."""
_RUNTIME_TIMEOUT: Final = 0.5
"""Seconds for a runtime's version in GetInfo."""


class AgentService(agent_pb2_grpc.AgentServicer):
    """All calls; any thread may be in any of them."""

    @staticmethod
    def preload() -> None:
        """Imports what only some calls need, and what takes long; to be run in the background.

        The simulator has a class for each match and target: they take as long to make as all
        the rest of the agent to start.
        """
        import gketrace_agent.conntracks
        import gketrace_agent.walks  # noqa: F401 - imported to be there

        # What is there now stays.  To look through it for garbage takes longer than a walk.
        gc.collect()
        gc.freeze()

    def __init__(self, config: Config) -> None:
        self._config = config
        self._resolver = Resolver(config.paths, config.node, runtime_sockets=config.runtime_sockets)
        self._namespaces = NodeNamespaces(config.paths, config.node, self._resolver)
        self._observer = Observer(paths=config.paths)
        self._started_at = time.time()
        self.ports: tuple[int, ...] = tuple(one.port for one in config.listen if one.port)
        """TCP, that the agent listens on; the server adds what the kernel chose."""

    def close(self) -> None:
        self._resolver.close()

    def host_netns(self) -> NetnsHandle:
        """The node's own network namespace; the caller closes it."""
        return self._resolver.host_netns()

    def node_addresses(self) -> list[str]:
        """What the node itself has, and its gateways: nobody's secret."""
        with (
            self._namespaces.open(None, timeout=self._config.limits.call_seconds) as target,
            self._observer.observe(
                target.here, only=frozenset({"links", "addresses", "routes"})
            ) as host,
        ):
            found: list[str] = []
            if not isinstance(host.snapshot.addresses, Unavailable):
                found += [str(one.address) for one in host.snapshot.addresses]
            if not isinstance(host.snapshot.routes, Unavailable):
                for route in host.snapshot.routes:
                    found += [str(hop.gateway) for hop in route.next_hops if hop.gateway]
            return found

    def service_names(self) -> ServiceNames:
        """What the node's rules call the destinations that they translate."""
        from gketrace_agent.observe.conntrack_names import nft_service_names, service_names

        with (
            self._namespaces.open(None, timeout=self._config.limits.call_seconds) as target,
            self._observer.observe(target.here, only=frozenset({"rulesets"})) as observation,
        ):
            names: dict[Destination, str] = {}
            if isinstance(observation.iptables, IptablesDumps):
                for dump in observation.iptables.dumps:
                    if isinstance(dump, IptablesDump):
                        names |= service_names(dump.text)
            if isinstance(observation.nftables, NftablesDump):
                for table, text in observation.nftables.tables:
                    if table.name == "kube-proxy" and isinstance(text, bytes):
                        names |= nft_service_names(text)
            return names

    def pod_tables(self) -> PodTables:
        """How many connections each pod's own namespace tracks."""
        from gketrace_agent.observe.pod_tables import count_pod_tables

        return count_pod_tables(self._resolver, self._config.paths)

    def GetInfo(
        self, request: agent_pb2.GetInfoRequest, context: grpc.ServicerContext
    ) -> agent_pb2.GetInfoReply:
        with (
            self._namespaces.open(None, timeout=self._remaining(context)) as target,
            self._observer.observe(target.here, only=INFO_NOUNS) as host,
        ):
            plane = detect_data_plane(host, self._config.paths)
            return agent_pb2.GetInfoReply(
                version=_VERSION,
                api_version=_API_VERSION,
                node=self._config.node,
                kernel=os.uname().release,
                started_at=self._started_at,
                data_plane=plane.name,
                data_plane_reason=plane.reason,
                iptables_backend=plane.iptables_backend,
                rulesets=summaries(host.iptables, host.nftables),
                runtime=self._runtime(),
                missing=[codec.encode(missing) for missing in plane.missing],
                now=time.time(),
                allow_system_changes=self._config.allow_system_changes,
                addresses=[
                    agent_pb2.NodeAddress(
                        address=str(one.address), prefixlen=one.prefixlen, interface=name
                    )
                    for one, name in own_addresses(host.snapshot)
                ],
            )

    def ResolvePod(
        self, request: agent_pb2.ResolvePodRequest, context: grpc.ServicerContext
    ) -> agent_pb2.ResolvePodReply:
        pod = pod_ref(request.pod)
        with self._resolver.resolve(pod, timeout=self._remaining(context)) as found:
            return agent_pb2.ResolvePodReply(pod=resolved_to_proto(found))

    def GetNetns(
        self, request: agent_pb2.GetNetnsRequest, context: grpc.ServicerContext
    ) -> agent_pb2.GetNetnsReply:
        with (
            self._namespaces.open(
                target_pod(request.target),
                pods=map(pod_ref, request.pods),
                timeout=self._remaining(context),
                owners=True,
            ) as target,
            self._observer.observe(target.here, known=target.known) as observation,
        ):
            snapshot = codec.snapshot_to_proto(observation.snapshot)
            snapshot.rulesets.extend(summaries(observation.iptables, observation.nftables))
            pod = None if target.pod is None else resolved_to_proto(target.pod)
            return agent_pb2.GetNetnsReply(snapshot=snapshot, pod=pod)

    def Snapshot(
        self, request: agent_pb2.SnapshotRequest, context: grpc.ServicerContext
    ) -> Iterator[agent_pb2.SnapshotReply]:
        pods = {pod_ref(message): message for message in request.pods}
        with self._namespaces.open(
            None, pods=pods, timeout=self._remaining(context), owners=True
        ) as target:
            yield from until_stalled(
                snapshot_replies(
                    target,
                    self._observer,
                    pods,
                    lambda: self._statistics(target),
                    rules=not request.without_rules,
                ),
                context,
                self._config.limits.stall_seconds,
            )

    def GetRules(
        self, request: agent_pb2.GetRulesRequest, context: grpc.ServicerContext
    ) -> Iterator[agent_pb2.GetRulesReply]:
        with (
            self._namespaces.open(
                target_pod(request.target), timeout=self._remaining(context)
            ) as target,
            # Fresh, as whoever asks for rules wants their counters.
            self._observer.observe(
                target.here, only=frozenset({"rulesets"}), fresh=True
            ) as observation,
        ):
            yield from rule_chunks(
                observation.iptables,
                observation.nftables,
                table=request.table,
                chain=request.chain,
            )

    def ListConntrack(
        self, request: agent_pb2.ListConntrackRequest, context: grpc.ServicerContext
    ) -> Iterator[agent_pb2.ListConntrackReply]:
        from gketrace_agent.conntracks import list_entries  # NumPy: see `preload`

        wanted = replace(conntrack_filters(request), among=OWN.get())
        limits = self._config.limits
        limit = min(request.limit or limits.conntrack_entries, limits.conntrack_entries)
        with (
            self._namespaces.open(
                target_pod(request.target), timeout=self._remaining(context)
            ) as target,
            self._open_conntrack(target, context.is_active) as table,
        ):
            for reply in until_stalled(
                list_entries(table, wanted, request.format, limit), context, limits.stall_seconds
            ):
                if reply.HasField("summary"):
                    reply.summary.tracked = self._tracked(target, table)
                    reply.summary.netns.CopyFrom(codec.encode(target.here.ref))
                yield reply

    def FollowConntrack(
        self, request: agent_pb2.FollowConntrackRequest, context: grpc.ServicerContext
    ) -> Iterator[agent_pb2.FollowConntrackReply]:
        from gketrace_agent.conntracks import asked_kinds, follow_entries  # see `preload`

        wanted = replace(conntrack_filters(request), among=OWN.get())
        with (
            self._namespaces.open(
                target_pod(request.target), timeout=self._remaining(context)
            ) as target,
            self._open_conntrack(target, context.is_active) as table,
            closing(
                table.follow(
                    wanted,
                    asked_kinds(request),
                    existing=request.existing,
                    poll_seconds=max(request.poll_seconds, _POLL_SECONDS),
                )
            ) as follower,
        ):
            base = agent_pb2.FollowConntrackStatus(
                tracked=self._tracked(target, table),
                accounting=table.settings.accounting,
                netns=codec.encode(target.here.ref),
            )
            yield from until_stalled(
                follow_entries(follower, request.format, base),
                context,
                self._config.limits.stall_seconds,
            )

    def GetConntrackStats(
        self, request: agent_pb2.GetConntrackStatsRequest, context: grpc.ServicerContext
    ) -> agent_pb2.GetConntrackStatsReply:
        with self._namespaces.open(
            target_pod(request.target), timeout=self._remaining(context)
        ) as target:
            return self._statistics(target)

    def _statistics(self, target: OpenTarget) -> agent_pb2.GetConntrackStatsReply:
        from gketrace_agent.conntracks import statistics  # see `preload`

        with self._open_conntrack(target) as table:
            reply = statistics(table)
            reply.tracked = self._tracked(target, table)
            reply.netns.CopyFrom(codec.encode(target.here.ref))
            return reply

    def DeleteConntrack(
        self, request: agent_pb2.DeleteConntrackRequest, context: grpc.ServicerContext
    ) -> agent_pb2.DeleteConntrackReply:
        from gketrace_agent.conntracks import delete_asked  # see `preload`

        if not self._config.allow_system_changes:
            raise ReadOnlyError(
                "this agent changes nothing on its node",
                hint="it would have to be started with --allow-system-changes",
            )
        with (
            self._namespaces.open(
                target_pod(request.target), timeout=self._remaining(context)
            ) as target,
            self._open_conntrack(target, context.is_active) as table,
        ):
            return delete_asked(table, request)

    def _open_conntrack(
        self, target: OpenTarget, active: Callable[[], bool] = lambda: True
    ) -> ConntrackTable:
        from gketrace_agent.observe.conntrack_table import open_conntrack  # see `preload`

        return open_conntrack(target.here.handle, self._config.paths, active=active)

    def _tracked(self, target: OpenTarget, table: ConntrackTable) -> bool:
        """Whether anything in the target asks for connection tracking.

        Where there are entries it does; otherwise the rules have to be read to know.
        """
        if table.size().entries:
            return True
        with self._observer.observe(
            target.here, only=frozenset({"rulesets", "conntrack"})
        ) as observation:
            tracking = observation.conntrack
            if not isinstance(tracking, Conntrack):
                raise UnavailableError(f"conntrack: {tracking.reason}")
            return tracking.tracked

    def Walk(
        self, request: agent_pb2.WalkRequest, context: grpc.ServicerContext
    ) -> agent_pb2.WalkReply:
        from gketrace_agent.walks import walk_here  # see `preload`

        packet = request_part(Packet, request.packet)
        flows = tuple(request_part(Flow, flow) for flow in request.flows)
        pod = target_pod(request.target)
        if request.arrives and pod is not None:
            raise UsageError("a packet arrives at the node from the network, not at a pod")
        started = time.monotonic()
        with self._namespaces.open(
            pod,
            pods=map(pod_ref, request.pods),
            timeout=self._remaining(context),
            quick=True,
        ) as target:
            resolved = time.monotonic() - started
            walked = walk_here(
                target,
                self._observer,
                packet,
                interface=request.interface,
                arrives=request.arrives,
                flows=flows,
                use_conntrack=request.use_conntrack,
            )
            return agent_pb2.WalkReply(
                walk=codec.encode(walked.walk),
                timings=agent_pb2.GetWalkTimings(
                    resolve=resolved, observe=walked.observe_seconds, walk=walked.walk_seconds
                ),
                arrival=walked.arrival,
            )

    def Capture(
        self, request: capture_pb2.CaptureRequest, context: grpc.ServicerContext
    ) -> Iterator[capture_pb2.CaptureReply]:
        from gketrace_agent.capture_taps import CapturePlace, exclusions
        from gketrace_agent.captures import capture_packets

        peer = context.peer()
        forwarded = peer.startswith(("ipv4:127.", "ipv6:%5B::1%5D", "ipv6:[::1]"))
        with ExitStack() as stack:
            places: list[CapturePlace] = []
            opened: dict[PodRef | None, Namespace] = {}
            for tap in request.taps:
                pod = target_pod(tap.target)
                if pod not in opened:
                    opened[pod] = stack.enter_context(
                        self._namespaces.open(pod, timeout=self._remaining(context))
                    ).here
                here = opened[pod]
                left_out = exclusions(
                    host=here.ref.kind is NetnsKind.HOST, ports=self.ports, forwarded=forwarded
                )
                places.append(
                    CapturePlace(
                        request=tap,
                        namespace=here,
                        excluded=() if request.include_own else left_out,
                    )
                )
            finish = stack.enter_context(FINISHES.open(CALLER.get().user))
            context.add_callback(lambda: FINISHES.wake(finish.id))
            replies = stack.enter_context(
                closing(
                    capture_packets(
                        request,
                        places,
                        node=self._config.node,
                        limits=self._config.captures,
                        paths=self._config.paths,
                        finish=finish,
                        active=context.is_active,
                    )
                )
            )
            sent = until_stalled(replies, context, self._config.limits.stall_seconds)
            # Some are encoded already, which the interceptor knows and the generated types do not.
            yield from cast("Iterator[capture_pb2.CaptureReply]", sent)

    def FinishCapture(
        self, request: capture_pb2.FinishCaptureRequest, context: grpc.ServicerContext
    ) -> capture_pb2.FinishCaptureReply:
        FINISHES.finish(request.capture_id, CALLER.get().user)
        return capture_pb2.FinishCaptureReply()

    def _runtime(self) -> str:
        """The first runtime that answers; empty: none."""
        for client in self._resolver.runtimes():
            try:
                return f"{client.version(_RUNTIME_TIMEOUT)} at {client.endpoint}"
            except GketraceError:
                continue  # ResolvePod says why, step by step
        return ""

    def _remaining(self, context: grpc.ServicerContext) -> float:
        """Seconds that this call may still take."""
        left = context.time_remaining()
        bound = self._config.limits.call_seconds
        return bound if left is None else min(left, bound)
