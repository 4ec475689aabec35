"""The nodes' connection-tracking entries of what a plan captures: which tuple became which.

Packets tell mostly by themselves that they are one connection's.  A datagram over IPv6 that is like
another one does not: no sequence number, no identification.  The entry of the node that rewrote it
does.

Read are the entries whose first tuple is that of a planned packet before a rewrite, and nothing
else; agents and their kernels filter.  They are read at the end, and, where what is captured is
not TCP, every few seconds before: an entry without an answer is gone after 30 seconds
(nf_conntrack_udp_timeout).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from gketrace.capture.conversations import Tracked
from gketrace.capture.plan import Plan
from gketrace.errors import GketraceError
from gketrace.packet import PORT_PROTOCOLS, Packet, Protocol
from gketrace_cli.conntrack_reading import Place, Reading
from gketrace_proto.v1alpha1 import agent_pb2 as pb

if TYPE_CHECKING:
    from gketrace_cli.agents import Fleet

__all__ = ["Tracking", "tracked_filters"]

_EACH: Final = 20_000
"""Entries of a node in one reading, at most."""
_MOST: Final = 100_000
"""Entries that are kept."""
_EVERY: Final = 12.0
"""Seconds between two readings: two fall into the 30 that an unanswered one lasts."""


def tracked_filters(plan: Plan) -> dict[Place, tuple[pb.ConntrackFilter, ...]]:
    """Which entries of each node are about what the plan captures.

    A crossing behind a rewrite on a node's own namespace stands for the packet before it: that is
    the entry's original tuple.  What the plan leaves open, the filter does.
    """
    wanted: dict[str, dict[bytes, pb.ConntrackFilter]] = {}
    for route in plan.routes:
        for crossing in route.there:
            if not crossing.rewrites or crossing.spot.pod:
                continue
            open_client = crossing.term.client is None
            one = _filter(crossing.rewrites[0].before, open_client=open_client)
            wanted.setdefault(crossing.spot.node, {})[one.SerializeToString()] = one
    return {Place(node=node): tuple(found.values()) for node, found in wanted.items()}


def _filter(before: Packet, *, open_client: bool) -> pb.ConntrackFilter:
    one = pb.ConntrackFilter(
        family=before.family, protocol=before.protocol, orig_dst=str(before.dst)
    )
    if not open_client:
        one.orig_src = str(before.src)
    if before.protocol in PORT_PROTOCOLS and before.dport is not None:
        one.orig_dport = before.dport
    return one


class Tracking:
    """Reads them while a capture runs.  `start` it, `finish` it, then `entries`."""

    def __init__(self, fleet: Fleet, plan: Plan, tell: Callable[[str], None]) -> None:
        """`tell`: gets a sentence for what could not be read."""
        self._fleet = fleet
        self._filters = tracked_filters(plan)
        self._tell = tell
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._said: set[str] = set()
        self._entries: dict[tuple[object, ...], Tracked] = {}
        protocols = {c.packet.protocol for route in plan.routes for c in route.there if c.rewrites}
        self._often = bool(protocols - {Protocol.TCP})

    @property
    def entries(self) -> tuple[Tracked, ...]:
        """After `finish`.  Of two with the same tuples, the one that was read last."""
        return tuple(self._entries.values())

    def start(self) -> None:
        if self._filters and self._often:
            self._thread = threading.Thread(target=self._run, name="conntrack", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Reads a last time."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._read()

    def _run(self) -> None:
        while not self._stop.wait(_EVERY):
            self._read()

    def _read(self) -> None:
        if not self._filters:
            return
        reading = Reading(
            fleet=self._fleet, places=tuple(self._filters), filters=self._filters, limit=_EACH
        )
        try:
            for place, entry in reading.entries():
                key = (place.node, entry.zone, entry.orig, entry.reply)
                if key in self._entries or len(self._entries) < _MOST:
                    self._entries[key] = Tracked(node=place.node, entry=entry)
                else:
                    self._say(f"conntrack: no more than {_MOST} entries are kept")
        except GketraceError as error:
            self._say(f"connections are joined without conntrack: {error.message}")
            return
        for missing in reading.missing:
            self._say(f"not seen: {missing}")
        for place, end in reading.ends.items():
            if end.summary is not None and end.summary.truncated:
                self._say(f"conntrack of {place}: no more than {_EACH} entries are read at once")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._tell(text)
