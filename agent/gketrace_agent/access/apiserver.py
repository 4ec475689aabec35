"""The Kubernetes API, as the agent's own ServiceAccount: a few requests over kept connections.

Plain ``http.client``: the ``kubernetes`` package would double the agent's idle memory.
"""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gketrace.errors import NotFoundError, UnavailableError, UsageError

__all__ = ["KubeApi"]

_SECONDS: Final = 5.0
"""For one request; a call waits for it."""
_REPLY_BYTES: Final = 64 << 20
_TOKEN_SECONDS: Final = 60.0
"""The kubelet renews the token's file long before it expires."""
_IDLE: Final = 8
"""Connections kept: as many as ask at once in a crowd, as a new one costs a handshake."""


class KubeApi:
    """Any thread may ask.  Nothing is sent before that."""

    def __init__(self, url: str, *, ca: Path, token: Path) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "https" or not parts.hostname:
            raise UsageError(f"not the https URL of an API server: {url!r}")
        self._host, self._port = parts.hostname, parts.port or 443
        self._ca, self._token_file = ca, token
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPSConnection] = []
        self._token, self._token_read = "", 0.0
        self._context: ssl.SSLContext | None = None
        self._ca_stamp: object = None

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def get(self, path: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Raises `NotFoundError`, `UnavailableError`."""
        asked = f"?{urllib.parse.urlencode(query)}" if query else ""
        return self._ask("GET", path + asked, None)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._ask("POST", path, json.dumps(body).encode())

    def _ask(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        headers = {
            "Accept": "application/json",
            "Authorization": f"Bearer {self._own_token()}",
            "Content-Type": "application/json",
            "User-Agent": "gketrace-agent",
        }
        connection = self._kept()
        try:
            if connection is not None:
                try:
                    return self._send(connection, method, path, body, headers)
                except (OSError, http.client.HTTPException):
                    # An idle one that was closed meanwhile, and the others most likely too: once
                    # more on a new one.  A review may be asked twice.
                    connection.close()
                    self.close()
            connection = self._connect()
            return self._send(connection, method, path, body, headers)
        except (OSError, http.client.HTTPException) as error:
            if connection is not None:
                connection.close()
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UnavailableError(f"the API server does not answer: {reason}") from None

    def _send(
        self,
        connection: http.client.HTTPSConnection,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
    ) -> dict[str, Any]:
        connection.request(method, path, body=body, headers=dict(headers))
        response = connection.getresponse()
        raw = response.read(_REPLY_BYTES + 1)
        if len(raw) > _REPLY_BYTES:
            connection.close()
            raise UnavailableError(f"the API server's answer is longer than {_REPLY_BYTES} bytes")
        if response.will_close:
            connection.close()
        else:
            self._keep(connection)
        try:
            document = json.loads(raw)
        except (ValueError, RecursionError):
            document = None
        said = str(document.get("message", ""))[:300] if isinstance(document, dict) else ""
        if response.status == 404:
            raise NotFoundError(said or f"the API server has no {path.partition('?')[0]}")
        if response.status >= 300 or not isinstance(document, dict):
            if response.status == 401:
                self._token_read = 0.0
            raise UnavailableError(
                f"the API server answered {response.status} {said}".rstrip(),
                hint="the agent's ServiceAccount needs the ClusterRole gketrace-agent"
                if response.status in (401, 403)
                else "",
            )
        return document

    def _own_token(self) -> str:
        now = time.monotonic()
        with self._lock:
            if self._token and now - self._token_read < _TOKEN_SECONDS:
                return self._token
        try:
            token = self._token_file.read_text().strip()
        except OSError as error:
            raise UnavailableError(
                f"cannot read the agent's own token {self._token_file}: {error.strerror}"
            ) from None
        with self._lock:
            self._token, self._token_read = token, now
        return token

    def _kept(self) -> http.client.HTTPSConnection | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _keep(self, connection: http.client.HTTPSConnection) -> None:
        with self._lock:
            if len(self._idle) < _IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def _connect(self) -> http.client.HTTPSConnection:
        try:
            stat = self._ca.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if self._context is None or stamp != self._ca_stamp:
                self._context = ssl.create_default_context(cafile=str(self._ca))
                self._ca_stamp = stamp
        except (OSError, ssl.SSLError) as error:
            raise UnavailableError(
                f"cannot read the API server's certificate authority {self._ca}: {error}"
            ) from None
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=_SECONDS, context=self._context
        )
