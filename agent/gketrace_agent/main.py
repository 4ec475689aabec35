"""The entry point of ``gketrace-agent``.

Exit codes: 0 stopped when told to, 2 usage, 4 may not, 5 cannot serve.
"""

from __future__ import annotations

import os
import sys

from gketrace.errors import ExitCode, GketraceError
from gketrace_agent.config import parse_arguments

__all__ = ["main"]


def main() -> None:
    """Runs until told to stop."""
    # The agent starts subprocesses by vfork and exec only; gRPC's fork handlers have no use here.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # What gRPC would print is in the exceptions that it raises, too.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # NumPy's linear algebra, which is not used, else begins a thread for each of the node's cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        config = parse_arguments()
        from gketrace_agent.server import serve  # gRPC loads only when there is something to serve

        serve(config)
    except GketraceError as error:
        print(f"gketrace-agent: {error}", file=sys.stderr)  # noqa: T201 - the command's own output
        sys.exit(error.exit_code)
    sys.exit(ExitCode.OK)
