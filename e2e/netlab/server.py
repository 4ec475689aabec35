"""What runs in a lab pod: one process that answers on every port the pod has.

TCP: an HTTP GET of `/json` and a line `probe` get one line of JSON, then the connection closes;
`hold` gets the line and stays open, echoing lines; any other GET gets what the hello-app of the
tutorial says. UDP: the line of JSON for each datagram. SCTP: an INIT ACK whose State Cookie is the
line. The line says what the pod saw:
`{"pod", "node", "protocol", "peer": [ip, port], "local": [ip, port]}`.
Each peer is also appended to `log`, one JSON object a line.

TCP and UDP sockets are dual-stack ones, as those of a Go program are.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
import time
from dataclasses import dataclass, field

from e2e.netlab.sctp import INIT, pack_init_ack, parse_sctp

__all__ = ["serve"]

_SILENCE = 1.0
"""Seconds after which a client that says nothing gets the line of JSON all the same."""


@dataclass(slots=True)
class _Connection:
    sock: socket.socket
    since: float
    data: bytes = b""
    held: bool = False


@dataclass(slots=True)
class _Server:
    pod: str
    node: str
    log: int
    selector: selectors.DefaultSelector = field(default_factory=selectors.DefaultSelector)
    waiting: dict[int, _Connection] = field(default_factory=dict)

    def seen(self, protocol: str, peer: tuple[str, int], local: tuple[str, int]) -> bytes:
        line = json.dumps(
            {
                "pod": self.pod,
                "node": self.node,
                "protocol": protocol,
                "peer": list(peer),
                "local": list(local),
            }
        ).encode()
        os.write(self.log, line + b"\n")
        return line + b"\n"

    def accept(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        sock.setblocking(False)
        connection = _Connection(sock=sock, since=time.monotonic())
        self.waiting[sock.fileno()] = connection
        self.selector.register(sock, selectors.EVENT_READ, connection)

    def drop(self, connection: _Connection) -> None:
        self.waiting.pop(connection.sock.fileno(), None)
        self.selector.unregister(connection.sock)
        connection.sock.close()

    def answer(self, connection: _Connection) -> bytes:
        return self.seen(
            "TCP", _plain(connection.sock.getpeername()), _plain(connection.sock.getsockname())
        )

    def read(self, connection: _Connection) -> None:
        try:
            data = connection.sock.recv(4096)
        except OSError:  # reset by the peer: the same as the end
            data = b""
        if not data:
            self.drop(connection)
            return
        if connection.held:
            with contextlib.suppress(OSError):  # a peer that went away is dropped at the next read
                connection.sock.send(data)
            return
        connection.data += data
        first = connection.data.split(b"\n", 1)[0].strip()
        if b"\n" not in connection.data:
            return
        with contextlib.suppress(OSError):  # as above
            if first == b"hold":
                self.waiting.pop(connection.sock.fileno(), None)
                connection.held = True
                connection.sock.send(self.answer(connection))
                return
            words = first.split()
            if len(words) >= 2 and words[0] in (b"GET", b"HEAD"):
                connection.sock.send(self.http(connection, words[0], words[1]))
            else:
                connection.sock.send(self.answer(connection))
            connection.sock.shutdown(socket.SHUT_WR)
        self.drop(connection)

    def http(self, connection: _Connection, method: bytes, path: bytes) -> bytes:
        body = self.answer(connection)
        kind = "application/json"
        if path != b"/json":
            name = self.pod.split("/", 1)[1]
            body = f"Hello, world!\nVersion: 1.0.0\nHostname: {name}\n".encode()
            kind = "text/plain; charset=utf-8"
        head = (
            f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        return head.encode() + (body if method == b"GET" else b"")

    def datagram(self, sock: socket.socket) -> None:
        try:
            _, ancillary, _, peer = sock.recvmsg(4096, 256)
        except OSError:  # an ICMP error about an earlier answer
            return
        local, control = ("", sock.getsockname()[1]), []
        for level, kind, data in ancillary:
            if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
                address, interface = struct.unpack("@16sI", data)
                local = (_unmapped(socket.inet_ntop(socket.AF_INET6, address)), local[1])
                # Answer from the address that was asked, wherever the route points.
                fixed = 0 if _mapped(address) else interface
                control = [(level, kind, struct.pack("@16sI", address, fixed))]
        line = self.seen("UDP", _plain(peer), local)
        with contextlib.suppress(OSError):  # no way back: the client times out, as it should
            sock.sendmsg([line], control, 0, peer)

    def sctp(self, sock: socket.socket, ports: frozenset[int]) -> None:
        packet, source = sock.recvfrom(65535)
        size = (packet[0] & 0x0F) * 4
        init = parse_sctp(packet[size:])
        if init is None or init.kind != INIT or init.destination_port not in ports:
            return
        local = socket.inet_ntoa(packet[16:20])
        cookie = self.seen("SCTP", (source[0], init.source_port), (local, init.destination_port))
        with contextlib.suppress(OSError):  # as for UDP
            sock.sendto(pack_init_ack(init, 0x6B657473, cookie.strip()), (source[0], 0))

    def late(self) -> float | None:
        """Answers the silent ones whose time has come; seconds until the next, if any."""
        now = time.monotonic()
        for connection in list(self.waiting.values()):
            if connection.held or connection.data or now - connection.since < _SILENCE:
                continue
            with contextlib.suppress(OSError):  # as for read
                connection.sock.send(self.answer(connection))
            self.drop(connection)
        silent = [c.since for c in self.waiting.values() if not c.data]
        return max(0.0, min(silent) + _SILENCE - now) if silent else None


def _mapped(address: bytes) -> bool:
    return address.startswith(b"\0" * 10 + b"\xff\xff")


def _unmapped(address: str) -> str:
    return address.removeprefix("::ffff:") if "." in address else address


def _plain(address: tuple[str, int]) -> tuple[str, int]:
    return _unmapped(address[0]), address[1]


def serve(pod: str, node: str, ports: tuple[tuple[str, int], ...], log: int) -> None:
    """Listens on `ports` ((protocol, port) pairs) in this network namespace, for ever."""
    server = _Server(pod=pod, node=node, log=log)
    sctp = frozenset(port for protocol, port in ports if protocol == "SCTP")
    for protocol, port in ports:
        if protocol == "SCTP":
            continue
        kind = socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM
        sock = socket.socket(socket.AF_INET6, kind | socket.SOCK_CLOEXEC)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if protocol == "TCP":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        sock.bind(("::", port))
        if protocol == "TCP":
            sock.listen(128)
        sock.setblocking(False)
        server.selector.register(sock, selectors.EVENT_READ, protocol)
    if sctp:
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 132)
        server.selector.register(raw, selectors.EVENT_READ, "SCTP")
    while True:
        for key, _ in server.selector.select(server.late()):
            ready = key.fileobj
            assert isinstance(ready, socket.socket)
            if isinstance(key.data, _Connection):
                server.read(key.data)
            elif key.data == "TCP":
                server.accept(ready)
            elif key.data == "UDP":
                server.datagram(ready)
            else:
                server.sctp(ready, sctp)
