"""The relay between one port-forward WebSocket and ports in a pod's network namespace.

It speaks what the kubelet speaks (k8s.io/cri-streaming portforward/websocket.go): subprotocol
v4.channel.k8s.io, for the i-th port a data channel 2i and an error channel 2i+1, and on each first
a message with the port as little-endian uint16. The port is dialled at 127.0.0.1, then at ::1, as
containerd does (internal/cri/server/sandbox_portforward_linux.go), with its error text.

One thread, one poll loop: an SSL object must not be used by two threads at once. A side is only
read while what waits for the other side is below ``_HIGH`` bytes.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import websocket
from .errors import ApiError, bad_request
from .netns import NamespaceGone, make_socket

__all__ = ["PROTOCOL", "Forward", "negotiate", "parse_ports", "relay"]

PROTOCOL = "v4.channel.k8s.io"
_HIGH = 256 << 10
_CHUNK = 64 << 10
_ADDRESSES = ((socket.AF_INET, "127.0.0.1", "tcp4"), (socket.AF_INET6, "::1", "tcp6"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """An accepted request: which ports, in which pod's namespace."""

    ports: tuple[int, ...]
    pod: Mapping[str, Any]
    pid: int | None
    """A process in the pod's network namespace; None when nobody knows one."""
    accept: str


def parse_ports(values: Sequence[str]) -> tuple[int, ...]:
    """The ports of ``?ports=80,443&ports=8080``. Raises: ApiError 400."""
    ports: list[int] = []
    for text in ",".join(values).split(",") if values else ():
        if not text.isdigit() or not 0 < int(text) < 65536:
            raise bad_request(
                f"invalid port {text!r}" if text else "query parameter ports is empty"
            )
        ports.append(int(text))
    if not ports:
        raise bad_request('query parameter "ports" is required')
    return tuple(ports)


def negotiate(headers: Mapping[str, str]) -> str:
    """The Sec-WebSocket-Accept value for the handshake. Raises: ApiError 400."""
    upgrade = headers.get("Upgrade", "").lower()
    if "upgrade" not in headers.get("Connection", "").lower() or not upgrade:
        raise bad_request("Upgrade request required")
    key = headers.get("Sec-WebSocket-Key", "")
    if upgrade != "websocket" or headers.get("Sec-WebSocket-Version") != "13" or not key:
        raise bad_request(f"unable to upgrade: only WebSocket version 13 is served, not {upgrade}")
    offered = [text.strip() for text in headers.get("Sec-WebSocket-Protocol", "").split(",")]
    if PROTOCOL not in offered:
        raise ApiError(
            403, "Forbidden", f"unable to upgrade: no protocol of {offered} is served ({PROTOCOL})"
        )
    return websocket.accept(key)


@dataclass(slots=True)
class _Port:
    index: int
    number: int
    sock: socket.socket | None = None
    connecting: bool = False
    tries: int = 0
    failures: list[str] = field(default_factory=list)
    outgoing: bytearray = field(default_factory=bytearray)
    done: bool = False

    def close(self) -> None:
        self.done = True
        self.outgoing.clear()
        if self.sock is not None:
            self.sock.close()
            self.sock = None


