"""Rule trees as text and as the document ``RuleTree``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from gketrace.trace import Branch, Missing, Step, StepKind, Walk
from gketrace_cli.render.documents import envelope, missing_document, packet_document, probability
from gketrace_cli.render.layout import Page
from gketrace_cli.ruletree import ChainView, Owner, RuleLine, RuleTree, TableView

__all__ = ["draw_rules", "draw_walk", "rules_document"]

_MOST: Final = 64
"""Rules of one chain that text shows, unless the chain was asked for; ``wide`` shows all."""
_COMMENT: Final = re.compile(
    r' ?-m comment --comment (?:"(?:[^"\\]|\\.)*"|\S+)| ?\bcomment "[^"]*"'
)
_KINDS: Final = frozenset({StepKind.RULE, StepKind.POLICY})


def draw_rules(
    page: Page, where: str, tree: RuleTree, *, chain: str = "", notes: Sequence[str] = ()
) -> None:
    """The chain tree, from the hooks down; from `chain` down when it is given, which all of the
    tree's tables then have (`select_chain`)."""
    total = sum(table.rule_count for table in tree.tables)
    counted = f"{total} rules{_in_backends(tree)}" if total else "no rules"
    page.line(f"{where}: {counted}", "bold")
    if total:
        page.line("[packets:bytes]: what each rule matched", "dim", indent=2)
    _draw_notes(page, notes, tree.missing)
    for table in tree.tables:
        if not table.rule_count and not chain:
            policies = {c.base.policy for c in table.roots if c.base is not None}
            said = f"policy {', '.join(sorted(policies))}" if policies else "no chains on hooks"
            page.blank()
            page.line(f"{table.title}: no rules, {said}", "dim")
            continue
        page.blank()
        page.line(table.title, "bold")
        _draw_table(page, table, chain)


def _in_backends(tree: RuleTree) -> str:
    return f" in {' and '.join(tree.backends)}" if tree.backends else ""


def _draw_notes(page: Page, notes: Sequence[str], missing: Sequence[Missing]) -> None:
    for note in notes:
        page.line(note, "yellow", indent=2, hang=2)
    for gap in missing:
        page.line(f"not seen: {gap}", "yellow", indent=2, hang=2)


def _draw_table(page: Page, table: TableView, chain: str) -> None:
    drawn: set[str] = set()
    if chain:
        callers = table.callers.get(chain, ())
        where = ", ".join(f"{name}:{position}" for name, position in callers[:8])
        if len(callers) > 8:
            where += f" and {len(callers) - 8} more"
        page.entry("called by", where or "nothing in this table", indent=2, column=11)
        _draw_chain(page, table, table.chains[chain], drawn, asked=True)
        return
    for root in table.roots:
        if root.rules or (root.base is not None and root.base.policy != "ACCEPT"):
            _draw_chain(page, table, root, drawn, asked=False)
    idle = [c.name for c in table.chains.values() if c.base is None and c.name not in drawn]
    cut = any(len(c.rules) > _MOST for c in table.chains.values()) and not page.wide
    if idle and not cut:
        page.line(f"not reached from any hook: {', '.join(idle)}", "dim", indent=2, hang=2)


def _draw_chain(
    page: Page, table: TableView, top: ChainView, drawn: set[str], *, asked: bool
) -> None:
    """`top` and all below it, each chain once."""
    stack: list[tuple[int, ChainView | RuleLine | str]] = [(1, top)]
    while stack:
        depth, item = stack.pop()
        if isinstance(item, str):
            page.line(item, "dim", indent=2 * depth, hang=2)
        elif isinstance(item, RuleLine):
            text = f"{item.position}  {_text(page, item.text)}{_counted(item.packets, item.bytes)}"
            page.line(text, indent=2 * depth, hang=4)
            below = _below(table, item, drawn)
            stack += [(depth + 1, one) for one in reversed(below)]
        else:
            if item.name in drawn:  # drawn since it was put on the stack
                stack.append((depth, f"{item.name} (above)"))
                continue
            drawn.add(item.name)
            page.line(_heading(item), "cyan", indent=2 * depth, hang=4)
            shown = item.rules
            if not (page.wide or (asked and item is top)) and len(shown) > _MOST:
                more = len(shown) - _MOST
                hint = f"… {more} more rules; --chain {item.name} or -o wide shows them"
                stack.append((depth + 1, hint))
                shown = shown[:_MOST]
            if not item.rules:
                stack.append((depth + 1, "(no rules)"))
            stack += [(depth + 1, rule) for rule in reversed(shown)]


