"""Two bundles → which verdicts changed, and which differences changed them.

A difference is not taken for a cause because it looks like one.  Each part that differs is put
back as it was, alone, and everything is found and traced again: what changes the verdict back is
the cause.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from gketrace.findings.detect import find
from gketrace.findings.model import Finding
from gketrace.findings.world import Sight, Way, World
from gketrace.snapshot import Maybe, NetnsSnapshot
from gketrace.topology import SeenAddress
from gketrace.trace import Citation, Path
from gketrace_cli.bundle.differences import Difference, Part, differences
from gketrace_cli.bundle.model import HOST, Bundle
from gketrace_cli.bundle.replay import Replay
from gketrace_cli.bundle.ticking import ticking
from gketrace_cli.checking.whole import read_world, trace_world
from gketrace_cli.options import Options
from gketrace_cli.session import Session

__all__ = ["Compared", "Opened", "Verdict", "compare", "open_bundle"]

_ROUTING: Final = frozenset({"routes", "rules"})
"""Nouns: of the policy rules, and of the tables that they name."""
_TRIED: Final = 60
"""Parts that are put back, one by one, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A bundle, and what follows from it."""

    bundle: Bundle
    world: World
    seen: Mapping[str, tuple[SeenAddress, ...]]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One verdict that is not the same in both."""

    name: str
    """A finding's code and subject, or a way."""
    before: str
    """``fine``, ``broken`` …, a finding's sentence; empty: there was none."""
    after: str
    causes: tuple[Difference, ...] = ()
    """Put back, they change the verdict back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The answer."""

    verdicts: tuple[Verdict, ...]
    differences: tuple[Difference, ...]
    """All of them, those that changed a verdict first."""
    causes: frozenset[Part]
    untried: int
    """Parts that were not put back, because there are too many."""


def open_bundle(path: str, options: Options) -> Opened:
    """Raises: `UsageError` for what is no bundle; `GketraceError`."""
    with Session(replace(options, bundle=path)) as session:
        world, _ = read_world(session)
        seen = {node.name: session.fleet.addresses(node.name) for node in world.nodes}
    return Opened(bundle=Replay.open(path).bundle, world=world, seen=seen, findings=find(world))


def compare(before: Opened, after: Opened) -> Compared:
    """What changed, the causes of changed verdicts first."""
    changed = _changed(before, after.findings, after.world)
    found = differences(before.bundle, after.bundle)
    mine = [one for one in after.findings if _name(one) in changed]
    counters = ticking(before.world, after.world, mine)
    tryable = (*found, *counters)
    cited = _cited(before, changed) + _cited(after, changed)
    parts = list(dict.fromkeys(one.part for one in tryable))
    parts.sort(key=lambda part: -_rank(part, tryable, cited))
    causes: dict[str, list[Difference]] = {name: [] for name in changed}
    tried = 0
    for part in parts if changed else ():
        if tried == _TRIED:
            break
        if all(causes.values()) and not _goes_with(part, causes):
            continue
        restored = _put_back(part, before.world, after.world)
        if restored is None:
            continue
        tried += 1
        world, _ = trace_world(restored, after.seen)
        still = _changed(before, find(world), world)
        of_part = sorted(
            (one for one in tryable if one.part == part),
            key=lambda one: (not _named(one, cited), one in counters),
        )
        for name, (_, now) in changed.items():
            if name not in still or still[name][1] != now:
                causes[name] += of_part
    of_verdict = frozenset(one.part for some in causes.values() for one in some)
    order = sorted(
        (*found, *(one for one in counters if one.part in of_verdict)),
        key=lambda one: (one.part not in of_verdict, not _named(one, cited) if cited else False),
    )
    return Compared(
        verdicts=tuple(
            Verdict(name=name, before=then, after=now, causes=tuple(causes[name]))
            for name, (then, now) in changed.items()
        ),
        differences=tuple(order),
        causes=of_verdict,
        untried=max(0, len(parts) - _TRIED) if not all(causes.values()) else 0,
    )


def _changed(
    before: Opened, findings: Iterable[Finding], world: World
) -> dict[str, tuple[str, str]]:
    """Name → verdict before and after, of those that differ."""
    old, new = _verdicts(before.findings, before.world), _verdicts(findings, world)
    names = dict.fromkeys((*new, *old))
    return {
        name: (old.get(name, ""), new.get(name, ""))
        for name in names
        if old.get(name, "") != new.get(name, "")
        and (name.startswith("GKT-") or (name in old and name in new))
    }


