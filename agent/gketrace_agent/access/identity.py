"""A bearer token → who calls, by TokenReview."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from gketrace import access
from gketrace.errors import GketraceError, UnauthenticatedError, UnavailableError
from gketrace_agent.access.cache import Cache

if TYPE_CHECKING:
    from gketrace_agent.access.apiserver import KubeApi

__all__ = ["LOCAL", "Caller", "Identities"]

_PATH: Final = "/apis/authentication.k8s.io/v1/tokenreviews"
_VALID_SECONDS: Final = 120.0
_REFUSED_SECONDS: Final = 30.0
_CACHED: Final = 1024
_TOKEN_BYTES: Final = 8192
_SERVICE_ACCOUNT: Final = "system:serviceaccount:"
_LOOPBACK: Final = ("ipv4:127.0.0.1", "ipv6:[::1]", "ipv6:%5B::1%5D")
_CREDENTIAL: Final = "authentication.kubernetes.io/credential-id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who calls, as the cluster knows them."""

    user: str
    groups: tuple[str, ...] = ()
    uid: str = ""
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    credential: str = ""
    """The token's id, as the API server's own audit log has it; empty: it has none."""
    local: bool = False
    """On the unix socket: root on this node."""

    @property
    def namespace(self) -> str:
        """Of its ServiceAccount."""
        rest = self.user.removeprefix(_SERVICE_ACCOUNT)
        return rest.partition(":")[0] if rest != self.user else ""


LOCAL: Final = Caller(user="root (unix socket)", local=True)


class Identities:
    """Checks tokens for one node.  Any thread may ask."""

    def __init__(
        self, api: KubeApi, node: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._api = api
        self._audience = access.audience(node)
        self._cache: Cache[bytes, Caller | str] = Cache(
            _CACHED, good=lambda found: isinstance(found, Caller), clock=clock
        )

    def caller(self, token: str, peer: str = "") -> Caller:
        """`peer`: as gRPC names it; who wait for their token's review have their turns by it.

        Raises `UnauthenticatedError`; `UnavailableError` when nobody can tell.
        """
        why = self._obviously_wrong(token)
        if why:
            raise UnauthenticatedError(why)
        key = hashlib.sha256(token.encode()).digest()
        try:
            found = self._cache.get(key, lambda: self._review(token), _origin(peer))
        except GketraceError as error:
            raise UnavailableError(
                f"{access.DENIED}the caller's token could not be reviewed: {error.message}",
                hint=error.hint,
            ) from None
        if isinstance(found, str):
            raise UnauthenticatedError(found)
        return found

    def _obviously_wrong(self, token: str) -> str:
        """What shows without asking; the API server is not bothered with it.  Empty: nothing.

        Nothing that a token says is believed before its review.
        """
        if not token:
            return "no token: the call carries no 'authorization: Bearer' metadata"
        if len(token) > _TOKEN_BYTES or not token.isascii():
            return "the token is no ServiceAccount token"
        claims = _claims(token)
        if claims is None:
            return "the token is no ServiceAccount token"
        audiences = claims.get("aud")
        named = [audiences] if isinstance(audiences, str) else audiences
        if not isinstance(named, list) or self._audience not in named:
            return f"the token is for another audience than this node's agent ({self._audience})"
        expires = claims.get("exp")
        if not isinstance(expires, int | float) or expires <= time.time():
            return "the token has expired"
        return ""

    def _review(self, token: str) -> tuple[Caller | str, float]:
        answer = self._api.post(
            _PATH,
            {
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "TokenReview",
                "spec": {"token": token, "audiences": [self._audience]},
            },
        )
        status = answer.get("status")
        if not isinstance(status, dict):
            raise UnavailableError("the API server's TokenReview has no status")
        if status.get("authenticated") is not True:
            return "the API server does not accept the token", _REFUSED_SECONDS
        # An API server that knows no audiences would leave them out.
        if self._audience not in (status.get("audiences") or ()):
            return (
                f"the token is for another audience than this node's agent ({self._audience})",
                _REFUSED_SECONDS,
            )
        user = status.get("user") or {}
        name = str(user.get("username") or "")
        if not name.startswith(_SERVICE_ACCOUNT):
            return f"the token names {name or 'nobody'}, not a ServiceAccount", _REFUSED_SECONDS
        extra = {
            str(key): tuple(map(str, values)) for key, values in (user.get("extra") or {}).items()
        }
        caller = Caller(
            user=name,
            groups=tuple(map(str, user.get("groups") or ())),
            uid=str(user.get("uid") or ""),
            extra=extra,
            credential=next(iter(extra.get(_CREDENTIAL, ())), ""),
        )
        claims = _claims(token) or {}
        left = float(claims.get("exp", 0)) - time.time()
        return caller, min(_VALID_SECONDS, left)


def _origin(peer: str) -> str:
    """Whose turn it is: a host's, however many connections it makes.  All port-forwards come from
    the node itself: there it is the connection's."""
    host = peer.rpartition(":")[0]
    return peer if host in _LOOPBACK else host


def _claims(token: str) -> dict[str, Any] | None:
    """A JWT's claims, unchecked; None: it is none."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    body = parts[1]
    try:
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        return None
    return claims if isinstance(claims, dict) else None
