"""What the CLI knows of the cluster, read from the Kubernetes API.

`Cluster.open` resolves the kubeconfig; nothing goes over the network until something is asked.
Lists come in pages of 500 and, in `read`, at the same time on several connections.
"""

from __future__ import annotations

import threading
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from gketrace.errors import (
    GketraceError,
    GoneError,
    NotFoundError,
    UnavailableError,
)
from gketrace.objects import Endpoint, Node, Pod, Service

from .apiserver import ApiServer
from .kubeconfig import load_settings
from .object_json import (
    parse_endpoints,
    parse_endpointslice,
    parse_node,
    parse_pod,
    parse_service,
)

__all__ = ["KINDS", "Cluster", "Reading"]

T = TypeVar("T")
_PAGE: Final = "500"
KINDS: Final = ("pods", "services", "endpoints", "nodes")
"""What `Cluster.read` reads unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Several lists, read together but not as one snapshot: each has a version of its own."""

    pods: tuple[Pod, ...] = ()
    services: tuple[Service, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    nodes: tuple[Node, ...] = ()
    missing: Mapping[str, GketraceError] = field(default_factory=dict)
    """The kinds that could not be read, and why.  Their tuples are empty and say nothing."""


class Cluster:
    """One cluster, as one user.  A context manager; may be used from several threads."""

    def __init__(self, api: ApiServer) -> None:
        self.api: Final = api

    @classmethod
    def open(cls, *, kubeconfig: str = "", context: str = "", timeout: float = 30.0) -> Cluster:
        """Raises: UsageError when the kubeconfig is missing or wrong."""
        settings = load_settings(kubeconfig=kubeconfig, context=context)
        return cls(ApiServer(settings, timeout=timeout))

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.api.close()

    @property
    def context(self) -> str:
        return self.api.settings.context

    @property
    def namespace(self) -> str:
        """The context's default namespace."""
        return self.api.settings.namespace

    # one object

    def pod(self, namespace: str, name: str) -> Pod:
        """Raises: NotFoundError, ForbiddenError, UnavailableError; so do all that follow."""
        return parse_pod(self._one("pods", namespace, name))

    def service(self, namespace: str, name: str) -> Service:
        return parse_service(self._one("services", namespace, name))

    def node(self, name: str) -> Node:
        return parse_node(self._one("nodes", "", name))

    def _one(self, plural: str, namespace: str, name: str) -> dict[str, Any]:
        if not name or "/" in name or name in (".", ".."):
            raise NotFoundError(f'{plural} "{name}" not found')
        try:
            return self.api.get(f"{_collection('', plural, namespace)}/{_quote(name)}")
        except NotFoundError as error:
            where = f' in namespace "{namespace}"' if namespace else ""
            raise NotFoundError(
                f"{error.message}{where}", hint=f'context "{self.context}" was asked'
            ) from error

    # lists

    def pods(
        self, namespace: str = "", *, label_selector: str = "", field_selector: str = ""
    ) -> tuple[Pod, ...]:
        """The pods of `namespace`; of all namespaces when it is empty."""
        query = {"labelSelector": label_selector, "fieldSelector": field_selector}
        return tuple(parse_pod(obj) for obj in self._items("", "pods", namespace, query))

    def services(self, namespace: str = "", *, label_selector: str = "") -> tuple[Service, ...]:
        query = {"labelSelector": label_selector}
        return tuple(parse_service(obj) for obj in self._items("", "services", namespace, query))

    def endpoints(self, namespace: str = "", *, service: str = "") -> tuple[Endpoint, ...]:
        """From EndpointSlices; from Endpoints on a cluster that has no EndpointSlice v1."""
        query = {"labelSelector": f"kubernetes.io/service-name={service}" if service else ""}
        group = "discovery.k8s.io"
        try:
            slices = self._items(group, "endpointslices", namespace, query)
        except NotFoundError:
            query = {"fieldSelector": f"metadata.name={service}" if service else ""}
            listed = self._items("", "endpoints", namespace, query)
            return tuple(endpoint for obj in listed for endpoint in parse_endpoints(obj))
        return tuple(endpoint for obj in slices for endpoint in parse_endpointslice(obj))

    def nodes(self) -> tuple[Node, ...]:
        return tuple(parse_node(obj) for obj in self._items("", "nodes", "", {}))

    def items(self, group: str, plural: str, namespace: str = "") -> list[dict[str, Any]]:
        """A list of any kind, as the server has it."""
        return self._items(group, plural, namespace, {})

    def read(self, namespace: str = "", *, kinds: Iterable[str] = KINDS) -> Reading:
        """Several lists at once; those with namespaces are cut to `namespace` when it is given.

        A list that may not be seen, or that failed alone, is named in `missing`.
        Raises: the first failure when no list at all could be read.
        """
        readers: dict[str, Callable[[], Any]] = {
            "pods": lambda: self.pods(namespace),
            "services": lambda: self.services(namespace),
            "endpoints": lambda: self.endpoints(namespace),
            "nodes": self.nodes,
        }
        got, failed = _at_once({kind: readers[kind] for kind in kinds})
        if failed and not got:
            raise next(iter(failed.values()))
        return Reading(**got, missing=failed)

    def _items(
        self, group: str, plural: str, namespace: str, query: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        """All items, page by page; in one piece when the server forgets the version between two."""
        path = _collection(group, plural, namespace)
        items: list[dict[str, Any]] = []
        token = ""
        while True:
            try:
                page = self.api.get(path, {**query, "limit": _PAGE, "continue": token})
            except GoneError:
                if not token:
                    raise
                return self._list(self.api.get(path, query), plural)
            items += self._list(page, plural)
            metadata = page.get("metadata")
            token = metadata.get("continue") or "" if isinstance(metadata, dict) else ""
            if not token:
                return items

    def _list(self, document: dict[str, Any], plural: str) -> list[dict[str, Any]]:
        items = document.get("items")
        if items is None and str(document.get("kind", "")).endswith("List"):
            return []
        if not isinstance(items, list):
            raise UnavailableError(
                f"{self.api.name} answered the list of {plural} with no list",
                hint="check that the server URL is a Kubernetes API server's",
            )
        return items

    # permissions

    def may(self, verb: str, resource: str, *, namespace: str = "", group: str = "") -> bool:
        """Whether the user may do this (SelfSubjectAccessReview); `resource` may be PLURAL/SUB."""
        plural, _, subresource = resource.partition("/")
        attributes = {
            "verb": verb,
            "group": group,
            "resource": plural,
            "subresource": subresource,
            "namespace": namespace,
        }
        answer = self.api.request(
            "POST",
            "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
            body={
                "kind": "SelfSubjectAccessReview",
                "apiVersion": "authorization.k8s.io/v1",
                "spec": {"resourceAttributes": attributes},
            },
        )
        status = answer.get("status")
        return isinstance(status, dict) and status.get("allowed") is True


def _quote(text: str) -> str:
    return urllib.parse.quote(text, safe="")


def _collection(group: str, plural: str, namespace: str) -> str:
    root = f"/apis/{group}/v1" if group else "/api/v1"
    return f"{root}/namespaces/{_quote(namespace)}/{plural}" if namespace else f"{root}/{plural}"


def _at_once(
    calls: Mapping[str, Callable[[], T]],
) -> tuple[dict[str, T], dict[str, GketraceError]]:
    """Run each call in a thread; the answers, and the failures, both in the order of `calls`."""
    got: dict[str, T] = {}
    failed: dict[str, GketraceError] = {}
    unexpected: list[BaseException] = []

    def run(name: str) -> None:
        try:
            got[name] = calls[name]()
        except GketraceError as error:
            failed[name] = error
        except BaseException as error:  # noqa: BLE001  handed to the caller's thread, below
            unexpected.append(error)

    threads = [threading.Thread(target=run, args=(name,), name=f"read-{name}") for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if unexpected:
        raise unexpected[0]
    return (
        {name: got[name] for name in calls if name in got},
        {name: failed[name] for name in calls if name in failed},
    )
