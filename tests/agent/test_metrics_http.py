"""What clients of /metrics that mean no good, or speak no HTTP, get."""

from __future__ import annotations

import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge

from gketrace_agent import metrics_http
from gketrace_agent.access.alarms import Alarms
from gketrace_agent.metrics_http import ScrapeServer
from gketrace_agent.tls import Certificate
from gketrace_cli.certificates import issue


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    folder: Path = tmp_path_factory.mktemp("tls")
    issued = issue(["localhost"])
    (folder / "crt").write_text(issued.certificate)
    (folder / "key").write_text(issued.key)
    return Certificate(folder / "crt", folder / "key")


@pytest.fixture
def port(certificate: Certificate) -> Iterator[int]:
    registry = CollectorRegistry()
    Gauge("one", "One.", registry=registry).set(1)
    server = ScrapeServer("127.0.0.1", 0, registry, certificate)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield int(server.server_port)
    server.shutdown()
    server.server_close()
    thread.join(5)


def _scrape(port: int) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with urllib.request.urlopen(
        f"https://127.0.0.1:{port}/metrics", timeout=5, context=context
    ) as reply:
        return str(reply.read().decode())


def test_plaintext_and_noise_leave_no_traceback(
    port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    for said in (b"GET /metrics HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00", b""):
        client = socket.create_connection(("127.0.0.1", port), 5)
        with closing(client), suppress(OSError):  # the server may end it before we are done
            client.sendall(said)
            client.shutdown(socket.SHUT_WR)
            while client.recv(4096):
                pass
    assert "one 1.0" in _scrape(port)
    assert capfd.readouterr() == ("", "")


def test_connections_are_bounded(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends a byte now and then is cut off, and a good one gets in again."""
    monkeypatch.setattr(metrics_http, "_ALARMS", Alarms(0.5))
    before = threading.active_count()
    idle = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(200)]
    try:
        for client in idle:
            client.settimeout(5)
        deadline = time.monotonic() + 20
        while True:
            try:
                assert "one 1.0" in _scrape(port)
                break
            except OSError:  # all places are taken
                assert time.monotonic() < deadline
                assert threading.active_count() <= before + metrics_http._CONNECTIONS + 1
        for client in idle:
            assert client.recv(1) == b""
    finally:
        for client in idle:
            client.close()
