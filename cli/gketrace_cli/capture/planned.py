"""Captures along paths: what they do beyond those of named places.

Files are written at the end, with corrected times and comments; what goes through a pipe is
commented by the plan at once.  At the end the connections are printed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gketrace.capture.packets import Tap
from gketrace.capture.plan import Plan
from gketrace.errors import ExitCode, UsageError
from gketrace.packet import IPAddress
from gketrace_cli.capture.connections import connection_document, draw_connections, exit_code
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

__all__ = ["PlannedCapture", "connections_of", "print_connections"]


class PlannedCapture:
    """One capture along a plan's paths.  Its collector gets all events."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.collector = Collector()
        self._collection: Collection | None = None

    @property
    def collection(self) -> Collection:
        """After the last event."""
        if self._collection is None:
            self._collection = self.collector.result(routes=self._plan.routes)
            if self._collection.left_out:
                tell(
                    f"{self._collection.left_out} packets beyond what is kept are neither in "
                    "connections nor, with -w, in the file"
                )
        return self._collection

    def files(self, path: str, make: Callable[[Callable[[], Sequence[str]]], FileSink]) -> Sink:
        """A sink for `path`; `make`: section comments → what writes it.  Raises `UsageError`."""
        if path == "-":
            return _Commented(PlanComments(self._plan), make(tuple))
        folder = Path(path).resolve().parent
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"cannot write {path}: no files can be made in {folder}")
        return _AtTheEnd(self, make)


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


class _AtTheEnd:
    """Writes files when all is known."""

    def __init__(
        self, capture: PlannedCapture, make: Callable[[Callable[[], Sequence[str]]], FileSink]
    ) -> None:
        self._capture = capture
        self._make = make

    def started(self, taps: tuple[Tap, ...]) -> None:
        """Nothing is written yet."""

    def write(self, chunk: Chunk) -> None:
        """The collector has it."""

    def finish(self, outcome: Outcome) -> None:
        collection = self._capture.collection
        files = self._make(lambda: collection.section_comments)
        try:
            files.started(tuple(outcome.taps))
            if collection.packets:
                files.write(chunk_of(collection.packets))
        except BaseException:
            files.abandon()
            raise
        files.finish(outcome)


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
