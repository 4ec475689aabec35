"""A process in one network namespace of the lab that opens connections when asked.

`python -m e2e.netlab.prober` reads requests from stdin and writes answers to stdout, one JSON
object a line, answers in the order in which they come. Each request runs in a thread of its own.

Request: `{"id", "op": "connect"|"hold"|"talk"|"close", "protocol", "address", "port", "timeout",
"source": [ip, port]|null, "hold": id}`. Answer: `{"id", "kind", "source", "seen", "text",
"detail", "icmp"}`: `kind` is that of `probes.Result`, `seen` the pod's line of JSON (server.py).
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import secrets
import socket
import struct
import sys
import threading
import time
from typing import Any

from e2e.netlab import linux
from e2e.netlab.sctp import INIT_ACK, pack_init, parse_sctp

__all__ = ["main"]

_IP_RECVERR = 11
_IPV6_RECVERR = 25
_SO_EE_ORIGIN_ICMP = 2
_SO_EE_ORIGIN_ICMP6 = 3
_KINDS = {
    errno.ECONNREFUSED: "refused",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.ECONNRESET: "reset",
    errno.ETIMEDOUT: "timeout",
}
_held: dict[str, socket.socket] = {}


def _socket(request: dict[str, Any]) -> socket.socket:
    six = ipaddress.ip_address(request["address"]).version == 6
    family = socket.AF_INET6 if six else socket.AF_INET
    kind, protocol = {
        "TCP": (socket.SOCK_STREAM, 0),
        "UDP": (socket.SOCK_DGRAM, 0),
        "SCTP": (socket.SOCK_RAW, 132),
    }[request["protocol"]]
    sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
    sock.settimeout(request["timeout"])
    if six:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
    if request.get("source") and request["protocol"] != "SCTP":
        sock.bind(tuple(request["source"]))
    return sock


def _icmp(sock: socket.socket) -> list[int] | None:
    """Type and code of the ICMP message behind the socket's error, if one was."""
    sock.settimeout(0)
    try:
        _, ancillary, _, _ = sock.recvmsg(1024, 1024, socket.MSG_ERRQUEUE)
    except OSError:  # nothing is queued: the error came another way
        return None
    for _, _, data in ancillary:
        _, origin, kind, code = struct.unpack_from("=IBBB", data)
        if origin in (_SO_EE_ORIGIN_ICMP, _SO_EE_ORIGIN_ICMP6):
            return [kind, code]
    return None


def _exchange(sock: socket.socket, request: dict[str, Any]) -> bytes:
    """Connects, asks, and returns what came back; b"" is a timeout of a datagram protocol."""
    target = (request["address"], request["port"])
    if request["protocol"] == "SCTP":
        return _sctp(sock, request)
    sock.connect(target)
    sock.send(b"hold\n" if request["op"] == "hold" else b"probe\n")
    data = sock.recv(65536)
    while request["protocol"] == "TCP" and data and not data.endswith(b"\n"):
        more = sock.recv(65536)
        if not more:
            break
        data += more
    return data


def _sctp(sock: socket.socket, request: dict[str, Any]) -> bytes:
    source = (request.get("source") or ["", 0])[1] or 20000 + secrets.randbelow(40000)
    tag = secrets.randbelow(2**32 - 1) + 1
    sock.connect((request["address"], 0))
    sock.send(pack_init(source, request["port"], tag))
    request["source"] = [sock.getsockname()[0], source]
    deadline = time.monotonic() + request["timeout"]
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        packet = sock.recv(65536)
        answer = parse_sctp(packet[(packet[0] & 0x0F) * 4 :])
        if (
            answer
            and (answer.kind, answer.tag) == (INIT_ACK, tag)
            and answer.source_port == request["port"]
        ):
            return answer.cookie
    raise TimeoutError


def _connect(request: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {"id": request["id"]}
    sock = None
    try:
        sock = _socket(request)
        data = _exchange(sock, request)
        answer["kind"] = "delivered"
        with contextlib.suppress(ValueError):  # not one of the lab's pods
            answer["seen"] = json.loads(data)
        answer["text"] = data.decode(errors="replace")
    except TimeoutError:
        answer["kind"] = "timeout"
    except OSError as error:
        answer["kind"] = _KINDS.get(error.errno or 0, "error")
        answer["detail"] = str(error)
        answer["icmp"] = _icmp(sock) if sock else None
    if sock:
        with contextlib.suppress(OSError):  # an unbound socket has no name
            answer["source"] = request.get("source") or list(sock.getsockname()[:2])
        if request["op"] == "hold" and answer["kind"] == "delivered":
            _held[request["id"]] = sock
        else:
            sock.close()
    return answer


def _talk(request: dict[str, Any]) -> dict[str, Any]:
    """Sends a line on a held connection; delivered when the pod echoes it."""
    sock = _held[request["hold"]]
    try:
        sock.settimeout(request["timeout"])
        sock.sendall(b"still there?\n")
        kind = "delivered" if sock.recv(4096) else "reset"
    except TimeoutError:
        kind = "timeout"
    except OSError as error:
        kind = _KINDS.get(error.errno or 0, "error")
    return {"id": request["id"], "kind": kind}


def _close(request: dict[str, Any]) -> dict[str, Any]:
    _held.pop(request["hold"]).close()
    return {"id": request["id"], "kind": "closed"}


def main() -> None:
    """Until stdin ends, which ends the held connections too."""
    linux.die_with_parent()
    lock = threading.Lock()
    operations = {"connect": _connect, "hold": _connect, "talk": _talk, "close": _close}

    def run(request: dict[str, Any]) -> None:
        line = json.dumps(operations[request["op"]](request)).encode() + b"\n"
        with lock:
            os.write(1, line)

    for line in sys.stdin:
        threading.Thread(target=run, args=(json.loads(line),), daemon=True).start()


if __name__ == "__main__":
    main()
