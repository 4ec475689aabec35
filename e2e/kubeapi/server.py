"""Connections: TLS, one thread each, keep-alive, start and stop."""

from __future__ import annotations

import contextlib
import email.utils
import os
import socket
import ssl
import threading
import time
import urllib.parse
import uuid
from http.client import responses
from typing import BinaryIO, cast

from . import portforward, watch
from .api import Api, Request, Response
from .certs import Authority, write_kubeconfig
from .config import Config
from .control import Control
from .errors import ApiError
from .netns import listening_socket
from .patch import merge_patch
from .rbac import BOOTSTRAP
from .store import Store, dump
from .tokens import ADMIN, Tokens

__all__ = ["Server"]

_MAX_BODY = 8 << 20
_MAX_HEAD = 64 << 10
_HEAD_SECONDS = 20.0
_IDLE_SECONDS = 180.0


class _Headers(dict[str, str]):
    """Header values by name, the case of names ignored; repeated ones joined with commas."""

    def add(self, name: str, value: str) -> None:
        key = name.lower()
        self[key] = f"{self[key]}, {value}" if key in self else value

    def get(self, key: str, default: str | None = "") -> str:  # type: ignore[override]
        return super().get(key.lower(), default or "")


class _Hangup(Exception):
    """The connection ends here: nothing more can or should be said on it."""


class _Connection:
    def __init__(self, server: Server, conn: ssl.SSLSocket) -> None:
        self._server = server
        self._conn = conn
        self._in = cast("BinaryIO", conn.makefile("rb"))
        self._out = cast("BinaryIO", conn.makefile("wb"))

    def run(self) -> None:
        try:
            while self._serve_one():
                pass
        finally:
            for stream in (self._in, self._out):
                with contextlib.suppress(OSError):  # flushing to a client that is gone
                    stream.close()

    def _serve_one(self) -> bool:
        self._conn.settimeout(_IDLE_SECONDS)
        line = self._in.readline(_MAX_HEAD)
        if not line.strip():
            return bool(line)
        self._conn.settimeout(_HEAD_SECONDS)
        try:
            method, target, version = line.decode("latin-1").split()
        except ValueError as error:
            raise _Hangup from error
        headers = self._read_headers()
        parsed = urllib.parse.urlsplit(target)
        path = urllib.parse.unquote(parsed.path)
        keep = version == "HTTP/1.1" and headers.get("Connection").lower() != "close"
        self._server.control.count_request(method, path)
        try:
            request = Request(
                method=method,
                path=path,
                query=urllib.parse.parse_qs(parsed.query, keep_blank_values=True),
                headers=headers,
                body=self._read_body(headers),
            )
            self._meet_fault(method, path)
            answer = self._server.api.handle(request)
        except ApiError as error:
            answer = Response(code=error.code, body=dump(error.status()))
        if isinstance(answer, Response):
            self._respond(answer, keep=keep, with_body=method != "HEAD")
            return keep
        if isinstance(answer, portforward.Forward):
            self._switch(answer)
            with self._server.control.counted("portforwards"):
                portforward.relay(self._conn, answer, self._server.hangup_fd())
        else:
            self._head(200, {"Content-Type": "application/json", "Transfer-Encoding": "chunked"})
            self._out.flush()
            with self._server.control.counted("watches"):
                watch.serve(
                    answer, self._server.store, self._conn, self._out, self._server.hangup_fd()
                )
        return False

    def _read_headers(self) -> _Headers:
        headers, size = _Headers(), 0
        while True:
            line = self._in.readline(_MAX_HEAD)
            size += len(line)
            if not line.endswith(b"\n") or size > _MAX_HEAD:
                raise _Hangup
            if not line.strip():
                return headers
            name, _, value = line.decode("latin-1").partition(":")
            headers.add(name.strip(), value.strip())

    def _read_body(self, headers: _Headers) -> bytes:
        if headers.get("Transfer-Encoding"):
            raise _Hangup  # no client of this API sends a body without its length
        text = headers.get("Content-Length", "0")
        if not text.isdigit() or int(text) > _MAX_BODY:
            raise _Hangup
        if headers.get("Expect").lower() == "100-continue":
            self._out.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._out.flush()
        body = self._in.read(int(text))
        if len(body) < int(text):
            raise _Hangup
        return body

    def _meet_fault(self, method: str, path: str) -> None:
        fault = None if path.startswith("/lab/") else self._server.control.fault(method, path)
        if fault is None:
            return
        if fault.delay and self._server.stopping.wait(fault.delay):
            raise _Hangup
        if fault.drop:
            raise _Hangup
        if fault.status:
            reason = {
                401: "Unauthorized",
                403: "Forbidden",
                404: "NotFound",
                410: "Expired",
                429: "TooManyRequests",
                500: "InternalError",
                503: "ServiceUnavailable",
                504: "Timeout",
            }.get(fault.status, "")
            raise ApiError(fault.status, reason, fault.message)

    def _head(self, code: int, headers: dict[str, str]) -> None:
        lines = [f"HTTP/1.1 {code} {responses.get(code, '')}"]
        lines.append(f"Date: {email.utils.formatdate(usegmt=True)}")
        lines.append(f"Audit-Id: {uuid.uuid4()}")
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._out.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))

    def _respond(self, response: Response, *, keep: bool, with_body: bool) -> None:
        body = response.body
        plain = body == b"ok"
        headers = {
            "Content-Type": "text/plain; charset=utf-8" if plain else "application/json",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-cache, private",
            **response.headers,
        }
        if response.code == 401:
            headers["Www-Authenticate"] = 'Bearer realm="kubernetes"'
        if not keep:
            headers["Connection"] = "close"
        self._head(response.code, headers)
        if with_body:
            self._out.write(body)
        self._out.flush()

    def _switch(self, forward: portforward.Forward) -> None:
        self._head(
            101,
            {
                "Upgrade": "websocket",
                "Connection": "Upgrade",
                "Sec-WebSocket-Accept": forward.accept,
                "Sec-WebSocket-Protocol": portforward.PROTOCOL,
            },
        )
        self._out.flush()


