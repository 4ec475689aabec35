"""The program's entry: runs the application and turns every error into one line and a status."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Final

import typer

from gketrace.errors import ExitCode, GketraceError
from gketrace_cli.leftovers import clear
from gketrace_cli.printable import PrintableStream, printable
from gketrace_cli.start import leave

__all__ = ["main", "run"]

INTERRUPTED: Final = 130
"""128 + SIGINT, as shells have it."""

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO})

# typer carries its own copy of click, or uses the installed one, by its version: this is the base
# of all its complaints about the command line in both.
_CommandLineError: Final[type[Exception]] = typer.BadParameter.__mro__[2]


_ended: Final[list[int]] = []
"""The signals that came; typer's exception does not tell which."""


def _interrupted() -> int:
    return 128 + _ended[0] if _ended else INTERRUPTED


def _end(number: int, _frame: FrameType | None) -> None:
    """SIGTERM or SIGHUP: ends a command as Ctrl-C does, so that nothing stays behind."""
    _ended.append(number)
    raise KeyboardInterrupt


def main() -> None:
    """Console script ``gketrace`` and ``kubectl-gketrace``."""
    name = os.path.basename(sys.argv[0])
    plain = sys.stdout, sys.stderr  # held, or their end would close the files
    sys.stdout, sys.stderr = map(PrintableStream.over, plain)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has it ignored
            signal.signal(number, _end)
    early = signal.getsignal(signal.SIGINT) is leave
    try:
        if early:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run(
            sys.argv[1:], program="kubectl gketrace" if name.startswith("kubectl-") else name
        )
    except KeyboardInterrupt:
        code = _interrupted()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it is ending, and takes three seconds at most
    clear()
    if early:
        signal.signal(signal.SIGINT, leave)
    # Not sys.exit(): threads that still wait for an agent must not delay the answer's end.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # said already, or there is nobody to say it to
            stream.flush()
    os._exit(code)


def run(arguments: Sequence[str], program: str = "gketrace") -> int:
    """Runs one command line and returns the exit status.  Never raises, never prints a traceback
    unless GKETRACE_DEBUG is set."""
    for one in arguments:
        if any(0xDC80 <= ord(character) <= 0xDCFF for character in one):  # PEP 383
            return _complain(f"error: argument {one!r} is not UTF-8", ExitCode.USAGE)
    try:
        from gketrace_cli.app import app

        result = app(list(arguments) or ["--help"], prog_name=program, standalone_mode=False)
        sys.stdout.flush()
    except _CommandLineError as error:
        return _complain(_one_line(error, program), ExitCode.USAGE)
    except GketraceError as error:
        return _complain(f"error: {error}", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:
        # The reader (head, less) has seen enough.  Python would complain once more at exit.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return ExitCode.OK
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else ExitCode.USAGE
    except Exception as error:  # noqa: BLE001  the last resort: a bug must not look like an answer
        if (why := _unwritable(error)) is not None:
            return _complain(f"error: cannot write standard output: {why}", ExitCode.PARTIAL)
        if os.environ.get("GKETRACE_DEBUG"):
            traceback.print_exc()
        line = " ".join(f"{type(error).__name__}: {error}".split())
        return _complain(
            f"internal error: {line} (please report this; GKETRACE_DEBUG=1 shows the traceback)",
            ExitCode.PARTIAL,
        )
    if result == INTERRUPTED:  # what typer makes of KeyboardInterrupt, by its version
        return _interrupted()
    if not arguments:
        return ExitCode.USAGE
    return result if isinstance(result, int) else ExitCode.OK


def _one_line(error: Exception, program: str) -> str:
    """typer's complaint about the command line."""
    text = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
    if not text:
        return f"error: no command; see '{program} --help'"
    context = getattr(error, "ctx", None)
    text = text.replace(": Value error, ", ": ")  # what typer says before a choice's complaint
    path = context.command_path if context is not None else program
    return f"error: {text[0].lower()}{text[1:].rstrip('.')}; see '{path} --help'"


def _unwritable(error: Exception) -> str | None:
    """Why the answer cannot be written; None: `error` is about something else.

    Files are named in what is said of them; only standard output is written without a name.
    """
    if isinstance(error, OSError) and error.filename is None and error.errno in _NO_ROOM:
        return error.strerror
    try:
        sys.stdout.flush()
    except OSError as unflushed:
        return unflushed.strerror
    return None


def _complain(text: str, code: int) -> int:
    with contextlib.suppress(OSError):  # nobody reads it, or there is no room for it
        print(printable(text), file=sys.stderr, flush=True)  # noqa: T201
    return int(code)
