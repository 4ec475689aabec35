"""A credential plugin that does not end, prints without end, or has to be answered."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from gketrace.errors import UnavailableError
from gketrace_cli.credential_plugin import Done, run_plugin


def run(script: str, seconds: float = 0.0) -> Done:
    return run_plugin(["sh", "-c", script], dict(os.environ), "p", seconds)


@pytest.mark.parametrize("where", ["", " >&2"])
def test_one_that_does_not_stop_printing(where: str) -> None:
    with pytest.raises(UnavailableError, match="plugin p printed more than 1 MiB"):
        run(f"exec cat /dev/zero{where}")


@pytest.mark.parametrize("script", ["exec sleep 30", "exec >&- 2>&-; exec sleep 30", "sleep 5; :"])
def test_one_that_does_not_end(script: str) -> None:
    """Nor does what it started, which holds its output open."""
    with pytest.raises(UnavailableError, match="plugin p did not finish in 1 s"):
        run(script, 0.6)


def test_what_it_leaves_behind_is_not_waited_for() -> None:
    # It would hold both pipes open for ten seconds more.
    done = run("sleep 10 & echo token; echo why >&2; exit 3", 9.0)
    assert done == Done(status=3, out=b"token\n", err=b"why\n", shown=False)


def test_at_a_terminal_it_speaks_to_whoever_is_there() -> None:
    """As with kubectl: to log in, somebody has to read what it says, and may have to answer."""
    code = (
        "import os, sys; from gketrace_cli.credential_plugin import run_plugin\n"
        "done = run_plugin(['sh', '-c', 'echo log in, please >&2; read line; echo $line'],"
        " dict(os.environ), 'p', 60.0)\n"
        "sys.stdout.write(f'{done}')"
    )
    ours, its = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=its, stderr=its, stdout=subprocess.PIPE, text=True
    ) as process:
        os.close(its)
        shown = b""
        while b"please" not in shown:
            shown += os.read(ours, 1000)
        os.write(ours, b"yes\n")
        said, _ = process.communicate(timeout=60)
    os.close(ours)
    assert said == "Done(status=0, out=b'yes\\n', err=b'', shown=True)"
