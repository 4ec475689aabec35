"""What must not outlive the program, whatever ends it: temporary folders, an agent started here.

A thread makes them while the main one may be interrupted, and the program ends without waiting for
its threads.  So whoever makes one says here how it is removed, and `main` removes what is left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from gketrace.errors import UnavailableError

__all__ = ["clear", "forget", "keep", "make_folder", "remove_folder"]

T = TypeVar("T")

_LOCK: Final = threading.Lock()
_LEFT: Final[dict[int, tuple[Any, Callable[[Any], object]]]] = {}
"""By `id`: what was made, and what removes it."""
_ENDED: Final = threading.Event()


def keep(make: Callable[[], T], remove: Callable[[T], object]) -> T:
    """`make()`, which is removed at the end unless `forget` is called.

    Raises: `UnavailableError` when the program is ending; what `make` does.
    """
    with _LOCK:
        if _ENDED.is_set():
            raise UnavailableError("the command has been ended")
        made = make()
        _LEFT[id(made)] = made, remove
        return made


def forget(made: object) -> None:
    """It has been removed.  May be called twice."""
    with _LOCK:
        _LEFT.pop(id(made), None)


def clear() -> None:
    """Removes what is left; nothing can be made from now on: the last thing that a program does."""
    _ENDED.set()
    with _LOCK:
        left = list(_LEFT.values())
        _LEFT.clear()
    for made, remove in reversed(left):
        remove(made)


def make_folder(prefix: str) -> Path:
    """A folder of mode 0700 for temporary files.  Raises as `keep`, `OSError`."""
    return keep(lambda: Path(tempfile.mkdtemp(prefix=prefix)), _remove)


def remove_folder(folder: Path) -> None:
    """With all in it.  May be called twice."""
    _remove(folder)
    forget(folder)


def _remove(folder: Path) -> None:
    # Under another name, a thread that is still at work makes no more files in it.
    gone = folder.with_name(f"{folder.name}.gone")
    with contextlib.suppress(OSError):  # somebody has removed it
        os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)
