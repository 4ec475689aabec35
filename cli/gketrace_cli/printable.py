"""What a terminal is never told: control characters from the cluster, written as ``\\u001b``.

A rule's comment, an annotation, a node's name or an interface's can hold escape sequences, and a
terminal would do what they say: colour a verdict, hide a line, set the window's title.  The form is
JSON's, so that a document stays one.
"""

from __future__ import annotations

import io
import re
from typing import Final, TextIO

__all__ = ["PrintableStream", "printable"]

_UNSHOWN: Final = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
"""C0 without tab and newline, DEL, C1, and what turns the direction of writing."""
_ANY: Final = re.compile(_UNSHOWN)
_OWN: Final = re.compile(rf"(\x1b\[(?:0|(?:[12]|3[1236]|;)+)m|\r\x1b\[K)|{_UNSHOWN}")
"""Our own colours, and the line of progress, pass."""


def printable(text: str) -> str:
    """`text` without control characters other than tab and newline."""
    return _ANY.sub(_escaped, text) if _ANY.search(text) else text


class PrintableStream(io.TextIOWrapper):
    """Standard output or error: what is written to its ``buffer`` is bytes, and stays as it is."""

    @classmethod
    def over(cls, stream: TextIO) -> TextIO:
        """The same file; `stream` itself when it is no file.

        What its encoding cannot show (a name, where it is ASCII; half of a UTF-16 pair) is written
        as ``\\u00e9`` or ``\\xe9``, as Python does it on standard error: it fails no answer.
        """
        if not isinstance(stream, io.TextIOWrapper) or isinstance(stream, cls):
            return stream
        return cls(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace" if stream.errors == "strict" else stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )

    def write(self, text: str) -> int:
        if _ANY.search(text):
            text = _OWN.sub(lambda found: found[1] or _escaped(found), text)
        return super().write(text)


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
