"""What a joiner knows of one place."""

from __future__ import annotations

from gketrace.follow.entries import EntryKey, Seen

__all__ = ["Here"]


class Here:
    """One place.  Mutable; the joiner's own."""

    __slots__ = (
        "after",
        "complete",
        "counts",
        "heard",
        "known_until",
        "live",
        "lost_at",
        "met",
        "recovering",
        "unplaced",
    )

    def __init__(self) -> None:
        self.after = 0.0
        """What is fed now happened after that."""
        self.counts = False
        """Its kernel counts packets and bytes."""
        self.recovering = False
        """Events were lost, and the table has not been read since."""
        self.lost_at = 0.0
        """When that was said last."""
        self.known_until: float | None = None
        """All that was there at that time, before the loss, is in `live`; None: that is not
        known."""
        self.unplaced: list[tuple[Seen, int, float]] = []
        """What has come since a loss without its beginning, with the kind of event and when it was
        read: not yet put to a connection."""
        self.heard = 0.0
        """By its clock: everything before has come."""
        self.complete = False
        """All that is there is known."""
        self.live: dict[EntryKey, Seen] = {}
        """Entries that were not destroyed."""
        self.met: set[EntryKey] = set()
        """Those of a reading of the whole table that is under way, or that came since."""
