"""The pages of docs/findings, which are installed with the program."""

from __future__ import annotations

from gketrace.errors import UnavailableError
from gketrace_cli.packaged import packaged

__all__ = ["page_of"]


def page_of(code: str) -> str:
    """The page's text.  Raises: `UnavailableError` when this installation lacks it."""
    text = packaged(f"findings_pages/{code}.md", f"docs/findings/{code}.md")
    if text is None:
        raise UnavailableError(f"the page of {code} is not part of this installation")
    return text
