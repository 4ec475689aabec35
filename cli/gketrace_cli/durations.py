"""Durations as users write them."""

from __future__ import annotations

import re
from typing import Final

from gketrace.errors import UsageError

__all__ = ["seconds_of"]

_UNITS: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds_of(option: str, text: str | None) -> float | None:
    """``30``, ``30s``, ``5m``, ``1h`` in seconds; None stays None.  Raises `UsageError`."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|[smhd]?)", text.strip())
    if match is None or not float(match[1]):
        raise UsageError(f"{option} {text}: not a duration", hint="for example 30s, 5m, 1h")
    return float(match[1]) * _UNITS[match[2]]
