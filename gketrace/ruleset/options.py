"""iptables' command-line grammar: a rule's line → tokens → options, and values back to text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

__all__ = [
    "Option",
    "Token",
    "flags_text",
    "integer",
    "interval",
    "interval_text",
    "quote",
    "tokenize",
    "value_mask",
]


@dataclass(frozen=True, slots=True)
class Token:
    """One word of a rule."""

    text: str
    """Unquoted."""
    start: int
    """Where it stands in the line."""
    end: int
    quoted: bool = False


@dataclass(frozen=True, slots=True)
class Option:
    """One option with its arguments: ``! --dport 80``."""

    name: str
    negated: bool
    args: tuple[str, ...]

    @property
    def value(self) -> str:
        """The only argument."""
        if len(self.args) != 1:
            raise ValueError(f"{self.name} needs one argument")
        return self.args[0]


_WORD: Final = re.compile(r'[ \t]*(?:"((?:[^"\\]|\\.)*)"(?=[ \t]|$)|([^ \t]+))')
_ESCAPE: Final = re.compile(r"\\(.)")


def tokenize(line: str) -> list[Token]:
    r"""Words of a rule; a word in double quotes may hold spaces, ``\"``, ``\'`` and ``\\``.

    The inverse of xtables_save_string() (libxtables/xtables.c); read as add_param_to_argv() reads
    it.  Raises `ValueError` when a quote is not closed.
    """
    tokens: list[Token] = []
    position = 0
    end = len(line.rstrip(" \t"))
    while position < end:
        found = _WORD.match(line, position)
        if found is None:
            raise ValueError("cannot split into words")
        position = found.end()
        if found[1] is not None:
            text = _ESCAPE.sub(r"\1", found[1]) if "\\" in found[1] else found[1]
            tokens.append(Token(text, found.start(1) - 1, position, True))
        else:
            text = found[2]
            if text[0] == '"':
                raise ValueError("a quote is not closed")
            tokens.append(Token(text, found.start(2), position))
    return tokens


_PLAIN: Final = re.compile(r"[A-Za-z0-9_-]+\Z")


def quote(text: str) -> str:
    """As xtables_save_string() writes a string: plain words bare, all else in double quotes."""
    if _PLAIN.match(text):
        return text
    return '"' + re.sub(r"([\"\\'])", r"\\\1", text) + '"'


def integer(text: str, low: int = 0, high: int = 0xFFFFFFFF) -> int:
    """``10``, ``0x0a`` or ``012`` (octal, as strtoul reads it).  Raises `ValueError`."""
    if re.fullmatch(r"0[xX][0-9a-fA-F]+", text):
        number = int(text, 16)
    elif re.fullmatch(r"0[0-7]+", text):
        number = int(text, 8)
    elif re.fullmatch(r"[0-9]+", text):
        number = int(text)
    else:
        raise ValueError(f"not a number: {text!r}")
    if not low <= number <= high:
        raise ValueError(f"{text} is not within {low} to {high}")
    return number


def interval(text: str, high: int = 0xFFFF, separator: str = ":") -> tuple[int, int]:
    """``80``, ``80:90``, ``:90`` or ``80:`` → first and last.  Raises `ValueError`."""
    first, colon, last = text.partition(separator)
    if not colon:
        number = integer(first, 0, high)
        return number, number
    return (
        integer(first, 0, high) if first else 0,
        integer(last, 0, high) if last else high,
    )


def interval_text(pair: tuple[int, int], separator: str = ":") -> str:
    """``80`` or ``80:90``."""
    return f"{pair[0]}" if pair[0] == pair[1] else f"{pair[0]}{separator}{pair[1]}"


def value_mask(text: str, default: int = 0xFFFFFFFF, high: int = 0xFFFFFFFF) -> tuple[int, int]:
    """``0x1/0xff`` or ``0x1`` → value and mask.  Raises `ValueError`."""
    value, slash, mask = text.partition("/")
    return integer(value, 0, high), integer(mask, 0, high) if slash else default


def flags_text(parts: Iterable[tuple[bool, str]]) -> str:
    """The words whose condition holds, with a space before each."""
    return "".join(f" {word}" for condition, word in parts if condition)
