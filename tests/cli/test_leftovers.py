"""What a command makes beside its answer is gone when it ends, whatever ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gketrace.errors import ExitCode

BIN = Path(sys.executable).parent
META = {"namespace": "gketrace", "name": "gketrace-agent-x", "uid": "1"}
LISTS = {
    "nodes": {"metadata": {"name": "n1"}, "spec": {}, "status": {}},
    "pods": {
        "metadata": {**META, "labels": {"app.kubernetes.io/name": "gketrace-agent"}},
        "spec": {
            "nodeName": "n1",
            "containers": [{"name": "a", "ports": [{"name": "grpc", "containerPort": 50051}]}],
        },
        "status": {
            "phase": "Running",
            "podIP": "10.0.0.1",
            "podIPs": [{"ip": "10.0.0.1"}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    },
}


@contextmanager
def silent_agents() -> Iterator[tuple[str, threading.Event]]:
    """An API server that knows of an agent, and does not answer for it; its URL, and when
    somebody asks."""
    asked, over = threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if "portforward" in self.path:
                asked.set()
                over.wait(60)
                return
            item = LISTS.get(self.path.partition("?")[0].rsplit("/", 1)[-1])
            body = json.dumps({"kind": "List", "items": [item] if item else []}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()


def ask(folder: Path, url: str, temporary: Path) -> subprocess.Popen[str]:
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(
        f"{{current-context: c, clusters: [{{name: c, cluster: {{server: '{url}'}}}}],"
        "users: [{name: u, user: {token: t}}],"
        "contexts: [{name: c, context: {cluster: c, user: u}}]}"
    )
    words = ["capture", "node/n1", "--plaintext", "--kubeconfig", str(kubeconfig)]
    return subprocess.Popen(
        ["env", "--default-signal", str(BIN / "gketrace"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_while_agents_are_reached(tmp_path: Path, number: signal.Signals) -> None:
    # A short name: it has sockets in it.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, silent_agents() as (url, asked):
        temporary = Path(folder)
        process = ask(tmp_path, url, temporary)
        with process:
            try:
                assert asked.wait(60), process.communicate(timeout=1)
                made = list(temporary.iterdir())
                process.send_signal(number)
                _, err = process.communicate(timeout=60)
            finally:
                process.kill()
        left = list(temporary.iterdir())
    assert process.returncode == 128 + number, err
    assert "interrupted before a capture began" in err
    assert [one.name.startswith("gketrace-") for one in made] == [True]
    assert not left


def test_a_name_too_long_for_a_socket(tmp_path: Path) -> None:
    temporary = tmp_path / ("x" * 100)
    temporary.mkdir()
    with silent_agents() as (url, _), ask(tmp_path, url, temporary) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.UNAVAILABLE
    assert "AF_UNIX path too long" in err
    assert "set TMPDIR to a folder with a shorter name" in err
    assert not list(temporary.iterdir())


def test_nothing_is_made_once_it_ends() -> None:
    """In a process of its own: what has ended stays so."""
    code = """if True:
        from pathlib import Path
        from gketrace.errors import UnavailableError
        from gketrace_cli import leftovers
        first, second = (leftovers.make_folder("gketrace-test-") for _ in range(2))
        (first / "file").write_text("x")
        leftovers.remove_folder(second)
        leftovers.remove_folder(second)
        assert (first.exists(), second.exists()) == (True, False)
        stopped = []
        leftovers.keep(lambda: [1], stopped.append)
        leftovers.clear()
        leftovers.clear()
        assert (first.exists(), stopped) == (False, [[1]])
        try:
            leftovers.make_folder("gketrace-test-")
        except UnavailableError:
            print("refused")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
