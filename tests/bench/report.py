"""What all benchmarks share: their arguments, and the one JSON object that ends their output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["arguments", "goal", "report"]


def arguments(description: str | None, *, runs: int) -> argparse.Namespace:
    """``--json`` (only the object is printed) and ``--runs N``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--runs", type=int, default=runs, help=f"counted runs (default {runs})")
    return parser.parse_args()


def goal(
    value: float, *, at_most: float | None = None, at_least: float | None = None
) -> dict[str, Any]:
    """One goal's line: the value, the bound, whether it is met."""
    bound = at_most if at_most is not None else at_least
    met = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    return {"value": value, "goal": bound, "met": met}


def report(
    options: argparse.Namespace, *, figures: Mapping[str, Any], goals: Mapping[str, dict[str, Any]]
) -> None:
    """Prints the figures for people, then the object as the last line."""
    if not options.json:
        for name, value in figures.items():
            print(f"{name}: {value}")
        for name, line in goals.items():
            state = "met" if line["met"] else "NOT met"
            print(f"goal {name}: {line['value']} (goal {line['goal']}, {state})")
    print(json.dumps({**figures, "goals": goals}))
