"""Captures along paths: what they do beyond those of named places.

Files are written at the end, with corrected times and comments.  Until then FILE.part has all
packets as they come, by each node's own clock and with the plan's comments: what goes through a
pipe is like that, too.  At the end the connections are printed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gketrace.capture.packets import Tap
from gketrace.capture.plan import Plan
from gketrace.errors import ExitCode
from gketrace.packet import IPAddress
from gketrace_cli.capture.connection_document import connection_document
from gketrace_cli.capture.connections import draw_connections, exit_code
from gketrace_cli.capture.files import FileSink
from gketrace_cli.capture.merge import Chunk
from gketrace_cli.capture.running import Outcome, Sink, tell
from gketrace_cli.capture.stitching import (
    Collection,
    Collector,
    PlanComments,
    chunk_of,
)
from gketrace_cli.render.documents import envelope
from gketrace_cli.render.layout import Page, write

if TYPE_CHECKING:
    from gketrace_cli.capture.tracking import Tracking

__all__ = ["MakeFiles", "PlannedCapture", "connections_of", "print_connections"]


class MakeFiles(Protocol):
    """Opens the files that were asked for."""

    def __call__(self, comments: Callable[[], Sequence[str]] = ..., suffix: str = ...) -> FileSink:
        """`comments`: of the section header; `suffix`: of names while files are not whole."""


class PlannedCapture:
    """One capture along a plan's paths.  Its collector gets all events."""

    def __init__(self, plan: Plan, tracking: Tracking) -> None:
        """`tracking` has been started."""
        self._plan = plan
        self._tracking = tracking
        self.collector = Collector()
        self._collection: Collection | None = None

    @property
    def collection(self) -> Collection:
        """After the last event."""
        if self._collection is None:
            self._tracking.finish()
            self._collection = self.collector.result(
                routes=self._plan.routes, entries=self._tracking.entries
            )
            if self._collection.left_out:
                tell(
                    f"{self._collection.left_out} packets beyond what is kept are in no "
                    "connection, and have no corrected time"
                )
        return self._collection

    def files(self, path: str, make: MakeFiles) -> Sink:
        """A sink for `path`.  Raises `UsageError`."""
        now = _Commented(PlanComments(self._plan), make())
        pipe = path == "-" or (Path(path).exists() and not Path(path).is_file())
        return now if pipe else _AtTheEnd(self, now, make)


class _Commented:
    """In front of files that are written at once."""

    def __init__(self, comments: PlanComments, inner: FileSink) -> None:
        self._comments = comments
        self._inner = inner

    def started(self, taps: tuple[Tap, ...]) -> None:
        self._inner.started(taps)

    def write(self, chunk: Chunk) -> None:
        self._inner.write(self._comments.chunk(chunk))

    def finish(self, outcome: Outcome) -> None:
        self._inner.finish(outcome)

    def discard(self) -> None:
        self._inner.discard()

    def abandon(self) -> None:
        self._inner.abandon()


class _AtTheEnd:
    """Writes files when all is known, and until then those that are left if it never is."""

    def __init__(self, capture: PlannedCapture, now: _Commented, make: MakeFiles) -> None:
        self._capture = capture
        self._now = now
        self._make = make

    def started(self, taps: tuple[Tap, ...]) -> None:
        self._now.started(taps)

    def write(self, chunk: Chunk) -> None:
        self._now.write(chunk)

    def finish(self, outcome: Outcome) -> None:
        collection = self._capture.collection
        files = self._make(lambda: collection.section_comments, ".whole")
        try:
            files.started(tuple(outcome.taps))
            if collection.packets:
                files.write(chunk_of(collection.packets))
        except BaseException:
            files.abandon()
            raise
        files.finish(outcome)
        if collection.left_out:
            self._now.abandon()  # it has more packets than the files have
        else:
            self._now.discard()


def print_connections(
    page: Page, collection: Collection, names: Mapping[IPAddress, str], said: Sequence[str] = ()
) -> ExitCode:
    """As text; 1 when one of them failed."""
    page.blank()
    draw_connections(page, collection.stitched, names, collection.clocks, said)
    for text in collection.section_comments:
        page.line(page.short(text), "dim")
    write(page.text())
    return exit_code(collection.stitched)


def connections_of(
    collection: Collection, names: Mapping[IPAddress, str], *, lines: bool = False
) -> tuple[dict[str, Any], ExitCode]:
    """What a document says of them; `lines`: prints one for each."""
    documents = [
        connection_document(connection, names, collection.clocks)
        for connection in collection.stitched.connections
    ]
    if lines:
        for document in documents:
            sys.stdout.write(json.dumps(envelope("CapturedConnection", document)) + "\n")
        sys.stdout.flush()
    body = {"connections": documents, "clocks": next(iter(collection.section_comments), None)}
    return body, exit_code(collection.stitched)
