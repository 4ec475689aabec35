"""One port-forward WebSocket, and the relay between it and one local connection.

RFC 6455, the client's side, for what pods/portforward needs: binary messages whose first byte is a
channel, 0 for data and 1 for the error text, each channel opening with the port as little-endian
uint16.  A session is used by one thread at a time and never blocks after `dial`.
"""

from __future__ import annotations

import base64
import hashlib
import os
import select
import socket
import ssl
import struct
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gketrace.errors import (
    GketraceError,
    NotFoundError,
    TimeoutExceeded,
    UnavailableError,
)

from .apiserver import ApiServer, error_from_response
from .kubeconfig import redact

__all__ = ["Session", "Target", "dial"]

_PROTOCOL = "v4.channel.k8s.io"
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING = 0, 1, 2, 8, 9
_PONG = 10
_DATA, _ERROR = 0, 1
_HIGH = 256 << 10
_CHUNK = 64 << 10
_MAX_FRAME = 64 << 20
_MAX_HEAD = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A pod's port."""

    namespace: str
    pod: str
    port: int

    def __str__(self) -> str:
        return f"pod {self.namespace}/{self.pod} port {self.port}"


def dial(
    api: ApiServer, target: Target, *, timeout: float, opened: Callable[[socket.socket], None]
) -> Session:
    """Open the WebSocket and wait until both channels are announced.

    That the port is announced says that the kubelet has been reached, not that anything listens.
    `opened` is given each socket once it is connected: shutting it down ends the wait.  Logs in
    again after one 401.
    Raises: NotFoundError, ForbiddenError, TimeoutExceeded, UnavailableError, all with the API's
    own text where it gave one.
    """
    used = api.credentials()
    status, outcome = _attempt(api, target, timeout, opened)
    if status == 401 and api.log_in_again(used):
        _, outcome = _attempt(api, target, timeout, opened)
    if isinstance(outcome, Session):
        return outcome
    raise outcome


def _attempt(
    api: ApiServer, target: Target, timeout: float, opened: Callable[[socket.socket], None]
) -> tuple[int, Session | GketraceError]:
    """The handshake's status, and the session or why there is none."""
    sock = api.connect()
    try:
        opened(sock)
        sock.settimeout(timeout)
        status, rest = _handshake(api, sock, target)
        if status != 101:
            sock.close()
            return status, _refusal(api, target, status, rest)
        session = Session(sock, target)
        session.feed(rest)
        while not session.announced and not session.over:
            data = sock.recv(_CHUNK)
            if not data:
                raise UnavailableError(f"the port-forward to {target} ended before it began")
            session.feed(data)
        if session.over:
            raise session.error or UnavailableError(f"the port-forward to {target} was closed")
        sock.setblocking(False)
    except TimeoutError as error:
        sock.close()
        raise TimeoutExceeded(
            f"the port-forward to {target} was not answered within {timeout:g} s",
            hint="the node's kubelet may be unreachable",
        ) from error
    except OSError as error:
        sock.close()
        raise _broken(target, error) from error
    except BaseException:
        sock.close()
        raise
    return status, session


def _broken(target: Target, error: OSError) -> UnavailableError:
    reason = redact(error.strerror or type(error).__name__)
    return UnavailableError(f"the port-forward to {target} broke: {reason}")


def _path(target: Target) -> str:
    namespace, pod = (urllib.parse.quote(part, safe="") for part in (target.namespace, target.pod))
    return f"/api/v1/namespaces/{namespace}/pods/{pod}/portforward"


def _refusal(api: ApiServer, target: Target, status: int, body: bytes) -> GketraceError:
    error = error_from_response(api.name, status, body, what=_path(target))
    if isinstance(error, NotFoundError):
        return NotFoundError(f'{error.message} in namespace "{target.namespace}"')
    return error


