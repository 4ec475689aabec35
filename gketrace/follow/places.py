"""What a joiner knows of one place."""

from __future__ import annotations

from gketrace.follow.entries import EntryKey, Seen

__all__ = ["Here"]


class Here:
    """One place.  Mutable; the joiner's own."""

    __slots__ = ("after", "complete", "counts", "heard", "live", "met", "recovering")

    def __init__(self) -> None:
        self.after = 0.0
        """What is fed now happened after that."""
        self.counts = False
        """Its kernel counts packets and bytes."""
        self.recovering = False
        """Events were lost, and the table has not been read since."""
        self.heard = 0.0
        """By its clock: everything before has come."""
        self.complete = False
        """All that is there is known."""
        self.live: dict[EntryKey, Seen] = {}
        """Entries that were not destroyed."""
        self.met: set[EntryKey] = set()
        """Those of a reading of the whole table that is under way, or that came since."""
