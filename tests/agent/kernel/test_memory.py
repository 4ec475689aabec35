"""What the C library keeps, in a process of its own: it cannot be told twice."""

from __future__ import annotations

import subprocess
import sys

_HEAPS = """
import ctypes, sys, threading
from gketrace_agent.kernel.memory import give_back_memory
if sys.argv[1] == "told":
    give_back_memory()
together, over = threading.Barrier(17), threading.Event()
def allocate():
    kept = [bytes(10_000) for _ in range(10)]
    together.wait(20)
    over.wait(20)
for _ in range(16):
    threading.Thread(target=allocate, daemon=True).start()
together.wait(20)
libc = ctypes.CDLL(None)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
over.set()
"""


def heaps(told: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _HEAPS, told], capture_output=True, text=True, check=True
    )
    return done.stdout.count("<heap nr=")


def test_threads_share_two_heaps() -> None:
    assert heaps("told") <= 2 < heaps("not told")
