"""Clients that mean no good, as a process of their own.

``python -m tests.security.crowd KIND PORT COUNT SEED NODE``, with a token on stdin: prints
"ready" when COUNT connections of that KIND were made, keeps up their number where the agent lets
it, and ends when stdin does.  Its last line is what it did, as JSON.
"""

from __future__ import annotations

import json
import random
import select
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from tests.security.http2 import MALFORMED, PREFACE, SETTINGS, data, message, request
from tests.security.tokens import forged

__all__ = ["KINDS", "MIXED"]

MIXED: Final = "all of these"
_SECONDS: Final = 5.0
"""That one of them waits for the other side."""
_HELLO: Final = 100
"""Bytes of a TLS ClientHello that are sent of it."""


class _Crowd:
    def __init__(self, kind: str, port: int, seed: int, node: str, token: str) -> None:
        self._port = port
        self._node = node
        self._token = ("authorization", f"Bearer {token}")
        self.rng = random.Random(seed)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname, self._context.verify_mode = False, ssl.CERT_NONE
        self._context.set_alpn_protocols(["h2"])
        self._begin = KINDS[kind]
        self.did: Counter[str] = Counter()
        self.held: dict[int, tuple[socket.socket, bytes]] = {}
        """By descriptor: the connection, and what it still has to say, a byte at a time."""

    def tcp(self) -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self._port), _SECONDS)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    def tls(self) -> socket.socket:
        raw = self.tcp()
        try:
            return self._context.wrap_socket(raw)
        except BaseException:
            raw.close()
            raise

    def half_tls(self) -> tuple[socket.socket, bytes]:
        """A part of a ClientHello; the rest of it comes slowly."""
        raw = self.tcp()
        coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
        hello = self._context.wrap_bio(coming, going)
        with suppress(ssl.SSLWantReadError):
            hello.do_handshake()
        said = going.read()
        raw.sendall(said[:_HELLO])
        return raw, said[_HELLO:]

    def http1(self) -> tuple[socket.socket, bytes]:
        made = self.tls()
        return made, b"GET / HTTP/1.1\r\nHost: agent\r\n" + b"X: y\r\n" * 1000

    def idle(self) -> tuple[socket.socket, bytes]:
        made = self.tls()
        made.sendall(PREFACE + SETTINGS)
        return made, b""

    def slow(self) -> tuple[socket.socket, bytes]:
        """A call by somebody who may make it, whose request comes a byte at a time."""
        made = self.tls()
        made.sendall(PREFACE + SETTINGS + request(1, "ListConntrack", self._token))
        return made, data(1, message(b"\x0a\x02\x08\x01" * 500), ends=True)

    def forged(self) -> tuple[socket.socket, bytes]:
        """Calls with tokens that look right until somebody is asked, a new one each time."""
        made = self.tls()
        calls = b"".join(
            request(2 * n + 1, "GetInfo", ("authorization", f"Bearer {self._lie()}"))
            + data(2 * n + 1, message(b""), ends=True)
            for n in range(4)
        )
        made.sendall(PREFACE + SETTINGS + calls)
        return made, b""

    def _lie(self) -> str:
        return forged(self._node, account=f"default:{self.rng.getrandbits(64):x}")

    def malformed(self) -> tuple[socket.socket, bytes]:
        made = self.tls()
        made.sendall(PREFACE + SETTINGS + self.rng.choice(MALFORMED)(self.rng, self._token))
        return made, b""

    def one_more(self) -> None:
        try:
            made, rest = self._begin(self)
        except OSError as error:
            self.did[f"refused: {type(error).__name__}"] += 1
            return
        self.did["connections"] += 1
        made.setblocking(False)
        self.held[made.fileno()] = made, rest

    def drop(self, number: int) -> None:
        made, _ = self.held.pop(number)
        made.close()

    def look(self) -> None:
        """Reads what came; what the agent has ended is gone."""
        poll = select.poll()
        for number in self.held:
            poll.register(number, select.POLLIN)
        for number, _ in poll.poll(0):
            made, _ = self.held[number]
            try:
                while got := made.recv(65536):
                    self.did["bytes"] += len(got)
                self.did["ended by the agent"] += 1
            except (ssl.SSLWantReadError, BlockingIOError):
                continue
            except OSError:
                self.did["ended by the agent"] += 1
            self.drop(number)

    def trickle(self) -> None:
        """A byte of each that has one to send."""
        for number, (made, rest) in list(self.held.items()):
            if rest:
                try:
                    made.send(rest[:1])
                    self.held[number] = made, rest[1:]
                except (ssl.SSLWantWriteError, BlockingIOError):
                    continue
                except OSError:
                    self.did["ended by the agent"] += 1
                    self.drop(number)


def _plain(crowd: _Crowd) -> tuple[socket.socket, bytes]:
    return crowd.tcp(), b""


def _tls(crowd: _Crowd) -> tuple[socket.socket, bytes]:
    return crowd.tls(), b""


def _mixed(crowd: _Crowd) -> tuple[socket.socket, bytes]:
    return crowd.rng.choice(_EACH)(crowd)


KINDS: Final[dict[str, Callable[[_Crowd], tuple[socket.socket, bytes]]]] = {
    "plain TCP": _plain,
    "half-open TLS": _Crowd.half_tls,
    "TLS, no HTTP/2": _tls,
    "TLS, HTTP/1 slowly": _Crowd.http1,
    "HTTP/2, no requests": _Crowd.idle,
    "requests slowly": _Crowd.slow,
    "forged tokens": _Crowd.forged,
    "malformed": _Crowd.malformed,
    MIXED: _mixed,
}
_EACH: Final = tuple(begin for kind, begin in KINDS.items() if kind != MIXED)
_SHORT_LIVED: Final = frozenset({"malformed", "forged tokens", MIXED})
"""They hang up after a moment and come again."""


def main() -> None:
    kind, port, count, seed, node = sys.argv[1:]
    crowd = _Crowd(kind, int(port), int(seed), node, sys.stdin.readline().strip())
    most = int(count)
    ready, trickled = False, time.monotonic()
    while not select.select([sys.stdin], [], [], 0.01 if len(crowd.held) >= most else 0)[0]:
        # Some at a time, so that those that are there go on with what they do.
        for _ in range(min(50, most - len(crowd.held))):
            crowd.one_more()
        crowd.look()
        if time.monotonic() - trickled > 0.5:
            trickled = time.monotonic()
            crowd.trickle()
            if kind in _SHORT_LIVED:
                for number in list(crowd.held)[: len(crowd.held) // 20]:
                    crowd.drop(number)
        crowd.did["most at once"] = max(crowd.did["most at once"], len(crowd.held))
        # What the agent ends at once is never held.
        if not ready and crowd.did["connections"] >= most:
            ready = True
            print("ready", flush=True)
    for number in list(crowd.held):
        crowd.drop(number)
    print(json.dumps(dict(crowd.did)), flush=True)


if __name__ == "__main__":
    main()
