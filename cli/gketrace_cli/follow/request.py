"""What was asked for, once it is understood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gketrace_cli.follow.scope import Scope
from gketrace_cli.follow.view import Chosen

if TYPE_CHECKING:
    from gketrace_cli.session import Session

__all__ = ["Request"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for."""

    read: Callable[[Session, Scope | None], Scope]
    """Reads the objects; the scope of before, when there was one."""
    chosen: Chosen
    jsonl: bool
    steps: bool = False
    since: float | None = None
    """Seconds; None: what was there before and does not end is not shown."""
    duration: float | None = None
    """Seconds; None: until it is interrupted."""
    packets: bool = False
    """Captures them, too."""
