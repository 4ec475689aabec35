"""`evolve`: `dataclasses.replace` for the frozen slotted classes that a walk makes by the hundred.

`replace` looks at each field's definition and runs `__init__`, which checks and sets each field by
name: 7 µs for a class of twenty fields.  A walk to ten endpoints makes 500 copies.  Here code is
made once for each class, which fills a twin: a class of the same slots that is not frozen, so that
the interpreter sets them directly.  The full copy then becomes one of the class itself: 0.6 µs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Final, TypeVar

__all__ = ["COPIERS", "copier", "evolve"]

T = TypeVar("T")

COPIERS: Final[dict[type, Callable[[Any, dict[str, Any]], Any]]] = {}
"""Class → what copies it: made here when first needed, unless the class brings its own."""


def evolve(item: T, /, **changes: Any) -> T:
    """A copy of `item` with other values in some fields.

    For slotted dataclasses; `__post_init__` is run.  Raises `TypeError` for a name that is no
    field, and for a class of another kind.
    """
    kind = type(item)
    try:
        copy = COPIERS[kind]
    except KeyError:
        copy = COPIERS[kind] = _copier(kind)
    made: T = copy(item, changes)
    return made


def copier(kind: type[T], *given: str) -> Callable[..., T]:
    """A function ``(item, *values)``: a copy with other values in the fields that are `given`.

    For what is copied most, always with the same changes; `__post_init__` is not run.
    """
    names, scope = _scope(kind)
    lines = [
        f"def copy(old, {', '.join(given)}):",
        " made = new(twin)",
        *(f" made.{name} = {name if name in given else f'old.{name}'}" for name in names),
        " made.__class__ = kind",
        " return made",
    ]
    exec("\n".join(lines), scope)
    copy: Callable[..., T] = scope["copy"]
    return copy


def _scope(kind: type) -> tuple[list[str], dict[str, Any]]:
    """The fields of a class, and what code that copies it needs."""
    names = [field.name for field in fields(kind)]
    slots: dict[str, Any] = {name: getattr(kind, name, None) for name in names}
    if not all(hasattr(slot, "__set__") for slot in slots.values()):
        raise TypeError(f"{kind.__name__} is not a slotted dataclass")
    twin = type(f"_{kind.__name__}", (), {"__slots__": tuple(names)})
    scope: dict[str, Any] = {"new": object.__new__, "kind": kind, "twin": twin}
    scope["setters"] = {name: vars(twin)[name].__set__ for name in names}
    return names, scope


def _copier(kind: type) -> Callable[[Any, dict[str, Any]], Any]:
    names, scope = _scope(kind)
    lines = [
        "def copy(old, changes):",
        " made = new(twin)",
        *(f" made.{name} = old.{name}" for name in names),
        " for name, value in changes.items():",
        "  try:",
        "   setters[name](made, value)",
        "  except KeyError:",
        "   raise TypeError(f'{kind.__name__} has no field {name}') from None",
        " made.__class__ = kind",
        *([" made.__post_init__()"] if hasattr(kind, "__post_init__") else []),
        " return made",
    ]
    exec("\n".join(lines), scope)
    copy: Callable[[Any, dict[str, Any]], Any] = scope["copy"]
    return copy
