"""Files of the repository that are installed with the program (pyproject.toml, force-include)."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

__all__ = ["packaged"]


def packaged(installed: str, source: str) -> str | None:
    """The text at `installed`, below the package, or at `source`, below the repository, for an
    editable installation.  None where neither is."""
    inside = resources.files("gketrace_cli").joinpath(*installed.split("/"))
    if inside.is_file():
        return inside.read_text(encoding="utf-8")
    path = Path(__file__).resolve().parents[2] / source
    return path.read_text(encoding="utf-8") if path.is_file() else None
