"""Talking to the Kubernetes API server: connections, requests, and what their failures mean.

Plain `http.client` over `ssl`: the `kubernetes` package's transport costs 0.4 s to import (see
kubeconfig).  JSON comes back as parsed; what it means is `objects`' business.
Safe to use from several threads: every thread borrows a connection of its own.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
import ssl
import tempfile
import threading
import time
import urllib.parse
import zlib
from collections.abc import Mapping
from typing import IO, Any
from urllib.request import (  # type: ignore[attr-defined]  # typeshed lacks the second
    getproxies_environment,
    proxy_bypass_environment,
)

from gketrace.errors import (
    ExhaustedError,
    ForbiddenError,
    GketraceError,
    GoneError,
    NotFoundError,
    TimeoutExceeded,
    UnavailableError,
    UsageError,
)

from .kubeconfig import Credentials, Settings, redact
from .leftovers import forget, keep

__all__ = ["ApiServer", "error_from_response"]

_CONNECT_SECONDS = 10.0
_RETRIES = 3
_MAX_RETRY_AFTER = 2.0
_MOST_BODY = 1 << 30
"""Bytes of an answer; a list of 100,000 pods has half of it."""
_PIECE = 1 << 20


class ApiServer:
    """One API server, as one user.  Connects when first asked; `close` when done."""

    def __init__(self, settings: Settings, *, timeout: float = 30.0) -> None:
        self.settings = settings
        self._timeout = timeout
        """Seconds without a byte before a request fails."""
        url = urllib.parse.urlsplit(settings.server)
        try:
            port = url.port
        except ValueError as error:
            raise UsageError(f"the server URL {settings.server} has no valid port") from error
        self._tls = url.scheme == "https"
        self._host = url.hostname or ""
        self._port = port or (443 if self._tls else 80)
        self._prefix = url.path.rstrip("/")
        self._lock = threading.Lock()
        self._credentials_lock = threading.Lock()
        self._credentials: Credentials | None = None
        self._context: ssl.SSLContext | None = None
        self._idle: list[http.client.HTTPConnection] = []
        self._closed = False

    @property
    def name(self) -> str:
        """The server as messages call it."""
        return f'the API server {self.settings.server} of context "{self.settings.context}"'

    @property
    def host_header(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self._port}"

    def path(self, path: str, query: Mapping[str, str] | None = None) -> str:
        """The request target for an API path."""
        asked = urllib.parse.urlencode({k: v for k, v in (query or {}).items() if v})
        return self._prefix + path + (f"?{asked}" if asked else "")

    # requests

    def get(self, path: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The JSON object at `path`.  Raises: any of the exception tree but ParseError."""
        return self.request("GET", path, query=query)

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One request and its JSON answer.

        Logs in again after one 401, and waits where the server says Retry-After with 429 or 503.
        Raises: ForbiddenError (401, 403), NotFoundError (404), GoneError (410), ExhaustedError
        (429), TimeoutExceeded, UnavailableError (no answer, 5xx, no JSON), UsageError (other 4xx).
        """
        target = self.path(path, query)
        payload = json.dumps(body).encode() if body is not None else None
        fresh_login = False
        for attempt in range(_RETRIES + 1):
            used = self.credentials()
            status, headers, raw = self._send(method, target, payload, used)
            if status == 401 and not fresh_login:
                fresh_login = True
                if self.log_in_again(used):
                    continue
            wait = _retry_after(status, headers)
            if wait is not None and attempt < _RETRIES:
                time.sleep(wait)
                continue
            break
        if status >= 300:
            raise error_from_response(self.name, status, raw, what=path)
        try:
            document = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise self._not_kubernetes() from error
        if not isinstance(document, dict):
            raise self._not_kubernetes()
        return document

    def _not_kubernetes(self) -> UnavailableError:
        return UnavailableError(
            f"{self.name} answered with something that is not a JSON object",
            hint="check that the server URL is a Kubernetes API server's",
        )

    def _send(
        self, method: str, target: str, payload: bytes | None, credentials: Credentials
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "gzip",
            "User-Agent": "gketrace",
        }
        if credentials.authorization:
            headers["Authorization"] = credentials.authorization
        if payload is not None:
            headers["Content-Type"] = "application/json"
        connection, reused = self._borrow()
        while True:
            try:
                connection.request(method, target, body=payload, headers=headers)
                response = connection.getresponse()
                raw = _unzipped(response.headers, _body(response))
                if response.will_close:
                    connection.close()
                else:
                    self._give_back(connection)
                return response.status, response.headers, raw
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError) as error:
                connection.close()
                # An idle connection may have been closed by the server at any time.
                if not reused or method != "GET":
                    raise self._explain(error) from error
                connection, reused = self._new_connection(), False
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                raise self._explain(error) from error
            except BaseException:  # an interrupt: the connection is in an unknown state
                connection.close()
                raise

    # who we are

    def credentials(self) -> Credentials:
        """Raises: UsageError, ForbiddenError, UnavailableError."""
        with self._credentials_lock:
            if self._credentials is None:
                self._credentials = self.settings.credentials()
            return self._credentials

    def log_in_again(self, refused: Credentials) -> bool:
        """Get credentials anew after a 401 for `refused`; whether they differ."""
        with self._credentials_lock:
            if self._credentials is refused or self._credentials is None:
                self._credentials = self.settings.credentials()
            changed = self._credentials != refused
        if changed:
            with self._lock:
                stale, self._idle, self._context = self._idle, [], None
            for connection in stale:
                connection.close()
        return changed

    # connections

    def _borrow(self) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            if self._closed:
                raise UnavailableError("the connection to the cluster is closed")
            if self._idle:
                return self._idle.pop(), True
        return self._new_connection(), False

    def _new_connection(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self._host, self._port)
        connection.sock = self.connect()
        return connection

    def _give_back(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def connect(self) -> socket.socket:
        """A new connection to the server, through the proxy if there is one, TLS done.

        Raises: UnavailableError, TimeoutExceeded.
        """
        sock: socket.socket | None = None
        try:
            proxy = self._proxy()
            sock = socket.create_connection(
                proxy[:2] if proxy else (self._host, self._port), timeout=_CONNECT_SECONDS
            )
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if proxy:
                self._tunnel(sock, proxy[2])
            if self._tls:
                name = self.settings.tls_server_name or self._host
                sock = self._tls_context().wrap_socket(sock, server_hostname=name)
            sock.settimeout(self._timeout)
        except OSError as error:
            if sock is not None:
                sock.close()
            raise self._explain(error) from error
        except BaseException:
            if sock is not None:
                sock.close()
            raise
        return sock

    def _proxy(self) -> tuple[str, int, str] | None:
        """Host, port and Proxy-Authorization of the HTTP proxy, if one is to be used."""
        text = self.settings.proxy_url
        if not text:
            proxies = getproxies_environment()
            text = proxies.get("https" if self._tls else "http", "")
            if not text or proxy_bypass_environment(self._host, proxies):
                return None
        url = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
        if url.scheme != "http" or not url.hostname:
            raise UsageError(
                f"the proxy for {self.settings.server} is {url.scheme}://, which is not supported",
                hint="use an http:// proxy",
            )
        authorization = ""
        if url.username:
            user = urllib.parse.unquote(url.username)
            raw = f"{user}:{urllib.parse.unquote(url.password or '')}".encode()
            authorization = f"Basic {base64.b64encode(raw).decode()}"
        return url.hostname, url.port or 80, authorization

    def _tunnel(self, sock: socket.socket, authorization: str) -> None:
        request = f"CONNECT {self.host_header} HTTP/1.1\r\nHost: {self.host_header}\r\n"
        if authorization:
            request += f"Proxy-Authorization: {authorization}\r\n"
        sock.sendall(f"{request}\r\n".encode())
        head = b""
        # Byte by byte: what follows the head belongs to TLS.
        while not head.endswith(b"\r\n\r\n") and len(head) < 16384:
            byte = sock.recv(1)
            if not byte:
                break
            head += byte
        answer = head.split(b"\r\n")[0].decode(errors="replace")
        if not re.match(r"HTTP/1\.[01] 2\d\d", answer):
            raise UnavailableError(
                f"the proxy does not connect to {self.settings.server}: {answer[:100] or 'closed'}",
                hint="check proxy-url in the kubeconfig and HTTPS_PROXY",
            )

    def _tls_context(self) -> ssl.SSLContext:
        credentials = self.credentials()
        with self._lock:
            if self._context is not None:
                return self._context
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.set_alpn_protocols(["http/1.1"])
            where = self.settings.source
            if not self.settings.verify:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            elif self.settings.ca_pem:
                try:
                    context.load_verify_locations(cadata=self.settings.ca_pem)
                except (ssl.SSLError, ValueError) as error:
                    raise UsageError(
                        f"the cluster's certificate-authority in {where} is not a PEM certificate"
                    ) from error
            else:
                context.load_default_certs(ssl.Purpose.SERVER_AUTH)
            if credentials.certificate:
                _load_certificate(context, credentials, where)
            self._context = context
            return context

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _explain(self, error: Exception) -> GketraceError:
        """The exception for a connection that failed with `error`."""
        where = self.settings.source
        if isinstance(error, ssl.SSLCertVerificationError):
            return UnavailableError(
                f"{self.name} shows a certificate that does not verify: {error.verify_message}",
                hint=f"check certificate-authority-data and server in {where}",
            )
        if isinstance(error, ssl.SSLError):
            reason = (error.reason or "handshake failed").replace("_", " ").lower()
            return UnavailableError(
                f"{self.name} speaks no TLS we accept: {reason}",
                hint=f"check server in {where}",
            )
        if isinstance(error, TimeoutError):
            return TimeoutExceeded(
                f"{self.name} did not answer in time",
                hint="check the network, the VPN and the cluster's authorized networks",
            )
        if isinstance(error, socket.gaierror):
            return UnavailableError(
                f"the name of {self.name} does not resolve",
                hint=f"check server in {where} and the network",
            )
        if isinstance(error, ConnectionRefusedError):
            return UnavailableError(
                f"{self.name} refuses the connection",
                hint="check that the cluster is up and that this is the right --context",
            )
        if isinstance(error, http.client.IncompleteRead | ConnectionError):
            return UnavailableError(f"{self.name} closed the connection")
        if isinstance(error, http.client.HTTPException):
            return UnavailableError(
                f"{self.name} answered with something that is not HTTP",
                hint=f"check server in {where}",
            )
        reason = getattr(error, "strerror", None) or type(error).__name__
        return UnavailableError(f"{self.name} cannot be reached: {reason}")


def _load_certificate(context: ssl.SSLContext, credentials: Credentials, where: str) -> None:
    # ssl takes keys from files only: one of mode 0600, for a moment.
    file = keep(_key_file, _close)
    try:
        with file:
            file.write(credentials.certificate + b"\n" + credentials.key)
            file.flush()
            context.load_cert_chain(file.name, password=lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(
            f"the client certificate and key in {where} cannot be used",
            hint="both must be PEM, belong together, and have no password",
        ) from error
    finally:
        forget(file)


def _key_file() -> IO[bytes]:
    return tempfile.NamedTemporaryFile(prefix="gketrace-")


def _close(file: IO[bytes]) -> None:
    file.close()


def _body(response: http.client.HTTPResponse) -> bytes:
    """In pieces: what a chunk says of its length is not believed."""
    parts: list[bytes] = []
    size = 0
    while piece := response.read(_PIECE):
        parts.append(piece)
        size += len(piece)
        if size > _MOST_BODY:
            raise _too_long()
    if response.length:  # read() tells of it only where it is asked for all
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _too_long() -> GketraceError:
    return UnavailableError(f"the API server's answer is longer than {_MOST_BODY >> 20} MiB")


def _unzipped(headers: http.client.HTTPMessage, raw: bytes) -> bytes:
    if headers.get("Content-Encoding", "").lower() != "gzip":
        return raw
    try:
        stream = zlib.decompressobj(wbits=31)
        found = stream.decompress(raw, _MOST_BODY)
    except zlib.error as error:
        raise http.client.HTTPException("the body is not gzip") from error
    if stream.unconsumed_tail:
        raise _too_long()
    if not stream.eof:
        raise http.client.HTTPException("the body is cut short")
    return found


def _retry_after(status: int, headers: http.client.HTTPMessage) -> float | None:
    """Seconds to wait before trying again, if the server asks for a wait that is short enough."""
    text = headers.get("Retry-After", "")
    if (
        status not in (429, 503)
        or not (text.isascii() and text.isdigit())
        or int(text) > _MAX_RETRY_AFTER
    ):
        return None
    return float(text)


def error_from_response(name: str, status: int, body: bytes, *, what: str) -> GketraceError:
    """The exception for an HTTP error answer of the server called `name` to a request for `what`.

    The text is the Status object's message when there is one.
    """
    message = ""
    try:
        document = json.loads(body)
        if isinstance(document, dict) and isinstance(document.get("message"), str):
            message = redact(document["message"])[:500]
    except (ValueError, RecursionError):
        message = ""
    if status == 401:
        return ForbiddenError(
            f"{name} does not accept these credentials (401 Unauthorized)",
            hint="log in again, or check the user in the kubeconfig",
        )
    if status == 403:
        return ForbiddenError(
            message or f"{name} forbids {what}", hint="ask for a role that allows it"
        )
    if status == 404:
        return NotFoundError(message or f"{name} has no {what}")
    if status == 410:
        return GoneError(message or f"{name} no longer has the version asked for")
    if status == 429:
        return ExhaustedError(f"{name} has too many requests to serve: {message or what}")
    if status >= 500:
        return UnavailableError(f"{name} failed with {status}: {message or what}")
    return UsageError(f"{name} refuses the request ({status}): {message or what}")
