"""The lab's own knobs, over HTTPS at /lab/, for the admin only.

* ``POST /lab/netns``   ``{"nodes": {NAME: {"pid": N}}, "pods": {"NS/NAME": {"pid": N}}}`` adds; a
  null instead of an entry removes.
* ``POST /lab/listen``  ``{"pid": N, "address": "10.43.240.1:443"}`` opens a listener in the network
  namespace of a process.
* ``POST /lab/fail``    ``{"path": "/api/v1/pods*", "method": "GET", "status": 503,
  "message": "...", "delay": 1.5, "drop": true, "times": 2}``: requests whose path matches the glob
  wait ``delay`` seconds, then fail with ``status``, or lose their connection (``drop``), or go on
  (neither). ``times`` ends it after that many; without it, ``DELETE /lab/fail`` ends all.
* ``POST /lab/compact`` forgets the history, so that older watches and pages get 410.
* ``POST /lab/hangup``  closes every open watch and port-forward.
* ``GET /lab/state``    counts: open connections, watches and port-forwards, requests so far.
"""

from __future__ import annotations

import fnmatch
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .config import ConfigError, parse_address
from .errors import bad_request, unknown_path
from .store import Store

__all__ = ["Control", "Fault"]


@dataclass(slots=True)
class Fault:
    path: str
    method: str
    status: int
    message: str
    delay: float
    drop: bool
    times: int
    """How many more requests it meets; negative for no end."""


class Control:
    def __init__(
        self, store: Store, node_pids: Mapping[str, int], pod_pids: Mapping[str, int]
    ) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._pids = {"nodes": dict(node_pids), "pods": dict(pod_pids)}
        self._faults: list[Fault] = []
        self._open: Counter[str] = Counter()
        self._requests: Counter[str] = Counter()
        self.on_listen: Callable[[tuple[str, int], int | None], None] | None = None
        self.on_hangup: Callable[[], None] | None = None

    # what the server asks

    def pid_of(self, pod: Mapping[str, Any]) -> int | None:
        """A process in the pod's network namespace; a hostNetwork pod's is its node's."""
        metadata, spec = pod["metadata"], pod["spec"]
        with self._lock:
            pid = self._pids["pods"].get(f"{metadata['namespace']}/{metadata['name']}")
            if pid is None and spec.get("hostNetwork"):
                pid = self._pids["nodes"].get(spec["nodeName"])
            return pid

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets, counted as met."""
        with self._lock:
            for fault in self._faults:
                if fault.method in ("", method) and fnmatch.fnmatchcase(path, fault.path):
                    fault.times -= 1
                    if fault.times == 0:
                        self._faults.remove(fault)
                    return fault
        return None

    def count_request(self, method: str, path: str) -> None:
        with self._lock:
            self._requests[f"{method} {path}"] += 1

    @contextmanager
    def counted(self, what: str) -> Iterator[None]:
        with self._lock:
            self._open[what] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open[what] -= 1

    # what the admin asks

    def handle(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Raises: ApiError."""
        handlers: dict[tuple[str, str], Callable[[dict[str, Any]], dict[str, Any]]] = {
            ("POST", "/lab/netns"): self._netns,
            ("POST", "/lab/listen"): self._listen,
            ("POST", "/lab/fail"): self._fail,
            ("DELETE", "/lab/fail"): self._mend,
            ("POST", "/lab/compact"): self._compact,
            ("POST", "/lab/hangup"): self._hangup,
            ("GET", "/lab/state"): self._state,
        }
        handler = handlers.get((method, path))
        if handler is None:
            raise unknown_path()
        try:
            return handler(body)
        except (TypeError, ValueError, KeyError, ConfigError) as error:
            raise bad_request(f"{path}: {error}") from error

    def _netns(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            for what, known in self._pids.items():
                for name, entry in (body.get(what) or {}).items():
                    if entry is None:
                        known.pop(name, None)
                    else:
                        known[name] = int(entry["pid"])
            return {what: dict(known) for what, known in self._pids.items()}

    def _listen(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.on_listen is None:
            raise ValueError("the server is not up yet")
        pid = body.get("pid")
        self.on_listen(parse_address(body["address"]), None if pid is None else int(pid))
        return {}

    def _fail(self, body: dict[str, Any]) -> dict[str, Any]:
        fault = Fault(
            path=str(body["path"]),
            method=str(body.get("method") or ""),
            status=int(body.get("status") or 0),
            message=str(body.get("message") or "the lab was told to fail this request"),
            delay=float(body.get("delay") or 0),
            drop=bool(body.get("drop")),
            times=int(body.get("times") or -1),
        )
        with self._lock:
            self._faults.append(fault)
        return {}

    def _mend(self, _: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            self._faults.clear()
        return {}

    def _compact(self, _: dict[str, Any]) -> dict[str, Any]:
        self._store.compact()
        return {"resourceVersion": str(self._store.version)}

    def _hangup(self, _: dict[str, Any]) -> dict[str, Any]:
        if self.on_hangup is not None:
            self.on_hangup()
        return {}

    def _state(self, _: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            return {
                "open": {what: count for what, count in self._open.items() if count},
                "requests": dict(self._requests),
                "threads": threading.active_count(),
                "resourceVersion": str(self._store.version),
            }
