"""Where the command begins: what it needs is loaded with Ctrl-C already quiet.

What is imported here is loaded before, so it is only what Python has loaded by itself.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal loads enum, which takes as long as Python
import os
import sys

__all__ = ["leave", "main"]

_INTERRUPTED = 130
"""As a shell reports a command that Ctrl-C ended; docs/exit-codes.md."""


def main() -> None:
    """The entry point of ``gketrace`` and ``kubectl-gketrace``."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, leave)
    _fill_standard_streams()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its errors are told, in one line
    from gketrace_cli.main import main as run

    run()


def _fill_standard_streams() -> None:
    """A closed one (``>&-``) would be None, and its number the next file's or socket's."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # Standard output is opened for reading, so that to write an answer fails.
            os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def leave(_number: int, _frame: object) -> None:
    """Handles Ctrl-C before there is anything to end in order, and after that."""
    os._exit(_INTERRUPTED)