def _below(table: TableView, rule: RuleLine, drawn: set[str]) -> list[ChainView | str]:
    found: list[ChainView | str] = []
    for name in dict.fromkeys(jump.chain for jump in rule.jumps):
        chain = table.chains.get(name)
        if chain is None:
            found.append(f"{name} (not in what was read)")
        elif name in drawn:
            found.append(f"{name}{_owned(chain.owner)} (above)")
        else:
            found.append(chain)
    return found


def _heading(chain: ChainView) -> str:
    base = chain.base
    if base is None:
        return f"{chain.name}{_owned(chain.owner)}"
    counted = _counted(base.packets, base.bytes)
    hook = "" if base.hook.value == chain.name else f" {base.hook.value}"
    return f"{chain.name}{hook} priority {base.priority}, policy {base.policy}{counted}"


def _owned(owner: Owner | None) -> str:
    return f" ({owner})" if owner is not None else ""


def _text(page: Page, rule: str) -> str:
    """The rule without its comments, which ``wide`` keeps: whose a chain is follows its name."""
    text = rule if page.wide else _COMMENT.sub("", rule)
    return text.strip() or "(matches all)"


def _counted(packets: int | None, size: int | None) -> str:
    """As iptables-save writes counters."""
    return f"  [{packets}:{size}]" if packets is not None else ""


def draw_walk(
    page: Page,
    where: str,
    title: str,
    walk: Walk,
    whose: Mapping[str, Owner],
    *,
    notes: Sequence[str] = (),
) -> None:
    """The rules that one packet meets, as a tree that forks where the kernel draws."""
    page.line(f"{where}: the rules that {title} meets", "bold")
    _draw_notes(page, notes, walk.missing)
    page.blank()
    children: dict[int, list[int]] = {}
    for index, branch in enumerate(walk.branches):
        if branch.parent is not None:
            children.setdefault(branch.parent, []).append(index)
    stack = [(0, 1)]
    while stack:
        index, depth = stack.pop()
        branch = walk.branches[index]
        if _forks(branch):
            chance = "" if branch.chance is None else f"{float(branch.chance):.4g} "
            page.line(f"{chance}{branch.because}".strip(), "yellow", indent=2 * depth, hang=2)
            depth += 1
        _draw_steps(page, branch, whose, depth)
        if branch.outcome is not None:
            out = branch.outcome
            page.line(
                f"{out.disposition.value}: {out.packet}  {out.detail}".rstrip(),
                "green",
                indent=2 * depth,
                hang=4,
            )
        stack += [(child, depth) for child in reversed(children.get(index, ()))]


def _forks(branch: Branch) -> bool:
    return branch.chance != 1 or bool(branch.because)


def _met(branch: Branch) -> list[Step]:
    """The steps that are rules; policies only where they stop the packet."""
    return [s for s in branch.steps if s.kind in _KINDS and s.citation is not None]


