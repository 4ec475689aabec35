"""Where the command begins: what it needs is loaded with Ctrl-C already quiet."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

__all__ = ["main"]

_INTERRUPTED = 130
"""As a shell reports a command that Ctrl-C ended; docs/exit-codes.md."""


def main() -> None:
    """The entry point of ``gketrace`` and ``kubectl-gketrace``."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    _fill_standard_streams()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its errors are told, in one line
    from gketrace_cli.main import main as run

    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _fill_standard_streams() -> None:
    """A closed one (``>&-``) would be None, and its number the next file's or socket's."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # Standard output is opened for reading, so that to write an answer fails.
            os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def _leave(_signal: int, _frame: FrameType | None) -> None:
    os._exit(_INTERRUPTED)
