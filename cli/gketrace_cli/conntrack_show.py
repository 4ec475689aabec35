"""What `gketrace conntrack` writes: lists, counts and statistics, in each of its formats.

``conntrack``, ``json`` and ``jsonl`` are written as the entries come.  Text holds them, packed as
they came over the wire, until the first line can say how many there are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn

import typer
from google.protobuf.json_format import MessageToDict

from gketrace.errors import ExitCode, GketraceError
from gketrace.trace import Missing
from gketrace_cli.addressbook import AddressBook
from gketrace_cli.commands.conntrack import ConntrackOutput
from gketrace_cli.conntrack_reading import RECORDS, Place, Reading, entries_of, plain_lines
from gketrace_cli.names import short_names
from gketrace_cli.options import Options, Output
from gketrace_cli.render.conntrack import (
    count_text,
    draw_entry,
    draw_statistics,
    end_document,
    entry_document,
    heading,
    list_verdict,
    statistics_document,
    statistics_line,
)
from gketrace_cli.render.documents import dump, envelope, missing_document
from gketrace_cli.render.layout import Page, write
from gketrace_cli.session import Session
from gketrace_proto.v1alpha1 import agent_pb2 as pb

__all__ = ["Listing", "filter_document", "read_book", "show_statistics"]

_PAGE: Final = 500
"""Entries that are drawn before they are written."""


def filter_document(typed: pb.ConntrackFilter) -> dict[str, Any]:
    """What was typed, for ``query``."""
    return MessageToDict(typed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """One ``-L`` or a filtered ``-C``.  Every ``show`` ends the program with its exit code."""

    session: Session
    options: Options
    places: Sequence[Place]
    gaps: tuple[Missing, ...]
    """Nodes whose agent does not answer."""
    filters: Mapping[Place, tuple[pb.ConntrackFilter, ...]]
    limit: int
    fitting: bool
    """True: something was filtered."""
    query: Mapping[str, Any]

    def show(self, form: ConntrackOutput) -> NoReturn:
        """Raises: `GketraceError`, `typer.Exit`."""
        reading = self._reading()
        self.session.progress.say("reading connection tracking")
        if form is ConntrackOutput.CONNTRACK:
            self._show_lines(reading)
        elif form is ConntrackOutput.JSONL:
            self._show_jsonl(reading)
        elif form is ConntrackOutput.JSON:
            self._show_json(reading)
        elif form is ConntrackOutput.YAML:
            self._show_yaml(reading)
        else:
            self._show_text(reading, wide=form is ConntrackOutput.WIDE)
        raise typer.Exit(int(self._code(reading)))

    def show_count(self, form: ConntrackOutput) -> NoReturn:
        """How many entries fit."""
        reading = self._reading()
        for _ in reading.replies(RECORDS):
            pass
        self.session.progress.clear()
        missing, verdict = self._missing(reading), self._verdict(reading)
        if form is ConntrackOutput.CONNTRACK:
            write(f"{reading.sent}\n")
            _complain(missing)
        elif form in (ConntrackOutput.TEXT, ConntrackOutput.WIDE):
            page = self._page(wide=form is ConntrackOutput.WIDE)
            self._draw_head(page, verdict, missing, self._notes(reading))
            write(page.text())
        else:
            end = end_document(verdict, self._ends(reading), missing, self._notes(reading))
            body = {"query": self.query, "entries": reading.sent, **end}
            write(_machine(envelope("ConntrackCount", body), form))
        raise typer.Exit(int(self._code(reading)))

    def _reading(self) -> Reading:
        return Reading(
            fleet=self.session.fleet, places=self.places, filters=self.filters, limit=self.limit
        )

    # as it comes

    def _show_lines(self, reading: Reading) -> None:
        """conntrack(8)'s lines, and nothing else, on standard output."""
        out = sys.stdout.buffer
        for _, reply in reading.replies(pb.CONNTRACK_FORMAT_TEXT):
            self.session.progress.clear()
            out.write(plain_lines(reply.text))
        out.flush()
        _complain(self._missing(reading))
        print(f"gketrace: {self._verdict(reading)}", file=sys.stderr)  # noqa: T201

    def _show_jsonl(self, reading: Reading) -> None:
        for place, reply in reading.replies(RECORDS):
            self.session.progress.clear()
            _emit(
                json.dumps(envelope("ConntrackEntry", entry_document(place, one))) + "\n"
                for one in entries_of(reply)
            )
        end = end_document(
            self._verdict(reading),
            self._ends(reading),
            self._missing(reading),
            self._notes(reading),
        )
        _emit([json.dumps(envelope("ConntrackListEnd", {"query": self.query, **end})) + "\n"])

    def _show_json(self, reading: Reading) -> None:
        """One document, whose entries are written before what is known only after them."""
        head = json.dumps(envelope("ConntrackList", {"query": self.query}), indent=2)
        _emit([head.removesuffix("\n}"), ',\n  "entries": ['])
        separator = "\n"
        for place, reply in reading.replies(RECORDS):
            self.session.progress.clear()
            pieces = []
            for one in entries_of(reply):
                pieces.append(f"{separator}    {json.dumps(entry_document(place, one))}")
                separator = ",\n"
            _emit(pieces)
        end = end_document(
            self._verdict(reading),
            self._ends(reading),
            self._missing(reading),
            self._notes(reading),
        )
        _emit(["\n  ],\n", json.dumps(end, indent=2).removeprefix("{\n"), "\n"])

    # all at once

    def _show_yaml(self, reading: Reading) -> None:
        entries = [entry_document(place, one) for place, one in reading.entries()]
        self.session.progress.clear()
        end = end_document(
            self._verdict(reading),
            self._ends(reading),
            self._missing(reading),
            self._notes(reading),
        )
        body = {"query": self.query, "entries": entries, **end}
        write(_machine(envelope("ConntrackList", body), ConntrackOutput.YAML))

    def _show_text(self, reading: Reading, *, wide: bool) -> None:
        held: dict[Place, list[pb.ListConntrackReply]] = {place: [] for place in self.places}
        for place, reply in reading.replies(RECORDS):
            held[place].append(reply)
        book, unnamed = read_book(self.session) if wide else (None, ())
        self.session.progress.clear()
        page = self._page(wide=wide)
        missing = (*self._missing(reading), *unnamed)
        self._draw_head(page, self._verdict(reading), missing, self._notes(reading))
        titles = {place: page.short(_title(place)) for place in self.places}
        width = max([4, *(len(title) for title in titles.values())])
        if reading.sent:
            page.blank()
            page.lines.append(page.paint(heading(width), "dim"))
        for place, replies in held.items():
            for one in (one for reply in replies for one in entries_of(reply)):
                draw_entry(page, titles[place], width, one, book)
                if len(page.lines) >= _PAGE:
                    write(page.text())
                    page.lines.clear()
        if page.lines:
            write(page.text())

    # what is said of all of it

    def _draw_head(
        self, page: Page, verdict: str, missing: Sequence[Missing], notes: Sequence[str]
    ) -> None:
        style = "yellow" if missing else "green"
        page.line(page.short(verdict), style, "bold")
        for item in missing:
            page.line(page.short(f"Not seen: {item}"), "yellow", hang=3)
        for note in notes:
            page.line(page.short(note), "dim", hang=2)

    def _page(self, *, wide: bool) -> Page:
        options = replace(self.options, output=Output.WIDE if wide else Output.TEXT)
        return Page.of(options, short_names(node.name for node in self.session.nodes))

    def _ends(self, reading: Reading) -> list[Any]:
        return [reading.ends[place] for place in self.places if place in reading.ends]

    def _missing(self, reading: Reading) -> tuple[Missing, ...]:
        return (*self.gaps, *reading.missing)

    def _verdict(self, reading: Reading) -> str:
        ends, missing = self._ends(reading), self._missing(reading)
        return list_verdict(ends, missing, fitting=self.fitting)

    def _notes(self, reading: Reading) -> list[str]:
        ends = [end for end in self._ends(reading) if end.summary is not None]
        notes = []
        blind = [end.place for end in ends if not end.summary.accounting and end.summary.tracked]
        if blind:
            where = _several(blind, len(ends))
            notes.append(f"Accounting is off{where}: packets and bytes are not known.")
        silent = [end.place for end in ends if end.not_tracked]
        if silent and len(silent) < len(ends):
            where = _several(silent, len(ends)).removeprefix(" on ")
            notes.append(f"Not tracked: {where}; nothing there asks for connection tracking.")
        if any(end.summary.truncated and not end.cut(self.limit) for end in ends):
            notes.append(f"There are more: --limit {self.limit} was given.")
        unread = [place for place in self.places if not self.filters[place]]
        if unread:
            notes.append("Nothing can fit: what was asked for contradicts itself.")
        return notes

    def _code(self, reading: Reading) -> ExitCode:
        return ExitCode.PARTIAL if self._missing(reading) else ExitCode.OK


