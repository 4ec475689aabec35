"""How the CLI shows agents who asks, and knows that they are the cluster's agents.

The agents' certificate authority is in a ConfigMap of their namespace, and the name in their
certificate is checked however they are reached.  Each agent gets a token of its own: a
ServiceAccount's, short-lived, for that node's agent alone.  The user's own credentials go to the
API server only.
"""

from __future__ import annotations

import threading
import time
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gketrace import access
from gketrace.errors import (
    ForbiddenError,
    GketraceError,
    NotFoundError,
    UnavailableError,
    UsageError,
)

from .account import Account
from .apiserver import ApiServer
from .inputs import read_input

if TYPE_CHECKING:
    import grpc

__all__ = ["AgentAccess", "request_token"]

_TOKEN_SECONDS: Final = 600
"""The shortest that an API server gives."""
_SPARE_SECONDS: Final = 120.0
"""A token is renewed so long before its end."""
_AT_ONCE: Final = 16


def request_token(api: ApiServer, account: Account, audience: str) -> str:
    """A new token (TokenRequest), for this audience, or for the API server where it is empty.

    Raises `GketraceError`.
    """
    namespace, name = (urllib.parse.quote(t, safe="") for t in (account.namespace, account.name))
    try:
        answer = api.request(
            "POST",
            f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token",
            body={
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "TokenRequest",
                "spec": {"expirationSeconds": _TOKEN_SECONDS}
                | ({"audiences": [audience]} if audience else {}),
            },
        )
    except NotFoundError as error:
        raise NotFoundError(
            f"ServiceAccount {account}, which agents are asked as, is not there: {error.message}",
            hint="'gketrace install' makes it; --as-serviceaccount NS/NAME selects another",
        ) from error
    except ForbiddenError as error:
        raise ForbiddenError(
            f"no token for ServiceAccount {account}: {error.message}",
            hint="'gketrace auth can-i' prints the role that would allow it; "
            "--as-serviceaccount NS/NAME selects another",
        ) from error
    token = (answer.get("status") or {}).get("token")
    if not isinstance(token, str) or not token:
        raise UnavailableError(f"{api.name} gave no token for ServiceAccount {account}")
    return token


@dataclass(slots=True)
class _Held:
    lock: threading.Lock = field(default_factory=threading.Lock)
    token: str = ""
    until: float = 0.0
    failed: GketraceError | None = None
    failed_at: float = 0.0


class AgentAccess:
    """For all agents of one command.  Any thread may ask."""

    def __init__(
        self,
        api: ApiServer,
        *,
        namespace: str,
        account: Account,
        ca_file: Path | None = None,
        about: Iterable[str] = (),
    ) -> None:
        """`namespace`: the agents'.  `about`: the namespaces that the command asks about."""
        self._api: Final = api
        self._namespace: Final = namespace
        self.account: Final = account
        self._ca_file = ca_file
        self._about = ",".join(about)
        self._lock = threading.Lock()
        self._ca: bytes | None = None
        self._held: dict[str, _Held] = {}

    def ca(self) -> bytes:
        """PEM.  Raises `GketraceError`."""
        with self._lock:
            if self._ca is None:
                self._ca = self._read_ca()
            return self._ca

    def _read_ca(self) -> bytes:
        if self._ca_file is not None:
            try:
                data = read_input(self._ca_file)
            except OSError as error:
                raise UsageError(f"--agent-ca {self._ca_file}: {error.strerror}") from None
            if b"BEGIN CERTIFICATE" not in data:
                raise UsageError(f"--agent-ca {self._ca_file} has no certificate in it")
            return data
        where = f"ConfigMap {self._namespace}/{access.CA_CONFIGMAP}"
        path = f"/api/v1/namespaces/{urllib.parse.quote(self._namespace, safe='')}/configmaps"
        try:
            found = self._api.get(f"{path}/{access.CA_CONFIGMAP}").get("data") or {}
        except NotFoundError:
            raise UnavailableError(
                f"the agents' certificate authority is not in the cluster ({where})",
                hint="'gketrace install' puts it there; --agent-ca FILE names it, --plaintext is "
                "for agents that were started with --insecure",
            ) from None
        text = str(found.get(access.CA_KEY) or "")
        if "BEGIN CERTIFICATE" not in text:
            raise UnavailableError(f"{where} has no certificate in {access.CA_KEY}")
        return text.encode()

    def channel(self, node: str, target: str, options: Iterable[tuple[str, Any]]) -> grpc.Channel:
        """TLS, with the certificate's name checked, and a token with each call."""
        # Here, as grpc takes long to load: what it needs of the cluster is asked for meanwhile.
        from gketrace_cli.agent_channel import secure_channel

        return secure_channel(
            target,
            ca=self.ca(),
            name=access.server_name(self._namespace),
            metadata=lambda: self.metadata(node),
            options=options,
        )

    def prepare(self, nodes: Iterable[str]) -> dict[str, GketraceError]:
        """Gets the tokens for these nodes' agents, several at a time; what went wrong."""
        waiting = [node for node in nodes if not self._fresh(node)]
        failed: dict[str, GketraceError] = {}

        def work() -> None:
            while waiting:
                try:
                    node = waiting.pop()
                except IndexError:  # another thread took the last one
                    return
                try:
                    self.metadata(node)
                except GketraceError as error:
                    failed[node] = error

        threads = [
            threading.Thread(target=work, name="tokens", daemon=True)
            for _ in range(min(_AT_ONCE, len(waiting)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return failed

    def _fresh(self, node: str) -> bool:
        held = self._held.get(node)
        return held is not None and time.monotonic() < held.until

    def metadata(self, node: str) -> tuple[tuple[str, str], ...]:
        """What goes with each call to this node's agent.  Raises `GketraceError`."""
        with self._lock:
            held = self._held.setdefault(node, _Held())
        since = time.monotonic()
        with held.lock:
            if held.failed is not None and held.failed_at >= since:
                raise held.failed  # what it waited for, asked for by another thread
            if time.monotonic() >= held.until:
                try:
                    held.token = request_token(self._api, self.account, access.audience(node))
                except GketraceError as error:
                    held.failed, held.failed_at = error, time.monotonic()
                    raise
                held.until = time.monotonic() + _TOKEN_SECONDS - _SPARE_SECONDS
            token = held.token
        about = ((access.NAMESPACES_HEADER, self._about),) if self._about else ()
        return (("authorization", f"Bearer {token}"), *about)
