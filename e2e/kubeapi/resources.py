"""The served resources, as one table, and the discovery documents made from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["RESOURCES", "Resource", "by_kind", "by_path", "discovery", "groups"]

_VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """One resource. ``subresources`` maps each name to the verbs discovery lists for it."""

    group: str
    version: str
    plural: str
    singular: str
    kind: str
    namespaced: bool
    short_names: tuple[str, ...] = ()
    subresources: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    """(name, kind, verbs)"""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


def _core(plural: str, kind: str, *short: str, namespaced: bool = True, **more: Any) -> Resource:
    return Resource(
        group="",
        version="v1",
        plural=plural,
        singular=kind.lower(),
        kind=kind,
        namespaced=namespaced,
        short_names=short,
        **more,
    )


def _rbac(plural: str, kind: str, *, namespaced: bool) -> Resource:
    return Resource(
        group="rbac.authorization.k8s.io",
        version="v1",
        plural=plural,
        singular=kind.lower(),
        kind=kind,
        namespaced=namespaced,
    )


_STATUS = ("get", "patch", "update")

RESOURCES: tuple[Resource, ...] = (
    _core(
        "pods",
        "Pod",
        "po",
        subresources=(
            ("portforward", "PodPortForwardOptions", ("create", "get")),
            ("status", "Pod", _STATUS),
        ),
    ),
    _core("services", "Service", "svc", subresources=(("status", "Service", _STATUS),)),
    _core("endpoints", "Endpoints", "ep"),
    _core("nodes", "Node", "no", namespaced=False, subresources=(("status", "Node", _STATUS),)),
    _core("namespaces", "Namespace", "ns", namespaced=False),
    _core("configmaps", "ConfigMap", "cm"),
    _core("secrets", "Secret"),
    _core("resourcequotas", "ResourceQuota", "quota"),
    _core(
        "serviceaccounts",
        "ServiceAccount",
        "sa",
        subresources=(("token", "TokenRequest", ("create",)),),
    ),
    Resource(
        group="discovery.k8s.io",
        version="v1",
        plural="endpointslices",
        singular="endpointslice",
        kind="EndpointSlice",
        namespaced=True,
    ),
    Resource(
        group="apps",
        version="v1",
        plural="daemonsets",
        singular="daemonset",
        kind="DaemonSet",
        namespaced=True,
        short_names=("ds",),
    ),
    Resource(
        group="networking.k8s.io",
        version="v1",
        plural="networkpolicies",
        singular="networkpolicy",
        kind="NetworkPolicy",
        namespaced=True,
        short_names=("netpol",),
    ),
    _rbac("clusterroles", "ClusterRole", namespaced=False),
    _rbac("clusterrolebindings", "ClusterRoleBinding", namespaced=False),
    _rbac("roles", "Role", namespaced=True),
    _rbac("rolebindings", "RoleBinding", namespaced=True),
)

_REVIEWS: tuple[tuple[str, str, str, bool], ...] = (
    ("authentication.k8s.io", "tokenreviews", "TokenReview", False),
    ("authentication.k8s.io", "selfsubjectreviews", "SelfSubjectReview", False),
    ("authorization.k8s.io", "subjectaccessreviews", "SubjectAccessReview", False),
    ("authorization.k8s.io", "selfsubjectaccessreviews", "SelfSubjectAccessReview", False),
    ("authorization.k8s.io", "localsubjectaccessreviews", "LocalSubjectAccessReview", True),
)
"""Resources that are only posted: (group, plural, kind, namespaced)."""

_BY_PATH = {(r.group, r.version, r.plural): r for r in RESOURCES}
_BY_KIND = {(r.api_version, r.kind): r for r in RESOURCES}


def by_path(group: str, version: str, plural: str) -> Resource | None:
    return _BY_PATH.get((group, version, plural))


def by_kind(api_version: str, kind: str) -> Resource | None:
    return _BY_KIND.get((api_version, kind))


def groups() -> tuple[str, ...]:
    """The named API groups, each served in version v1, in order of first use."""
    named = [r.group for r in RESOURCES if r.group] + [group for group, *_ in _REVIEWS]
    return tuple(dict.fromkeys(named))


def _group_document(group: str) -> dict[str, Any]:
    version = {"groupVersion": f"{group}/v1", "version": "v1"}
    return {"name": group, "versions": [version], "preferredVersion": version}


def _resource_list(group: str, resources: Iterable[Resource]) -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    for resource in resources:
        entry: dict[str, Any] = {
            "name": resource.plural,
            "singularName": resource.singular,
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": list(_VERBS),
        }
        if resource.short_names:
            entry["shortNames"] = list(resource.short_names)
        entries.append(entry)
        entries.extend(
            {
                "name": f"{resource.plural}/{name}",
                "singularName": "",
                "namespaced": resource.namespaced,
                "kind": kind,
                "verbs": list(verbs),
            }
            for name, kind, verbs in resource.subresources
        )
    entries.extend(
        {
            "name": plural,
            "singularName": kind.lower(),
            "namespaced": namespaced,
            "kind": kind,
            "verbs": ["create"],
        }
        for review_group, plural, kind, namespaced in _REVIEWS
        if review_group == group
    )
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": f"{group}/v1" if group else "v1",
        "resources": entries,
    }


def discovery(address: str) -> dict[str, dict[str, Any]]:
    """Every discovery document by its path; ``address`` is the server's own ``host:port``."""
    documents: dict[str, dict[str, Any]] = {
        "/api": {
            "kind": "APIVersions",
            "versions": ["v1"],
            "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}],
        },
        "/api/v1": _resource_list("", (r for r in RESOURCES if not r.group)),
        "/apis": {
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": [_group_document(group) for group in groups()],
        },
    }
    for group in groups():
        documents[f"/apis/{group}"] = {
            "kind": "APIGroup",
            "apiVersion": "v1",
            **_group_document(group),
        }
        documents[f"/apis/{group}/v1"] = _resource_list(
            group, (r for r in RESOURCES if r.group == group)
        )
    return documents
