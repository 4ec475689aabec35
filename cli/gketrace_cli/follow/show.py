"""What is written: lines for people or documents for programs, and what is said beside them."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from gketrace.follow.joiner import Phase, Step
from gketrace.follow.outcome import Judgement
from gketrace.packet import Tuple5
from gketrace.trace import Missing
from gketrace_cli.follow.output import Output, Sampler
from gketrace_cli.follow.packets import SeenPackets
from gketrace_cli.follow.tally import Tally
from gketrace_cli.follow.view import View
from gketrace_cli.render.follow import alone_lines, connection_lines
from gketrace_cli.render.follow_documents import (
    alone_document,
    connection_document,
    step_document,
    summary_document,
)
from gketrace_cli.render.follow_summary import summary_lines
from gketrace_cli.render.layout import WIDTH, Page

if TYPE_CHECKING:
    from gketrace_cli.options import Options

__all__ = ["RECORDS", "Show"]

RECORDS: Final = (Phase.CLOSED, Phase.STILL_OPEN)
"""A connection is told in one of these exactly once."""
_SIXTH: Final = 6
"""On a terminal, of whose rows so large a part is what connections a second are shown of those
that ended well, and as many that failed: they take two lines and more, and somebody reads them."""
_UNWRAPPED: Final = 1 << 20
"""Columns of what is no terminal: a line for a connection, for grep."""


class Show:
    """Standard output and standard error.  For one thread."""

    def __init__(
        self, options: Options, names: Mapping[str, str], *, jsonl: bool, steps: bool
    ) -> None:
        """`names`: long names of nodes → short ones.  `steps`: of documents, all phases."""
        self._jsonl = jsonl
        self._steps = steps
        self._options = options
        self._page = Page.of(options, names)
        self._page.width = _UNWRAPPED
        self._output = Output()
        self._sampler: Sampler | None = None
        if sys.stdout.isatty() and not jsonl:
            rows = shutil.get_terminal_size((WIDTH, 24)).lines
            self._sampler = Sampler(self._output.write, max(rows // _SIXTH, 2), time.monotonic)
        self._told: set[str] = set()
        """Rules whose text was shown."""
        self._warned: set[int] = set()
        """Connections of which a failure was shown before their end."""

    @property
    def error(self) -> str:
        """Why standard output cannot be written; empty: it can, or nobody reads it."""
        return self._output.error

    @property
    def over(self) -> bool:
        """Nobody reads it any more, or it cannot be written."""
        return self._output.broken.is_set()

    @property
    def unwritten(self) -> int:
        """Pieces that were thrown away, as too many waited."""
        return self._output.unwritten

    def say(self, text: str) -> None:
        """To people, beside the answer."""
        page = Page(width=_columns() if sys.stderr.isatty() else _UNWRAPPED)
        page.line(self._page.short(f"{time.strftime('%H:%M:%S')} {text}"), hang=9)
        print(page.text(), file=sys.stderr, end="", flush=True)  # noqa: T201

    def step(self, step: Step) -> None:
        self._write(step_document(step))

    def connection(self, view: View, namespace: str) -> None:
        """A record, or before it that a connection opened or fails."""
        followed = view.followed
        record = followed.phase in RECORDS
        if self._jsonl:
            if record or self._steps:
                self._write(connection_document(view))
            return
        if record and followed.number in self._warned:
            self._warned.discard(followed.number)
            if view.failed:
                return
        if not record and view.failed:
            self._warned.add(followed.number)
        self._offer(
            partial(connection_lines, self._page, view, namespace, self._told), failed=view.failed
        )

    def alone(
        self,
        seen: SeenPackets,
        judgement: Judgement,
        number: int,
        names: Callable[[Tuple5], tuple[str, str]],
    ) -> None:
        """A record of what only packets tell.  `names`: of its client and its front door."""
        if self._jsonl:
            self._write(alone_document(seen, judgement, number, names))
        else:
            self._offer(partial(alone_lines, self._page, seen, judgement), failed=True)

    def tick(self) -> None:
        """Now and then: says what a terminal was not shown."""
        if self._sampler is not None:
            self._sampler.tick()

    def summary(
        self,
        title: str,
        tally: Tally,
        seconds: float,
        missing: Sequence[Missing],
        names: Mapping[str, str],
    ) -> None:
        """The last thing.  `names`: endpoint → the pod's name."""
        self.tick()
        if self._jsonl:
            document = summary_document(title, tally, seconds, missing, names)
            self._write(document, must=True)
            self.say(str(document["verdict"]))
            return
        page = Page.of(self._options, self._page.names)
        summary_lines(page, title, tally, seconds, missing, names)
        self._output.write("\n" + page.text(), must=True)

    def close(self, seconds: float) -> bool:
        """Waits until all is written; False: somebody reads it, and too slowly."""
        return self._output.close(seconds) or self.over

    def _offer(self, text: Callable[[], str], *, failed: bool) -> None:
        if self._sampler is None:
            self._output.write(text())
        else:
            self._page.width = _columns()
            self._sampler.offer(text, failed=failed)

    def _write(self, document: dict[str, Any], *, must: bool = False) -> None:
        self._output.write(json.dumps(document, ensure_ascii=False) + "\n", must=must)


def _columns() -> int:
    """Of the terminal as it is now: it may have been made wider or narrower."""
    return max(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH // 2)