def _handshake(api: ApiServer, sock: socket.socket, target: Target) -> tuple[int, bytes]:
    """Ask for the upgrade: 101 and what came after the head, or another status and its body."""
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        f"GET {api.path(_path(target), {'ports': str(target.port)})} HTTP/1.1",
        f"Host: {api.host_header}",
        "User-Agent: gketrace",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Protocol: {_PROTOCOL}",
    ]
    if authorization := api.credentials().authorization:
        lines.append(f"Authorization: {authorization}")
    sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
    received = bytearray()
    while b"\r\n\r\n" not in received:
        data = sock.recv(_CHUNK)
        if not data or len(received) > _MAX_HEAD:
            raise UnavailableError(f"{api.name} closed the connection during a port-forward")
        received += data
    head, _, rest = bytes(received).partition(b"\r\n\r\n")
    status, headers = _parse_head(head)
    if status != 101:
        return status, _read_body(sock, headers, rest)
    expected = base64.b64encode(hashlib.sha1(key.encode() + _GUID).digest()).decode()
    agreed = headers.get("sec-websocket-protocol", "")
    if headers.get("sec-websocket-accept") != expected or agreed != _PROTOCOL:
        raise UnavailableError(
            f"{api.name} does not forward ports over WebSocket as {_PROTOCOL}",
            hint="a proxy in between may not pass WebSockets; try --connect direct",
        )
    return status, rest


def _parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    parts = first.split(" ", 2)
    if len(parts) < 2 or not parts[0].startswith("HTTP/1.") or not parts[1].isdigit():
        raise UnavailableError("the API server answered a port-forward with no HTTP")
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(parts[1]), headers


def _read_body(sock: socket.socket, headers: Mapping[str, str], got: bytes) -> bytes:
    """The error answer's body, as much of it as its length says and fits in 64 KiB."""
    text = headers.get("content-length", "")
    wanted = min(int(text), _MAX_HEAD) if text.isdigit() else 0
    body = got
    while len(body) < wanted:
        data = sock.recv(_CHUNK)
        if not data:
            break
        body += data
    return body


