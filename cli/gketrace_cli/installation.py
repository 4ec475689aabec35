"""All that a cluster needs: the objects of ``gketrace install``, and putting them there."""

from __future__ import annotations

import base64
import copy
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import yaml

from gketrace.access import AGENT_NAMESPACE, CA_CONFIGMAP, CA_KEY, server_name
from gketrace.errors import NotFoundError, UnavailableError

from .apiserver import ApiServer
from .packaged import packaged

__all__ = ["TLS_SECRET", "Change", "apply_object", "certificate_objects", "manifests", "remove"]

Object: TypeAlias = dict[str, Any]
TLS_SECRET: Final = "gketrace-agent-tls"
_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's is ten times as fast, and not everywhere."""
_FILES: Final = ("daemonset.yaml", "rbac.yaml")
_MANAGED: Final = {"app.kubernetes.io/managed-by": "gketrace"}
_RENEW_DAYS: Final = 60.0
"""A certificate that ends sooner is replaced."""
_RBAC: Final = "/apis/rbac.authorization.k8s.io/v1"
_PLACES: Final[Mapping[str, tuple[str, str]]] = {
    "Namespace": ("/api/v1", "namespaces"),
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
    "ResourceQuota": ("/api/v1", "resourcequotas"),
    "Service": ("/api/v1", "services"),
    "Secret": ("/api/v1", "secrets"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "ClusterRole": (_RBAC, "clusterroles"),
    "ClusterRoleBinding": (_RBAC, "clusterrolebindings"),
    "Role": (_RBAC, "roles"),
    "RoleBinding": (_RBAC, "rolebindings"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "DaemonSet": ("/apis/apps/v1", "daemonsets"),
}
"""Kind → API and plural, in the order in which they are made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became of one object."""

    what: str
    """``created``, ``updated``, ``unchanged``, ``deleted`` or ``absent``."""
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        where = f" in namespace {self.namespace}" if self.namespace else ""
        return f"{self.what:9} {self.kind} {self.name}{where}"


def manifests(*, namespace: str = AGENT_NAMESPACE, image: str = "") -> list[Object]:
    """Everything but the certificate, in the order in which it is to be made.

    Raises: UnavailableError when this installation lacks the files.
    """
    found: list[Object] = []
    for name in _FILES:
        text = packaged(f"manifests/{name}", f"deploy/{name}")
        if text is None:
            raise UnavailableError(f"{name} is not part of this installation")
        if namespace != AGENT_NAMESPACE:
            text = text.replace(AGENT_NAMESPACE, namespace)
        found += [one for one in yaml.load_all(text, _LOADER) if one]
    for one in found:
        one["metadata"].setdefault("labels", {}).update(_MANAGED)
        if image and one["kind"] == "DaemonSet":
            for container in one["spec"]["template"]["spec"]["containers"]:
                container["image"] = image
    order = list(_PLACES)
    return sorted(found, key=lambda one: order.index(one["kind"]))


def certificate_objects(
    api: ApiServer | None, namespace: str, *, renew: bool = False
) -> list[Object]:
    """The Secret and the ConfigMap: those of the cluster while they last, else new ones.

    A new authority is put before the old one, so that agents that have not yet taken up their new
    certificate are known, too.  `api` None: new ones.
    """
    from .certificates import days_left, issue

    old = "" if api is None else _authority(api, namespace)
    if api is not None and not renew and old:
        try:
            secret = api.get(_path("Secret", namespace, TLS_SECRET))
            chain = base64.b64decode((secret.get("data") or {}).get("tls.crt") or "").decode()
            if days_left(chain) > _RENEW_DAYS:
                return []
        except (NotFoundError, ValueError):
            pass  # there is none, or it is none: a new one
    issued = issue([server_name(namespace), f"{server_name(namespace)}.cluster.local"])
    labels = dict(_MANAGED)
    data = {"tls.crt": issued.certificate, "tls.key": issued.key}
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": TLS_SECRET, "namespace": namespace, "labels": labels},
            "type": "kubernetes.io/tls",
            "data": {key: base64.b64encode(value.encode()).decode() for key, value in data.items()},
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": CA_CONFIGMAP, "namespace": namespace, "labels": labels},
            "data": {CA_KEY: issued.authority + _first_certificate(old)},
        },
    ]


