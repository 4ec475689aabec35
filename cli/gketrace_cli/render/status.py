"""``gketrace status`` as text and as a document."""

from __future__ import annotations

from collections import Counter
from typing import Any

from gketrace_cli.node_status import NodeStatus, Reading
from gketrace_cli.render.documents import envelope
from gketrace_cli.render.layout import Page

__all__ = ["draw_status", "status_document", "verdict"]


def verdict(reading: Reading) -> str:
    """One sentence."""
    total, answered = len(reading.nodes), sum(1 for n in reading.nodes if n.info is not None)
    text = f"{answered} of {total} nodes have an agent that answers"
    if len(reading.versions) > 1:
        each = ", ".join(f"{count} of {name}" for name, count in sorted(reading.versions.items()))
        text += f"; they differ in version: {each}"
    troubled = [one for one in reading.nodes if one.problems]
    if troubled:
        problems = Counter(problem for one in troubled for problem in one.problems)
        problem, count = problems.most_common(1)[0]
        text += f"; {problem} (on {count} of {total})"
        if len(problems) > 1:
            text += f", and {len(problems) - 1} more that is marked ! below"
    return f"{text}."


def draw_status(page: Page, reading: Reading) -> None:
    """The verdict, then each node."""
    style = "green" if reading.whole else "yellow"
    page.line(verdict(reading), style, "bold")
    for one in reading.nodes:
        page.blank()
        page.line(page.short(one.node), "bold")
        _draw_node(page, one)


def _draw_node(page: Page, one: NodeStatus) -> None:
    info, stats = one.info, one.conntrack
    if info is not None:
        page.entry("agent", f"{info.version}, {page.short(one.how)}")
        page.entry("data plane", f"{info.data_plane}: {info.data_plane_reason}")
        page.entry("rules", _backend(one))
        page.entry("runtime", info.runtime or "none answers")
        page.entry("kernel", info.kernel)
        changes = "allowed" if info.allow_system_changes else "refused"
        page.entry("changes", f"to the node are {changes} (--allow-system-changes)")
    if stats is not None:
        fill = "" if one.fill is None else f" ({one.fill:.1%})"
        page.entry("conntrack", f"{stats.entries} of {stats.limit} entries{fill}")
        page.entry("drops", f"{one.drops} by connection tracking since the node started")
    if one.clock is not None:
        way = "ahead of" if one.clock > 0 else "behind"
        off = f"{abs(one.clock):.3f} s (±{one.clock_error:.3f} s)"
        page.entry("clock", f"{off} {way} this machine's")
    for problem in one.problems:
        page.entry("!", page.short(problem), "yellow")


def _backend(one: NodeStatus) -> str:
    info = one.info
    assert info is not None
    if info.iptables_backend:
        return _rules(one)
    unseen = any(rules.unavailable for rules in info.rulesets)
    nothing = "not all seen" if unseen else "none of kube-proxy in iptables"
    return f"{nothing}; {_rules(one)}"


def _rules(one: NodeStatus) -> str:
    """``iptables-nft: 233 rules of IPv4, 35 of IPv6``; each backend that has rules."""
    assert one.info is not None
    parts: dict[str, list[str]] = {}
    for rules in one.info.rulesets:
        if not rules.unavailable and rules.rules:
            of = parts.setdefault(rules.backend, [])
            of.append(f"{rules.rules}{'' if of else ' rules'} of IPv{rules.family}")
    unseen = any(rules.unavailable for rules in one.info.rulesets)
    texts = [f"{backend}: {', '.join(counted)}" for backend, counted in parts.items()]
    return "; ".join(texts) or ("see below" if unseen else "no rules")


def status_document(reading: Reading) -> dict[str, Any]:
    """See docs/schema/status.json."""
    return envelope(
        "Status",
        {
            "verdict": verdict(reading),
            "clientVersion": reading.client,
            "versions": reading.versions,
            "nodes": [_node_document(one) for one in reading.nodes],
        },
    )


def _node_document(one: NodeStatus) -> dict[str, Any]:
    info, stats = one.info, one.conntrack
    return {
        "node": one.node,
        "reached": one.how or None,
        "version": info.version if info else None,
        "apiVersion": info.api_version if info else None,
        "kernel": info.kernel if info else None,
        "startedAt": info.started_at if info else None,
        "dataPlane": info.data_plane if info else None,
        "dataPlaneReason": info.data_plane_reason if info else None,
        "iptablesBackend": (info.iptables_backend or None) if info else None,
        "rulesets": [
            {
                "backend": rules.backend,
                "family": rules.family,
                "rules": rules.rules,
                "chains": rules.chains,
                "unavailable": rules.unavailable or None,
            }
            for rules in (info.rulesets if info else ())
        ],
        "runtime": (info.runtime or None) if info else None,
        "allowSystemChanges": info.allow_system_changes if info else None,
        "conntrack": None
        if stats is None
        else {
            "entries": stats.entries,
            "limit": stats.limit,
            "drops": one.drops,
            "tracked": stats.tracked,
            "accounting": stats.accounting,
        },
        "clockOffsetSeconds": one.clock,
        "clockErrorSeconds": one.clock_error if one.clock is not None else None,
        "problems": list(one.problems),
    }
