"""The pages of docs/findings, which are installed with the program."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from gketrace.errors import UnavailableError

__all__ = ["page_of"]


def page_of(code: str) -> str:
    """The page's text.  Raises: `UnavailableError` when this installation lacks it."""
    name = f"{code}.md"
    installed = resources.files("gketrace_cli") / "findings_pages" / name
    if installed.is_file():
        return installed.read_text(encoding="utf-8")
    # An editable installation: the repository itself.
    path = Path(__file__).resolve().parents[3] / "docs" / "findings" / name
    if path.is_file():
        return path.read_text(encoding="utf-8")
    raise UnavailableError(f"the page of {code} is not part of this installation")
