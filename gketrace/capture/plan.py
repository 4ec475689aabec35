"""Paths → taps: where to capture so that a connection is seen at every hop.

Pure.  A tap is one interface in one namespace of one node.  For each way that a path leads over
it there is a `Crossing`: the packet as it looks there (before or after each rewrite), which way
it passes, and the step of the trace that says so.  A tap's filter is the union of its crossings,
in both directions.

What a trace assumes is left open in the filters: the client where it stands for any, the source
port, and the port that a masquerade will pick.

A bridge is a tap of its own.  What comes in through a port reaches the bridge's own device before
or behind PREROUTING, as br_netfilter is on or off: the filter takes both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from gketrace.capture.filters import Term, filter_of, term_of
from gketrace.capture.packets import Direction
from gketrace.packet import Packet
from gketrace.trace import (
    Citation,
    Hop,
    NetnsKind,
    Outcome,
    Path,
    Source,
    Step,
    StepAction,
    StepKind,
)

__all__ = [
    "Crossing",
    "Plan",
    "PlannedTap",
    "Rewrite",
    "Route",
    "Spot",
    "Wanted",
    "make_plan",
    "rule_text",
]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Spot:
    """Names a tap: an interface in a namespace."""

    node: str
    pod: str = ""
    """``namespace/name``; empty: the node's own namespace."""
    interface: str

    def __str__(self) -> str:
        return f"{self.node} {f'{self.pod}:' if self.pod else ''}{self.interface}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """An address translation on the way, and what did it."""

    before: Packet
    after: Packet
    citation: Citation | None
    hop: int

    @property
    def kind(self) -> str:
        """``DNAT``, ``SNAT`` or, of both, ``NAT``."""
        source = (self.before.src, self.before.sport) != (self.after.src, self.after.sport)
        target = (self.before.dst, self.before.dport) != (self.after.dst, self.after.dport)
        if source and target:
            return "NAT"
        return "SNAT" if source else "DNAT"

    @property
    def by(self) -> str:
        """``KUBE-SEP-GNGNYGTEG254KWMX:2``, or the source of the citation."""
        return rule_text(self.citation) if self.citation is not None else "?"


def rule_text(citation: Citation) -> str:
    """A rule by chain and number; another source by its name."""
    if citation.source is Source.RULE and citation.chain:
        return f"{citation.chain}:{citation.position}" if citation.position else citation.chain
    return citation.source.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """One way over a tap."""

    spot: Spot
    direction: Direction
    """Of this packet; its answers pass the other way, where they come back the same way."""
    packet: Packet
    """As it looks here."""
    term: Term
    path: int
    """Number of the path in the plan, from 0."""
    hop: int
    """Number of the hop in the path, from 1, as the trace prints them."""
    back: bool
    """The packet is an answer."""
    rewrites: tuple[Rewrite, ...] = ()
    """Since the tap before this one on the same path."""
    also: Term | None = None
    """Before a rewrite that may or may not have happened already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The taps that a path crosses, in order."""

    path: int
    title: str
    """``NodePort 10.142.0.7:31830/tcp from client 203.0.113.10``."""
    there: tuple[Crossing, ...]
    back: tuple[Crossing, ...]
    endpoint: str
    """Who takes it; empty: nobody does."""
    outcome: Outcome
    """How the way there ends, by the trace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTap:
    """One tap, and why."""

    spot: Spot
    filter: str
    crossings: tuple[Crossing, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A path to capture."""

    path: Path
    any_client: bool = False
    """Its sender stands for any."""
    any_port: bool = True
    """Its source port stands for any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where to capture what."""

    taps: tuple[PlannedTap, ...]
    """In the order in which packets meet them, as far as paths agree."""
    routes: tuple[Route, ...]
    notes: tuple[str, ...] = ()
    """What is not captured, a sentence each."""


def make_plan(wanted: Sequence[Wanted]) -> Plan:
    """The union of all paths."""
    flat = list(_flat(wanted))
    bridges = _bridges(one.path for one in flat)
    notes: dict[str, None] = {}
    routes: list[Route] = []
    for number, one in enumerate(flat):
        reader = _Reader(one, number, bridges, notes)
        there = reader.read(one.path.hops, 0, back=False)
        reply = one.path.reply
        back = reader.read(reply.hops, len(one.path.hops), back=True) if reply is not None else ()
        title = f"{one.path.front_door} {one.path.target} from {one.path.source}"
        route = Route(
            path=number,
            title=title,
            there=there,
            back=back,
            endpoint=one.path.endpoint,
            outcome=one.path.outcome,
        )
        routes.append(route)
    crossings: dict[Spot, list[Crossing]] = {}
    for route in routes:
        for crossing in route.there:
            crossings.setdefault(crossing.spot, []).append(crossing)
    for route in routes:
        for crossing in route.back:
            crossings.setdefault(crossing.spot, []).append(crossing)
    taps = tuple(
        PlannedTap(
            spot=spot,
            filter=filter_of(term for c in found for term in (c.term, c.also) if term is not None),
            crossings=tuple(found),
        )
        for spot, found in crossings.items()
    )
    return Plan(taps=taps, routes=tuple(routes), notes=tuple(notes))


def _flat(wanted: Iterable[Wanted]) -> Iterable[Wanted]:
    """Existing connections and the way of new ones, each once."""
    seen: dict[Path, None] = {}
    for one in wanted:
        for path in (one.path, *one.path.fresh):
            bare = replace(path, fresh=())
            if bare not in seen:
                seen[bare] = None
                yield replace(one, path=bare)


def _bridges(paths: Iterable[Path]) -> dict[tuple[str, str], str]:
    """(node, port) → bridge, where some path was routed to a bridge and left through a port."""
    found: dict[tuple[str, str], str] = {}
    for path in paths:
        for way in (path, path.reply):
            for hop in way.hops if way is not None else ():
                routed = ""
                for step in hop.steps:
                    if step.kind is StepKind.ROUTE and step.interface:
                        routed = step.interface
                    elif step.kind is StepKind.TRANSMIT and routed not in ("", step.interface):
                        found[hop.netns.node, step.interface] = routed
    return found


class _Reader:
    """Reads the crossings of one path."""

    def __init__(
        self,
        wanted: Wanted,
        number: int,
        bridges: dict[tuple[str, str], str],
        notes: dict[str, None],
    ) -> None:
        self._wanted = wanted
        self._number = number
        self._bridges = bridges
        self._notes = notes
        self._found: list[Crossing] = []
        self._pending: list[Rewrite] = []
        self._back = False

    def read(self, hops: tuple[Hop, ...], offset: int, *, back: bool) -> tuple[Crossing, ...]:
        self._found, self._pending, self._back = [], [], back
        for position, hop in enumerate(hops, offset + 1):
            if hop.netns.node:
                self._hop(hop, position)
        return tuple(self._found)

    def _hop(self, hop: Hop, position: int) -> None:
        netns = hop.netns
        if netns.kind is NetnsKind.OTHER or (netns.kind is NetnsKind.POD and not netns.pod):
            self._notes[f"{netns} on node {netns.node} belongs to no known pod: not captured"] = (
                None
            )
            return
        if any(step.kind is StepKind.UNKNOWN for step in hop.steps) and not hop.ingress.interface:
            why = next(step.note for step in hop.steps if step.kind is StepKind.UNKNOWN)
            self._notes[f"node {netns.node}: {why}"] = None
        if hop.ingress.interface and hop.steps:
            self._enter(hop, position)
        routed = ""
        for step in hop.steps:
            if step.kind is StepKind.NAT and step.before != step.after:
                self._pending.append(
                    Rewrite(
                        before=step.before, after=step.after, citation=step.citation, hop=position
                    )
                )
            elif step.kind is StepKind.NETWORK:
                continue
            elif step.kind is StepKind.ROUTE and step.action is StepAction.FORWARD:
                routed = step.interface
            elif step.kind is StepKind.TRANSMIT and step.interface:
                self._leave(hop, step, routed, position)

    def _enter(self, hop: Hop, position: int) -> None:
        interface, packet = hop.ingress.interface, hop.steps[0].before
        self._add(hop, interface, Direction.IN, packet, position)
        bridge = self._bridges.get((hop.netns.node, interface)) if not hop.netns.pod else None
        if bridge is None:
            return
        routed = next((s.before for s in hop.steps if s.kind is StepKind.ROUTE), packet)
        also = self._term(packet) if routed != packet else None
        self._add(hop, bridge, Direction.IN, routed, position, also)

    def _leave(self, hop: Hop, step: Step, routed: str, position: int) -> None:
        bridge = self._bridges.get((hop.netns.node, step.interface))
        if bridge is not None and routed == bridge and not hop.netns.pod:
            self._add(hop, bridge, Direction.OUT, step.before, position)
        self._add(hop, step.interface, Direction.OUT, step.before, position)

    def _term(self, packet: Packet) -> Term:
        wanted = self._wanted
        return term_of(
            packet, back=self._back, client=not wanted.any_client, port=not wanted.any_port
        )

    def _add(
        self,
        hop: Hop,
        interface: str,
        direction: Direction,
        packet: Packet,
        position: int,
        also: Term | None = None,
    ) -> None:
        spot = Spot(node=hop.netns.node, pod=hop.netns.pod, interface=interface)
        self._found.append(
            Crossing(
                spot=spot,
                direction=direction,
                packet=packet,
                term=self._term(packet),
                path=self._number,
                hop=position,
                back=self._back,
                rewrites=tuple(self._pending),
                also=also,
            )
        )
        self._pending = []
