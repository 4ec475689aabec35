"""Joins the walks of several nodes into paths, there and back.

Pure: `stitch` is a generator.  It yields the node walks that it needs next, all that can be asked
at once, and is sent their results; it returns the paths.  So whoever drives it decides how to
reach the nodes and how many to ask at the same time::

    run = stitch(topology, inquiries)
    batch = next(run)
    while True:
        try:
            batch = run.send([ask(query) for query in batch])
        except StopIteration as done:
            return done.value          # one tuple of paths for each inquiry

Between two nodes only Kubernetes objects speak: a packet that leaves a node goes to the node that
has its destination (or its next hop) as an InternalIP or in its podCIDRs.  Firewalls and routes of
the network itself are not observable, which the first such step says.

Each delivered path is walked back: the answer starts in the namespace that took the packet, with
the entries that the way there has made, and must reach the sender with the addresses that it
expects.

Where an entry of a kernel's table decided a path, the same packet is followed once more without
looking at those tables: what new connections would do (`Path.fresh`).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TypeAlias

from gketrace.crossing import Inquiry, NodeQuery, Trail, begin, beyond, flows_of, union
from gketrace.packet import Packet
from gketrace.snapshot import Maybe, Unavailable
from gketrace.topology import Topology, cite_object
from gketrace.trace import (
    FAILURE,
    SUCCESS,
    Disposition,
    Hop,
    Ingress,
    Leaf,
    Missing,
    NetnsKind,
    NetnsRef,
    Outcome,
    Path,
    Step,
    StepAction,
    StepKind,
    Walk,
)

__all__ = ["Inquiry", "NodeQuery", "Stitching", "stitch"]

Stitching: TypeAlias = Generator[
    tuple[NodeQuery, ...], Sequence[Maybe[Walk]], tuple[tuple[Path, ...], ...]
]


@dataclass(slots=True)
class _Run:
    """The state of one stitching."""

    topology: Topology
    inquiries: tuple[Inquiry, ...]
    ended: list[Trail] = field(default_factory=list)
    """Ways there that have ended, in order."""
    back: dict[int, list[Trail]] = field(default_factory=dict)
    """Position in `ended` → ends of the way back."""
    known: dict[NodeQuery, Maybe[Walk]] = field(default_factory=dict)


def stitch(topology: Topology, inquiries: Sequence[Inquiry]) -> Stitching:
    """The paths of each inquiry, in the inquiries' order; yields batches of walks to do."""
    run = _Run(topology, tuple(inquiries))
    open_trails: list[Trail] = []
    for number, inquiry in enumerate(run.inquiries):
        for trail in begin(topology, number, inquiry):
            (open_trails if trail.query is not None else run.ended).append(trail)
    while open_trails:
        wanted = dict.fromkeys(
            t.query for t in open_trails if t.query is not None and t.query not in run.known
        )
        if wanted:
            batch = tuple(wanted)
            answers = yield batch
            if len(answers) != len(batch):
                raise ValueError(f"{len(batch)} walks were asked, {len(answers)} answered")
            run.known.update(zip(batch, answers, strict=True))
        following: list[Trail] = []
        for trail in open_trails:
            for further in _extend(run, trail):
                if further.query is not None:
                    following.append(further)
                else:
                    following += _finish(run, further)
        open_trails = following
    found = _paths(run)
    pinned = [
        number
        for number, paths in enumerate(found)
        if run.inquiries[number].use_conntrack and any(path.pinned_by for path in paths)
    ]
    if not pinned:
        return found
    again = [replace(run.inquiries[number], use_conntrack=False) for number in pinned]
    fresh = dict(zip(pinned, (yield from stitch(topology, again)), strict=True))
    return tuple(
        tuple(replace(p, fresh=fresh[number]) if p.pinned_by else p for p in paths)
        if number in fresh
        else paths
        for number, paths in enumerate(found)
    )


