"""Lines of text for people: labels, wrapping at 80 columns, colour, and writing them out."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from gketrace_cli.options import Options, Output
from gketrace_cli.printable import printable

__all__ = ["WIDTH", "Page", "plain_ascii", "write"]

WIDTH: Final = 80
"""Columns that text output keeps to; ``wide`` does not wrap."""
WIDEST: Final = 120
"""A terminal that is wider than `WIDTH` is used up to here: longer lines are hard to read."""

_CODES: Final = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_ASCII: Final = str.maketrans({"→": "->", "←": "<-", "…": "...", "·": "-", "×": "x"})


@dataclass(slots=True, kw_only=True)
class Page:
    """Collects lines.  Colour never changes where a line breaks."""

    colored: bool = False
    wide: bool = False
    """True: nothing is wrapped."""
    width: int = WIDTH

    names: Mapping[str, str] = field(default_factory=dict)
    """Long names of nodes → short ones, for lines where the long one would crowd out the rest."""
    lines: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, options: Options, names: Mapping[str, str] | None = None) -> Page:
        wide = options.format is Output.WIDE
        return cls(colored=options.colored, wide=wide, width=_columns(), names=names or {})

    def short(self, text: str) -> str:
        """`text` with the nodes' names shortened; ``wide`` keeps them."""
        if not self.wide:
            for name, brief in self.names.items():
                text = text.replace(name, brief)
        return text

    def paint(self, text: str, *styles: str) -> str:
        """`text` in the given styles, when colour is on."""
        codes = ";".join(_CODES[style] for style in styles)
        return f"\033[{codes}m{text}\033[0m" if self.colored and codes and text else text

    def blank(self) -> None:
        """An empty line, unless the page is empty or ends in one."""
        if self.lines and self.lines[-1]:
            self.lines.append("")

    def line(self, text: str, *styles: str, indent: int = 0, hang: int = 0) -> None:
        """Text, wrapped; continuation lines are indented by `hang` more."""
        for piece in self._wrap(text, " " * indent, " " * (indent + hang)):
            margin = len(piece) - len(piece.lstrip())
            self.lines.append(piece[:margin] + self.paint(piece[margin:], *styles))

    def entry(self, label: str, text: str, *styles: str, indent: int = 3, column: int = 11) -> None:
        """A dim label in its own column, then text wrapped inside the second column."""
        body = " " * (indent + column)
        first = " " * indent + f"{label:<{column}}"
        if len(label) >= column:
            first = " " * indent + label + " "
        pieces = self._wrap(text, first, body)
        for number, piece in enumerate(pieces):
            if number == 0:
                head, rest = piece[: len(first)], piece[len(first) :]
                self.lines.append((self.paint(head, "dim") + self.paint(rest, *styles)).rstrip())
            else:
                self.lines.append(body + self.paint(piece[len(body) :], *styles))

    def command(self, label: str, text: str, *, indent: int = 3, column: int = 11) -> None:
        """A command to be pasted: on one line, however long."""
        head = " " * indent + f"{label:<{column}}"
        self.lines.append(self.paint(head, "dim") + self.paint(printable(text), "bold"))

    def _wrap(self, text: str, first: str, rest: str) -> list[str]:
        text = printable(" ".join(text.split()))
        if self.wide:
            return [first + text]
        return textwrap.wrap(
            text,
            width=self.width,
            initial_indent=first,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [first.rstrip()]

    def text(self) -> str:
        while self.lines and not self.lines[-1]:
            self.lines.pop()
        return "\n".join(self.lines) + "\n"


def _columns() -> int:
    """Between 80 and 120 as the terminal has them; 80 when it is none."""
    if not sys.stdout.isatty():
        return WIDTH
    return min(max(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH), WIDEST)


def plain_ascii(text: str) -> str:
    """For a terminal that cannot show the arrows."""
    return text.translate(_ASCII)


def write(text: str) -> None:
    """To standard output, in what its encoding can show.

    A reader that has seen enough (head, less) is no failure: the exit status stays the answer's.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = plain_ascii(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still in the buffer goes nowhere, or the end of the program would complain.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
