"""What answers a request: authentication, authorization, then the route's handler.

Paths and verbs follow apiserver/pkg/endpoints/request/requestinfo.go.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .control import Control
from .errors import (
    bad_request,
    method_not_allowed,
    unauthorized,
    unknown_path,
    unsupported_media_type,
)
from .patch import json_patch, merge_patch
from .portforward import Forward, negotiate, parse_ports
from .rbac import Attributes, Rbac
from .resources import Resource, by_path, discovery
from .selectors import Predicate, parse_field_selector, parse_label_selector
from .store import Object, Store, dump, now
from .tokens import ANONYMOUS, TokenRefused, Tokens, User
from .watch import Watch

__all__ = ["Api", "Request", "Response"]

_VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_RETURN_DELETED = ("pods", "services", "serviceaccounts", "namespaces")
"""Deleting one answers with the object; deleting anything else, with a Status."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    def parameter(self, name: str) -> str:
        return (self.query.get(name) or [""])[0]

    def flag(self, name: str) -> bool:
        return self.parameter(name) in ("true", "True", "1", "t", "T", "TRUE")

    def number(self, name: str) -> int:
        """Raises: ApiError 400."""
        text = self.parameter(name)
        if not text:
            return 0
        if not text.isdigit():
            raise bad_request(f'unable to convert "{text}" of {name} to a number')
        return int(text)

    def document(self) -> dict[str, Any]:
        """Raises: ApiError 400, 415."""
        kind = self.headers.get("Content-Type", "").split(";")[0].strip()
        if kind not in ("", "application/json", "*/*"):
            raise unsupported_media_type(kind, "application/json")
        return _object(self.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    code: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """A resource request, taken apart."""

    resource: Resource
    namespace: str
    name: str
    subresource: str


def _object(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body or b"null")
    except ValueError as error:
        raise bad_request(f"the body of the request is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise bad_request("the body of the request is not a JSON object")
    return document


class Api:
    def __init__(
        self, *, store: Store, tokens: Tokens, control: Control, version: str, address: str
    ) -> None:
        self._store = store
        self._tokens = tokens
        self._rbac = Rbac(store)
        self._control = control
        self._documents = {path: dump(doc) for path, doc in discovery(address).items()}
        major, minor, *_ = version.lstrip("v").split(".")
        self._documents["/version"] = dump(
            {
                "major": major,
                "minor": minor,
                "gitVersion": version,
                "gitCommit": "",
                "gitTreeState": "clean",
                "buildDate": now(),
                "goVersion": "",
                "compiler": "",
                "platform": "linux/amd64",
            }
        )
        for path in ("/healthz", "/livez", "/readyz"):
            self._documents[path] = b"ok"

    def handle(self, request: Request) -> Response | Watch | Forward:
        """Raises: ApiError."""
        user = self._authenticate(request)
        path = request.path.rstrip("/") or "/"
        if path.startswith("/lab/"):
            return self._lab(request, user, path)
        if path in self._documents:
            self._rbac.check(user, Attributes(verb=request.method.lower(), path=path))
            if request.method not in ("GET", "HEAD"):
                raise method_not_allowed()
            return Response(code=200, body=self._documents[path])
        parts = path.strip("/").split("/")
        if parts[0] == "api" and len(parts) > 2:
            group, version, rest = "", parts[1], parts[2:]
        elif parts[0] == "apis" and len(parts) > 3:
            group, version, rest = parts[1], parts[2], parts[3:]
        else:
            self._rbac.check(user, Attributes(verb=request.method.lower(), path=path))
            raise unknown_path()
        if group in ("authentication.k8s.io", "authorization.k8s.io") and version == "v1":
            return self._review(request, user, group, rest)
        return self._resource(request, user, self._target(group, version, rest))

    # who is asking

    def _authenticate(self, request: Request) -> User:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return ANONYMOUS
        if scheme.lower() != "bearer":
            raise unauthorized()
        try:
            user, _ = self._tokens.authenticate(token.strip())
        except TokenRefused as error:
            raise unauthorized() from error
        return user

    # resources

    @staticmethod
    def _target(group: str, version: str, parts: list[str]) -> _Target:
        namespace = ""
        if parts[0] == "namespaces" and len(parts) > 2 and parts[2] not in ("status", "finalize"):
            namespace, parts = parts[1], parts[2:]
        resource = by_path(group, version, parts[0])
        if resource is None or len(parts) > 3 or (namespace and not resource.namespaced):
            raise unknown_path()
        name = parts[1] if len(parts) > 1 else ""
        if resource.namespaced and name and not namespace:
            raise unknown_path()
        subresource = parts[2] if len(parts) > 2 else ""
        if subresource and subresource not in {n for n, *_ in resource.subresources}:
            raise unknown_path()
        return _Target(resource=resource, namespace=namespace, name=name, subresource=subresource)

    def _resource(
        self, request: Request, user: User, target: _Target
    ) -> Response | Watch | Forward:
        verb = _VERBS.get("GET" if request.method == "HEAD" else request.method)
        if verb is None:
            raise method_not_allowed()
        if not target.name:
            if verb == "get":
                verb = "watch" if request.flag("watch") else "list"
            elif verb == "delete":
                verb = "deletecollection"
        action = Attributes(
            verb=verb,
            group=target.resource.group,
            resource=target.resource.plural,
            subresource=target.subresource,
            namespace=target.namespace,
            name=target.name,
        )
        if target.resource.plural == "namespaces" and target.name:
            action = Attributes(
                verb=verb,
                resource="namespaces",
                subresource=target.subresource,
                namespace=target.name,
                name=target.name,
            )
        self._rbac.check(user, action)
        if target.subresource == "portforward":
            return self._portforward(request, user, target)
        if target.subresource == "token":
            if verb != "create":
                raise method_not_allowed()
            made = self._tokens.request(target.namespace, target.name, request.document())
            return Response(code=201, body=dump(made))
        if verb in ("list", "watch"):
            return self._list(request, target, watch=verb == "watch")
        return self._single(request, target, verb)

    def _single(self, request: Request, target: _Target, verb: str) -> Response:
        store, resource = self._store, target.resource
        if verb == "get":
            return Response(code=200, body=dump(store.get(resource, target.namespace, target.name)))
        if verb == "create":
            if target.name or (resource.namespaced and not target.namespace):
                raise method_not_allowed()
            body = self._checked(request.document(), target)
            return Response(code=201, body=dump(store.create(resource, target.namespace, body)))
        if verb in ("update", "patch"):
            if not target.name:
                raise method_not_allowed()
            if verb == "update":
                body = self._checked(request.document(), target)
                new = store.update(
                    resource,
                    target.namespace,
                    target.name,
                    lambda _: body,
                    only_status=target.subresource == "status",
                )
            else:
                new = self._patch(request, target)
            return Response(code=200, body=dump(new))
        if target.subresource:
            raise method_not_allowed()
        if verb == "delete":
            return self._deleted(resource, store.delete(resource, target.namespace, target.name))
        predicate = self._predicate(request, resource)
        for obj in store.all(resource, target.namespace):
            if predicate is None or predicate(obj):
                metadata = obj["metadata"]
                store.delete(resource, metadata.get("namespace", ""), metadata["name"])
        return Response(code=200, body=dump(_success({})))

    def _deleted(self, resource: Resource, old: Object) -> Response:
        if resource.plural in _RETURN_DELETED:
            return Response(code=200, body=dump(old))
        metadata = old["metadata"]
        details = {"name": metadata["name"], "kind": resource.plural, "uid": metadata["uid"]}
        if resource.group:
            details["group"] = resource.group
        return Response(code=200, body=dump(_success(details)))

    def _checked(self, body: dict[str, Any], target: _Target) -> dict[str, Any]:
        resource = target.resource
        got = (body.get("apiVersion", resource.api_version), body.get("kind", resource.kind))
        if got != (resource.api_version, resource.kind):
            raise bad_request(
                f"the API version in the data ({got[0]}, Kind={got[1]}) does not match the "
                f"expected API version ({resource.api_version}, Kind={resource.kind})"
            )
        namespace = (body.get("metadata") or {}).get("namespace", target.namespace)
        if resource.namespaced and namespace != target.namespace:
            raise bad_request(
                "the namespace of the provided object does not match the namespace sent on the "
                "request"
            )
        return body

    def _patch(self, request: Request, target: _Target) -> Object:
        kind = request.headers.get("Content-Type", "").split(";")[0].strip()
        accepted = "application/json-patch+json, application/merge-patch+json"
        try:
            patch = json.loads(request.body)
        except ValueError as error:
            raise bad_request(f"the patch is not JSON: {error}") from error
        if kind == "application/merge-patch+json":

            def make(old: Object) -> Object:
                merged: Object = merge_patch(old, patch)
                return merged

        elif kind == "application/json-patch+json":

            def make(old: Object) -> Object:
                patched: Object = json_patch(old, patch)
                return patched

        else:
            raise unsupported_media_type(kind, accepted)
        return self._store.update(
            target.resource,
            target.namespace,
            target.name,
            make,
            only_status=target.subresource == "status",
        )

    def _predicate(self, request: Request, resource: Resource) -> Predicate | None:
        labels = parse_label_selector(request.parameter("labelSelector"))
        fields = parse_field_selector(
            request.parameter("fieldSelector"), resource.plural, resource.api_version
        )
        if labels and fields:
            return lambda obj: labels(obj) and fields(obj)
        return labels or fields

    def _list(self, request: Request, target: _Target, *, watch: bool) -> Response | Watch:
        predicate = self._predicate(request, target.resource)
        if not watch:
            body = self._store.page(
                target.resource,
                target.namespace,
                predicate=predicate,
                limit=request.number("limit"),
                token=request.parameter("continue"),
            )
            return Response(code=200, body=body)
        version = request.number("resourceVersion")
        initial = request.flag("sendInitialEvents")
        # The real server picks 30 to 60 minutes when none is asked for.
        seconds = request.number("timeoutSeconds") or random.randint(1800, 3600)
        return Watch(
            resource=target.resource,
            namespace=target.namespace,
            name="",
            predicate=predicate,
            since=None if initial or not version else version,
            bookmarks=request.flag("allowWatchBookmarks"),
            initial_events_end=initial,
            timeout=seconds,
        )

    def _portforward(self, request: Request, user: User, target: _Target) -> Forward:
        if request.method == "GET":
            # Since 1.35 a WebSocket's GET needs create as well as get
            # (AuthorizePodWebsocketUpgradeCreatePermission, on by default).
            self._rbac.check(
                user,
                Attributes(
                    verb="create",
                    resource="pods",
                    subresource="portforward",
                    namespace=target.namespace,
                    name=target.name,
                ),
            )
        elif request.method != "POST":
            raise method_not_allowed()
        pod = self._store.get(target.resource, target.namespace, target.name)
        if not pod.get("spec", {}).get("nodeName"):
            raise bad_request(f"pod {target.name} does not have a host assigned")
        accept = negotiate(request.headers)
        return Forward(
            ports=parse_ports(request.query.get("ports", [])),
            pod=pod,
            pid=self._control.pid_of(pod),
            accept=accept,
        )

    # reviews

    def _review(self, request: Request, user: User, group: str, parts: list[str]) -> Response:
        namespace = ""
        if parts[0] == "namespaces" and len(parts) == 3:
            namespace, parts = parts[1], parts[2:]
        kind = parts[0] if len(parts) == 1 else ""
        review = {
            "tokenreviews": self._token_review,
            "selfsubjectreviews": self._self_review,
            "subjectaccessreviews": self._access_review,
            "selfsubjectaccessreviews": self._access_review,
            "localsubjectaccessreviews": self._access_review,
        }.get(kind)
        if review is None or (kind == "localsubjectaccessreviews") != bool(namespace):
            raise unknown_path()
        verb = _VERBS.get(request.method, request.method.lower())
        self._rbac.check(
            user, Attributes(verb=verb, group=group, resource=kind, namespace=namespace)
        )
        if request.method != "POST":
            raise method_not_allowed()
        body = request.document()
        spec = body.get("spec") or {}
        return Response(code=201, body=dump({**body, "status": review(spec, user, kind)}))

    def _token_review(self, spec: dict[str, Any], _: User, __: str) -> dict[str, Any]:
        try:
            owner, audiences = self._tokens.authenticate(
                spec.get("token") or "", spec.get("audiences") or ()
            )
        except TokenRefused as error:
            return {"user": {}, "error": str(error)}
        return {"authenticated": True, "user": owner.document(), "audiences": audiences}

    def _self_review(self, _: dict[str, Any], user: User, __: str) -> dict[str, Any]:
        return {"userInfo": user.document()}

    def _access_review(self, spec: dict[str, Any], user: User, kind: str) -> dict[str, Any]:
        subject = user
        if kind != "selfsubjectaccessreviews":
            groups = tuple(spec.get("groups") or ())
            if not spec.get("user") and not groups:
                raise bad_request("at least one of user or group must be specified")
            subject = User(name=spec.get("user") or "", groups=groups, uid=spec.get("uid") or "")
        resource = spec.get("resourceAttributes")
        other = spec.get("nonResourceAttributes")
        if bool(resource) == bool(other):
            raise bad_request(
                "exactly one of nonResourceAttributes or resourceAttributes must be specified"
            )
        if resource:
            action = Attributes(
                verb=resource.get("verb") or "",
                group=resource.get("group") or "",
                resource=resource.get("resource") or "",
                subresource=resource.get("subresource") or "",
                namespace=resource.get("namespace") or "",
                name=resource.get("name") or "",
            )
        else:
            url = other or {}
            action = Attributes(verb=url.get("verb") or "", path=url.get("path") or "/")
        reason = self._rbac.allowed(subject, action)
        return {"allowed": True, "reason": reason} if reason else {"allowed": False}

    # the lab's own knobs

    def _lab(self, request: Request, user: User, path: str) -> Response:
        if "system:masters" not in user.groups:
            raise Attributes(verb=request.method.lower(), path=path).denial(user)
        body = _object(request.body) if request.body else {}
        return Response(code=200, body=dump(self._control.handle(request.method, path, body)))


def _success(details: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Success",
        "details": details,
    }
