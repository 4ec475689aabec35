"""`quick`: faster construction for the frozen dataclasses that a walk makes by the hundred.

The ``__init__`` that `dataclasses` writes for a frozen class sets each field with
``object.__setattr__``, which looks the name up; here the slots' own descriptors set them, which
takes half the time.  An object of many fields is for that moment one of a twin: a class of the same
slots that is not frozen, so that the interpreter itself sets them, which takes half of that again.
Nothing else about the class changes.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, TypeVar

__all__ = ["quick"]

T = TypeVar("T")

_MANY = 5
"""From so many fields on a twin pays."""


def quick(kind: type[T]) -> type[T]:
    """Decorates a dataclass with ``frozen``, ``slots`` and ``kw_only``, and no base with fields.

    Raises `TypeError` for a class with default factories, or fields that ``__init__`` does not
    take.
    """
    arguments: list[str] = []
    scope: dict[str, Any] = {}
    lines: list[str] = []
    for one in fields(kind):  # type: ignore[arg-type]  # raises TypeError for any other class
        slot = vars(kind).get(one.name)
        if not one.init or not one.kw_only or one.default_factory is not MISSING or slot is None:
            raise TypeError(f"{kind.__name__}.{one.name} is not a plain field of a slotted class")
        scope[f"set_{one.name}"] = slot.__set__
        if one.default is MISSING:
            arguments.append(one.name)
        else:
            scope[f"default_{one.name}"] = one.default
            arguments.append(f"{one.name}=default_{one.name}")
        lines.append(one.name)
    if len(lines) < _MANY:
        lines = [f" set_{name}(self, {name})" for name in lines]
    else:
        scope["_twin"] = type(f"_{kind.__name__}", (), {"__slots__": tuple(lines)})
        scope["_kind"], scope["_set_class"] = kind, vars(object)["__class__"].__set__
        lines = [
            " _set_class(self, _twin)",
            *(f" self.{name} = {name}" for name in lines),
            " self.__class__ = _kind",
        ]
    if hasattr(kind, "__post_init__"):
        lines.append(" self.__post_init__()")
    exec("\n".join([f"def __init__(self, *, {', '.join(arguments)}):", *lines]), scope)
    made = scope["__init__"]
    written = vars(kind)["__init__"]
    made.__qualname__, made.__module__ = written.__qualname__, kind.__module__
    made.__annotations__ = written.__annotations__
    kind.__init__ = made  # type: ignore[method-assign]  # the very same signature
    return kind
