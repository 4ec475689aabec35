"""Findings as text, as JSON and YAML, and as SARIF."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from gketrace.findings.model import Evidence, Finding, Severity
from gketrace.findings.registry import CODES, code_of
from gketrace.trace import Source
from gketrace_cli import __version__
from gketrace_cli.render.layout import Page
from gketrace_cli.render.steps import counters

__all__ = ["count_text", "draw_findings", "finding_documents", "sarif_document"]

_STYLES: Final = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}
_LEVELS: Final = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}
_SHOWN: Final = 6
"""Subjects of one finding that text names; ``wide`` names all."""


def count_text(findings: Sequence[Finding]) -> str:
    """``1 error, 2 warnings, 3 to know``; ``nothing found``."""
    parts = []
    for severity, one, many in (
        (Severity.ERROR, "error", "errors"),
        (Severity.WARNING, "warning", "warnings"),
        (Severity.INFO, "to know", "to know"),
    ):
        count = sum(1 for f in findings if f.severity is severity)
        if count:
            parts.append(f"{count} {one if count == 1 else many}")
    return ", ".join(parts) or "nothing found"


def draw_findings(page: Page, findings: Sequence[Finding], *, heading: str = "") -> None:
    """Each finding: what, evidence, remedy."""
    if not findings:
        return
    if heading:
        page.blank()
        page.line(heading, "bold")
    for one in findings:
        page.blank()
        sure = "" if one.confidence.value == "certain" else f", {one.confidence.value}"
        page.line(
            page.short(f"{one.code} {one.severity.value}{sure}: {one.text}."),
            _STYLES[one.severity],
            "bold",
            hang=3,
        )
        subjects = one.subjects if page.wide else one.subjects[:_SHOWN]
        more = len(one.subjects) - len(subjects)
        rest = f" and {more} more" if more else ""
        page.entry("about", page.short(", ".join(subjects)) + rest)
        for proof in one.evidence:
            page.entry("evidence", page.short(_evidence_text(proof)))
        if one.more:
            page.entry("", f"and {one.more} more")
        _draw_consequences(page, one)
        page.entry("do", page.short(f"{one.remedy[:1].upper()}{one.remedy[1:]}."))
        page.command("run", one.command)


def _draw_consequences(page: Page, one: Finding) -> None:
    shown = one.consequences if page.wide else one.consequences[:_SHOWN]
    for each in shown:
        page.entry("explains", page.short(f"{each.code} {each.text}"))
    if len(one.consequences) > len(shown):
        page.entry("", f"and {len(one.consequences) - len(shown)} more")


def _evidence_text(proof: Evidence) -> str:
    cited = proof.citation
    place = ""
    if cited.source is Source.RULE and cited.position:
        place = f"{cited.table} {cited.chain}:{cited.position} "
    elif cited.source is Source.POLICY and cited.table:
        place = f"policy of {cited.table} "
    text = f"{place}{cited.text}"
    if place and cited.packets is not None:
        text += f" {counters(cited)}"
    where = " ".join(filter(None, (proof.node, "" if proof.netns == "host" else proof.netns)))
    if where:
        text += f" ({where})"
    return f"{proof.note}: {text}" if proof.note else text


def finding_documents(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """The elements of ``findings``."""
    return [
        {
            **_document(one),
            "family": code_of(one.code).family.value,
            "consequences": [_document(each) for each in one.consequences],
            "remedy": one.remedy,
            "command": one.command,
        }
        for one in findings
    ]


def _document(one: Finding) -> dict[str, Any]:
    """What is said of a finding, and of what another one explains."""
    return {
        "code": one.code,
        "title": code_of(one.code).title,
        "severity": one.severity.value,
        "confidence": one.confidence.value,
        "text": one.text,
        "subjects": list(one.subjects),
        "nodes": list(one.nodes),
        "cause": one.cause,
        "evidence": [_evidence_document(proof) for proof in one.evidence],
        "evidenceLeftOut": one.more,
    }


def _evidence_document(proof: Evidence) -> dict[str, Any]:
    cited = proof.citation
    return {
        "source": cited.source.value,
        "text": cited.text,
        "node": proof.node or None,
        "netns": proof.netns or None,
        "backend": cited.backend or None,
        "table": cited.table or None,
        "chain": cited.chain or None,
        "position": cited.position or None,
        "packets": cited.packets,
        "bytes": cited.bytes,
        "note": proof.note or None,
    }


def sarif_document(findings: Sequence[Finding], uri: str) -> dict[str, Any]:
    """SARIF 2.1.0; a finding's place is a logical one: an object or a node of the cluster `uri`."""
    named = {one.code for one in findings}
    rules = [code for code in CODES if code.code in named]
    index = {code.code: position for position, code in enumerate(rules)}
    return {
        "version": "2.1.0",
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "gketrace",
                        "semanticVersion": __version__,
                        "rules": [
                            {
                                "id": code.code,
                                "shortDescription": {"text": code.title},
                                "defaultConfiguration": {"level": _LEVELS[code.severity]},
                                "properties": {"family": code.family.value},
                            }
                            for code in rules
                        ],
                    }
                },
                "automationDetails": {"id": f"gketrace/{uri}"},
                "results": [_result(one, index[one.code]) for one in findings],
            }
        ],
    }


def _result(one: Finding, index: int) -> dict[str, Any]:
    lines = [f"{one.text}."]
    lines += [f"Evidence: {_evidence_text(proof)}" for proof in one.evidence]
    lines += [f"Explains: {each.code} {each.text}" for each in one.consequences]
    lines += [f"Do: {one.remedy}.", f"Run: {one.command}"]
    return {
        "ruleId": one.code,
        "ruleIndex": index,
        "level": _LEVELS[one.severity],
        "message": {"text": "\n".join(lines)},
        "locations": [
            {"logicalLocations": [{"fullyQualifiedName": name, "kind": "resource"}]}
            for name in one.subjects
        ],
        "partialFingerprints": {"cause/v1": f"{one.code} {one.cause}"},
        "properties": {"confidence": one.confidence.value, "nodes": list(one.nodes)},
    }
