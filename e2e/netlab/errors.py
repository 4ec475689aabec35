"""The lab's one exception."""

from __future__ import annotations

__all__ = ["LabError"]


class LabError(Exception):
    """What the user asked for cannot be done, or did not work; one line for them to read."""