def show_statistics(
    session: Session,
    places: Sequence[Place],
    gaps: tuple[Missing, ...],
    options: Options,
    form: ConntrackOutput,
    *,
    brief: bool,
) -> NoReturn:
    """``-S``, and ``-C`` of whole tables (`brief`).  Raises: `GketraceError`, `typer.Exit`."""
    session.progress.say("asking for statistics")
    request = {
        place: (place.node, "GetConntrackStats", pb.GetConntrackStatsRequest(target=place.target))
        for place in places
    }
    answers = session.fleet.ask(request)
    session.progress.clear()
    failed = {p: a for p, a in answers.items() if isinstance(a, GketraceError)}
    if failed and len(failed) == len(answers):
        raise next(iter(failed.values()))
    missing = gaps + tuple(
        Missing(what="conntrack", why=error.message, node=place.node)
        for place, error in failed.items()
    )
    read = {place: answer for place, answer in answers.items() if place not in failed}
    total = sum(answer.entries for answer in read.values())
    where = str(next(iter(read))) if len(read) == 1 else f"{len(read)} nodes"
    tail = "; not everything was seen." if missing else "."
    verdict = f"{count_text(total, 'entry', 'entries')} on {where}{tail}"
    if len(read) == 1 and not next(iter(read.values())).tracked:
        verdict = f"{where} is not tracked: nothing there asks for connection tracking{tail}"
        verdict = verdict[0].upper() + verdict[1:]
    if form is ConntrackOutput.CONNTRACK:
        stats = [statistics_line(cpu) for answer in read.values() for cpu in answer.cpus]
        write("".join(f"{line}\n" for line in ([str(total)] if brief else stats)))
        _complain(missing)
    elif form in (ConntrackOutput.TEXT, ConntrackOutput.WIDE):
        page = Page.of(options, short_names(node.name for node in session.nodes))
        page.line(page.short(verdict), "yellow" if missing else "green", "bold")
        for item in missing:
            page.line(page.short(f"Not seen: {item}"), "yellow", hang=3)
        for place, answer in read.items():
            if not brief:
                draw_statistics(page, place, answer)
            elif len(read) > 1:
                off = "" if answer.tracked else "  not tracked"
                page.entry(page.short(_title(place)), f"{answer.entries}{off}", column=24)
        write(page.text())
    else:
        body = {
            "verdict": verdict,
            "complete": not missing,
            "missing": missing_document(missing),
            "tables": [statistics_document(place, answer) for place, answer in read.items()],
        }
        write(_machine(envelope("ConntrackStatistics", body), form))
    raise typer.Exit(int(ExitCode.PARTIAL if missing else ExitCode.OK))


