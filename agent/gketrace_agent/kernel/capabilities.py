"""Which capabilities this process has, for saying which one is missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

__all__ = ["missing_capabilities"]

_BITS: Final = {"NET_ADMIN": 12, "NET_RAW": 13}
"""include/uapi/linux/capability.h; those that the programs which the agent runs ask for."""
_DENIED: Final = re.compile(r"must be root|not permitted|permission denied", re.IGNORECASE)


def missing_capabilities(said: str) -> str:
    """What to add to a program's complaint `said`: ``the agent needs NET_RAW``; empty unless it is
    about permission and one of the capabilities is missing indeed (/proc/PID/status, CapEff)."""
    if not _DENIED.search(said):
        return ""
    status = Path("/proc/thread-self/status").read_text()
    effective = int(re.findall(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)[0], 16)
    missing = [name for name, bit in _BITS.items() if not effective >> bit & 1]
    return f"the agent needs {' and '.join(missing)}" if missing else ""
