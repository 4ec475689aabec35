"""The one exception tree, and the one table from it to gRPC status and exit code.

    GketraceError
    ├── UsageError            the caller asked for something that makes no sense
    ├── ParseError            what the cluster or a node's tool says does not parse: where, and it
    ├── NotFoundError         the named pod, service, node, port or namespace does not exist
    ├── ForbiddenError        the caller may not see or do this
    │   ├── ReadOnlyError     the agent was told to change nothing, whoever asks
    │   └── UnauthenticatedError  nobody that the cluster knows, or not for this agent
    ├── UnavailableError      nobody answered: API server, agent, runtime, kernel interface
    │   ├── GoneError         it was there when the call began and is gone now
    │   └── TimeoutExceeded   it did not answer in time
    ├── ExhaustedError        a bound of the server was reached
    └── UnsupportedError      understood, and this build, kernel or data plane cannot do it

Exit codes are documented in docs/exit-codes and hold for every command:
0 fine, 1 something is broken, 2 usage or not found, 3 could not tell (partial), 4 forbidden,
5 unavailable.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

__all__ = [
    "GRPC_STATUS",
    "ExhaustedError",
    "ExitCode",
    "ForbiddenError",
    "GketraceError",
    "GoneError",
    "NotFoundError",
    "ParseError",
    "ReadOnlyError",
    "TimeoutExceeded",
    "UnauthenticatedError",
    "UnavailableError",
    "UnsupportedError",
    "UsageError",
    "error_from_status",
]


class ExitCode(IntEnum):
    """What a command's exit status says."""

    OK = 0
    """Everything that was asked is fine, and all of it was seen."""
    BROKEN = 1
    """Something is proved to be broken."""
    USAGE = 2
    """The command line is wrong, or names something that does not exist."""
    PARTIAL = 3
    """Could not tell: some part was not seen or is not understood."""
    FORBIDDEN = 4
    """The caller may not see or do this."""
    UNAVAILABLE = 5
    """Nobody answered: no agent, no API server."""


class GketraceError(Exception):
    """Base of all errors that a user may meet.  ``str()`` is one line, fit to print."""

    exit_code: ExitCode = ExitCode.PARTIAL

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(" ".join(message.split()))
        self.hint: Final = " ".join(hint.split())
        """What to do about it, one sentence; empty when there is nothing to say."""

    @property
    def message(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(GketraceError):
    """The caller asked for something that makes no sense."""

    exit_code = ExitCode.USAGE


class ParseError(GketraceError):
    """Text that does not parse: of a tool, the kernel or the API server, so no fault of the
    caller's."""

    def __init__(self, message: str, *, source: str, line: int, text: str, hint: str = "") -> None:
        self.source: Final = source
        """File name, or the command that printed the text."""
        self.line: Final = line
        """1-based line number in `source`; 0 when the text has no lines (JSON)."""
        self.text: Final = text
        """The offending text, cut to 200 characters."""
        where = f"{source}:{line}" if line else source
        super().__init__(f"{where}: {message}: {text[:200]!r}", hint=hint)


class NotFoundError(GketraceError):
    """The named thing does not exist."""

    exit_code = ExitCode.USAGE


class ForbiddenError(GketraceError):
    """The caller may not see or do this."""

    exit_code = ExitCode.FORBIDDEN


class ReadOnlyError(ForbiddenError):
    """The agent was started without ``--allow-system-changes``."""


class UnauthenticatedError(ForbiddenError):
    """No credentials, or credentials that do not hold here."""


class UnavailableError(GketraceError):
    """Nobody answered."""

    exit_code = ExitCode.UNAVAILABLE


class GoneError(UnavailableError):
    """It was there when the call began and is gone now."""

    exit_code = ExitCode.PARTIAL


class TimeoutExceeded(UnavailableError):
    """It did not answer in time."""


class ExhaustedError(GketraceError):
    """A bound of the server was reached."""

    exit_code = ExitCode.UNAVAILABLE


class UnsupportedError(GketraceError):
    """Understood, and this build, kernel or data plane cannot do it."""

    exit_code = ExitCode.PARTIAL


GRPC_STATUS: Final[tuple[tuple[type[GketraceError], str], ...]] = (
    (UsageError, "INVALID_ARGUMENT"),
    (NotFoundError, "NOT_FOUND"),
    (ReadOnlyError, "FAILED_PRECONDITION"),
    (UnauthenticatedError, "UNAUTHENTICATED"),
    (ForbiddenError, "PERMISSION_DENIED"),
    (GoneError, "ABORTED"),
    (TimeoutExceeded, "DEADLINE_EXCEEDED"),
    (UnavailableError, "UNAVAILABLE"),
    (ExhaustedError, "RESOURCE_EXHAUSTED"),
    (UnsupportedError, "UNIMPLEMENTED"),
    (GketraceError, "INTERNAL"),
)
"""Exception class → name of the gRPC status, first match wins.

Read the other way by `error_from_status`.  Names, not `grpc.StatusCode`: the core imports no grpc.
"""

_FROM_STATUS: Final[dict[str, type[GketraceError]]] = {
    **{status: cls for cls, status in reversed(GRPC_STATUS)},
    "CANCELLED": UnavailableError,
    "OUT_OF_RANGE": UsageError,
}


def error_from_status(status: str, message: str) -> GketraceError:
    """The exception for a gRPC status name, e.g. ``"NOT_FOUND"``; unknown names give the base."""
    return _FROM_STATUS.get(status, GketraceError)(message)
