"""Who a bearer token is: static tokens, and ServiceAccount tokens as TokenRequest issues them.

A ServiceAccount token is a JWT signed ES256 with a key of this server's own. Its claims are those
of k8s.io/kubernetes/pkg/serviceaccount/claims.go; checking one follows the same file's
``Validate``: signature, issuer, times, audience, and that the ServiceAccount and the bound object
still exist with the same UID.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from .errors import bad_request, invalid, not_found
from .resources import by_kind, by_path
from .store import Store, dump

__all__ = ["API_AUDIENCE", "ADMIN", "ANONYMOUS", "TokenRefused", "Tokens", "User"]

API_AUDIENCE = "https://kubernetes.default.svc.cluster.local"
_BINDABLE = {"Pod": "v1", "Secret": "v1", "Node": "v1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    name: str
    groups: tuple[str, ...]
    uid: str = ""
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The ``UserInfo`` of a TokenReview."""
        body: dict[str, Any] = {"username": self.name, "groups": list(self.groups)}
        if self.uid:
            body["uid"] = self.uid
        if self.extra:
            body["extra"] = {key: list(values) for key, values in self.extra.items()}
        return body


ANONYMOUS = User(name="system:anonymous", groups=("system:unauthenticated",))
ADMIN = "kubernetes-admin"


