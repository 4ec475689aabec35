"""Ways to a pod's port through the API server, as local unix sockets that gRPC can dial.

    with PortForwards(api) as forwards:
        ways = forwards.open([Target(namespace="gketrace", pod="agent-x", port=50051), ...])
        channel = grpc.insecure_channel(ways[0].address)      # "unix:/tmp/gketrace-.../0.sock"

Each connection to the local socket is one WebSocket to pods/portforward (subprotocol
v4.channel.k8s.io; k8s.io/cri-streaming portforward/websocket.go), so a way that broke works again
at the next connection.  `open` makes the first WebSocket of each way beforehand, all at the same
time: a pod that is gone or a missing permission is known at once.  A port that refuses is known
only when the kubelet says so on the error channel, perhaps after the first bytes went out; the
local connection then ends, and `Way.error` says why.

Threads: one for the accepting and relaying of all ways, and a short one per dial.  Why not
`kubernetes.stream`: a thread per connection, no back-pressure, no error until the socket ends, and
0.5 s of import.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gketrace.errors import GketraceError, UnavailableError

from .apiserver import ApiServer
from .leftovers import make_folder, remove_folder
from .portforward_session import Session, Target, dial

__all__ = ["PortForwards", "Target", "Way"]

_DIALS_AT_ONCE = 32


class Way:
    """The way to one target.  Made by `PortForwards.open`."""

    def __init__(self, target: Target, path: Path, listener: socket.socket) -> None:
        self.target: Final = target
        self.path: Final = path
        """The unix socket, of mode 0600 in a folder of mode 0700."""
        self.listener: Final = listener
        self.ready: Session | None = None
        """A WebSocket made beforehand, for the next local connection."""
        self._lock = threading.Lock()
        self._error: GketraceError | None = None

    @property
    def address(self) -> str:
        """The gRPC target."""
        return f"unix:{self.path}"

    @property
    def error(self) -> GketraceError | None:
        """Why the last connection was not made, or how it ended; None while bytes come back."""
        with self._lock:
            return self._error

    def check(self) -> None:
        """Raises: `error`, if there is one."""
        if (error := self.error) is not None:
            raise error

    def note(self, error: GketraceError | None) -> None:
        with self._lock:
            self._error = error


class PortForwards:
    """All ways of one command.  `close` ends every connection, thread and file."""

    def __init__(self, api: ApiServer, *, timeout: float = 10.0) -> None:
        self._api = api
        self._timeout = timeout
        """Seconds until a port-forward must be answered, once connected."""
        self._folder = make_folder("gketrace-")
        self._lock = threading.Lock()
        self._ways: list[Way] = []
        self._dialled: list[tuple[Way, Session]] = []
        self._dials: set[threading.Thread] = set()
        self._dialling: set[socket.socket] = set()
        """Connected sockets that wait for the API server's answer."""
        self._closing = False
        self._wake_out, self._wake_in = socket.socketpair()
        for end in (self._wake_out, self._wake_in):
            end.setblocking(False)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PortForwards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, targets: Sequence[Target]) -> tuple[Way, ...]:
        """A way to each target, in order.  One that cannot be made has `error` set.

        Its socket exists all the same: the next connection to it tries again.
        Raises: UnavailableError when closed, or when no local socket can be made.
        """
        ways = tuple(self._listen(target) for target in targets)
        failures: list[BaseException] = []

        def first(queue: list[Way]) -> None:
            while queue:
                try:
                    way = queue.pop()
                except IndexError:  # another thread took the last one
                    return
                try:
                    way.ready = self._dial(way)
                except BaseException as error:  # noqa: BLE001  raised again below
                    failures.append(error)

        queue = list(reversed(ways))
        threads = [
            threading.Thread(target=first, args=(queue,), name="port-forward-open")
            for _ in range(min(len(ways), _DIALS_AT_ONCE))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with self._lock:
            self._ways += ways
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="port-forward", daemon=True)
                self._thread.start()
        self._wake()
        if failures:
            raise failures[0]
        return ways

    def close(self) -> None:
        """May be called twice."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._wake()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            dials = list(self._dials)
            for sock in self._dialling:
                # Not SSLSocket.shutdown: that would take the TLS object from the dialling thread.
                with contextlib.suppress(OSError):  # it may have ended by itself
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for dialling in dials:
            dialling.join()
        with self._lock:
            dialled, self._dialled = self._dialled, []
        for _, session in dialled:
            session.close()
        for way in self._ways:
            way.listener.close()
            if way.ready is not None:
                way.ready.close()
        self._wake_in.close()
        self._wake_out.close()
        remove_folder(self._folder)

    # dialling

    def _listen(self, target: Target) -> Way:
        with self._lock:
            if self._closing:
                raise UnavailableError("the port-forwards are closed")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            fd, name = tempfile.mkstemp(dir=self._folder, suffix=".sock")
            os.close(fd)
            os.unlink(name)
            listener.bind(name)
            os.chmod(name, 0o600)
            listener.listen(128)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            # Without a number: Python's own complaint about a path of more than 107 bytes.
            hint = "" if error.errno else "set TMPDIR to a folder with a shorter name"
            raise UnavailableError(
                f"cannot make a local socket for {target}: {error.strerror or error}", hint=hint
            ) from error
        return Way(target, Path(name), listener)

    def _dial(self, way: Way) -> Session | None:
        """A new session, or None with `way.error` set."""
        opened: list[socket.socket] = []

        def remember(sock: socket.socket) -> None:
            opened.append(sock)
            with self._lock:
                if self._closing:
                    raise UnavailableError("the port-forwards are closed")
                self._dialling.add(sock)

        try:
            session = dial(self._api, way.target, timeout=self._timeout, opened=remember)
        except GketraceError as error:
            way.note(error)
            return None
        finally:
            with self._lock:
                self._dialling.difference_update(opened)
        way.note(None)
        return session

    def _dial_for(self, way: Way, local: socket.socket) -> None:
        """In a thread of its own: dial, then hand over to the relaying thread."""
        session: Session | None = None
        try:
            session = self._dial(way)
            if session is None:
                local.close()  # who connected sees the end, and `way.error` says why
                return
            session.attach(local)
            with self._lock:
                self._dialled.append((way, session))
        except BaseException:
            local.close()
            if session is not None:
                session.close()
            raise
        finally:
            with self._lock:
                self._dials.discard(threading.current_thread())
            self._wake()

    # relaying

    def _wake(self) -> None:
        # Full: it will wake anyway.  Closed: nobody is left to wake.
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_in.send(b".")

    def _accept(self, way: Way) -> Session | None:
        try:
            local, _ = way.listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            way.note(UnavailableError(f"cannot accept for {way.target}: {error.strerror}"))
            time.sleep(0.05)  # out of file descriptors: poll would report it again at once
            return None
        local.setblocking(False)
        session, way.ready = way.ready, None
        if session is not None and not session.ended:
            session.attach(local)
            return session
        if session is not None:
            session.close()
        thread = threading.Thread(
            target=self._dial_for, args=(way, local), name="port-forward-dial", daemon=True
        )
        with self._lock:
            self._dials.add(thread)
        thread.start()
        return None

    def _run(self) -> None:
        sessions: list[tuple[Way, Session]] = []
        try:
            while True:
                with self._lock:
                    if self._closing:
                        return
                    ways = list(self._ways)
                    sessions += self._dialled
                    self._dialled = []
                self._turn(ways, sessions)
        finally:
            for _, session in sessions:
                session.close()

    def _turn(self, ways: list[Way], sessions: list[tuple[Way, Session]]) -> None:
        """Wait for something to happen and handle it; `sessions` is kept up to date."""
        poller = select.poll()
        poller.register(self._wake_out, select.POLLIN)
        by_listener = {way.listener.fileno(): way for way in ways}
        for fd in by_listener:
            poller.register(fd, select.POLLIN)
        waiting = [(way, way.ready) for way in ways if way.ready and not way.ready.ended]
        watched = [*sessions, *waiting]
        at_once = False
        for _, session in watched:
            for fd, events in session.interests():
                poller.register(fd, events)
            at_once = at_once or session.buffered()
        ready = dict(poller.poll(0 if at_once else None))
        if self._wake_out.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._wake_out.recv(4096)
        for way, session in watched:
            if session.buffered() or any(fd in ready for fd in session.fds()):
                session.step(ready)
                if session.answered:
                    way.note(None)
            if session.ended:
                if session.error is not None:
                    way.note(session.error)
                session.close()
        sessions[:] = [(way, session) for way, session in sessions if not session.ended]
        for fd, way in by_listener.items():
            if fd in ready:
                started = self._accept(way)
                if started is not None:
                    sessions.append((way, started))
