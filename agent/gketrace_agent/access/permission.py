"""Whether a caller may, by SubjectAccessReview on virtual resources (see `gketrace.access`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gketrace import access
from gketrace.errors import ForbiddenError, GketraceError, UnavailableError
from gketrace_agent.access.cache import Cache
from gketrace_agent.access.identity import Caller

if TYPE_CHECKING:
    from gketrace_agent.access.apiserver import KubeApi

__all__ = ["Action", "Permissions", "refusal"]

_PATH: Final = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
_ALLOWED_SECONDS: Final = 300.0
_DENIED_SECONDS: Final = 30.0
_CACHED: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One question for the API server."""

    verb: str
    resource: str
    """``pods`` or ``nodes``."""
    sub: str
    namespace: str = ""
    """Of pods; empty: in all namespaces."""
    name: str = ""
    """Empty: any."""

    def __str__(self) -> str:
        text = f"{self.verb} {self.resource}/{self.sub}.{access.GROUP}"
        if self.resource == "nodes":
            return f"{text} of node {self.name}" if self.name else text
        where = f"in namespace {self.namespace}" if self.namespace else "in all namespaces"
        return f"{text} {where}"


class Permissions:
    """Any thread may ask."""

    def __init__(self, api: KubeApi, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._api = api
        self._cache: Cache[tuple[str, str, tuple[str, ...], Action], bool] = Cache(
            _CACHED, asking=16, good=bool, clock=clock
        )

    def may(self, caller: Caller, action: Action) -> bool:
        """Raises `UnavailableError` when nobody can tell: that is a refusal, too."""
        if caller.local:
            return True
        key = (caller.user, caller.uid, caller.groups, action)
        try:
            return self._cache.get(key, lambda: self._review(caller, action), caller.user)
        except GketraceError as error:
            raise UnavailableError(
                f"{access.DENIED}whether {caller.user} may {action} could not be asked: "
                f"{error.message}",
                hint=error.hint,
            ) from None

    def require(self, caller: Caller, action: Action) -> None:
        """Raises `ForbiddenError`, `UnavailableError`."""
        if not self.may(caller, action):
            raise refusal(caller, action)

    def _review(self, caller: Caller, action: Action) -> tuple[bool, float]:
        attributes = {
            "group": access.GROUP,
            "version": "v1alpha1",
            "resource": action.resource,
            "subresource": action.sub,
            "verb": action.verb,
            "namespace": action.namespace,
            "name": action.name,
        }
        answer = self._api.post(
            _PATH,
            {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SubjectAccessReview",
                "spec": {
                    "user": caller.user,
                    "uid": caller.uid,
                    "groups": list(caller.groups),
                    "extra": {key: list(values) for key, values in caller.extra.items()},
                    "resourceAttributes": {k: v for k, v in attributes.items() if v},
                },
            },
        )
        status = answer.get("status")
        if not isinstance(status, dict):
            raise UnavailableError("the API server's SubjectAccessReview has no status")
        allowed = status.get("allowed") is True and status.get("denied") is not True
        return allowed, _ALLOWED_SECONDS if allowed else _DENIED_SECONDS


def refusal(caller: Caller, action: Action) -> ForbiddenError:
    """What a caller is told."""
    return ForbiddenError(
        f"{caller.user} may not {action}",
        hint="'gketrace auth can-i' prints the role that would allow it",
    )
