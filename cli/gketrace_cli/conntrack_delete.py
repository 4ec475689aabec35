"""``gketrace conntrack -D``: shows the entries that fit, asks, and deletes exactly those."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any, Final, NoReturn

import typer

from gketrace.conntrack import ConntrackEntry
from gketrace.conntrack_records import RECORD, record_of
from gketrace.conntrack_text import render_entry
from gketrace.errors import ExitCode, GketraceError, ReadOnlyError, UsageError
from gketrace.trace import Missing
from gketrace_cli.commands.conntrack import ConntrackOutput
from gketrace_cli.conntrack_reading import Place, Reading
from gketrace_cli.names import short_names
from gketrace_cli.options import Output
from gketrace_cli.render.conntrack import count_text, draw_entry, entry_document, heading
from gketrace_cli.render.documents import dump, envelope, missing_document
from gketrace_cli.render.layout import Page, write
from gketrace_cli.session import Session
from gketrace_proto.codec import encode
from gketrace_proto.v1alpha1 import agent_pb2 as pb

__all__ = ["Removal", "require_confirmation", "require_filter"]

_AT_ONCE: Final = 5000
"""Entries in one request."""
_OUTCOMES: Final = {
    pb.CONNTRACK_DELETION_DELETED: "deleted",
    pb.CONNTRACK_DELETION_GONE: "gone",
    pb.CONNTRACK_DELETION_REPLACED: "replaced",
    pb.CONNTRACK_DELETION_FAILED: "failed",
}
_WHY: Final = {
    "gone": "had gone already",
    "replaced": "was left alone: another connection has its tuple now",
    "failed": "could not be deleted",
    "unknown": "may or may not be deleted: the agent did not answer",
}


def require_filter(typed: pb.ConntrackFilter, *, named: bool) -> None:
    """Raises `UsageError` for what takes every entry: a table is never deleted as a whole.

    `named`: a pod or a Service was given.
    """
    narrow = pb.ConntrackFilter()
    narrow.CopyFrom(typed)
    narrow.family = 0
    for name in ("orig_src", "orig_dst", "reply_src", "reply_dst", "src_nat", "dst_nat"):
        text = getattr(narrow, name)
        if text and ip_network(text).prefixlen == 0:
            narrow.ClearField(name)
    if not named and not narrow.ByteSize():
        raise UsageError(
            "-D without a filter would delete whole tables",
            hint="say which entries, for example -p udp -d ADDRESS",
        )


def require_confirmation(*, yes: bool, dry_run: bool) -> None:
    """Raises `UsageError` where nobody could be asked."""
    if not yes and not dry_run and not sys.stdin.isatty():
        raise UsageError(
            "-D asks before it deletes, and standard input is no terminal",
            hint="--yes deletes without asking, --dry-run only shows",
        )


@dataclass(frozen=True, slots=True)
class _Found:
    """One entry that fits."""

    place: Place
    entry: ConntrackEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """One ``-D``.  `run` ends the program."""

    session: Session
    places: Sequence[Place]
    gaps: tuple[Missing, ...]
    filters: Mapping[Place, tuple[pb.ConntrackFilter, ...]]
    form: ConntrackOutput
    yes: bool
    dry_run: bool
    query: Mapping[str, Any]

    def run(self) -> NoReturn:
        """Raises: `GketraceError`, `typer.Exit`."""
        if not self.dry_run:
            self._require_permission()
        self.session.progress.say("reading connection tracking")
        reading = Reading(fleet=self.session.fleet, places=self.places, filters=self.filters)
        found = [_Found(place, entry) for place, entry in reading.entries()]
        self.session.progress.clear()
        missing = (*self.gaps, *reading.missing)
        asks = not self.yes and not self.dry_run
        if not self.form_is_document or asks:
            self._show(found, missing)
        outcomes: list[str] = []
        if asks and found and not self._agreed(found):
            self._say("Nothing was deleted.")
            raise typer.Exit(int(ExitCode.OK))
        errors: list[str] = []
        if found and not self.dry_run:
            outcomes = self._delete(found, errors)
        self._report(found, outcomes, errors, missing)
        bad = missing or "failed" in outcomes or "unknown" in outcomes
        raise typer.Exit(int(ExitCode.PARTIAL if bad else ExitCode.OK))

    @property
    def form_is_document(self) -> bool:
        return self.form in (ConntrackOutput.JSON, ConntrackOutput.JSONL, ConntrackOutput.YAML)

    def _require_permission(self) -> None:
        """Before anything is shown: a refusal afterwards would leave half a deletion."""
        fleet = self.session.fleet
        self.session.options.check_live("deleted")
        infos = {place.node: fleet.agent(place.node).info for place in self.places}
        refusing = [n for n, info in infos.items() if info and not info.allow_system_changes]
        if refusing:
            raise ReadOnlyError(
                f"the agent of node {refusing[0]} changes nothing on its node"
                + (f", nor do {len(refusing) - 1} others" if len(refusing) > 1 else ""),
                hint="it would have to be started with --allow-system-changes",
            )

    def _show(self, found: Sequence[_Found], missing: Sequence[Missing]) -> None:
        """What fits, and what was not seen."""
        if self.form is ConntrackOutput.CONNTRACK or self.form_is_document:
            # Documents go to standard output whole, so what is asked about is shown beside it.
            out = sys.stderr if self.form_is_document else sys.stdout
            now = time.time()
            out.writelines(f"{render_entry(one.entry, now=now)}\n" for one in found)
            out.flush()
            for item in missing:
                self._say(f"not seen: {item}")
            return
        page = self._page()
        which = {one.place for one in found}
        where = str(next(iter(which))) if len(which) == 1 else _several(which)
        verb = "would be deleted" if self.dry_run else "to be deleted"
        text = f"{count_text(len(found), 'entry', 'entries')} {verb} on {where}"
        if not found:
            text = "No entry fits; nothing is deleted"
        page.line(page.short(f"{text}."), "yellow" if missing else "bold")
        for item in missing:
            page.line(page.short(f"Not seen: {item}"), "yellow", hang=3)
        titles = {place: page.short(_title(place)) for place in self.places}
        width = max([4, *map(len, titles.values())])
        if found:
            page.blank()
            page.lines.append(page.paint(heading(width), "dim"))
        for one in found:
            draw_entry(page, titles[one.place], width, one.entry, None)
        write(page.text())

    def _agreed(self, found: Sequence[_Found]) -> bool:
        many = "this entry" if len(found) == 1 else f"these {len(found)} entries"
        sys.stderr.write(f"Delete {many}? [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def _delete(self, found: Sequence[_Found], errors: list[str]) -> list[str]:
        """What became of each; the kernel's and agents' complaints are added to `errors`."""
        self.session.progress.say("deleting")
        outcomes = ["unknown"] * len(found)
        for indices in _portions(found):
            place = found[indices[0]].place
            request = pb.DeleteConntrackRequest(target=place.target)
            order: list[int] = []
            others: list[int] = []
            for index in indices:
                record = record_of(found[index].entry)
                if record is None:
                    others.append(index)
                    request.entries.append(encode(found[index].entry))
                else:
                    order.append(index)
                    request.records += RECORD.pack(*record)
            try:
                reply = self.session.fleet.call(place.node, "DeleteConntrack", request)
            except GketraceError as error:
                errors.append(f"{place}: {error.message}")
                continue
            for index, outcome in zip((*order, *others), reply.outcomes, strict=True):
                outcomes[index] = _OUTCOMES.get(outcome, "unknown")
            errors.extend(f"{place}: {text}" for text in reply.errors)
        self.session.progress.clear()
        return outcomes

    def _report(
        self,
        found: Sequence[_Found],
        outcomes: Sequence[str],
        errors: Sequence[str],
        missing: Sequence[Missing],
    ) -> None:
        deleted = outcomes.count("deleted")
        verdict = f"{count_text(deleted, 'entry was', 'entries were')} deleted"
        rest = len(outcomes) - deleted
        verdict += f", {rest} {'was' if rest == 1 else 'were'} not." if rest else "."
        if self.dry_run:
            many = count_text(len(found), "entry", "entries")
            verdict = f"{many} would be deleted; nothing was."
        if self.form_is_document:
            self._write_document(found, outcomes, errors, missing, verdict)
            return
        left = [
            f"{one.place}: {one.entry} {_WHY[outcome]}"
            for one, outcome in zip(found, outcomes, strict=False)
            if outcome != "deleted"
        ]
        if self.form is ConntrackOutput.CONNTRACK:
            for text in (*left, *errors):
                self._say(text)
            # As conntrack(8) says it.
            said = f"{deleted} flow entries have been deleted."
            self._say(verdict if self.dry_run else said)
        elif found and not self.dry_run:
            page = self._page()
            page.line(verdict, "yellow" if rest else "green", "bold")
            for text in (*left, *errors):
                page.line(page.short(text), "yellow", indent=3, hang=2)
            write(f"\n{page.text()}")

    def _write_document(
        self,
        found: Sequence[_Found],
        outcomes: Sequence[str],
        errors: Sequence[str],
        missing: Sequence[Missing],
        verdict: str,
    ) -> None:
        told = outcomes or ["would be deleted"] * len(found)
        entries = [
            {"outcome": outcome, **entry_document(one.place, one.entry)}
            for one, outcome in zip(found, told, strict=True)
        ]
        body = {
            "query": dict(self.query),
            "dryRun": self.dry_run,
            "verdict": verdict,
            "complete": not missing,
            "missing": missing_document(missing),
            "errors": list(errors),
            "entries": entries,
        }
        document = envelope("ConntrackDeletion", body)
        if self.form is ConntrackOutput.JSONL:
            write(json.dumps(document) + "\n")
        else:
            form = Output.YAML if self.form is ConntrackOutput.YAML else Output.JSON
            write(dump(document, form))

    def _page(self) -> Page:
        wide = self.form is ConntrackOutput.WIDE
        names = short_names(node.name for node in self.session.nodes)
        return Page(colored=self.session.options.colored, wide=wide, names=names)

    def _say(self, text: str) -> None:
        print(f"gketrace: {text}", file=sys.stderr, flush=True)  # noqa: T201


def _portions(found: Sequence[_Found]) -> Iterator[list[int]]:
    """Indices of entries of one table, as many as go into one request."""
    by_place: dict[Place, list[int]] = {}
    for index, one in enumerate(found):
        by_place.setdefault(one.place, []).append(index)
    for indices in by_place.values():
        for start in range(0, len(indices), _AT_ONCE):
            yield indices[start : start + _AT_ONCE]


def _several(places: Collection[Place]) -> str:
    pods = any(place.pod is not None for place in places)
    return count_text(len(places), "namespace" if pods else "node")


def _title(place: Place) -> str:
    return place.node if place.pod is None else f"{place.node} {place.pod.key}"
