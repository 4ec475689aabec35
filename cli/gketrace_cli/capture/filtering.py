"""The filter that was typed: joined to a plan's own, checked, and named in errors as it was typed.

The nodes compile filters, each for its interface.  What is checked here is for plans that nobody
carries out, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from gketrace.capture.packets import LinkType
from gketrace.errors import UnsupportedError, UsageError
from gketrace_cli.capture.offline import OfflineFilter
from gketrace_cli.capture.stream import AgentFailed, CaptureStream, Event, Started
from gketrace_proto.v1alpha1 import capture_pb2 as pb

if TYPE_CHECKING:
    from gketrace_cli.agents import Fleet

__all__ = ["FilteredStream", "check_filter", "join_filters"]

_ANY: Final = "any"


def join_filters(planned: str, typed: str) -> str:
    """Packets that both take.

    Raises `UsageError` where parentheses would make of both something else than that: alone, no
    libpcap takes such a filter either.
    """
    if not typed:
        return planned
    depth = 0
    for character in typed:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            break
    if depth:
        raise UsageError(f"filter {typed!r}: its parentheses do not match")
    return f"({planned}) and ({typed})"


def check_filter(typed: str, interfaces: frozenset[str]) -> str:
    """By this machine's libpcap; why it was not checked, when it was not.

    Raises `UsageError` with its message.
    """
    if not typed:
        return ""
    kinds = {LinkType.LINUX_SLL2 if name == _ANY else LinkType.ETHERNET for name in interfaces}
    try:
        for kind in kinds or {LinkType.ETHERNET}:
            OfflineFilter(int(kind), typed)
    except UnsupportedError:
        return "libpcap is not installed here, and the nodes were not asked"
    except UsageError as error:
        hint = "this machine's libpcap says so; the nodes were not asked"
        raise UsageError(error.message, hint=hint) from None
    return ""


class FilteredStream(CaptureStream):
    """A stream whose errors name the filter as it was typed; when all that refuse it say the same
    and nobody takes it, that is one error."""

    def __init__(
        self,
        fleet: Fleet,
        requests: Mapping[str, pb.CaptureRequest],
        *,
        descriptions: Mapping[str, tuple[str, ...]],
        typed: str,
    ) -> None:
        """As for `CaptureStream`."""
        super().__init__(fleet, requests, descriptions=descriptions)
        self._typed = typed
        self._sent = {node: [tap.filter for tap in one.taps] for node, one in requests.items()}

    def events(self) -> Iterator[Event]:
        """As for `CaptureStream`.  Raises `UsageError`."""
        refused: list[AgentFailed] = []
        taken = False
        for event in super().events():
            if isinstance(event, AgentFailed) and isinstance(event.error, UsageError):
                event = replace(event, error=self._as_typed(event.node, event.error))
                if not taken:
                    refused.append(event)
                    continue
            elif isinstance(event, Started) and not taken:
                taken = True
                yield from refused
            yield event
        if taken or not refused:
            return
        if len(refused) == 1:
            raise refused[0].error
        whys = {event.error.message.partition(repr(self._typed))[2] for event in refused}
        if len(whys) > 1 or not all(whys):
            yield from refused
            return
        nodes = ", ".join(event.node for event in refused)
        if len(refused) == len(self._sent):
            nodes = f"all {len(refused)} nodes"
        raise UsageError(f"filter {self._typed!r}{whys.pop()}, on {nodes}")

    def _as_typed(self, node: str, error: UsageError) -> UsageError:
        message = error.message
        for sent in self._sent.get(node, ()):
            message = message.replace(repr(sent), repr(self._typed))
        return UsageError(message, hint=error.hint)