def _authority(api: ApiServer, namespace: str) -> str:
    try:
        found = api.get(_path("ConfigMap", namespace, CA_CONFIGMAP))
    except NotFoundError:
        return ""
    return str((found.get("data") or {}).get(CA_KEY) or "")


def _first_certificate(bundle: str) -> str:
    end = "-----END CERTIFICATE-----\n"
    return bundle[: bundle.index(end) + len(end)] if end in bundle else ""


def apply_object(api: ApiServer, wanted: Object) -> Change:
    """Makes it, or makes it as it should be; what others have added to it stays.

    Raises `GketraceError`.
    """
    kind, metadata = wanted["kind"], wanted["metadata"]
    namespace, name = metadata.get("namespace", ""), metadata["name"]

    def change(what: str) -> Change:
        return Change(what=what, kind=kind, namespace=namespace, name=name)

    try:
        live = api.get(_path(kind, namespace, name))
    except NotFoundError:
        api.request("POST", _path(kind, namespace), body=wanted)
        return change("created")
    if "roleRef" in wanted and live.get("roleRef") != wanted["roleRef"]:
        # It cannot be changed.
        api.request("DELETE", _path(kind, namespace, name))
        api.request("POST", _path(kind, namespace), body=wanted)
        return change("updated")
    if _within(wanted, live):
        return change("unchanged")
    api.request("PUT", _path(kind, namespace, name), body=_merged(live, wanted))
    return change("updated")


def remove(api: ApiServer, namespace: str) -> Iterator[Change]:
    """Deletes what `install` makes, the namespace last, if `install` made that.

    Raises `GketraceError`.
    """
    listed = manifests(namespace=namespace)
    for name, kind in ((TLS_SECRET, "Secret"), (CA_CONFIGMAP, "ConfigMap")):
        listed.append({"kind": kind, "metadata": {"name": name, "namespace": namespace}})
    order = list(_PLACES)
    for one in sorted(listed, key=lambda one: -order.index(one["kind"])):
        kind, metadata = one["kind"], one["metadata"]
        where, name = metadata.get("namespace", ""), metadata["name"]
        what = "deleted"
        try:
            if kind == "Namespace":
                labels = api.get(_path(kind, "", name))["metadata"].get("labels") or {}
                if not _MANAGED.items() <= labels.items():
                    yield Change(what="kept", kind=kind, namespace=where, name=name)
                    continue
            api.request("DELETE", _path(kind, where, name))
        except NotFoundError:
            what = "absent"
        yield Change(what=what, kind=kind, namespace=where, name=name)


def _path(kind: str, namespace: str, name: str = "") -> str:
    if kind not in _PLACES:
        raise UnavailableError(f"no place is known for objects of kind {kind}")
    root, plural = _PLACES[kind]
    where = f"/namespaces/{urllib.parse.quote(namespace, safe='')}" if namespace else ""
    one = f"/{urllib.parse.quote(name, safe='')}" if name else ""
    return f"{root}{where}/{plural}{one}"


def _within(wanted: Any, live: Any) -> bool:
    """Whether all that is wanted is there already, whatever else is."""
    if isinstance(wanted, dict):
        return isinstance(live, dict) and all(
            key in live and _within(value, live[key]) for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return (
            isinstance(live, list)
            and len(wanted) == len(live)
            and all(_within(a, b) for a, b in zip(wanted, live, strict=True))
        )
    return bool(wanted == live)


def _merged(live: Any, wanted: Any) -> Any:
    """`live` with `wanted` over it; lists are taken whole."""
    if not (isinstance(live, dict) and isinstance(wanted, dict)):
        return copy.deepcopy(wanted)
    merged = dict(live)
    for key, value in wanted.items():
        merged[key] = _merged(live[key], value) if key in live else copy.deepcopy(value)
    return merged
