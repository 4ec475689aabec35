"""The certificate of TCP listeners: read from files, and read again when they change."""

from __future__ import annotations

import ssl
import threading
from pathlib import Path
from typing import Any, Final

import grpc

from gketrace.errors import UnavailableError
from gketrace_agent.log import logger

__all__ = ["Certificate"]


class Certificate:
    """A certificate chain and its key, both PEM, as a kubelet mounts a Secret of type TLS.

    The files are looked at for each new connection.  A pair that does not fit together (half of it
    written, say) is said in the log, and the last one that did stays in use.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises `UnavailableError` when the files cannot be used."""
        self._certificate: Final = certificate
        self._key: Final = key
        self._lock = threading.Lock()
        try:
            self._stamp = self._look()
            self._pair = self._read()
        except (OSError, ssl.SSLError) as error:
            raise UnavailableError(
                f"cannot use the certificate {certificate} with the key {key}: {_why(error)}"
            ) from None
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC, which asks `_changed` before each handshake."""
        return grpc.dynamic_ssl_server_credentials(self._configuration(), self._changed)

    def context(self) -> ssl.SSLContext:
        """For other servers; ask for it before each handshake."""
        self._changed()
        return self._context

    def _configuration(self) -> Any:
        return grpc.ssl_server_certificate_configuration([self._pair])

    def _changed(self) -> Any:
        """The new configuration; None: nothing changed."""
        with self._lock:
            try:
                stamp = self._look()
                if stamp == self._stamp:
                    return None
                self._stamp = stamp
                pair = self._read()
                # Handshakes under way keep what they began with.
                self._context.load_cert_chain(self._certificate, self._key)
            except (OSError, ssl.SSLError) as error:
                logger.error(
                    "the new certificate cannot be used, the old one stays: %s", _why(error)
                )
                return None
            self._pair = pair
            logger.info("certificate read again", extra={"fields": {"file": str(self._key)}})
            return self._configuration()

    def _look(self) -> tuple[object, ...]:
        stats = (self._certificate.stat(), self._key.stat())
        return tuple((s.st_mtime_ns, s.st_size, s.st_ino) for s in stats)

    def _read(self) -> tuple[bytes, bytes]:
        """Key and chain.  Raises when they do not belong together."""
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._certificate, self._key)
        return self._key.read_bytes(), self._certificate.read_bytes()


def _why(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").replace("_", " ").lower()
    return str(error.strerror or error)