def _extend(run: _Run, trail: Trail) -> list[Trail]:
    """The trail with each way through the walk that it waited for."""
    query, inquiry = trail.query, run.inquiries[trail.inquiry]
    assert query is not None
    answer = run.known[query]
    if isinstance(answer, Unavailable):
        return [_unanswered(trail, query, answer)]
    extended: list[Trail] = []
    for number, leaf in enumerate(answer.leaves()):
        further = _along(trail, query, answer, leaf)
        further = replace(further, order=(*trail.order, number))
        if leaf.outcome.disposition is Disposition.TRANSMITTED:
            extended += beyond(run.topology, inquiry, further, leaf.outcome)
        else:
            extended.append(further)
    return extended


def _unanswered(trail: Trail, query: NodeQuery, gap: Unavailable) -> Trail:
    netns = NetnsRef(
        node=query.node, kind=NetnsKind.POD if query.pod else NetnsKind.HOST, pod=query.pod
    )
    citation = cite_object(f"Node {query.node}")
    step = Step(
        kind=StepKind.UNKNOWN,
        action=StepAction.UNKNOWN,
        before=query.packet,
        after=query.packet,
        note=gap.reason,
        citation=citation,
    )
    outcome = Outcome(
        disposition=Disposition.UNKNOWN,
        packet=query.packet,
        netns=netns,
        detail=f"node {query.node} could not be asked: {gap.reason}",
        citation=citation,
    )
    missing = Missing(what="agent", why=gap.reason, node=query.node)
    return replace(
        trail,
        query=None,
        outcome=outcome,
        hops=(*trail.hops, Hop(ingress=Ingress(netns=netns), steps=(step,))),
        missing=union(trail.missing, (missing,)),
    )


def _along(trail: Trail, query: NodeQuery, walked: Walk, leaf: Leaf) -> Trail:
    chance: Fraction | None = None
    if trail.chance is not None and leaf.chance is not None:
        chance = trail.chance * leaf.chance
    hops = leaf.hops()
    seen = {str(hop.netns) for hop in hops}
    gaps = tuple(m for m in walked.missing if not m.netns or m.netns in seen)
    expected = trail.expected
    if trail.forward is None and expected is None:
        expected = _sent(hops, query.packet).tuple5.inverted()
    return replace(
        trail,
        query=None,
        outcome=leaf.outcome,
        hops=(*trail.hops, *hops),
        chance=chance,
        because=(*trail.because, *leaf.because),
        flows=union(trail.flows, leaf.flows),
        missing=union(trail.missing, gaps),
        expected=expected,
    )


def _sent(hops: tuple[Hop, ...], packet: Packet) -> Packet:
    """The packet as its sender made it, its source address selected."""
    for hop in hops:
        for step in hop.steps:
            if step.kind is StepKind.SEND:
                return step.after
    return packet


def _finish(run: _Run, trail: Trail) -> list[Trail]:
    """Files a trail that has ended; the way back is a new one."""
    assert trail.outcome is not None
    if trail.forward is not None:
        run.back.setdefault(trail.forward, []).append(_received(run, trail))
        return []
    run.ended.append(trail)
    if trail.outcome.disposition not in SUCCESS:
        return []
    inquiry = run.inquiries[trail.inquiry]
    outcome = trail.outcome
    answer = outcome.packet.reply()
    back = Trail(
        inquiry=trail.inquiry,
        forward=len(run.ended) - 1,
        flows=trail.flows,
        expected=trail.expected,
    )
    if outcome.netns.kind is NetnsKind.OTHER:
        ended = replace(outcome, disposition=Disposition.UNKNOWN, packet=answer)
        why = f"{outcome.netns} belongs to no pod, so its answer cannot be asked for"
        return _finish(run, replace(back, outcome=replace(ended, detail=why)))
    query = NodeQuery(
        node=outcome.netns.node,
        pod=outcome.netns.pod if outcome.netns.kind is NetnsKind.POD else "",
        packet=answer,
        flows=flows_of(trail.flows, outcome.netns.node),
        use_conntrack=inquiry.use_conntrack,
    )
    return [replace(back, query=query)]


