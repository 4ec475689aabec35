"""Reads the cluster's objects again and again, and says what became different."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from gketrace.errors import GketraceError, NotFoundError
from gketrace_cli.follow.request import Request
from gketrace_cli.follow.scope import changes
from gketrace_cli.follow.world import World, read_world

if TYPE_CHECKING:
    from gketrace_cli.session import Session

__all__ = ["look_again", "watch_objects"]

_REREAD_SECONDS: Final = 2.0


def watch_objects(
    session: Session,
    request: Request,
    world: Callable[[], World],
    *,
    changed: Callable[[World, Sequence[str]], None],
    looked: Callable[[float], None],
    failed: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Until `stop`.  `world`: as it was read last; `changed` gets it as it is now and sentences of
    what is different; `looked` when a reading began (seconds since the epoch), once what it changed
    has been told; `failed` a sentence when reading begins to fail, and when it works again."""
    broken = False
    while not stop.wait(_REREAD_SECONDS):
        old = world()
        try:
            look_again(session, request, old, changed=changed, looked=looked)
            if broken:
                failed("objects are read again")
            broken = False
        except GketraceError as error:
            why = error.message
            if isinstance(error, NotFoundError):
                why = f"{old.scope.title} is not there any more: {why}"
            if not broken:
                failed(f"changes of objects are not seen: {why}")
            broken = True


def look_again(
    session: Session,
    request: Request,
    old: World,
    *,
    changed: Callable[[World, Sequence[str]], None],
    looked: Callable[[float], None],
) -> None:
    """Once, as `watch_objects` does.  Raises `GketraceError`."""
    began = time.time()
    different = changes(old.scope, request.read(session, old.scope))
    if different:
        changed(read_world(session, request.read, old.scope), different)
    looked(began)
