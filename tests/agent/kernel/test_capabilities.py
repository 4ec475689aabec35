"""A program that complains without saying why: which capability is missing is found out."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gketrace_agent.kernel.capabilities import missing_capabilities

SCRIPT = """
from gketrace_agent.kernel.process import run
print(run(["iptables-legacy-save", "-t", "nat"], timeout=10, limit=1 << 20).failure())
"""


@pytest.mark.parametrize("name", ["NET_RAW", "NET_ADMIN"])
def test_iptables_without_a_capability(name: str) -> None:
    """In a network namespace of its own, as a container's root: "you must be root", it says."""
    without = f"-{name.lower()}"
    setpriv = ["setpriv", "--bounding-set", without, "--inh-caps", without]
    prepare = 'iptables-legacy -t nat -S > /dev/null; exec "$@"'
    argv = ["unshare", "--net", "sh", "-c", prepare, "sh", *setpriv, sys.executable, "-c", SCRIPT]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "must be root" in done.stdout
    assert done.stdout.endswith(f"; the agent needs {name}\n")


def test_other_complaints_get_no_hint() -> None:
    assert missing_capabilities("no such table") == ""
    assert (
        missing_capabilities("Permission denied (you must be root)") == ""
    )  # this process has all
