"""A request's target and the namespaces around it, opened for the length of one call."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from gketrace.trace import NetnsKind, NetnsRef
from gketrace_agent.access.guard import IN_NODE
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.observe.snapshot import Namespace
from gketrace_agent.resolve.directory import OpenNamespace, PodDirectory
from gketrace_agent.resolve.model import PodRef, ResolvedPod
from gketrace_agent.resolve.resolver import Resolver

__all__ = ["NodeNamespaces", "OpenTarget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTarget:
    """What a call may look at; closed when the call ends."""

    here: Namespace
    """The target."""
    host: Namespace
    known: tuple[Namespace, ...]
    """The target, the host and all pods that were named and found."""
    pod: ResolvedPod | None = None
    """Set when the target is a pod and was not opened quickly.  Its handle is `here`'s."""
    absent: dict[PodRef, str] = field(default_factory=dict)
    """Pods that were named and not found, with the reason."""


class NodeNamespaces:
    """Opens them.  Any thread may call."""

    def __init__(self, paths: HostPaths, node: str, resolver: Resolver) -> None:
        self._paths = paths
        self._node = node
        self._resolver = resolver
        self._directory = PodDirectory(paths, resolver)

    @contextmanager
    def open(
        self,
        target: PodRef | None,
        *,
        pods: Iterable[PodRef] = (),
        timeout: float,
        quick: bool = False,
        owners: bool = False,
    ) -> Iterator[OpenTarget]:
        """`target` None is the host.

        `quick`: the target is opened as `pods` are: by what is known of it already, else by the
        cgroups, which say less than the runtime and take less time.
        `owners`: also find which processes are in the target, so that sockets can be given their
        owners; that looks at every process of the node.

        Raises what `Resolver.resolve` raises for `target`; `pods` that are not found are `absent`.
        """
        with ExitStack() as stack:
            host_handle = stack.enter_context(self._resolver.host_netns())
            host = Namespace(
                ref=NetnsRef(node=self._node, kind=NetnsKind.HOST, inode=host_handle.inode),
                handle=host_handle,
            )
            wanted = (*pods, target) if quick and target is not None else pods
            others = stack.enter_context(self._directory.open(wanted, timeout=timeout))
            here, pod = host, None
            if target is not None and quick and target in others.namespaces:
                here = _namespace(others.namespaces[target])
            elif target is not None:
                pod = self._resolver.resolve(target, timeout=timeout)
                stack.enter_context(pod)
                here = Namespace(
                    ref=pod.netns,
                    handle=pod.found.handle,
                    pids=pod.found.pids,
                    runtime_handler=pod.found.runtime_handler,
                )
            if here.ref.kind is NetnsKind.HOST:
                here = host
                if target is not None and (check := IN_NODE.get(None)) is not None:
                    check()
            if owners:
                here = Namespace(
                    ref=here.ref,
                    handle=here.handle,
                    pids=_processes_in(self._paths, here.handle.inode),
                    runtime_handler=here.runtime_handler,
                )
            known = {here.handle.inode: here}
            for one in (host, *map(_namespace, others.namespaces.values())):
                known.setdefault(one.handle.inode, one)
            yield OpenTarget(
                here=here,
                host=host,
                known=tuple(known.values()),
                pod=pod,
                absent=others.absent,
            )


def _namespace(opened: OpenNamespace) -> Namespace:
    return Namespace(
        ref=opened.ref,
        handle=opened.handle,
        pids=opened.pids,
        runtime_handler=opened.runtime_handler,
    )


def _processes_in(paths: HostPaths, inode: int) -> tuple[int, ...]:
    """Every process of that network namespace that may be looked at."""
    found: list[int] = []
    for name in os.listdir(paths.proc):
        if not name.isdigit():
            continue
        try:
            if os.stat(paths.pid(int(name), "ns", "net")).st_ino == inode:
                found.append(int(name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            # Ended meanwhile, a zombie, or not ours to see: its sockets stay without an owner.
            continue
    return tuple(found)
