"""`LiveNodeView`: how a walk reaches the namespaces of its node as they are now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from gketrace.errors import GketraceError
from gketrace.snapshot import Maybe, NetnsSnapshot, Unavailable
from gketrace.trace import Missing, NetnsKind, NetnsRef
from gketrace_agent.observe.snapshot import Namespace, Observation, Observer

__all__ = ["LiveNodeView"]


class LiveNodeView:
    """Implements `gketrace.snapshot.NodeView` for one call.

    A namespace is observed when it is first asked for, and the same snapshot is given for the rest
    of the call.  `namespaces` stay the caller's, open until after `close`.
    """

    def __init__(
        self,
        node: str,
        observer: Observer,
        namespaces: Sequence[Namespace],
        *,
        observed: Callable[[Observation], None] | None = None,
    ) -> None:
        """`observed` is told each observation, for metrics and logs."""
        self._node: Final = node
        self._observer = observer
        self._namespaces = tuple(namespaces)
        self._observed = observed
        self._taken: dict[int, Maybe[NetnsSnapshot]] = {}
        self._observations: dict[int, Observation] = {}

    @property
    def node(self) -> str:
        return self._node

    @property
    def observations(self) -> Mapping[int, Observation]:
        """Namespace inode → what was observed so far."""
        return self._observations

    @property
    def missing(self) -> tuple[Missing, ...]:
        """What could not be read in any of the namespaces that were asked for."""
        return tuple(
            missing
            for observation in self._observations.values()
            for missing in observation.snapshot.missing
        )

    def snapshot(self, netns: NetnsRef) -> Maybe[NetnsSnapshot]:
        """The namespace at this moment; the same object for the same namespace in one call."""
        namespace = self._find(netns)
        if namespace is None:
            return Unavailable(reason=f"{netns} is not a namespace that this agent knows")
        inode = namespace.handle.inode
        if inode not in self._taken:
            self._taken[inode] = self._observe(namespace)
        return self._taken[inode]

    def _observe(self, namespace: Namespace) -> Maybe[NetnsSnapshot]:
        try:
            observation = self._observer.observe(namespace, known=self._namespaces)
        except GketraceError as error:
            return Unavailable(reason=str(error))
        self._observations[namespace.handle.inode] = observation
        if self._observed is not None:
            self._observed(observation)
        return observation.snapshot

    def _find(self, netns: NetnsRef) -> Namespace | None:
        """By inode; a reference without one by what it names."""
        if netns.node != self._node:
            return None
        for namespace in self._namespaces:
            if netns.inode and namespace.handle.inode == netns.inode:
                return namespace
        if netns.inode:
            return None
        for namespace in self._namespaces:
            if namespace.ref.kind is netns.kind and (
                netns.kind is NetnsKind.HOST or (netns.pod and namespace.ref.pod == netns.pod)
            ):
                return namespace
        return None

    def close(self) -> None:
        """Closes the observations' sockets; may be called twice."""
        for observation in self._observations.values():
            observation.close()

    def __enter__(self) -> LiveNodeView:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
