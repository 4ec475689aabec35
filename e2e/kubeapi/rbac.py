"""Who may do what, from the RBAC objects in the store (k8s.io/kubernetes/plugin/.../rbac)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ApiError, forbidden
from .resources import by_path
from .store import Store
from .tokens import User

__all__ = ["BOOTSTRAP", "Attributes", "Rbac"]

_GROUP = "rbac.authorization.k8s.io"


def _role(name: str, *rules: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "ClusterRole",
        "apiVersion": f"{_GROUP}/v1",
        "metadata": {"name": name, "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}},
        "rules": list(rules),
    }


def _binding(role: str, *groups: str) -> dict[str, Any]:
    return {
        "kind": "ClusterRoleBinding",
        "apiVersion": f"{_GROUP}/v1",
        "metadata": {"name": role, "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}},
        "roleRef": {"apiGroup": _GROUP, "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": _GROUP, "kind": "Group", "name": group} for group in groups],
    }


_EVERYBODY = ("system:authenticated", "system:unauthenticated")

BOOTSTRAP: tuple[dict[str, Any], ...] = (
    _role(
        "cluster-admin",
        {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]},
        {"nonResourceURLs": ["*"], "verbs": ["*"]},
    ),
    _binding("cluster-admin", "system:masters"),
    _role(
        "system:public-info-viewer",
        {
            "nonResourceURLs": ["/healthz", "/livez", "/readyz", "/version", "/version/"],
            "verbs": ["get"],
        },
    ),
    _binding("system:public-info-viewer", *_EVERYBODY),
    _role(
        "system:discovery",
        {"nonResourceURLs": ["/api", "/api/*", "/apis", "/apis/*", "/openapi/*"], "verbs": ["get"]},
    ),
    _binding("system:discovery", "system:authenticated"),
    _role(
        "system:basic-user",
        {
            "apiGroups": ["authorization.k8s.io", "authentication.k8s.io"],
            "resources": ["selfsubjectaccessreviews", "selfsubjectreviews"],
            "verbs": ["create"],
        },
    ),
    _binding("system:basic-user", "system:authenticated"),
    _role(
        "system:auth-delegator",
        {
            "apiGroups": ["authentication.k8s.io"],
            "resources": ["tokenreviews"],
            "verbs": ["create"],
        },
        {
            "apiGroups": ["authorization.k8s.io"],
            "resources": ["subjectaccessreviews"],
            "verbs": ["create"],
        },
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """One action: on a resource, or (``path`` set) on a URL that is none."""

    verb: str
    group: str = ""
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""

    @property
    def qualified(self) -> str:
        return f"{self.resource}/{self.subresource}" if self.subresource else self.resource

    def denial(self, user: User) -> ApiError:
        """The stock 403 (apiserver/pkg/endpoints/handlers/responsewriters ``forbiddenMessage``)."""
        if self.path:
            return forbidden(
                "", "", "", f'User "{user.name}" cannot {self.verb} path "{self.path}"'
            )
        where = f'in the namespace "{self.namespace}"' if self.namespace else "at the cluster scope"
        return forbidden(
            self.resource,
            self.group,
            self.name,
            f'User "{user.name}" cannot {self.verb} resource "{self.qualified}" '
            f'in API group "{self.group}" {where}',
        )


def _has(listed: Any, wanted: str) -> bool:
    return bool(listed) and ("*" in listed or wanted in listed)


def _covers(rule: Mapping[str, Any], action: Attributes) -> bool:
    if not _has(rule.get("verbs"), action.verb):
        return False
    if action.path:
        return any(
            url == action.path or (url.endswith("*") and action.path.startswith(url[:-1]))
            for url in rule.get("nonResourceURLs") or ()
        )
    resources = rule.get("resources") or ()
    named = (
        "*" in resources
        or action.qualified in resources
        or (bool(action.subresource) and f"*/{action.subresource}" in resources)
    )
    names = rule.get("resourceNames")
    return (
        named and _has(rule.get("apiGroups"), action.group) and (not names or action.name in names)
    )


class Rbac:
    def __init__(self, store: Store) -> None:
        self._store = store

    def allowed(self, user: User, action: Attributes) -> str:
        """The reason why ``user`` may do ``action``; empty when nothing allows it."""
        if "system:masters" in user.groups:
            return "user is a member of system:masters"
        for binding, rules in self._rules(user, action.namespace):
            if any(_covers(rule, action) for rule in rules):
                return f"RBAC: allowed by {binding}"
        return ""

    def check(self, user: User, action: Attributes) -> None:
        """Raises: ApiError 403."""
        if not self.allowed(user, action):
            raise action.denial(user)

    def _rules(self, user: User, namespace: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        kinds = ["clusterrolebindings"] + (["rolebindings"] if namespace else [])
        for plural in kinds:
            resource = by_path(_GROUP, "v1", plural)
            if resource is None:
                continue
            for binding in self._store.all(resource, namespace if resource.namespaced else ""):
                metadata = binding["metadata"]
                subject = self._subject(binding, user, metadata.get("namespace", ""))
                role = subject and self._role(binding["roleRef"], metadata.get("namespace", ""))
                if role:
                    reference = binding["roleRef"]
                    where = f"{metadata['name']}"
                    if metadata.get("namespace"):
                        where = f"{metadata['name']}/{metadata['namespace']}"
                    text = (
                        f'{binding["kind"]} "{where}" of {reference["kind"]} '
                        f'"{reference["name"]}" to {subject}'
                    )
                    yield text, role.get("rules") or []

    def _role(self, reference: Mapping[str, str], namespace: str) -> dict[str, Any] | None:
        plural = "clusterroles" if reference["kind"] == "ClusterRole" else "roles"
        resource = by_path(_GROUP, "v1", plural)
        if resource is None:
            return None
        where = namespace if resource.namespaced else ""
        return self._store.find(resource, where, reference["name"])

    @staticmethod
    def _subject(binding: Mapping[str, Any], user: User, namespace: str) -> str:
        for subject in binding.get("subjects") or ():
            kind, name = subject.get("kind"), subject.get("name")
            if kind == "User" and name == user.name:
                return f'User "{name}"'
            if kind == "Group" and name in user.groups:
                return f'Group "{name}"'
            if kind == "ServiceAccount":
                where = subject.get("namespace") or namespace
                if user.name == f"system:serviceaccount:{where}:{name}":
                    return f'ServiceAccount "{name}/{where}"'
        return ""