def _draw_steps(page: Page, branch: Branch, whose: Mapping[str, Owner], depth: int) -> None:
    seen = None
    for step in _met(branch):
        cited = step.citation
        assert cited is not None  # `_met` left out those without
        if step.kind is StepKind.POLICY and step.action.value == "accept" and not page.wide:
            continue
        place = (step.hook, cited.backend, cited.table)
        if place != seen:
            hook = step.hook.value if step.hook else ""
            page.line(f"{hook} {cited.backend} {cited.table}".strip(), "dim", indent=2 * depth)
            seen = place
        number = f":{cited.position}" if cited.position else ""
        text = _text(page, cited.text.removeprefix(f"-A {cited.chain}"))
        counted = _counted(cited.packets, cited.bytes)
        note = f"  {step.note}" if step.action.value == "unknown" else ""
        page.line(
            f"{cited.chain}{number}{_owned(whose.get(cited.chain))}  {text}{counted}{note}",
            indent=2 * depth + 2,
            hang=4,
        )


def rules_document(
    *,
    node: str,
    pod: str,
    query: Mapping[str, Any],
    tree: RuleTree | None,
    walk: Walk | None,
    whose: Mapping[str, Owner],
    missing: Sequence[Missing],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The document ``RuleTree``: docs/schema/ruletree.json."""
    return envelope(
        "RuleTree",
        {
            "node": node,
            "pod": pod or None,
            "query": dict(query),
            "complete": not missing,
            "missing": missing_document(missing),
            "notes": list(notes),
            "tables": [] if tree is None else [_table(table) for table in tree.tables],
            "walk": None if walk is None else [_branch(b, whose) for b in walk.branches],
        },
    )


def _table(table: TableView) -> dict[str, Any]:
    return {
        "backend": table.backend,
        "family": table.family or None,
        "table": table.name,
        "takenAt": _moment(table.taken_at),
        "chains": [_chain(chain, table) for chain in table.chains.values()],
    }


def _moment(at: float) -> str | None:
    """None: not told, or no time that there is."""
    try:
        return datetime.fromtimestamp(at, UTC).isoformat() if at else None
    except (ValueError, OverflowError, OSError):
        return None


def _chain(chain: ChainView, table: TableView) -> dict[str, Any]:
    base = chain.base
    return {
        "name": chain.name,
        "hook": base.hook.value if base else None,
        "priority": base.priority if base else None,
        "policy": base.policy if base else None,
        "packets": base.packets if base else None,
        "bytes": base.bytes if base else None,
        "belongsTo": _owner(chain.owner),
        "calledBy": [
            {"chain": name, "position": position}
            for name, position in table.callers.get(chain.name, ())
        ],
        "rules": [
            {
                "position": rule.position,
                "handle": rule.handle,
                "rule": rule.text,
                "packets": rule.packets,
                "bytes": rule.bytes,
                "jumps": [
                    {"chain": j.chain, "goto": j.goto, "key": j.key or None} for j in rule.jumps
                ],
            }
            for rule in chain.rules
        ],
    }


def _owner(owner: Owner | None) -> dict[str, Any] | None:
    if owner is None:
        return None
    return {
        "namespace": owner.service.namespace,
        "service": owner.service.service,
        "port": owner.service.port or None,
        "protocol": owner.service.protocol,
        "role": owner.role,
        "endpoint": owner.endpoint or None,
    }


def _branch(branch: Branch, whose: Mapping[str, Owner]) -> dict[str, Any]:
    out = branch.outcome
    return {
        "parent": branch.parent,
        "probability": probability(branch.chance),
        "because": branch.because or None,
        "rules": [
            {
                "hook": step.hook.value if step.hook else None,
                "backend": cited.backend,
                "table": cited.table,
                "chain": cited.chain,
                "position": cited.position or None,
                "handle": cited.handle,
                "rule": cited.text,
                "packets": cited.packets,
                "bytes": cited.bytes,
                "action": step.action.value,
                "note": step.note or None,
                "belongsTo": _owner(whose.get(cited.chain)),
            }
            for step in _met(branch)
            if (cited := step.citation) is not None
        ],
        "outcome": None if out is None else out.disposition.value,
        "detail": (out.detail or None) if out is not None else None,
        "packet": None if out is None else packet_document(out.packet),
    }
