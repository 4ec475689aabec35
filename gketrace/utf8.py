"""Text that was read from bytes, for where only UTF-8 may go: messages, documents."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["as_utf8"]

_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def as_utf8(text: str) -> str:
    """`text` with each byte that was not UTF-8 (PEP 383) written as ``\\xff``."""
    return _SURROGATE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
