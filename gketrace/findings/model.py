"""A finding: what is wrong or suspicious, how sure, on what evidence, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from gketrace.trace import Citation, Source

__all__ = ["Confidence", "Evidence", "Finding", "Severity", "evidence"]


class Severity(Enum):
    """How bad it is.  ERROR alone makes a command's exit status 1."""

    ERROR = "error"
    """Something does not work."""
    WARNING = "warning"
    """It works now, or not always; somebody should look."""
    INFO = "info"
    """As configured, and worth knowing when packets go missing."""

    @property
    def rank(self) -> int:
        """0 is the worst."""
        return list(Severity).index(self)


class Confidence(Enum):
    """How much the evidence proves."""

    CERTAIN = "certain"
    """The kernel or the API says just this."""
    LIKELY = "likely"
    """Nothing else that is usual looks like this."""
    POSSIBLE = "possible"
    """Other causes look the same."""

    @property
    def rank(self) -> int:
        """0 is the surest."""
        return list(Confidence).index(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One thing that was read."""

    citation: Citation
    node: str = ""
    """Where it was read; empty: the API server."""
    netns: str = ""
    """``host`` or ``pod NAMESPACE/NAME``; empty without a node."""
    note: str = ""
    """What it shows, one clause; empty when the citation speaks for itself."""


def evidence(
    source: Source, text: str, *, node: str = "", netns: str = "", note: str = ""
) -> Evidence:
    """Evidence from a source that has no rule: an object, a route, a sysctl."""
    where = netns or ("host" if node else "")
    return Evidence(citation=Citation(source=source, text=text), node=node, netns=where, note=note)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong or worth knowing."""

    code: str
    """``GKT-101``: see `gketrace.findings.registry`."""
    severity: Severity
    confidence: Confidence
    text: str
    """One sentence."""
    evidence: tuple[Evidence, ...]
    remedy: str
    """What to do, one sentence."""
    command: str
    """The command to run: the remedy where there is one, else what shows more."""
    subjects: tuple[str, ...]
    """What it is about: ``service default/web``, ``pod default/web-0``, ``node n1``."""
    nodes: tuple[str, ...] = ()
    """Where it was seen; empty: it is the cluster's."""
    cause: str
    """What explains it.  Findings of one code and one cause are one."""
    families: frozenset[int] = frozenset()
    """4, 6: whose packets it is about; empty: that is not told."""
    more: int = 0
    """Evidence that was left out, as there is enough."""
    faulty: frozenset[str] = frozenset()
    """Ties (`gketrace.findings.ties`) that it holds to be wrong: what a way meets there is why."""
    trail: frozenset[str] = frozenset()
    """Ties that the traced way behind it met; empty: it is no traced way's."""
    consequences: tuple[Finding, ...] = ()
    """Other findings that this one explains."""
