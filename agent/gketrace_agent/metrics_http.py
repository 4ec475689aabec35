"""The HTTP server behind /metrics: bounded in connections and in time, quiet about bad clients."""

from __future__ import annotations

import io
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from gketrace_agent.access.alarms import Alarms
from gketrace_agent.log import logger

if TYPE_CHECKING:
    from gketrace_agent.tls import Certificate

__all__ = ["ScrapeServer"]

_CONNECTIONS: Final = 64
"""At once; a thread each.  A node has two or three scrapers."""
_SILENCE: Final = 10.0
"""Seconds that a client may say nothing."""
_ALARMS: Final = Alarms(20.0)
"""After so many seconds a connection is cut, whatever it does: a byte now and then is no scrape."""


class ScrapeServer(ThreadingWSGIServer):
    """Made, it listens; `serve_forever` serves.  Raises OSError when the address is taken."""

    request_queue_size = 128

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, certificate: Certificate | None
    ) -> None:
        """`certificate`: over TLS with it; None: in the clear."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0][0]
        self._certificate = certificate
        self._slots = threading.BoundedSemaphore(_CONNECTIONS)
        super().__init__((str(found[0][4][0]), port), _Handler)
        self.set_app(make_wsgi_app(registry))

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, peer = super().get_request()
        connection.settimeout(_SILENCE)
        if self._certificate is None:
            return connection, peer
        # The handshake is made in the connection's own thread, by its first read.
        context = self._certificate.context()
        return (
            context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False),
            peer,
        )

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            logger.debug("metrics: %s: refused, %s connections", client_address, _CONNECTIONS)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        call_off = _ALARMS.set(lambda: _cut(request))
        try:
            super().process_request_thread(request, client_address)
        finally:
            call_off()
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Not socketserver's traceback on stderr: whoever reaches the port could fill the log."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):  # the client hung up, spoke no TLS, was cut off
            why = error.strerror or error
            logger.debug("metrics: %s: %s: %s", client_address, type(error).__name__, why)
        else:
            logger.error("metrics: %s", client_address, exc_info=error)


def _cut(request: socket.socket) -> None:
    try:
        # Not SSLSocket's own method, which takes the session from under the thread that reads.
        socket.socket.shutdown(request, socket.SHUT_RDWR)
    except OSError as error:
        logger.debug("metrics: it was over already: %s", error.strerror)


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("metrics: %s: " + format, self.client_address, *args)

    def get_stderr(self) -> Any:
        return _Errors()


class _Errors(io.StringIO):
    """What wsgiref writes of a failure, a traceback, becomes one line of the log."""

    def flush(self) -> None:
        lines = self.getvalue().split("\n")
        self.seek(0)
        self.truncate()
        if said := next((line for line in reversed(lines) if line.strip()), ""):
            logger.warning("metrics: a scrape failed: %s", said)
