"""What a bundle holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from gketrace import errors
from gketrace.errors import GketraceError, ParseError
from gketrace_proto.v1alpha1 import agent_pb2 as pb

__all__ = ["HOST", "Bundle", "Listed", "NodeRecord", "Table"]

HOST: Final = ""
"""The key of a node's own namespace among those of its pods."""

_KINDS: Final = {
    name: kind
    for name in errors.__all__
    if isinstance(kind := getattr(errors, name), type)
    and issubclass(kind, GketraceError)
    and kind is not ParseError
}


@dataclass(slots=True, kw_only=True)
class Listed:
    """One list of Kubernetes objects, or why it could not be read."""

    items: list[dict[str, Any]] = field(default_factory=list)
    error: GketraceError | None = None


@dataclass(slots=True, kw_only=True)
class Table:
    """Connection tracking of one namespace."""

    entries: list[pb.ListConntrackReply] = field(default_factory=list)
    """Packed records and those that have more than fits, and the summary, as they were sent."""
    entries_error: GketraceError | None = None
    statistics: pb.GetConntrackStatsReply | GketraceError | None = None
    """None: not asked for."""


@dataclass(slots=True, kw_only=True)
class NodeRecord:
    """What one node's agent said, or why it did not."""

    node: str
    how: str = ""
    """How it was reached."""
    address: str = ""
    error: GketraceError | None = None
    """Nothing else is there then."""
    info: pb.GetInfoReply = field(default_factory=pb.GetInfoReply)
    replies: list[pb.SnapshotReply] = field(default_factory=list)
    """Of Snapshot, in order; each rule set's text whole in one reply."""
    snapshot_error: GketraceError | None = None
    pods: dict[str, pb.GetNetnsReply | GketraceError] = field(default_factory=dict)
    """``namespace/name`` → GetNetns of that pod."""
    tables: dict[str, Table] = field(default_factory=dict)
    """`HOST` or ``namespace/name`` → its connections."""
    hidden: str = ""
    """What the agent said that it hid from the caller."""


@dataclass(slots=True, kw_only=True)
class Bundle:
    """All of it."""

    created: float
    """Seconds since the epoch, by the clock of who made it."""
    gketrace: str
    """Version of the program that made it."""
    context: str
    namespace: str
    """The context's default namespace."""
    scope: tuple[str, ...]
    """The words that chose what is in it."""
    redacted: bool = False
    lists: dict[str, Listed] = field(default_factory=dict)
    """``pods``, ``services`` …, followed by ``@NAMESPACE`` where one namespace alone was listed."""
    nodes: dict[str, NodeRecord] = field(default_factory=dict)


def error_document(error: GketraceError) -> dict[str, str]:
    """As it is saved."""
    kind = next(c.__name__ for c in type(error).__mro__ if c in _KINDS.values())
    return {"kind": kind, "message": error.message, "hint": error.hint}


def error_from_document(document: Mapping[str, Any]) -> GketraceError:
    """Raises: `KeyError`, `TypeError` for what is none."""
    kind = _KINDS.get(str(document["kind"]), GketraceError)
    return kind(str(document["message"]), hint=str(document.get("hint", "")))


__all__ += ["error_document", "error_from_document"]