class Server:
    """The API server. ``start`` returns once it serves; ``stop`` once every thread is gone."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.store = Store()
        for obj in (*BOOTSTRAP, *config.objects):
            self.store.load(obj)
        self.store.loaded()
        self._override()
        self.control = Control(self.store, config.node_pids, config.pod_pids)
        self.control.on_listen = self._listen
        self.control.on_hangup = self._hang_up
        self._tokens = Tokens(self.store, config.users, min_seconds=config.min_token_seconds)
        self._authority = Authority(config.name)
        self._lock = threading.Lock()
        self._listeners: list[socket.socket] = []
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._acceptors: list[threading.Thread] = []
        self._hangup_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._spent_fds: list[int] = []
        self.stopping = threading.Event()
        self.kubeconfig = config.state_dir / "kubeconfig"
        self.api: Api

    def _override(self) -> None:
        """Merge the configuration's patches into the objects, before anybody can watch them."""
        for target, patch in self._config.overrides.items():
            plural, _, rest = target.partition("/")
            namespace, _, name = rest.rpartition("/")
            for obj in self._config.objects:
                metadata = obj["metadata"]
                kind = obj["kind"].lower()
                if plural in (kind, f"{kind}s") and (namespace, name) == (
                    metadata.get("namespace", ""),
                    metadata["name"],
                ):
                    self.store.load(merge_patch(obj, patch))
                    break
            else:
                raise ValueError(f"overrides: there is no {target}")

    def hangup_fd(self) -> int:
        """Readable once open watches and port-forwards must end."""
        with self._lock:
            return self._hangup_fd

    def _hang_up(self) -> None:
        """End open watches and port-forwards; later ones get a new descriptor."""
        with self._lock:
            os.eventfd_write(self._hangup_fd, 1)
            self._spent_fds.append(self._hangup_fd)
            self._hangup_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            if self.stopping.is_set():
                os.eventfd_write(self._hangup_fd, 1)

    def start(self) -> None:
        """Raises: OSError when an address cannot be listened on."""
        first = self._config.listeners[0]
        listener = listening_socket(first.address, first.pid)
        host, port = listener.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        sans = [*self._config.sans, *(one.address[0] for one in self._config.listeners)]
        self._context = self._authority.server_context(sans)
        self.api = Api(
            store=self.store,
            tokens=self._tokens,
            control=self.control,
            version=self._config.version,
            address=address,
        )
        tokens = {ADMIN: self._tokens.by_user[ADMIN], **self._tokens.by_user}
        write_kubeconfig(
            self.kubeconfig,
            cluster=self._config.name,
            server=f"https://{address}",
            ca_pem=self._authority.pem,
            tokens=tokens,
        )
        self._accept_on(listener)
        for more in self._config.listeners[1:]:
            self._listen(more.address, more.pid)

    def _listen(self, address: tuple[str, int], pid: int | None) -> None:
        self._accept_on(listening_socket(address, pid))

    def _accept_on(self, listener: socket.socket) -> None:
        thread = threading.Thread(target=self._accept, args=(listener,), name="accept", daemon=True)
        with self._lock:
            self._listeners.append(listener)
            self._acceptors.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while not self.stopping.is_set():
            try:
                conn, _ = listener.accept()
            except OSError:
                if self.stopping.is_set():
                    return
                time.sleep(0.05)  # out of file descriptors: some will be closed
                continue
            thread = threading.Thread(target=self._serve, args=(conn,), name="serve", daemon=True)
            with self._lock:
                if self.stopping.is_set():
                    conn.close()
                    return
                self._connections[thread] = conn
            thread.start()

    def _serve(self, raw: socket.socket) -> None:
        conn: socket.socket = raw
        try:
            raw.settimeout(_HEAD_SECONDS)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            conn = self._context.wrap_socket(raw, server_side=True)
            with self._lock:
                self._connections[threading.current_thread()] = conn
            with self.control.counted("connections"):
                _Connection(self, conn).run()
        except (OSError, _Hangup):
            pass  # the client went away, was too slow, or speaks no HTTP
        except ApiError as error:
            raise AssertionError("an ApiError got past its request") from error
        finally:
            with self._lock:
                self._connections.pop(threading.current_thread(), None)
            with contextlib.suppress(OSError):
                conn.shutdown(socket.SHUT_RDWR)
            conn.close()
            raw.close()

    def stop(self) -> None:
        """Close every connection and wait for their threads, 3 seconds at most."""
        self.stopping.set()
        self._hang_up()
        with self._lock:
            listeners, threads = list(self._listeners), list(self._connections)
            idle = list(self._connections.values())
        for listener in listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        deadline = time.monotonic() + 3
        for thread in threads:
            thread.join(min(0.05, max(0.0, deadline - time.monotonic())))
        for conn in idle:
            # Not SSLSocket.shutdown: that would take the TLS object from the thread that reads.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(conn, socket.SHUT_RDWR)
        for thread in (*threads, *self._acceptors):
            thread.join(max(0.0, deadline - time.monotonic()))
        self.kubeconfig.unlink(missing_ok=True)