def _verdicts(findings: Iterable[Finding], world: World) -> dict[str, str]:
    """Findings by code and subjects; ways by who asks whom."""
    found = {_name(one): one.severity.value for one in findings}
    rank = ("fine", "configured", "unknown", "broken")
    ways: dict[str, str] = {}
    for way in world.ways:
        name = f"{way.path.source} → {way.path.front_door} {way.path.target}"
        ways[name] = max(ways.get(name, way.standing), way.standing, key=rank.index)
    return found | ways


def _name(one: Finding) -> str:
    return f"{one.code} {', '.join(one.subjects)}"


def _cited(opened: Opened, changed: Mapping[str, object]) -> tuple[str, ...]:
    """What the evidence of changed verdicts quotes."""
    texts: list[str] = []
    for one in opened.findings:
        if _name(one) in changed:
            texts += [proof.citation.text for proof in one.evidence]
    for way in opened.world.ways:
        name = f"{way.path.source} → {way.path.front_door} {way.path.target}"
        if name in changed:
            texts += [citation.text for citation in _citations(way)]
    return tuple(dict.fromkeys(filter(None, texts)))


def _citations(way: Way) -> Iterable[Citation]:
    paths: list[Path] = [way.path]
    if way.path.reply is not None:
        paths.append(way.path.reply)
    for path in paths:
        if path.outcome.citation is not None:
            yield path.outcome.citation
        for hop in path.hops:
            for step in hop.steps:
                if step.citation is not None:
                    yield step.citation


def _goes_with(part: Part, causes: Mapping[str, Sequence[Difference]]) -> bool:
    """Whether it decides together with a cause that was found: a policy rule and the routes of the
    table that it names.  Without either there is no fault, so both are its cause."""
    return part.noun in _ROUTING and any(
        one.part.noun in _ROUTING and (one.part.node, one.part.pod) == (part.node, part.pod)
        for some in causes.values()
        for one in some
    )


def _named(one: Difference, cited: Sequence[str]) -> bool:
    wanted = one.name.rpartition(": ")[0] or one.name
    return any(wanted in text or (text and text in one.name) for text in cited)


def _rank(part: Part, found: Iterable[Difference], cited: Sequence[str]) -> int:
    """Quoted parts first; connections, of which many come and go, last."""
    mine = [one for one in found if one.part == part]
    return 2 * any(_named(one, cited) for one in mine) - (part.noun == "conntrack")


def _put_back(part: Part, before: World, after: World) -> World | None:
    """`after` with that part as it was; None: it cannot be put back alone."""
    if not part.node:
        return _put_object_back(part, before, after)
    one, two = before.sights.get(part.node), after.sights.get(part.node)
    if one is None or two is None:
        return _with_sight(after, part.node, one)
    if part.noun == "agent":
        return None
    sight = _put_namespace_back(part, one, two)
    return None if sight is None else _with_sight(after, part.node, sight)


def _put_object_back(part: Part, before: World, after: World) -> World | None:
    plural = part.noun.partition("@")[0]
    name = "endpoints" if plural == "endpointslices" else plural
    if name == "nodes":
        return replace(after, nodes=before.nodes)
    if name == "pods":
        return replace(after, pods=before.pods)
    if name == "services":
        return replace(after, services=before.services)
    return replace(after, endpoints=before.endpoints) if name == "endpoints" else None


def _with_sight(world: World, node: str, sight: Sight | None) -> World:
    sights = {name: one for name, one in world.sights.items() if name != node}
    missing = world.missing
    if sight is not None:
        sights[node] = sight
        missing = tuple(one for one in missing if one.node != node)
    return replace(world, sights=sights, missing=missing)


def _put_namespace_back(part: Part, one: Sight, two: Sight) -> Sight | None:
    if part.noun == "conntrack":
        if part.pod != HOST:
            return None
        return replace(two, entries=one.entries, table=one.table, table_later=one.table_later)
    if part.pod == HOST:
        return replace(two, host=_exchange(part.noun, one.host, two.host))
    then, now = one.pods.get(part.pod), two.pods.get(part.pod)
    if part.noun == "namespace":
        pods: dict[str, Maybe[NetnsSnapshot]] = {**two.pods}
        if then is None:
            del pods[part.pod]
        else:
            pods[part.pod] = then
        return replace(two, pods=pods)
    if not isinstance(then, NetnsSnapshot) or not isinstance(now, NetnsSnapshot):
        return None
    return replace(two, pods={**two.pods, part.pod: _exchange(part.noun, then, now)})


def _exchange(noun: str, then: NetnsSnapshot, now: NetnsSnapshot) -> NetnsSnapshot:
    if noun == "links":
        # A link's routes and addresses come and go with it.
        return replace(now, links=then.links)
    changes = {noun: getattr(then, noun)}
    return replace(now, **changes)
