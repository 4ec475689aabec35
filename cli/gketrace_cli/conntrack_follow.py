"""``gketrace conntrack -E``: events of any number of tables as they come, until interrupted."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import NoReturn

import typer

from gketrace.conntrack import ConntrackEntry
from gketrace.errors import ExitCode, GketraceError, UsageError
from gketrace.trace import Missing
from gketrace_cli.commands.conntrack import ConntrackOutput
from gketrace_cli.conntrack_reading import Place, check_events, plain_lines
from gketrace_cli.names import short_names
from gketrace_cli.render.conntrack import entry_document
from gketrace_cli.render.documents import envelope
from gketrace_cli.session import Session
from gketrace_proto.codec import decode
from gketrace_proto.v1alpha1 import agent_pb2 as pb

__all__ = ["follow"]

_AT_MOST = 32
"""Tables at a time: each is a call that does not end."""


def follow(
    session: Session,
    gaps: Sequence[Missing],
    filters: Mapping[Place, tuple[pb.ConntrackFilter, ...]],
    form: ConntrackOutput,
    kinds: Collection[str] = (),
) -> NoReturn:
    """Ends when every table's events have ended.  Losses are told on standard error.

    `kinds`: of news, updates and destroys; none: all.

    Raises: `UsageError`, `GketraceError`, `typer.Exit`.
    """
    if form in (ConntrackOutput.JSON, ConntrackOutput.YAML):
        raise UsageError(f"-E does not end, so it has no -o {form.value}", hint="use -o jsonl")
    if len(filters) > _AT_MOST:
        raise UsageError(f"-E follows {_AT_MOST} nodes at most", hint="--node NODE picks one")
    for item in gaps:
        _tell(f"not seen: {item}")
    short = short_names(node.name for node in session.nodes)
    calls = {
        place: (
            place.node,
            "FollowConntrack",
            pb.FollowConntrackRequest(
                target=place.target,
                any=a,
                news="news" in kinds,
                updates="updates" in kinds,
                destroys="destroys" in kinds,
                format=pb.CONNTRACK_FORMAT_UNSPECIFIED
                if form is ConntrackOutput.JSONL
                else pb.CONNTRACK_FORMAT_TEXT,
            ),
        )
        for place, a in filters.items()
        if a
    }
    said: dict[Place, tuple[str, int, int, bool]] = {}
    wrong: set[Place] = set()
    for place, reply in session.fleet.stream(calls):
        if isinstance(reply, GketraceError):
            _tell(f"not seen: conntrack on {place}: {reply.message}")
            continue
        if reply is None or place in wrong:
            continue
        try:
            check_events(reply)
        except GketraceError as error:
            wrong.add(place)
            _tell(f"not seen: conntrack on {place}: {error.message}")
            if len(wrong) == len(calls):
                break
            continue
        for event in reply.events:
            _write(place, event)
        if reply.text:
            _write_lines(reply.text, "" if form is ConntrackOutput.CONNTRACK else short[place.node])
        sys.stdout.flush()
        if reply.HasField("status"):
            status = reply.status
            now = (status.mode, status.overruns, status.lost, status.tracked)
            if said.get(place) != now:
                _tell_status(place, status, first=place not in said)
                said[place] = now
    raise typer.Exit(int(ExitCode.PARTIAL))


def _write(place: Place, event: pb.ConntrackEvent) -> None:
    entry = decode(ConntrackEntry, event.entry)
    kind = pb.ConntrackEventKind.Name(event.kind).removeprefix("CONNTRACK_EVENT_KIND_")
    body = {"event": kind, "polled": event.polled, **entry_document(place, entry)}
    sys.stdout.write(json.dumps(envelope("ConntrackEvent", body)) + "\n")


def _write_lines(text: bytes, node: str) -> None:
    """conntrack(8)'s lines, with the node before each when there is one."""
    if node:
        text = b"".join(b"%s %s" % (node.encode(), line) for line in text.splitlines(True))
    sys.stdout.flush()
    sys.stdout.buffer.write(plain_lines(text))


def _tell_status(place: Place, status: pb.FollowConntrackStatus, *, first: bool) -> None:
    if first:
        why = f" ({status.reason})" if status.reason else ""
        _tell(f"following {place} by {status.mode}{why}")
    if not status.tracked:
        _tell(f"{place}: not tracked: nothing there asks for connection tracking")
    if status.lost or status.overruns:
        _tell(
            f"{place}: the kernel dropped {status.lost} messages of events in {status.overruns} "
            f"overruns; the table was read again {status.resyncs} times"
        )


def _tell(text: str) -> None:
    print(f"gketrace: {text}", file=sys.stderr, flush=True)  # noqa: T201
