"""What the user, and the ServiceAccount that agents are asked as, need; and what would grant it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from gketrace.access import CA_CONFIGMAP, GROUP, METHODS, Need
from gketrace.errors import GketraceError

from .account import Account

if TYPE_CHECKING:
    from .apiserver import ApiServer

__all__ = [
    "Answer",
    "As",
    "Level",
    "Right",
    "account_rights",
    "as_account",
    "ask",
    "grants",
    "user_rights",
    "who",
]

_RBAC: Final = "rbac.authorization.k8s.io"


class Level(str, Enum):
    """What is to be done."""

    VIEWER = "viewer"
    """Look: traces, rules, routes, connections."""
    CAPTURER = "capturer"
    """And capture pods' packets."""
    NODE_ADMIN = "node-admin"
    """And capture on nodes, and change them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Right:
    """One thing that must be allowed."""

    verb: str
    resource: str
    """PLURAL or PLURAL/SUB."""
    group: str = ""
    namespace: str = ""
    """Empty: of the whole cluster."""
    name: str = ""
    why: str = ""

    def __str__(self) -> str:
        what = f"{self.verb} {self.resource}" + (f".{self.group}" if self.group else "")
        if self.name:
            what += f" {self.name}"
        return what + (f" in namespace {self.namespace}" if self.namespace else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class As:
    """Who needs it."""

    name: str
    account: Account | None = None
    """None: a user."""

    @property
    def subject(self) -> dict[str, str]:
        """For a binding."""
        if self.account is None:
            return {"apiGroup": _RBAC, "kind": "User", "name": self.name}
        one = self.account
        return {"kind": "ServiceAccount", "namespace": one.namespace, "name": one.name}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the API server said of one right."""

    right: Right
    allowed: bool
    unknown: str = ""
    """Why it could not be asked; then `allowed` is False."""


def user_rights(agents_in: str, account: Account, namespace: str) -> tuple[Right, ...]:
    """The user's: to read the cluster, to get to the agents, to ask as `account`.

    `namespace` empty: in all.
    """
    where = {"namespace": namespace}
    token = "serviceaccounts/token"
    return (
        Right(verb="list", resource="nodes", why="which nodes there are"),
        Right(verb="list", resource="pods", why="whose an address is", **where),
        Right(verb="list", resource="services", why="whose an address is", **where),
        Right(
            verb="list",
            resource="endpointslices",
            group="discovery.k8s.io",
            why="what is behind a Service",
            **where,
        ),
        Right(verb="list", resource="pods", namespace=agents_in, why="where the agents are"),
        Right(verb="get", resource="pods/portforward", namespace=agents_in, why="to get there"),
        Right(verb="create", resource="pods/portforward", namespace=agents_in, why="to get there"),
        Right(
            verb="get",
            resource="configmaps",
            namespace=agents_in,
            name=CA_CONFIGMAP,
            why="to know them by their certificate",
        ),
        Right(
            verb="create",
            resource=token,
            namespace=account.namespace,
            name=account.name,
            why="to ask them",
        ),
    )


def account_rights(level: Level, namespace: str) -> tuple[Right, ...]:
    """The ServiceAccount's, in one namespace or (empty) everywhere."""
    found: dict[Right, None] = {
        Right(verb="get", resource="nodes/info", group=GROUP, why="GetInfo"): None
    }
    for method, need in METHODS.items():
        if need.sub == "info":
            continue
        for kind in ("pods",) if namespace else ("pods", "nodes"):
            if _belongs(need, kind, level):
                right = Right(
                    verb=need.verb,
                    resource=f"{kind}/{need.sub}",
                    group=GROUP,
                    namespace=namespace,
                )
                if right not in {replace(one, why="") for one in found}:
                    found[replace(right, why=method)] = None
    return tuple(found)


def _belongs(need: Need, kind: str, level: Level) -> bool:
    if need.sub == "snapshot" and kind == "pods":
        return False  # it is of a node
    if need.verb == "get":
        return True
    if need.verb == "create" and kind == "pods":
        return level is not Level.VIEWER
    return level is Level.NODE_ADMIN


def who(api: ApiServer) -> str:
    """The user's name, as the API server has it.  Raises `GketraceError`."""
    answer = api.request(
        "POST",
        "/apis/authentication.k8s.io/v1/selfsubjectreviews",
        body={"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"},
    )
    return str(((answer.get("status") or {}).get("userInfo") or {}).get("username") or "")


def ask(api: ApiServer, rights: Iterable[Right]) -> list[Answer]:
    """Whether whoever `api` speaks as has them."""
    return [_ask(api, right) for right in rights]


def as_account(api: ApiServer, account: Account, timeout: float) -> ApiServer:
    """The same API server as this ServiceAccount.  Raises `GketraceError`."""
    # Not above: the command's help is to be quick.
    from .agent_access import request_token
    from .apiserver import ApiServer
    from .kubeconfig import Credentials

    token = request_token(api, account, "")
    credentials = Credentials(authorization=f"Bearer {token}")
    settings = replace(api.settings, user=str(account), credentials=lambda: credentials)
    return ApiServer(settings, timeout=timeout)


def _ask(api: ApiServer, right: Right) -> Answer:
    plural, _, sub = right.resource.partition("/")
    attributes = {
        "verb": right.verb,
        "group": right.group,
        "resource": plural,
        "subresource": sub,
        "namespace": right.namespace,
        "name": right.name,
    }
    try:
        answer = api.request(
            "POST",
            "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
            body={
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": {k: v for k, v in attributes.items() if v}},
            },
        )
    except GketraceError as error:
        return Answer(right=right, allowed=False, unknown=error.message)
    status = answer.get("status")
    return Answer(right=right, allowed=isinstance(status, dict) and status.get("allowed") is True)


def grants(subject: As, missing: Iterable[Right]) -> list[dict[str, Any]]:
    """Roles and bindings that would allow what is missing, and no more."""
    by_place: dict[str, list[Right]] = {}
    for right in missing:
        by_place.setdefault(right.namespace, []).append(right)
    found: list[dict[str, Any]] = []
    said = str(subject.account or subject.name).lower()
    plain = re.sub(r"[^a-z0-9.-]+", "-", said).strip("-.")[:200] or "user"
    for namespace, rights in by_place.items():
        kind = "Role" if namespace else "ClusterRole"
        metadata = {"name": f"gketrace-for-{plain}"} | (
            {"namespace": namespace} if namespace else {}
        )
        rules: dict[tuple[str, str, str], list[str]] = {}
        for right in rights:
            rules.setdefault((right.group, right.verb, right.name), []).append(right.resource)
        found.append(
            {
                "apiVersion": f"{_RBAC}/v1",
                "kind": kind,
                "metadata": metadata,
                "rules": [
                    {"apiGroups": [group], "resources": resources, "verbs": [verb]}
                    | ({"resourceNames": [name]} if name else {})
                    for (group, verb, name), resources in rules.items()
                ],
            }
        )
        found.append(
            {
                "apiVersion": f"{_RBAC}/v1",
                "kind": f"{kind}Binding",
                "metadata": dict(metadata),
                "roleRef": {"apiGroup": _RBAC, "kind": kind, "name": metadata["name"]},
                "subjects": [subject.subject],
            }
        )
    return found
