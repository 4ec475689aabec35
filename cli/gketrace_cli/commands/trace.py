"""placeholder"""

from __future__ import annotations

from typing import Annotated

import typer

from gketrace_cli.options import Options


def trace(options: Options, name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """x"""
