"""The fixture's own true faults, as `baseline` lists them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gketrace.findings.model import Finding

__all__ = ["beyond", "read_baseline"]

_FILE = Path(__file__).with_name("baseline")
_Known = tuple[str, str, str]
"""Code, severity, first subject."""


def read_baseline(topology: str, era: str, backend: str) -> frozenset[_Known]:
    """Of one kind of lab."""
    found = set()
    here = {topology, era, backend, f"{era}/{backend}"}
    for line in _FILE.read_text().splitlines():
        text = line.partition("#")[0].split()
        if not text:
            continue
        code, severity, kind, name, *only = text
        if not only or here & set(only):
            found.add((code, severity, f"{kind} {name}"))
    return frozenset(found)


def beyond(
    findings: Iterable[Finding], known: frozenset[_Known]
) -> tuple[tuple[Finding, ...], frozenset[_Known]]:
    """(findings that the baseline does not list, lines of the baseline that were not found)."""
    new, seen = [], set()
    for one in findings:
        key = (one.code, one.severity.value, one.subjects[0])
        if key in known:
            seen.add(key)
        else:
            new.append(one)
    return tuple(new), known - seen