class TokenRefused(Exception):
    """The token is nobody's, or not valid here and now; the text says why."""


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class Tokens:
    """Issues and checks tokens. The admin's token is made up at every start."""

    def __init__(
        self, store: Store, users: Mapping[str, Mapping[str, Any]], *, min_seconds: int
    ) -> None:
        self._store = store
        self._min_seconds = min_seconds
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._key_id = secrets.token_urlsafe(16)
        self._static: dict[str, User] = {}
        self.by_user: dict[str, str] = {}
        self._add(ADMIN, ("system:masters",), "")
        for name, entry in users.items():
            self._add(name, tuple(entry.get("groups") or ()), str(entry.get("token") or ""))

    def _add(self, name: str, groups: Sequence[str], token: str) -> None:
        token = token or secrets.token_urlsafe(32)
        self.by_user[name] = token
        self._static[token] = User(name=name, groups=(*groups, "system:authenticated"))

    def authenticate(self, token: str, audiences: Sequence[str] = ()) -> tuple[User, list[str]]:
        """Whose ``token`` is, and for which of ``audiences`` (default: this API) it holds.

        Raises: TokenRefused.
        """
        wanted = list(audiences) or [API_AUDIENCE]
        if user := self._static.get(token):
            if API_AUDIENCE not in wanted:
                raise TokenRefused("invalid bearer token")
            return user, [API_AUDIENCE]
        claims = self._verified(token)
        matching = [audience for audience in wanted if audience in claims["aud"]]
        if not matching:
            raise TokenRefused(
                f"[invalid bearer token, token audiences {json.dumps(claims['aud'])} is invalid "
                f"for the target audiences {json.dumps(wanted)}]"
            )
        return self._subject(claims), matching

    def _verified(self, token: str) -> dict[str, Any]:
        try:
            head, body, signature = token.split(".")
            header, claims = json.loads(_decode(head)), json.loads(_decode(body))
            raw = _decode(signature)
            if header.get("alg") != "ES256" or len(raw) != 64:
                raise TokenRefused("invalid bearer token")
            r, s = int.from_bytes(raw[:32]), int.from_bytes(raw[32:])
            self._key.public_key().verify(
                encode_dss_signature(r, s), f"{head}.{body}".encode(), ec.ECDSA(hashes.SHA256())
            )
        except (ValueError, TypeError, AttributeError, binascii.Error, InvalidSignature) as error:
            raise TokenRefused("invalid bearer token") from error
        now = time.time()
        if claims["exp"] <= now:
            raise TokenRefused("[invalid bearer token, service account token has expired]")
        if claims["nbf"] > now + 10:
            raise TokenRefused("[invalid bearer token, service account token is not valid yet]")
        checked: dict[str, Any] = claims
        return checked

    def _subject(self, claims: dict[str, Any]) -> User:
        bound = claims["kubernetes.io"]
        namespace, account = bound["namespace"], bound["serviceaccount"]
        self._must_exist("v1", "ServiceAccount", namespace, account)
        extra = {"authentication.kubernetes.io/credential-id": (f"JTI={claims['jti']}",)}
        for kind in ("pod", "node", "secret"):
            if kind in bound:
                where = "" if kind == "node" else namespace
                self._must_exist("v1", kind.capitalize(), where, bound[kind])
                if kind != "secret":
                    prefix = f"authentication.kubernetes.io/{kind}"
                    extra[f"{prefix}-name"] = (bound[kind]["name"],)
                    extra[f"{prefix}-uid"] = (bound[kind]["uid"],)
        return User(
            name=claims["sub"],
            uid=account["uid"],
            groups=(
                "system:serviceaccounts",
                f"system:serviceaccounts:{namespace}",
                "system:authenticated",
            ),
            extra=extra,
        )

    def _must_exist(
        self, api_version: str, kind: str, namespace: str, reference: Mapping[str, str]
    ) -> None:
        resource = by_kind(api_version, kind)
        found = resource and self._store.find(resource, namespace, reference["name"])
        if not found or found["metadata"]["uid"] != reference["uid"]:
            raise TokenRefused(
                f"[invalid bearer token, service account token has been invalidated: "
                f"{kind} {reference['name']} was deleted]"
            )

    def request(self, namespace: str, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a TokenRequest for ServiceAccount ``namespace``/``name``.

        Raises: ApiError 404 (no such ServiceAccount or bound object), 409 (its UID differs), 422.
        """
        accounts = by_path("", "v1", "serviceaccounts")
        if accounts is None:
            raise LookupError("serviceaccounts")
        account = self._store.get(accounts, namespace, name)
        spec = dict(body.get("spec") or {})
        seconds = spec.get("expirationSeconds") or 3600
        if not isinstance(seconds, int) or seconds < self._min_seconds:
            raise invalid(
                "TokenRequest",
                "authentication.k8s.io",
                "",
                f"spec.expirationSeconds: Invalid value: {seconds}: may not specify a duration "
                f"less than {self._min_seconds // 60} minutes",
            )
        audiences = spec.get("audiences") or [API_AUDIENCE]
        if not isinstance(audiences, list) or not all(isinstance(a, str) for a in audiences):
            raise bad_request("spec.audiences is not a list of strings")
        issued = int(time.time())
        bound: dict[str, Any] = {
            "namespace": namespace,
            "serviceaccount": {"name": name, "uid": account["metadata"]["uid"]},
        }
        if reference := spec.get("boundObjectRef"):
            bound.update(self._bind(namespace, reference))
        token = self._sign(
            {
                "aud": audiences,
                "exp": issued + seconds,
                "iat": issued,
                "iss": API_AUDIENCE,
                "jti": str(uuid.uuid4()),
                "kubernetes.io": bound,
                "nbf": issued,
                "sub": f"system:serviceaccount:{namespace}:{name}",
            }
        )
        expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(issued + seconds))
        return {
            "kind": "TokenRequest",
            "apiVersion": "authentication.k8s.io/v1",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {**spec, "audiences": audiences, "expirationSeconds": seconds},
            "status": {"token": token, "expirationTimestamp": expires},
        }

    def _bind(self, namespace: str, reference: Mapping[str, Any]) -> dict[str, Any]:
        kind, name = str(reference.get("kind")), str(reference.get("name"))
        resource = by_kind(str(reference.get("apiVersion") or _BINDABLE.get(kind)), kind)
        if resource is None or kind not in _BINDABLE:
            raise bad_request(f"cannot bind token for object of type {kind}")
        found = self._store.find(resource, namespace if resource.namespaced else "", name)
        if found is None:
            raise not_found(resource.plural, resource.group, name)
        uid = found["metadata"]["uid"]
        if reference.get("uid") not in (None, "", uid):
            raise bad_request(
                f"the UID in the bound object reference ({reference['uid']}) does not match the "
                f"UID in record. The object might have been deleted and then recreated"
            )
        claims = {kind.lower(): {"name": name, "uid": uid}}
        node = found.get("spec", {}).get("nodeName") if kind == "Pod" else ""
        nodes = by_path("", "v1", "nodes")
        if node and nodes and (record := self._store.find(nodes, "", node)):
            claims["node"] = {"name": node, "uid": record["metadata"]["uid"]}
        return claims

    def _sign(self, claims: dict[str, Any]) -> str:
        head = _encode(dump({"alg": "ES256", "kid": self._key_id}))
        signed = f"{head}.{_encode(dump(claims))}"
        der = self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256()))
        r, s = decode_dss_signature(der)
        return f"{signed}.{_encode(r.to_bytes(32) + s.to_bytes(32))}"