class Session:
    """A WebSocket after its handshake, later with a local connection attached."""

    def __init__(self, remote: socket.socket, target: Target) -> None:
        self._remote = remote
        self._target = target
        self._local: socket.socket | None = None
        self._received = bytearray()
        self._fragments: list[bytes] = []
        self._to_local = bytearray()
        self._to_remote = bytearray()
        self._channels: set[int] = set()
        self._write_wants_read = False
        self._remote_done = False
        self.ended = False
        """Nothing more will come or go; `close` it."""
        self.answered = False
        """The pod has sent bytes."""
        self.error: GketraceError | None = None
        """Why it is over: what the kubelet said, or that the other side ended it."""

    @property
    def over(self) -> bool:
        """The other side has ended it, though bytes may still wait for the local side."""
        return self._remote_done

    @property
    def announced(self) -> bool:
        return self._channels == {_DATA, _ERROR}

    def attach(self, local: socket.socket) -> None:
        self._local = local

    def close(self) -> None:
        self.ended = True
        self._remote.close()
        if self._local is not None:
            self._local.close()

    # what the poll loop asks

    def fds(self) -> list[int]:
        return [sock.fileno() for sock in (self._remote, self._local) if sock is not None]

    def buffered(self) -> bool:
        """Bytes wait inside TLS, where poll does not see them."""
        return (
            isinstance(self._remote, ssl.SSLSocket)
            and len(self._to_local) < _HIGH
            and self._remote.pending() > 0
        )

    def interests(self) -> Iterator[tuple[int, int]]:
        events = select.POLLIN if len(self._to_local) < _HIGH or self._write_wants_read else 0
        if self._to_remote and not self._write_wants_read:
            events |= select.POLLOUT
        if events:
            yield self._remote.fileno(), events
        if self._local is not None:
            events = select.POLLIN if len(self._to_remote) < _HIGH else 0
            if self._to_local:
                events |= select.POLLOUT
            if events:
                yield self._local.fileno(), events

    def step(self, ready: Mapping[int, int]) -> None:
        """Move what can be moved; sets `ended` when there is nothing left to do."""
        try:
            if self._local is not None and self._local.fileno() in ready:
                self._read_local(self._local)
                if self.ended:
                    return  # what the other side says to that is no error
            if len(self._to_local) < _HIGH and not self._remote_done:
                self._read_remote()
            self._write_remote()
            if self._local is not None:
                self._write_local(self._local)
        except GketraceError as error:
            self.error = self.error or error
            self.ended = True
        if self._remote_done and (not self._to_local or self._local is None):
            self.ended = True

    # the local side

    def _read_local(self, local: socket.socket) -> None:
        if len(self._to_remote) >= _HIGH:
            return
        try:
            data = local.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:  # reset: the same as its end
            data = b""
        if not data:
            # Port-forward has no half-close: who stops sending is done.
            self._frame(_CLOSE, struct.pack("!H", 1000))
            self._write_remote()
            self.ended = True
            return
        self._frame(_BINARY, bytes((_DATA,)) + data)

    def _write_local(self, local: socket.socket) -> None:
        try:
            while self._to_local:
                sent = local.send(self._to_local)
                del self._to_local[:sent]
        except BlockingIOError:
            return
        except OSError:  # nobody is left to read
            self.ended = True

    # the API server's side

    def _frame(self, opcode: int, payload: bytes) -> None:
        size = len(payload)
        if size < 126:
            head = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
        elif size < 1 << 16:
            head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
        else:
            head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size)
        mask = os.urandom(4)
        repeated = (mask * (size // 4 + 1))[:size]
        masked = int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")
        self._to_remote += head + mask + masked.to_bytes(size, "big")

    def _write_remote(self) -> None:
        self._write_wants_read = False
        try:
            while self._to_remote:
                # A retried SSL_write must not be shorter, so it always begins at the same byte.
                sent = self._remote.send(bytes(self._to_remote[:_CHUNK]))
                del self._to_remote[:sent]
        except (BlockingIOError, ssl.SSLWantWriteError):
            return
        except ssl.SSLWantReadError:
            self._write_wants_read = True
        except OSError as error:
            raise _broken(self._target, error) from error

    def _read_remote(self) -> None:
        try:
            data = self._remote.recv(_CHUNK)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError as error:
            raise _broken(self._target, error) from error
        if not data:
            self._end()
            return
        self.feed(data)

    def _end(self) -> None:
        self._remote_done = True
        if self.error is None:
            self.error = UnavailableError(f"the port-forward to {self._target} was closed")

    def feed(self, data: bytes) -> None:
        """Take in bytes from the WebSocket.  Raises: UnavailableError when they make no sense."""
        self._received += data
        while not self._remote_done and (got := self._next_frame()) is not None:
            final, opcode, payload = got
            if opcode == _PING:
                self._frame(_PONG, payload)
            elif opcode == _CLOSE:
                self._frame(_CLOSE, payload[:2])
                self._end()
            elif opcode in (_CONTINUATION, _TEXT, _BINARY):
                self._fragments.append(payload)
                if final:
                    message, self._fragments = b"".join(self._fragments), []
                    self._message(message)

    def _message(self, message: bytes) -> None:
        if not message:
            return
        channel, data = message[0], message[1:]
        if channel not in (_DATA, _ERROR):
            raise UnavailableError(
                f"the port-forward to {self._target} got channel {channel}, which nobody asked for"
            )
        if channel not in self._channels:
            if data != struct.pack("<H", self._target.port):
                raise UnavailableError(
                    f"the port-forward to {self._target} began with something that is not its port"
                )
            self._channels.add(channel)
        elif channel == _DATA:
            self.answered = self.answered or bool(data)
            self._to_local += data
        else:
            said = redact(data.decode(errors="replace"))
            hint = ""
            if said.rstrip().endswith("connection refused"):
                # The kubelet or runtime says it at length, with namespace paths and both families.
                said = "nothing listens there (connection refused)"
                hint = "the pod's log says why"
            what = f"no port-forward to {self._target}: {said[:500]}"
            self.error = UnavailableError(what, hint=hint)
            self._remote_done = True

    def _next_frame(self) -> tuple[bool, int, bytes] | None:
        buffer = self._received
        if len(buffer) < 2:
            return None
        size, offset = buffer[1] & 0x7F, 2
        if buffer[0] & 0x70 or buffer[1] & 0x80:
            raise UnavailableError(f"the port-forward to {self._target} got a malformed frame")
        if size >= 126:
            width = 2 if size == 126 else 8
            if len(buffer) < offset + width:
                return None
            size = int.from_bytes(buffer[offset : offset + width], "big")
            offset += width
        if size > _MAX_FRAME:
            raise UnavailableError(f"the port-forward to {self._target} got {size} bytes at once")
        if len(buffer) < offset + size:
            return None
        payload = bytes(buffer[offset : offset + size])
        final, opcode = bool(buffer[0] & 0x80), buffer[0] & 0x0F
        del buffer[: offset + size]
        return final, opcode, payload
