"""Agents without the second that Python takes to import what they are made of.

``python -m tests.races.warm ARGUMENTS...`` imports all that an agent uses; then, for each line on
stdin, it forks one that runs with these arguments as any other does, and prints its PID.  This is
before gRPC has begun anything and while there is one thread, so that nothing is shared but modules.
The environment is that of `gketrace_agent.main`, as some of them read it when they are imported.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from gketrace_agent.main import main as serve
from gketrace_agent.service import AgentService

__all__ = ["main"]


def main() -> None:
    import gketrace_agent.server  # noqa: F401 - imported to be there

    AgentService.preload()
    sys.argv[0] = "gketrace-agent"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps them
    for _ in iter(sys.stdin.readline, ""):
        threads = os.listdir("/proc/self/task")
        if len(threads) != 1:
            raise RuntimeError(f"{len(threads)} threads: what is forked now may hold their locks")
        if pid := os.fork():
            print(pid, flush=True)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        # As a new process would have it: only what was inherited on purpose stays open.
        os.closerange(3, max(int(name) for name in os.listdir("/proc/self/fd")) + 1)
        Path("/proc/self/comm").write_text("gketrace-agent")
        serve()


if __name__ == "__main__":
    main()