def _received(run: _Run, trail: Trail) -> Trail:
    """The end of a way back, judged by what the sender waits for."""
    outcome, expected = trail.outcome, trail.expected
    assert outcome is not None
    inquiry = run.inquiries[trail.inquiry]
    arrived = outcome.disposition in SUCCESS or (
        outcome.disposition is Disposition.TRANSMITTED and not inquiry.node
    )
    at_sender = outcome.netns.node == inquiry.node and (
        outcome.netns.pod == inquiry.pod if inquiry.pod else outcome.netns.kind is NetnsKind.HOST
    )
    # A SYN+ACK that matches no connection ends as UNKNOWN in the walk, which knows only what
    # listens.  Here the connection that it should belong to is known.
    strayed = (
        outcome.disposition is Disposition.UNKNOWN
        and inquiry.node != ""
        and at_sender
        and outcome.citation is not None
        and any(s.kind is StepKind.SOCKET for h in trail.hops[-1:] for s in h.steps[-1:])
    )
    if not arrived and not strayed:
        return trail
    got = outcome.packet.tuple5
    if outcome.disposition in SUCCESS and not (inquiry.node and at_sender):
        why = f"the answer went to {outcome.netns} of {outcome.netns.node}, not to the sender"
    elif got != expected:
        why = f"the sender expects {expected}; the answer is {got} and belongs to no connection"
    else:
        return trail
    return replace(trail, outcome=replace(outcome, disposition=Disposition.REFUSED, detail=why))


def _paths(run: _Run) -> tuple[tuple[Path, ...], ...]:
    found: list[dict[Path, None]] = [{} for _ in run.inquiries]
    for position, trail in sorted(enumerate(run.ended), key=lambda item: item[1].order):
        inquiry = run.inquiries[trail.inquiry]
        path = _path(inquiry, trail)
        ends = run.back.get(position, [])
        if ends:
            worst = min(ends, key=_rank)
            path = replace(path, reply=_path(_turned(inquiry, trail), worst))
        found[trail.inquiry][path] = None
    return tuple(tuple(paths) for paths in found)


def _rank(trail: Trail) -> int:
    """A way back that fails is shown before one that is not known, before one that works."""
    assert trail.outcome is not None
    if trail.outcome.disposition in FAILURE:
        return 0
    return 1 if trail.outcome.disposition is Disposition.UNKNOWN else 2


def _turned(inquiry: Inquiry, trail: Trail) -> Inquiry:
    """The inquiry as the way back answers it."""
    return replace(inquiry, source=_endpoint(trail.outcome), target=inquiry.source)


def _path(inquiry: Inquiry, trail: Trail) -> Path:
    assert trail.outcome is not None
    return Path(
        front_door=inquiry.front_door,
        source=inquiry.source,
        target=inquiry.target,
        chance=trail.chance,
        outcome=trail.outcome,
        hops=trail.hops,
        endpoint=_endpoint(trail.outcome),
        because=trail.because,
        flows=trail.flows,
        missing=trail.missing,
    )


def _endpoint(outcome: Outcome | None) -> str:
    """``pod/NS/NAME 10.40.0.6:8080`` or ``node/NAME 10.142.0.8:10250``; "" when nobody takes it."""
    if outcome is None or outcome.disposition not in SUCCESS:
        return ""
    netns, packet = outcome.netns, outcome.packet
    address = f"[{packet.dst}]" if packet.family == 6 else str(packet.dst)
    port = f":{packet.dport}" if packet.has_ports and packet.dport is not None else ""
    if netns.kind is NetnsKind.POD and netns.pod:
        who = f"pod/{netns.pod}"
    else:
        who = f"node/{netns.node}" if netns.kind is NetnsKind.HOST else str(netns)
    return f"{who} {address}{port}"
