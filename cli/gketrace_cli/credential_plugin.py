"""A credential plugin of a kubeconfig, run to its end, which it may not have.

As with kubectl, a plugin that somebody at a terminal has to answer speaks to the terminal: what it
reads is theirs, and what it says on standard error is shown as it comes (a login's address and
code).  Otherwise it reads nothing, and what it said is told when it fails.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Final

from gketrace.errors import UnavailableError

__all__ = ["Done", "run_plugin"]

_SECONDS: Final = 60.0
_LOGIN: Final = 600.0
"""Where somebody may have to log in first."""
_MOST: Final = 1 << 20
"""Bytes of each of its outputs: a token and a certificate chain are some kilobytes."""
_CHUNK: Final = 1 << 16
_LINGER: Final = 0.2
"""Seconds for the last of its output once it has ended: what it started may hold the pipe open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What came of it."""

    status: int
    out: bytes
    err: bytes
    shown: bool
    """It spoke to the terminal, and `err` is empty."""


def run_plugin(
    argv: Sequence[str], environment: Mapping[str, str], name: str, seconds: float = 0.0
) -> Done:
    """`name`: what it is called in errors; `seconds`: what it may take, 0: as is usual.

    Raises `OSError` when it cannot be started; `UnavailableError` when it does not end, or says far
    more than any plugin does.
    """
    asks = sys.stdin is not None and sys.stdin.isatty()
    seconds = seconds or (_LOGIN if asks else _SECONDS)
    process = subprocess.Popen(
        argv,
        env=environment,
        stdin=None if asks else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if asks else subprocess.PIPE,
    )
    outputs = [one for one in (process.stdout, process.stderr) if one is not None]
    try:
        said = _read(process, outputs, name, time.monotonic() + seconds, seconds)
    finally:
        process.kill()  # what has ended is not met by it
        for one in outputs:
            one.close()
        status = process.wait()
    return Done(status=status, out=said[0], err=b"" if asks else said[1], shown=asks)


def _read(
    process: subprocess.Popen[bytes],
    outputs: Sequence[IO[bytes]],
    name: str,
    until: float,
    seconds: float,
) -> list[bytes]:
    """What it says until it has ended."""
    said = [bytearray() for _ in outputs]
    with selectors.DefaultSelector() as selector:
        for number, one in enumerate(outputs):
            selector.register(one, selectors.EVENT_READ, number)
        ended = 0.0
        while selector.get_map():
            for key, _ in selector.select(timeout=_LINGER):
                data = os.read(key.fd, _CHUNK)
                if not data:
                    selector.unregister(key.fileobj)
                said[key.data] += data
                if len(said[key.data]) > _MOST:
                    raise UnavailableError(
                        f"the credential plugin {name} printed more than {_MOST >> 20} MiB"
                    )
            now = time.monotonic()
            if not ended and process.poll() is not None:
                ended = now
            if ended and now - ended > _LINGER:
                break
            if not ended and now > until:
                raise _endless(name, seconds)
    try:
        process.wait(max(until - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        raise _endless(name, seconds) from None
    return [bytes(one) for one in said]


def _endless(name: str, seconds: float) -> UnavailableError:
    return UnavailableError(f"the credential plugin {name} did not finish in {seconds:.0f} s")
