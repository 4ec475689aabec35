"""A group of commands whose modules are imported when a command is wanted: the start of the program
is a good part of what a short answer takes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from gketrace_cli.options import with_options

__all__ = ["LazyCommand", "lazy_group"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyCommand:
    """Where a command's function is, and what the list of commands says of it.

    `target` is ``module:function``; `cls`, ``module:class``, parses its command line where typer's
    own way does not do.  `unlisted`: see `with_options`.
    """

    target: str
    short_help: str
    cls: str = ""
    unlisted: tuple[str, ...] = ()

    def load(self, name: str, epilog: str) -> Any:
        """The command as typer makes it (a click command of typer's own copy, or click's)."""
        alone = typer.Typer(
            add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
        )
        cls: type[TyperCommand] = _load(self.cls) if self.cls else TyperCommand
        alone.command(name, cls=cls, epilog=epilog, short_help=self.short_help)(
            with_options(_load(self.target), self.unlisted)
        )
        return typer.main.get_command(alone)


def lazy_group(commands: Mapping[str, LazyCommand], epilog: str) -> type[TyperGroup]:
    """The class of a group that has `commands`, by name and in that order, beside those that are
    registered with it."""

    class LazyGroup(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            self.commands = _Commands(commands, epilog, self.commands)

    return LazyGroup


class _Commands(MutableMapping[str, Any]):
    """Name → command, made when it is first looked at."""

    def __init__(
        self, lazy: Mapping[str, LazyCommand], epilog: str, made: Mapping[str, Any]
    ) -> None:
        self._lazy = lazy
        self._epilog = epilog
        self._made = dict(made)

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._lazy[name].load(name, self._epilog)
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        raise TypeError("commands are not taken out")

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._lazy, *self._made}))

    def __len__(self) -> int:
        return len({*self._lazy, *self._made})

    def __contains__(self, name: object) -> bool:
        return name in self._lazy or name in self._made


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