class _Relay:
    def __init__(self, conn: ssl.SSLSocket, forward: Forward, stop_fd: int) -> None:
        self._conn = conn
        self._forward = forward
        self._stop_fd = stop_fd
        self._ports = [_Port(index, number) for index, number in enumerate(forward.ports)]
        self._decoder = websocket.Decoder()
        self._outgoing = bytearray()
        self._client_gone = False
        self._closing = False
        self._write_wants_read = False

    def run(self) -> None:
        self._conn.setblocking(False)
        try:
            for port in self._ports:
                number = struct.pack("<H", port.number)
                self._send(2 * port.index, number)
                self._send(2 * port.index + 1, number)
            for port in self._ports:
                self._dial(port)
            while not self._client_gone:
                if not self._closing and all(port.done for port in self._ports):
                    self._close(1000)
                self._flush()
                if self._closing and not self._outgoing:
                    return
                self._turn()
        except websocket.ProtocolError as error:
            self._close(error.code)
            self._flush()
        finally:
            for port in self._ports:
                port.close()

    # the pod's side

    def _dial(self, port: _Port) -> None:
        """Start connecting to the next address, or report that all have failed."""
        metadata = self._forward.pod["metadata"]
        while port.tries < len(_ADDRESSES):
            family, host, network = _ADDRESSES[port.tries]
            port.tries += 1
            if self._forward.pid is None:
                self._fail(port, f'failed to find sandbox "{metadata["uid"]}" in store: not found')
                return
            try:
                port.sock = make_socket(self._forward.pid, family)
            except NamespaceGone:
                self._fail(
                    port,
                    f"failed to execute portforward: network namespace for sandbox "
                    f'"{metadata["uid"]}" is closed',
                )
                return
            except OSError as error:
                port.failures.append(f"dial {network}: {_text(error.errno)}")
                continue
            port.sock.setblocking(False)
            port.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = port.sock.connect_ex((host, port.number))
            if code in (0, errno.EINPROGRESS):
                port.connecting = True
                return
            self._refused(port, code)
        path = f"/proc/{self._forward.pid}/ns/net"
        self._fail(
            port,
            f'failed to execute portforward in network namespace "{path}": failed to connect to '
            f'localhost:{port.number} inside namespace "{metadata["uid"]}", '
            f"IPv4: {port.failures[0]} IPv6 {port.failures[1]} ",
        )

    def _refused(self, port: _Port, code: int) -> None:
        _, host, network = _ADDRESSES[port.tries - 1]
        address = f"[{host}]" if ":" in host else host
        port.failures.append(f"dial {network} {address}:{port.number}: connect: {_text(code)}")
        if port.sock is not None:
            port.sock.close()
            port.sock = None
        port.connecting = False

    def _fail(self, port: _Port, why: str) -> None:
        uid = self._forward.pod["metadata"]["uid"]
        text = f"error forwarding port {port.number} to pod {uid}, uid : {why}"
        self._send(2 * port.index + 1, text.encode())
        port.close()

    def _pod_ready(self, port: _Port, events: int) -> None:
        if port.sock is None:
            return
        if port.connecting:
            code = port.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                self._refused(port, code)
                self._dial(port)
                return
            port.connecting = False
        try:
            if events & (select.POLLIN | select.POLLHUP | select.POLLERR):
                data = port.sock.recv(_CHUNK)
                if not data:
                    port.close()
                    return
                self._send(2 * port.index, data)
            if port.outgoing:
                sent = port.sock.send(port.outgoing)
                del port.outgoing[:sent]
        except BlockingIOError:
            return
        except OSError:  # reset by the pod: the stream ends, as after its EOF
            port.close()

    # the client's side

    def _send(self, channel: int, data: bytes) -> None:
        self._outgoing += websocket.frame(websocket.BINARY, bytes((channel,)), data)

    def _close(self, code: int) -> None:
        self._outgoing += websocket.frame(websocket.CLOSE, struct.pack("!H", code))
        self._closing = True

    def _flush(self) -> None:
        self._write_wants_read = False
        try:
            while self._outgoing:
                sent = self._conn.send(memoryview(self._outgoing)[:_CHUNK].tobytes())
                del self._outgoing[:sent]
        except ssl.SSLWantWriteError:
            return
        except ssl.SSLWantReadError:
            self._write_wants_read = True
        except OSError:  # the client is gone, there is nobody to tell
            self._client_gone = True

    def _read_client(self) -> None:
        try:
            data = self._conn.recv(_CHUNK)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError:  # reset: the same as its end
            data = b""
        if not data:
            self._client_gone = True
            return
        for opcode, payload in self._decoder.feed(data):
            if opcode == websocket.PING:
                self._outgoing += websocket.frame(websocket.PONG, payload)
            elif opcode == websocket.CLOSE:
                self._outgoing += websocket.frame(websocket.CLOSE, payload[:2])
                self._closing = True
                for port in self._ports:
                    port.close()
                return
            elif opcode in (websocket.BINARY, websocket.TEXT) and payload:
                self._from_client(payload[0], payload[1:])

    def _from_client(self, channel: int, data: bytes) -> None:
        if channel >= 2 * len(self._ports):
            raise websocket.ProtocolError(f"no channel {channel}")
        port = self._ports[channel // 2]
        # The kubelet gives the error channel no reader, so what is sent there goes nowhere.
        if channel % 2 == 0 and not port.done:
            port.outgoing += data

    # both

    def _turn(self) -> None:
        poller = select.poll()
        readable = all(len(port.outgoing) < _HIGH for port in self._ports)
        wanted = select.POLLIN if readable or self._write_wants_read else 0
        if self._outgoing and not self._write_wants_read:
            wanted |= select.POLLOUT
        client, sockets = self._conn.fileno(), {}
        poller.register(client, wanted)
        poller.register(self._stop_fd, select.POLLIN)
        for port in self._ports:
            if port.sock is None:
                continue
            wanted = select.POLLIN if len(self._outgoing) < _HIGH else 0
            if port.connecting:
                wanted = select.POLLOUT
            elif port.outgoing:
                wanted |= select.POLLOUT
            sockets[port.sock.fileno()] = port
            # Without an event wanted, poll still reports a hang-up at once, again and again; so
            # a port whose data cannot be taken now is left out.
            if wanted:
                poller.register(port.sock.fileno(), wanted)
        buffered = readable and self._conn.pending() > 0
        for fd, events in poller.poll(0 if buffered else None):
            if fd == self._stop_fd:
                if not self._closing:
                    self._close(1001)
                for port in self._ports:
                    port.close()
                self._flush()
                self._client_gone = True
                return
            if fd in sockets:
                self._pod_ready(sockets[fd], events)
            elif fd == client and events & (select.POLLHUP | select.POLLERR) and not readable:
                self._client_gone = True
        if readable:
            self._read_client()


def _text(code: int | None) -> str:
    return os.strerror(code or errno.EIO).lower()


def relay(conn: ssl.SSLSocket, forward: Forward, stop_fd: int) -> None:
    """Relay until the client or every port is done, or ``stop_fd`` becomes readable.

    The handshake's 101 has been sent. Leaves ``conn`` open, for the caller to close.
    """
    _Relay(conn, forward, stop_fd).run()
