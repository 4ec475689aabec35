"""Many pods' namespaces at once, for a walk that may enter any of them.

What is kept between calls is who a pod's process was (PID and start time), never an open
namespace: a handle would keep a dead pod's namespace alive.  Opening a known one takes about
40 µs; those not known yet are found by one scan of the cgroups for all of them, and only what that
does not find is asked of the runtime, which takes milliseconds for each.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from gketrace.errors import GketraceError, GoneError
from gketrace.trace import NetnsRef
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netns import NetnsHandle, open_pid
from gketrace_agent.resolve.model import PodRef, ResolvedPod
from gketrace_agent.resolve.resolver import Resolver

__all__ = ["OpenNamespace", "OpenPods", "PodDirectory"]

_KEPT: Final = 1024
_NOT_FOUND: Final = 1.0
"""Seconds for which a pod that was not found is not looked for again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenNamespace:
    """A pod's namespace, held open; the host's, for a pod of the host's network."""

    ref: NetnsRef
    handle: NetnsHandle
    pids: tuple[int, ...]
    runtime_handler: str


@dataclass(slots=True)
class OpenPods:
    """What `PodDirectory.open` found.  Use it with ``with``."""

    namespaces: dict[PodRef, OpenNamespace] = field(default_factory=dict)
    absent: dict[PodRef, str] = field(default_factory=dict)
    """Why the others could not be opened."""
    _stack: ExitStack = field(default_factory=ExitStack)

    def add(self, pod: PodRef, namespace: OpenNamespace) -> None:
        self._stack.callback(namespace.handle.close)
        self.namespaces[pod] = namespace

    def __enter__(self) -> OpenPods:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Identity:
    """A process that is in the pod's namespace, and what else need not be asked again."""

    pid: int
    start_time: int
    ref: NetnsRef
    pids: tuple[int, ...]
    runtime_handler: str


class PodDirectory:
    """Any thread may call."""

    def __init__(self, paths: HostPaths, resolver: Resolver) -> None:
        self._paths = paths
        self._resolver = resolver
        self._lock = threading.Lock()
        self._known: OrderedDict[PodRef, _Identity] = OrderedDict()
        self._absent: dict[PodRef, tuple[float, str]] = {}

    def open(self, pods: Iterable[PodRef], *, timeout: float) -> OpenPods:
        """Opens what can be opened, within about `timeout` seconds; says why for the rest."""
        deadline = time.monotonic() + timeout
        opened = OpenPods()
        unknown: list[PodRef] = []
        for pod in dict.fromkeys(pods):
            namespace = self._reopen(pod)
            if namespace is not None:
                opened.add(pod, namespace)
            elif reason := self._absent_lately(pod):
                opened.absent[pod] = reason
            else:
                unknown.append(pod)
        if unknown:
            self._find(unknown, opened, deadline)
        return opened

    def _reopen(self, pod: PodRef) -> OpenNamespace | None:
        with self._lock:
            identity = self._known.get(pod)
        if identity is None:
            return None
        try:
            handle = open_pid(self._paths, identity.pid, starttime=identity.start_time)
        except GoneError:
            with self._lock:
                self._known.pop(pod, None)
            return None
        if handle.inode != identity.ref.inode:
            handle.close()
            return None
        return OpenNamespace(
            ref=identity.ref,
            handle=handle,
            pids=identity.pids,
            runtime_handler=identity.runtime_handler,
        )

    def _absent_lately(self, pod: PodRef) -> str:
        with self._lock:
            until, reason = self._absent.get(pod, (0.0, ""))
            if time.monotonic() < until:
                return reason
            self._absent.pop(pod, None)
            return ""

    def _find(self, pods: list[PodRef], opened: OpenPods, deadline: float) -> None:
        scan = self._resolver.scan()
        for pod in pods:
            left = deadline - time.monotonic()
            if left <= 0:
                opened.absent[pod] = "the call's time was over before it was looked for"
                continue
            try:
                resolved = self._resolver.resolve(pod, timeout=left, scan=scan, cgroup_first=True)
            except GketraceError as error:
                opened.absent[pod] = str(error)
                with self._lock:
                    self._absent[pod] = (time.monotonic() + _NOT_FOUND, str(error))
                continue
            opened.add(
                pod,
                OpenNamespace(
                    ref=resolved.netns,
                    handle=resolved.found.handle,
                    pids=resolved.found.pids,
                    runtime_handler=resolved.found.runtime_handler,
                ),
            )
            self._remember(pod, resolved)

    def _remember(self, pod: PodRef, resolved: ResolvedPod) -> None:
        found = resolved.found
        process = next(((c.pid, c.start_time) for c in found.containers if c.start_time), None)
        if process is None:
            return
        with self._lock:
            self._known[pod] = _Identity(
                pid=process[0],
                start_time=process[1],
                ref=resolved.netns,
                pids=found.pids,
                runtime_handler=found.runtime_handler,
            )
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
