"""What clients of /metrics that mean no good, or speak no HTTP, get."""

from __future__ import annotations

import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge

from gketrace_agent import metrics_http
from gketrace_agent.access.alarms import Alarms
from gketrace_agent.metrics_http import ScrapeServer
from gketrace_agent.tls import Certificate
from gketrace_cli.certificates import Issued, issue


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("tls")
    return made


@pytest.fixture(scope="module")
def issued(folder: Path) -> Issued:
    made = issue(["localhost"])
    (folder / "crt").write_text(made.certificate)
    (folder / "key").write_text(made.key)
    return made


@pytest.fixture(scope="module")
def certificate(folder: Path, issued: Issued) -> Certificate:
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


def _scrape(port: int, authority: str = "") -> str:
    """Believes that authority; none: anybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if authority:
        context.load_verify_locations(cadata=authority)
    else:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with urllib.request.urlopen(
        f"https://localhost:{port}/metrics", timeout=5, context=context
    ) as reply:
        return str(reply.read().decode())


def _not_believed(port: int, authority: str) -> bool:
    try:
        _scrape(port, authority)
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLCertVerificationError)
    return False


def test_scrapers_can_check_who_answers(port: int, issued: Issued) -> None:
    assert "one 1.0" in _scrape(port, issued.authority)
    assert _not_believed(port, issue(["localhost"]).authority)
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that is what is tried
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("localhost", port), 5) as client,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        old.wrap_socket(client)


def test_a_renewed_certificate_is_taken_up(port: int, issued: Issued, folder: Path) -> None:
    renewed = issue(["localhost"])
    try:
        (folder / "crt").write_text(renewed.certificate)
        # Half of it: the old pair stays.
        assert "one 1.0" in _scrape(port, issued.authority)
        (folder / "key").write_text(renewed.key)
        assert "one 1.0" in _scrape(port, renewed.authority)
        assert _not_believed(port, issued.authority)
        (folder / "key").unlink()
        assert "one 1.0" in _scrape(port, renewed.authority)
    finally:
        (folder / "crt").write_text(issued.certificate)
        (folder / "key").write_text(issued.key)
    assert "one 1.0" in _scrape(port, issued.authority)


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
