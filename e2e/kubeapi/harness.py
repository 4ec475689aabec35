"""For tests: a running API server, and a pod that is a process in a network namespace."""

from __future__ import annotations

import json
import select
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = ["KubeApi", "Pod", "running_pod", "running_server", "until"]

_ROOT = Path(__file__).resolve().parents[2]


def until(what: Callable[[], Any], *, seconds: float = 30.0) -> Any:
    """Poll ``what`` until it is true, and return it. Raises: AssertionError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.01)
    return value


def _read_line(stream: IO[bytes], seconds: float) -> str:
    if not select.select([stream], [], [], seconds)[0]:
        raise AssertionError(f"nothing was printed within {seconds} s")
    return stream.readline().decode().strip()


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()


class KubeApi:
    """A running server and its admin's view of it."""

    def __init__(self, process: subprocess.Popen[bytes], kubeconfig: Path) -> None:
        self.process = process
        self.kubeconfig = kubeconfig
        document = json.loads(kubeconfig.read_text())
        self.url: str = document["clusters"][0]["cluster"]["server"]
        self.tokens: dict[str, str] = {u["name"]: u["user"]["token"] for u in document["users"]}
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname = False
        self._context.verify_mode = ssl.CERT_NONE

    @property
    def admin_token(self) -> str:
        return next(iter(self.tokens.values()))

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = "",
        content_type: str = "application/json",
    ) -> tuple[int, Any]:
        """Status and JSON of one request; ``token`` is the admin's by default, None sends none."""
        request = urllib.request.Request(self.url + path, method=method)
        if token is not None:
            request.add_header("Authorization", f"Bearer {token or self.admin_token}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", content_type)
        try:
            with urllib.request.urlopen(request, context=self._context, timeout=10) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def open_count(self, what: str) -> int:
        count: int = self.call("GET", "/lab/state")[1]["open"].get(what, 0)
        return count


@contextmanager
def running_server(state_dir: Path, **config: Any) -> Iterator[KubeApi]:
    """A server of its own process, with ``config`` (see ``config``) and a state directory."""
    state_dir.mkdir(parents=True, exist_ok=True)
    path = state_dir / "kubeapi.json"
    path.write_text(json.dumps({"state_dir": str(state_dir), **config}))
    process = subprocess.Popen(
        [sys.executable, "-m", "e2e.kubeapi", "--config", str(path)],
        stdout=subprocess.PIPE,
        cwd=_ROOT,
    )
    try:
        assert process.stdout
        word, _, kubeconfig = _read_line(process.stdout, 60).partition(" ")
        assert word == "ready"
        yield KubeApi(process, Path(kubeconfig))
    finally:
        _stop(process)


class Pod:
    """A process in a network namespace of its own, which ends with it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid

    def line(self, seconds: float = 30.0) -> str:
        """The next line that it prints."""
        assert self._process.stdout
        return _read_line(self._process.stdout, seconds)

    def stop(self) -> None:
        _stop(self._process)


@contextmanager
def running_pod(servers: Sequence[str]) -> Iterator[Pod]:
    """``servers`` as ``echo`` takes them, in a new network namespace with ``lo`` up."""
    process = subprocess.Popen(
        [
            *("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"),
            *(sys.executable, "-u", "-m", "e2e.kubeapi.echo", *servers),
        ],
        stdout=subprocess.PIPE,
        cwd=_ROOT,
    )
    pod = Pod(process)
    try:
        assert pod.line() == "up"
        yield pod
    finally:
        _stop(process)
