"""What one command works with: the cluster, the agents, and the time it takes to reach both.

The cluster's lists are read, the agents are found, and grpc is imported, all at the same time.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, TypeVar

from gketrace.errors import (
    ForbiddenError,
    GketraceError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from gketrace.objects import Node, Pod
from gketrace.trace import Missing
from gketrace_cli.cluster import Cluster
from gketrace_cli.names import close_names, find_node
from gketrace_cli.options import Connect, Options

if TYPE_CHECKING:
    from gketrace_cli.agent_access import AgentAccess
    from gketrace_cli.agents import Fleet
    from gketrace_cli.bundle.replay import Replay

__all__ = ["LABEL", "Pods", "Progress", "Session", "background"]

LABEL: Final = "app.kubernetes.io/name=gketrace-agent"
"""What the agents' pods are labelled with."""

T = TypeVar("T")
_GREET_ALL: Final = 32
"""Up to so many agents are connected beforehand; beyond that, only those that are needed."""


def background(call: Callable[[], T], name: str) -> Future[T]:
    """Runs `call` in a daemon thread: one that hangs does not keep the program from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  raised in the thread that asks for the result
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


_READ_ALL: Final = 16
"""Up to so many nodes, all pods are read with one list."""


class Progress:
    """One line on standard error that says what is being done; only on a terminal."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty() and sys.stdout.isatty()

    def say(self, text: str) -> None:
        if self._on:
            sys.stderr.write(f"\r\033[K{text} …")
            sys.stderr.flush()

    def mute(self) -> None:
        """Says nothing more: the command writes lines of its own."""
        self.clear()
        self._on = False

    def clear(self) -> None:
        if self._on:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


class Pods:
    """The cluster's running pods, as far as they may be listed.

    A small cluster's are read all at once, beforehand; of a large one only the nodes' that a
    packet meets, when it meets them.
    """

    def __init__(self, cluster: Cluster, listed: tuple[Pod, ...] | GketraceError | None) -> None:
        self._cluster = cluster
        self._by_node: dict[str, tuple[Pod, ...]] = {}
        self._whole = isinstance(listed, tuple)
        self._failed: dict[str, GketraceError] = {}
        if isinstance(listed, GketraceError):
            self._whole = True
            self._failed[""] = listed
        for pod in listed if isinstance(listed, tuple) else ():
            self.add(pod)

    def add(self, pod: Pod) -> None:
        """A pod that was read by its name."""
        if pod.node and pod.phase not in ("Succeeded", "Failed"):
            rest = tuple(p for p in self._by_node.get(pod.node, ()) if p.key != pod.key)
            self._by_node[pod.node] = (*rest, pod)

    @property
    def known(self) -> tuple[Pod, ...]:
        return tuple(pod for pods in self._by_node.values() for pod in pods)

    def of_node(self, node: str) -> tuple[Pod, ...]:
        """Those on one node."""
        if not self._whole and node not in self._failed:
            try:
                for pod in self._cluster.pods(field_selector=f"spec.nodeName={node}"):
                    self.add(pod)
            except GketraceError as error:
                self._failed[node] = error
            else:
                self._failed.pop(node, None)
        return self._by_node.get(node, ())

    @property
    def missing(self) -> tuple[Missing, ...]:
        """Lists that could not be read: without them an agent cannot enter the pods' namespaces."""
        return tuple(
            Missing(what="pods", why=error.message, node=node)
            for node, error in self._failed.items()
        )


