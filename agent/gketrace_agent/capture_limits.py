"""The agent's bounds for captures; a client can only lower them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["CaptureLimits", "add_capture_arguments", "capture_limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureLimits:
    """Of one capture, with all its taps, but for the last one.

    How many there may be at once is a bound of calls, `config.Limits.capture_calls`.
    """

    seconds: int = 3600
    packets: int = 100_000_000
    bytes: int = 8 << 30
    """As sent, the kernel's headers among them."""
    ring_bytes: int = 256 << 20
    """Memory of all captures' rings together, which the kernel takes as soon as they are open."""


_HELP = {
    "seconds": ("--max-capture-seconds", "the longest that a capture may take"),
    "packets": ("--max-capture-packets", "packets of one capture"),
    "bytes": ("--max-capture-bytes", "bytes of one capture"),
    "ring_bytes": ("--max-capture-ring-bytes", "memory of all captures' rings together"),
}


def add_capture_arguments(add: Callable[..., Any], positive: Callable[[str], int]) -> None:
    """`add` is a parser's add_argument; `positive` its type of numbers."""
    for one in fields(CaptureLimits):
        option, text = _HELP[one.name]
        add(
            option,
            type=positive,
            default=one.default,
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )


def capture_limits(given: argparse.Namespace) -> CaptureLimits:
    """What the command line says."""
    return CaptureLimits(
        **{
            one.name: getattr(given, _HELP[one.name][0].removeprefix("--").replace("-", "_"))
            for one in fields(CaptureLimits)
        }
    )
