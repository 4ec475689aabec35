"""Traces as a document: the envelope of kind ``ServiceTrace`` or ``Trace``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gketrace.findings.model import Finding
from gketrace.trace import Missing, Path
from gketrace_cli.render.documents import (
    envelope,
    missing_document,
    path_document,
    probability,
)
from gketrace_cli.render.findings import finding_documents
from gketrace_cli.verdict import Answer, Standing, Verdict, outcome_text, path_standing

__all__ = ["trace_document"]


def trace_document(
    kind: str,
    verdict: Verdict,
    answers: Sequence[Answer],
    *,
    query: Mapping[str, Any],
    missing: Sequence[Missing] = (),
    notes: Sequence[str] = (),
    live: Mapping[str, Any] | None = None,
    findings: Sequence[Finding] = (),
) -> dict[str, Any]:
    """What docs/schema/trace.json describes."""
    paths = []
    unknown = False
    for answer in answers:
        question = answer.question
        for path in answer.paths:
            standing = path_standing(answer, path)
            unknown = unknown or standing is Standing.UNKNOWN
            configured = standing is Standing.CONFIGURED
            paths.append(
                {
                    **path_document(path),
                    "standing": standing.name.lower(),
                    "configuredDrop": question.configured_drop if configured else None,
                    "entryNode": question.via or question.entry or question.sender.node or None,
                    "port": question.port_name or None,
                    "existingFlow": path.pinned_by is not None,
                    "newConnections": [_end(new) for new in path.fresh],
                }
            )
    return envelope(
        kind,
        {
            "query": dict(query),
            "verdict": verdict.text,
            "complete": not missing and not unknown and bool(paths),
            "missing": missing_document(missing),
            "notes": list(notes),
            "paths": paths,
            "liveConnections": live,
            "findings": finding_documents(findings),
        },
    )


def _end(path: Path) -> dict[str, Any]:
    """An element of ``newConnections``."""
    return {
        "probability": probability(path.chance),
        "outcome": path.outcome.disposition.value,
        "endpoint": path.endpoint or None,
        "text": outcome_text(path),
    }