class Session:
    """Opened cluster and agents of one command.  A context manager."""

    def __init__(self, options: Options) -> None:
        self.options: Final = options
        self.progress: Final = Progress()
        given = options.agents()
        if options.local and given:
            raise UsageError("--local and --agent exclude each other")
        self._given = given
        self._saved: Replay | None = None
        if options.bundle is not None:
            from gketrace_cli.bundle.replay import Replay

            self._saved = Replay.open(options.bundle)
        self.cluster: Final = self._open_cluster()
        self.namespace: Final = options.namespace or self.cluster.namespace or "default"
        self._fleet: Fleet | None = None
        self._closers: list[Callable[[], None]] = []
        self._nodes: Future[tuple[Node, ...]] = background(self.cluster.nodes, "nodes")
        self._pods: Future[Pods] = background(self._read_pods, "pods")
        self._agents: Future[Fleet] = background(self._reach_agents, "agents")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.progress.clear()
        if self._fleet is not None:
            for note in self.hidden:
                print(f"note: {note}", file=sys.stderr)  # noqa: T201
            self._fleet.close()
        for closer in reversed(self._closers):
            closer()
        self.cluster.close()

    # the cluster

    def _open_cluster(self) -> Cluster:
        if self._saved is not None:
            return self._saved.cluster()
        return Cluster.open(
            kubeconfig=self.options.kubeconfig or "",
            context=self.options.context or "",
            timeout=self.options.seconds,
        )

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Raises: `GketraceError`."""
        return self._nodes.result()

    @property
    def pods(self) -> Pods:
        return self._pods.result()

    def _read_pods(self) -> Pods:
        if len(self._nodes.result()) > _READ_ALL:
            return Pods(self.cluster, None)
        try:
            return Pods(self.cluster, self.cluster.pods())
        except GketraceError as error:
            return Pods(self.cluster, error)

    def read(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        """Several API calls at once.  Raises the first failure in the order of `calls`."""
        running = {name: background(call, name) for name, call in calls.items()}
        return {name: future.result() for name, future in running.items()}

    def check_namespace(self, namespace: str) -> NotFoundError | None:
        """The error when the namespace does not exist; None when it does or cannot be told."""
        try:
            self.cluster.api.get(f"/api/v1/namespaces/{namespace}")
        except NotFoundError:
            try:
                listed = self.cluster.api.get("/api/v1/namespaces").get("items") or []
                names = [item["metadata"]["name"] for item in listed]
            except GketraceError:
                names = []
            hint = close_names(namespace, names) if names else ""
            return NotFoundError(f'namespace "{namespace}" not found', hint=hint)
        except GketraceError:
            return None
        return None

    # the agents

    @property
    def hidden(self) -> tuple[str, ...]:
        """What agents said that this caller may not see."""
        if self._fleet is None:
            return ()
        said: dict[str, list[str]] = {}
        for node, text in self._fleet.hidden.items():
            said.setdefault(text, []).append(node)
        return tuple(f"{', '.join(sorted(nodes))}: {text}" for text, nodes in said.items())

    @property
    def fleet(self) -> Fleet:
        """Raises: `GketraceError`."""
        if self._fleet is None:
            self.progress.say("reaching the agents")
            self._fleet = self._agents.result()
        return self._fleet

    def _reach_agents(self) -> Fleet:
        """Runs in a thread of its own; imports grpc while the cluster answers."""
        if self._saved is not None:
            return self._saved.fleet()
        found: Future[tuple[Pod, ...]] | None = None
        access: AgentAccess | None = None
        ca: Future[bytes] | None = None
        if not self.options.local:
            where = self.options.agents_in
            found = background(lambda: self.cluster.pods(where, label_selector=LABEL), "agent-pods")
            access = self._access()
            if access is not None:
                ca = background(access.ca, "agent-ca")
        from gketrace_cli.agents import Fleet

        fleet = Fleet(timeout=self.options.seconds)
        try:
            if found is None:
                self._add_local(fleet)
            else:
                self._add_found(fleet, found, access, ca)
            if len(fleet.nodes) <= _GREET_ALL:
                fleet.greet()
        except BaseException:
            fleet.close()
            raise
        return fleet

    def _add_local(self, fleet: Fleet) -> None:
        from gketrace_cli.local import start_local_agent

        local = start_local_agent(self._nodes.result(), timeout=self.options.seconds)
        self._closers.append(local.stop)
        fleet.add_address(local.node, local.address, "--local")

    def _add_found(
        self,
        fleet: Fleet,
        found: Future[tuple[Pod, ...]],
        access: AgentAccess | None,
        ca: Future[bytes] | None,
    ) -> None:
        """The agents named by ``--agent``, then those found as pods.

        `access` None: in the clear, and without a token; else `ca` is its authority.
        """
        if self._given:
            nodes = self._nodes.result()
            for name, address in self._given.items():
                node = find_node(name, nodes).name
                unix = address.startswith("unix:")
                fleet.add_address(node, address, access=None if unix else access)
        pods: tuple[Pod, ...] = ()
        try:
            pods = found.result()
        except (ForbiddenError, UnavailableError) as error:
            if not self._given:
                raise type(error)(
                    f"cannot look for agents: {error.message}", hint="--agent NODE=ADDR names them"
                ) from error
        if not pods and not fleet.nodes:
            raise UnavailableError(
                f"no agent in the cluster (no pod labelled {LABEL} in namespace "
                f"{self.options.agents_in})",
                hint="install the DaemonSet with `gketrace install --apply`, "
                "give --agent NODE=ADDR, or use --local on a node",
            )
        forwards = None
        if pods and self.options.connect is not Connect.DIRECT:
            from gketrace_cli.portforward import PortForwards

            forwards = PortForwards(self.cluster.api)
        if pods and access is not None and ca is not None:
            nodes_of_pods = {pod.node for pod in pods if pod.node}
            if len(nodes_of_pods) <= _GREET_ALL:
                # While the ways to them are opened.  What fails is met again when they are asked.
                background(lambda: access.prepare(nodes_of_pods), "agent-tokens")
            try:
                ca.result()
            except GketraceError:
                if forwards is not None:
                    forwards.close()
                raise
        fleet.add_pods(pods, forwards=forwards, access=access)

    def _access(self) -> AgentAccess | None:
        """None: in the clear, and without a token."""
        if self.options.plaintext:
            return None
        from gketrace_cli.agent_access import AgentAccess

        return AgentAccess(
            self.cluster.api,
            namespace=self.options.agents_in,
            account=self.options.account,
            ca_file=self.options.agent_ca,
            about=(self.namespace,),
        )

    def reach(self, nodes: list[str]) -> None:
        """Connects the agents of these nodes, where that has not been done."""
        self.fleet.greet(nodes)
