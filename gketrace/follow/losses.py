"""Places that lost events: what waits for them, and what their tables say when they are read again.

A reading gives entries without their beginning, and the entry in the middle of three is all that
shows the other two to be one connection.  So

- a connection that may have an entry there (it has one, or one of its addresses is that node's)
  waits for the reading; others do not;
- what the reading finds is put to a connection when the other places have told all that was before
  it: then every connection that it can be of is known.  It is of the youngest that fits: a tuple
  is unique in a table, so a later connection that came through has put the earlier entry out;
- it fits only where its state does (`Generations`): answers and ends pass all places, so an open
  entry is of no connection that was over, nor one without an answer of one whose client has it;
- an entry that was not there before the loss is of no connection that was over before it.

Both waits have bounds.  When the reading does not come in time, what is known is told and counted
(`Joiner.unheard`); what comes after that is put to what was told, and not told again.  An entry
that was removed before the reading joins nothing: its connection is then told in two parts, as
nothing else says that they are one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf

from gketrace.connections import Place
from gketrace.follow.entries import Seen
from gketrace.follow.flow import Flow
from gketrace.follow.model import Limits
from gketrace.follow.places import Here
from gketrace.packet import IPAddress

__all__ = ["Losses"]


class Losses:
    """Of all places.  Mutable; the joiner's own."""

    def __init__(
        self, places: Mapping[Place, Here], limits: Limits, owner: Callable[[IPAddress], str]
    ) -> None:
        """`places`: all that are followed, as they are at any time."""
        self._places = places
        self._limits = limits
        self._owner = owner
        self._lacking: dict[Place, Here] = {}
        """Until what was read after the loss has been put to connections."""
        self.now = 0.0

    def __contains__(self, place: Place) -> bool:
        """Whether it may still add to what was before its loss."""
        return place in self._lacking

    def add(self, place: Place, *, widened: bool) -> None:
        """Events of the place were lost; `widened` as for `Joiner.lose`."""
        here = self._places[place]
        if here.complete:
            here.known_until = here.heard
        if widened:
            here.known_until = None
        here.complete, here.recovering, here.lost_at = False, True, self.now
        here.met = set()
        self._lacking[place] = here
        for one in here.live.values():
            one.lossy = True

    def awaits(self, here: Here) -> bool:
        """Whether what a place that lost events has to say is still waited for."""
        return self.now < here.lost_at + self._limits.recover_at_most

    def hold(self, flow: Flow) -> bool:
        """Whether a connection is to wait for such a place."""
        return any(
            self.awaits(here) and flow.lacks(place, self._owner)
            for place, here in self._lacking.items()
        )

    def more_of(self, flow: Flow) -> bool:
        """Whether such a place may still have something of it, waited for or not."""
        return any(flow.lacks(place, self._owner) for place in self._lacking)

    def found(self, *, all_of_it: bool) -> list[tuple[Seen, int, float]]:
        """Entries, with the kind of event and when it was read, that can be put to connections now.
        `all_of_it`: or never."""
        if not self._lacking:
            return []
        heard = (here.heard for here in self._places.values() if not here.recovering)
        until = min(heard, default=inf) - self._limits.skew
        ready = []
        for place, here in list(self._lacking.items()):
            at_once = all_of_it or not self.awaits(here)
            ready += [one for one in here.unplaced if at_once or one[2] <= until]
            here.unplaced = [one for one in here.unplaced if not at_once and one[2] > until]
            if not here.unplaced and not here.recovering:
                del self._lacking[place]
        return ready
