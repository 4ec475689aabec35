"""The objects, their resourceVersions, and the log of changes that feeds watches.

One counter numbers all changes, as etcd's revision does. Objects are never changed in place: a
write puts a new object and appends a ``Change`` that holds the new and the old one, so the state at
any logged version can be worked out again (that is how a paged list stays consistent).

Lists are answered from bytes serialised once per object and joined once per change.
"""

from __future__ import annotations

import base64
import binascii
import bisect
import datetime
import json
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .errors import already_exists, bad_request, conflict, expired, invalid, not_found
from .resources import RESOURCES, Resource, by_kind, by_path
from .selectors import Predicate

__all__ = ["Change", "Store", "dump", "now"]

Object = dict[str, Any]
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
_FIRST_NAMESPACES = ("default", "kube-node-lease", "kube-public", "kube-system")


def dump(value: Any) -> bytes:
    return _ENCODER.encode(value).encode()


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Key(NamedTuple):
    namespace: str
    name: str


@dataclass(slots=True)
class _Entry:
    obj: Object
    item: bytes = b""
    """The object as a list holds it: without kind and apiVersion. Made on first use."""

    def as_item(self) -> bytes:
        if not self.item:
            body = {k: v for k, v in self.obj.items() if k not in ("kind", "apiVersion")}
            self.item = dump(body)
        return self.item


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    version: int
    resource: Resource
    key: Key
    obj: Object | None
    """None when it was deleted."""
    old: Object | None
    """None when it was created."""


@dataclass(slots=True)
class _Table:
    entries: dict[Key, _Entry] = field(default_factory=dict)
    ordered: list[Key] | None = None
    joined: dict[str, bytes] = field(default_factory=dict)
    """All items of a namespace ("" for all namespaces), joined with commas."""

    def keys(self) -> list[Key]:
        if self.ordered is None:
            self.ordered = sorted(self.entries)
        return self.ordered

    def touched(self) -> None:
        self.ordered = None
        self.joined.clear()


