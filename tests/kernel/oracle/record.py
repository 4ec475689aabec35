"""What the kernel did, kept, so that another simulator can be judged by it without the kernel."""

from __future__ import annotations

from dataclasses import dataclass, field

from gketrace.conntrack import ConntrackEntry
from gketrace.packet import Tuple5
from gketrace.simulate.query import WalkQuery
from gketrace.snapshot import ConntrackView, NetnsSnapshot, Unavailable
from tests.kernel.oracle.compare import Judgement, Observed, RuleId, judge
from tests.kernel.oracle.view import DutView, WalkFunction

__all__ = ["Record", "Remembered", "replay"]


@dataclass(slots=True)
class Remembered:
    """A `ConntrackView` that asks once and remembers; later only what was asked is known."""

    source: ConntrackView | None
    known: dict[tuple[Tuple5, int], ConntrackEntry | None] = field(default_factory=dict)

    def lookup(self, tuple5: Tuple5, zone: int = 0) -> ConntrackEntry | Unavailable | None:
        key = (tuple5, zone)
        if key in self.known or self.source is None:
            return self.known.get(key)
        found = self.source.lookup(tuple5, zone)
        if not isinstance(found, Unavailable):
            self.known[key] = found
        return found

    def closed(self) -> Remembered:
        """The same without its source."""
        return Remembered(source=None, known=self.known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One packet that kernel and simulator agreed on."""

    world: str
    query: WalkQuery
    shot: NetnsSnapshot
    """As it was before the packet; its conntrack knows what the walk asked."""
    seen: Observed
    after: Remembered
    """Connection tracking after the packet."""
    masters: dict[str, str]
    open_rules: frozenset[RuleId]


def replay(story: Record, walk: WalkFunction) -> Judgement:
    """Judges `walk` by what the kernel did then."""
    view = DutView(node=story.shot.netns.node, shot=story.shot)
    return judge(walk(view, story.query), story.seen, story.after, story.masters, story.open_rules)
