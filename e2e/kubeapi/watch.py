"""One watch request: the changes of one resource as chunked JSON lines."""

from __future__ import annotations

import os
import select
import ssl
import time
from dataclasses import dataclass
from typing import Any, BinaryIO

from .errors import ApiError
from .resources import Resource
from .selectors import Predicate
from .store import Change, Object, Store, dump

__all__ = ["Watch", "serve"]

_BOOKMARK_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    resource: Resource
    namespace: str
    name: str
    predicate: Predicate | None
    since: int | None
    """None: begin with the present state as ADDED events."""
    bookmarks: bool
    initial_events_end: bool
    """``sendInitialEvents=true``: a bookmark says where the present state ends."""
    timeout: float

    def sees(self, obj: Object | None) -> bool:
        if obj is None:
            return False
        metadata = obj["metadata"]
        return (
            (not self.namespace or metadata.get("namespace", "") == self.namespace)
            and (not self.name or metadata["name"] == self.name)
            and (self.predicate is None or self.predicate(obj))
        )

    def event(self, change: Change) -> bytes:
        """The event for ``change``; empty when it happens outside of what is watched.

        An object that begins or ceases to match the selector is ADDED or DELETED.
        """
        before, after = self.sees(change.old), self.sees(change.obj)
        if after and change.obj is not None:
            return _line("MODIFIED" if before else "ADDED", change.obj)
        if before and change.old is not None:
            metadata = {**change.old["metadata"], "resourceVersion": str(change.version)}
            return _line("DELETED", {**change.old, "metadata": metadata})
        return b""

    def bookmark(self, version: int, *, initial: bool = False) -> bytes:
        metadata: dict[str, Any] = {"resourceVersion": str(version), "creationTimestamp": None}
        if initial:
            metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
        obj = {
            "kind": self.resource.kind,
            "apiVersion": self.resource.api_version,
            "metadata": metadata,
        }
        return _line("BOOKMARK", obj)


def _line(kind: str, obj: Any) -> bytes:
    return dump({"type": kind, "object": obj}) + b"\n"


def _initial(watch: Watch, store: Store) -> tuple[int, list[bytes]]:
    if watch.since is not None:
        return watch.since, []
    version, objects = store.snapshot(watch.resource, watch.namespace)
    lines = [_line("ADDED", obj) for obj in objects if watch.sees(obj)]
    if watch.initial_events_end:
        lines.append(watch.bookmark(version, initial=True))
    return version, lines


def _events(watch: Watch, store: Store, since: int) -> tuple[int, bytes]:
    version, changes = store.changes(watch.resource, since)
    return max(version, since), b"".join(watch.event(change) for change in changes)


def serve(watch: Watch, store: Store, conn: ssl.SSLSocket, out: BinaryIO, stop_fd: int) -> None:
    """Write chunks to ``out`` until the timeout, the client's end or ``stop_fd``.

    The response's head has been sent. A version that is too old ends the watch with an ERROR event
    that holds the 410 Status, as the real server does. Raises: OSError when the client is gone.
    """

    def write(lines: bytes) -> None:
        if lines:
            out.write(b"%x\r\n%b\r\n" % (len(lines), lines))
            out.flush()

    deadline = time.monotonic() + watch.timeout
    changed = store.subscribe()
    poller = select.poll()
    for fd in (conn.fileno(), changed, stop_fd):
        poller.register(fd, select.POLLIN | select.POLLRDHUP)
    try:
        version, lines = _initial(watch, store)
        write(b"".join(lines))
        bookmark_at = time.monotonic() + _BOOKMARK_SECONDS
        while True:
            try:
                version, new = _events(watch, store, version)
            except ApiError as error:
                write(_line("ERROR", error.status()))
                break
            write(new)
            present = time.monotonic()
            if present >= deadline:
                if watch.bookmarks:
                    write(watch.bookmark(version))
                break
            if watch.bookmarks and present >= bookmark_at:
                write(watch.bookmark(version))
                bookmark_at = present + _BOOKMARK_SECONDS
            until = min(deadline, bookmark_at) if watch.bookmarks else deadline
            ready = dict(poller.poll(max(0.0, until - present) * 1000 + 1))
            if stop_fd in ready:
                break
            if changed in ready:
                os.eventfd_read(changed)
            if conn.fileno() in ready:
                return  # a client that watches has nothing to say: this is its end
        out.write(b"0\r\n\r\n")
        out.flush()
    finally:
        store.unsubscribe(changed)