def read_book(session: Session) -> tuple[AddressBook, tuple[Missing, ...]]:
    """Names for addresses, as far as the API tells them."""
    nodes = session.nodes
    seen = {
        node.name: [one.address for one in session.fleet.addresses(node.name)] for node in nodes
    }
    try:
        read = session.read({"pods": session.cluster.pods, "services": session.cluster.services})
    except GketraceError as error:
        why = f"addresses have no names: {error.message}"
        book = AddressBook(nodes=nodes, pods=(), services=(), seen=seen)
        return book, (Missing(what="names", why=why),)
    pods, services = read["pods"], read["services"]
    return AddressBook(nodes=nodes, pods=pods, services=services, seen=seen), ()


def _title(place: Place) -> str:
    return place.node if place.pod is None else f"{place.node} {place.pod.key}"


def _several(places: Sequence[Place], among: int) -> str:
    """`` on N of M nodes``, their names, or nothing when it is the only one."""
    if among == 1:
        return ""
    if len(places) == among:
        return " on all nodes"
    if len(places) > 3:
        return f" on {len(places)} of {among} nodes"
    return " on " + ", ".join(_title(place) for place in places)


def _machine(document: Mapping[str, Any], form: ConntrackOutput) -> str:
    if form is ConntrackOutput.JSONL:
        return json.dumps(document) + "\n"
    return dump(document, Output.YAML if form is ConntrackOutput.YAML else Output.JSON)


def _emit(pieces: Any) -> None:
    """To standard output, a piece at a time."""
    for piece in pieces:
        sys.stdout.write(piece)
    sys.stdout.flush()


def _complain(missing: Sequence[Missing]) -> None:
    """On standard error: standard output is conntrack(8)'s."""
    for item in missing:
        print(f"gketrace: not seen: {item}", file=sys.stderr)  # noqa: T201