class Store:
    """All objects. Every method may be called from any thread."""

    def __init__(self, *, history: int = 20_000) -> None:
        self._lock = threading.RLock()
        self._tables = {resource: _Table() for resource in RESOURCES}
        self._history = history
        self._log: list[Change] = []
        self._oldest = 0
        self._version = 0
        self._watchers: set[int] = set()

    # reading

    @property
    def version(self) -> int:
        return self._version

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        """Raises: ApiError 404."""
        with self._lock:
            entry = self._tables[resource].entries.get(Key(namespace, name))
        if entry is None:
            raise not_found(resource.plural, resource.group, name)
        return entry.obj

    def find(self, resource: Resource, namespace: str, name: str) -> Object | None:
        with self._lock:
            entry = self._tables[resource].entries.get(Key(namespace, name))
            return entry.obj if entry else None

    def all(self, resource: Resource, namespace: str = "") -> list[Object]:
        with self._lock:
            table = self._tables[resource]
            return [
                table.entries[key].obj
                for key in table.keys()  # noqa: SIM118  (not a dict)
                if not namespace or key.namespace == namespace
            ]

    def page(
        self,
        resource: Resource,
        namespace: str = "",
        *,
        predicate: Predicate | None = None,
        limit: int = 0,
        token: str = "",
    ) -> bytes:
        """The serialised list object. ``token`` is the ``continue`` of the page before.

        Raises: ApiError 400 for a malformed token, 410 for one whose version is compacted.
        """
        with self._lock:
            if predicate is None and not limit and not token:
                table = self._tables[resource]
                body = table.joined.get(namespace)
                if body is None:
                    body = b",".join(
                        table.entries[key].as_item()
                        for key in table.keys()  # noqa: SIM118
                        if not namespace or key.namespace == namespace
                    )
                    table.joined[namespace] = body
                return self._wrap(resource, {"resourceVersion": str(self._version)}, body)
            version, after = self._version, None
            if token:
                version, after = _parse_token(token)
                if version < self._oldest or version > self._version:
                    raise expired(
                        "The provided continue parameter is too old to display a consistent list "
                        "result. You can start a new list without the continue parameter, or use "
                        "the continue token in this response to retrieve the remainder of the "
                        "results. Continuing with the provided token results in an inconsistent "
                        "list - objects that were created, modified, or deleted between the time "
                        "the first chunk was returned and now may show up in the list."
                    )
            entries = self._entries_at(resource, version)
        chosen = [
            (key, entry)
            for key, entry in entries
            if (not namespace or key.namespace == namespace)
            and (after is None or key > after)
            and (predicate is None or predicate(entry.obj))
        ]
        metadata: dict[str, Any] = {"resourceVersion": str(version)}
        if limit and len(chosen) > limit:
            metadata["continue"] = _make_token(version, chosen[limit - 1][0])
            if predicate is None:
                metadata["remainingItemCount"] = len(chosen) - limit
            chosen = chosen[:limit]
        return self._wrap(resource, metadata, b",".join(e.as_item() for _, e in chosen))

    @staticmethod
    def _wrap(resource: Resource, metadata: dict[str, Any], body: bytes) -> bytes:
        head = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version}
        return dump({**head, "metadata": metadata})[:-1] + b',"items":[' + body + b"]}"

    def _entries_at(self, resource: Resource, version: int) -> list[tuple[Key, _Entry]]:
        table = self._tables[resource]
        if version == self._version:
            return [(key, table.entries[key]) for key in table.keys()]  # noqa: SIM118
        entries = dict(table.entries)
        for change in reversed(self._log):
            if change.version <= version:
                break
            if change.resource is resource:
                if change.old is None:
                    entries.pop(change.key, None)
                else:
                    entries[change.key] = _Entry(change.old)
        return sorted(entries.items(), key=lambda pair: pair[0])

    # watching

    def subscribe(self) -> int:
        """An eventfd that becomes readable at every change. Give it back to ``unsubscribe``."""
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with self._lock:
            self._watchers.add(fd)
        return fd

    def unsubscribe(self, fd: int) -> None:
        with self._lock:
            self._watchers.discard(fd)
        os.close(fd)

    def wake(self) -> None:
        """Make every subscriber look again, as a change does."""
        with self._lock:
            for fd in self._watchers:
                os.eventfd_write(fd, 1)

    def changes(self, resource: Resource, since: int) -> tuple[int, list[Change]]:
        """The version now and the resource's changes after version ``since``.

        Raises: ApiError 410 when the log does not reach back that far.
        """
        with self._lock:
            if since < self._oldest:
                raise expired(f"too old resource version: {since} ({self._oldest})")
            start = bisect.bisect_right(self._log, since, key=lambda change: change.version)
            return self._version, [c for c in self._log[start:] if c.resource is resource]

    def snapshot(self, resource: Resource, namespace: str) -> tuple[int, list[Object]]:
        with self._lock:
            return self._version, self.all(resource, namespace)

    def compact(self) -> None:
        """Forget the log, as etcd's compaction does: older watches and pages get 410."""
        with self._lock:
            self._log.clear()
            self._oldest = self._version

    # writing

    def load(self, obj: Object) -> None:
        """Put ``obj`` at start-up: as it is, with what it lacks filled in; no change is logged."""
        resource = by_kind(obj.get("apiVersion", ""), obj.get("kind", ""))
        if resource is None:
            raise ValueError(f"no resource serves {obj.get('apiVersion')} {obj.get('kind')}")
        metadata = self._complete(resource, obj["metadata"])
        with self._lock:
            if metadata.get("namespace"):
                self._ensure_namespace(metadata["namespace"])
            given = metadata.get("resourceVersion", "")
            self._version = max(self._version + (not given), int(given or 0))
            metadata["resourceVersion"] = given or str(self._version)
            key = Key(metadata.get("namespace", ""), metadata["name"])
            self._tables[resource].entries[key] = _Entry({**obj, "metadata": metadata})
            self._tables[resource].touched()
            self._oldest = self._version

    def loaded(self) -> None:
        """End of ``load``: make the namespaces that every cluster has."""
        for name in _FIRST_NAMESPACES:
            self._ensure_namespace(name)

    def create(self, resource: Resource, namespace: str, obj: Object) -> Object:
        """Raises: ApiError 404 (no such namespace), 409 (exists), 422 (no name)."""
        metadata = dict(obj.get("metadata") or {})
        prefix = metadata.get("generateName", "")
        if not metadata.get("name") and prefix:
            metadata["name"] = prefix + uuid.uuid4().hex[:5]
        if not metadata.get("name"):
            raise invalid(
                resource.kind, resource.group, "", "metadata.name: Required value: name is required"
            )
        if metadata.get("resourceVersion"):
            raise bad_request("resourceVersion should not be set on objects to be created")
        if resource.namespaced:
            metadata["namespace"] = namespace
        with self._lock:
            if resource.namespaced:
                self.get(_NAMESPACES, "", namespace)
            key = Key(namespace if resource.namespaced else "", metadata["name"])
            if key in self._tables[resource].entries:
                raise already_exists(resource.plural, resource.group, metadata["name"])
            metadata.update(uid=str(uuid.uuid4()), creationTimestamp=now())
            created = self._put(resource, key, {**obj, "metadata": metadata}, None)
            if resource is _NAMESPACES:
                self._ensure_service_account(metadata["name"])
            return created

    def update(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        make: Callable[[Object], Object],
        *,
        only_status: bool = False,
    ) -> Object:
        """Replace an object by ``make(old)``; with ``only_status``, just its status.

        Raises: ApiError 404; 409 when ``make`` returns another resourceVersion or UID than the
        stored object's; 400 when it changes the name.
        """
        key = Key(namespace if resource.namespaced else "", name)
        with self._lock:
            old = self.get(resource, key.namespace, name)
            new = make(old)
            metadata = dict(new.get("metadata") or {})
            kept = old["metadata"]
            if metadata.get("name", name) != name:
                raise bad_request(
                    f"the name of the object ({metadata['name']}) does not match the name on the "
                    f"URL ({name})"
                )
            stale = metadata.get("resourceVersion", "") not in ("", kept["resourceVersion"])
            if stale or metadata.get("uid", kept["uid"]) != kept["uid"]:
                raise conflict(
                    resource.plural,
                    resource.group,
                    name,
                    "the object has been modified; please apply your changes to the latest version "
                    "and try again",
                )
            if only_status:
                new, metadata = {**old, "status": new.get("status", {})}, dict(kept)
            for field_name in ("name", "namespace", "uid", "creationTimestamp", "resourceVersion"):
                if field_name in kept:
                    metadata[field_name] = kept[field_name]
            candidate = {**new, "metadata": metadata}
            if candidate == old:
                return old
            return self._put(resource, key, candidate, old)

    def delete(self, resource: Resource, namespace: str, name: str) -> Object:
        """Raises: ApiError 404. A namespace takes its objects with it."""
        key = Key(namespace if resource.namespaced else "", name)
        with self._lock:
            old = self.get(resource, key.namespace, name)
            if resource is _NAMESPACES:
                for other, table in self._tables.items():
                    for inside in [k for k in table.entries if k.namespace == name]:
                        self.delete(other, inside.namespace, inside.name)
            del self._tables[resource].entries[key]
            self._log_change(resource, key, None, old)
            return old

    # inside

    def _put(self, resource: Resource, key: Key, obj: Object, old: Object | None) -> Object:
        metadata = {**obj["metadata"], "resourceVersion": str(self._version + 1)}
        whole = {
            "kind": resource.kind,
            "apiVersion": resource.api_version,
            **obj,
            "metadata": metadata,
        }
        self._tables[resource].entries[key] = _Entry(whole)
        self._log_change(resource, key, whole, old)
        return whole

    def _log_change(
        self, resource: Resource, key: Key, obj: Object | None, old: Object | None
    ) -> None:
        self._version += 1
        self._tables[resource].touched()
        self._log.append(
            Change(version=self._version, resource=resource, key=key, obj=obj, old=old)
        )
        if len(self._log) > self._history:
            dropped = self._log[: self._history // 2]
            del self._log[: self._history // 2]
            self._oldest = dropped[-1].version
        self.wake()

    @staticmethod
    def _complete(resource: Resource, given: Mapping[str, Any]) -> dict[str, Any]:
        metadata = dict(given)
        if resource.namespaced:
            metadata.setdefault("namespace", "default")
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", now())
        return metadata

    def _ensure_namespace(self, name: str) -> None:
        with self._lock:
            if Key("", name) not in self._tables[_NAMESPACES].entries:
                labels = {"kubernetes.io/metadata.name": name}
                self.load(
                    {
                        "kind": "Namespace",
                        "apiVersion": "v1",
                        "metadata": {"name": name, "labels": labels},
                        "spec": {"finalizers": ["kubernetes"]},
                        "status": {"phase": "Active"},
                    }
                )
                self._ensure_service_account(name)

    def _ensure_service_account(self, namespace: str) -> None:
        if Key(namespace, "default") not in self._tables[_SERVICE_ACCOUNTS].entries:
            self._version += 1
            metadata = self._complete(
                _SERVICE_ACCOUNTS, {"name": "default", "namespace": namespace}
            )
            metadata["resourceVersion"] = str(self._version)
            account = {"kind": "ServiceAccount", "apiVersion": "v1", "metadata": metadata}
            self._tables[_SERVICE_ACCOUNTS].entries[Key(namespace, "default")] = _Entry(account)
            self._tables[_SERVICE_ACCOUNTS].touched()


def _resource(plural: str) -> Resource:
    resource = by_path("", "v1", plural)
    if resource is None:
        raise LookupError(plural)
    return resource


_NAMESPACES = _resource("namespaces")
_SERVICE_ACCOUNTS = _resource("serviceaccounts")


def _make_token(version: int, key: Key) -> str:
    return base64.urlsafe_b64encode(dump([version, key.namespace, key.name])).decode().rstrip("=")


def _parse_token(token: str) -> tuple[int, Key]:
    try:
        version, namespace, name = json.loads(base64.urlsafe_b64decode(token + "=="))
        return int(version), Key(str(namespace), str(name))
    except (binascii.Error, ValueError, TypeError) as error:
        raise bad_request("continue key is not valid: " + token[:80]) from error
