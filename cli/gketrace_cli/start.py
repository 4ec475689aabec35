"""Where the command begins: what it needs is loaded with Ctrl-C already quiet."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["main"]

_INTERRUPTED = 130
"""As a shell reports a command that Ctrl-C ended; docs/exit-codes.md."""


def main() -> None:
    """The entry point of ``gketrace`` and ``kubectl-gketrace``."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from gketrace_cli.main import main as run

    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _leave(_signal: int, _frame: FrameType | None) -> None:
    os._exit(_INTERRUPTED)
