"""Real traffic from anywhere in the lab: the asking side of `prober`."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from e2e.netlab.errors import LabError
from e2e.netlab.targets import Target

__all__ = ["Hold", "Kind", "Prober", "Result"]

Kind = Literal["delivered", "refused", "timeout", "unreachable", "reset", "error"]
Address = tuple[str, int]
_SECONDS = 20.0
"""How long a prober may take over the probe's own timeout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of one connection.

    `source` is the socket's own address; `peer_seen` is the source that the pod saw, `local` the
    address at which the pod was reached. `pod` is "namespace/name", None when what answered is not
    a pod of the lab (`text` is what it said). `icmp` is (type, code) of the message behind
    `refused` or `unreachable`; None with `refused` is a TCP reset.
    """

    kind: Kind
    pod: str | None = None
    node: str | None = None
    peer_seen: Address | None = None
    local: Address | None = None
    source: Address | None = None
    icmp: tuple[int, int] | None = None
    text: str = ""
    detail: str = ""


def _result(answer: dict[str, Any]) -> Result:
    seen = answer.get("seen") or {}

    def address(value: Any) -> Address | None:
        return (str(value[0]), int(value[1])) if value else None

    return Result(
        kind=answer["kind"],
        pod=seen.get("pod"),
        node=seen.get("node"),
        peer_seen=address(seen.get("peer")),
        local=address(seen.get("local")),
        source=address(answer.get("source")),
        icmp=tuple(answer["icmp"]) if answer.get("icmp") else None,
        text=answer.get("text", ""),
        detail=answer.get("detail", ""),
    )


class Prober:
    """One process in the network namespace of `target`, in `cgroup`; thread-safe."""

    def __init__(self, target: Target, cgroup: Path) -> None:
        root = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(
            target.network_argv([sys.executable, "-m", "e2e.netlab.prober"], cgroup),
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._title = target.title
        self._ids = itertools.count()
        self._waiting: dict[str, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            with self._lock:
                future = self._waiting.pop(answer["id"])
            future.set_result(answer)
        with self._lock:
            lost, self._waiting = self._waiting, {}
        for future in lost.values():
            future.set_exception(LabError(f"{self._title}: the prober ended"))

    def ask(self, **request: Any) -> tuple[str, Future[dict[str, Any]]]:
        """Sends a request; its id and the answer to come."""
        assert self._process.stdin is not None
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            number = str(next(self._ids))
            self._waiting[number] = future
            try:
                self._process.stdin.write(json.dumps({"id": number, **request}) + "\n")
            except (OSError, ValueError) as error:
                raise LabError(f"{self._title}: the prober ended") from error
        return number, future

    def start(
        self,
        address: str,
        port: int,
        protocol: str,
        timeout: float,
        source: Address | None,
        *,
        hold: bool = False,
    ) -> tuple[str, Future[dict[str, Any]]]:
        return self.ask(
            op="hold" if hold else "connect",
            address=address,
            port=port,
            protocol=protocol,
            timeout=timeout,
            source=source,
        )

    def close(self) -> None:
        """Ends the process and its held connections."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()
        self._process.stdout.close()


def finish(future: Future[dict[str, Any]], timeout: float) -> Result:
    return _result(future.result(timeout + _SECONDS))


class Hold:
    """An open connection to a pod; closed by `close` or at the end of a `with`."""

    def __init__(self, prober: Prober, number: str, result: Result) -> None:
        self.result = result
        self._prober = prober
        self._number = number

    def alive(self, timeout: float = 1.0) -> bool:
        """True when the pod echoes a line."""
        _, future = self._prober.ask(op="talk", hold=self._number, timeout=timeout)
        return finish(future, timeout).kind == "delivered"

    def close(self) -> None:
        _, future = self._prober.ask(op="close", hold=self._number)
        future.result(_SECONDS)

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
