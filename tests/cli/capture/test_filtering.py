"""The filter that was typed, beside a plan's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from gketrace.capture.packets import CapturedPacket, Tap
from gketrace.errors import GketraceError, UnavailableError, UsageError
from gketrace.trace import NetnsKind, NetnsRef
from gketrace_cli.capture import offline
from gketrace_cli.capture.filtering import FilteredStream, check_filter, join_filters
from gketrace_cli.capture.offline import OfflineFilter
from gketrace_cli.capture.stream import AgentFailed, CaptureStream, Event, Started
from gketrace_proto.v1alpha1 import capture_pb2 as pb

PLANNED = "tcp and host 10.40.0.6 and port 8080"
TYPED = "port foo bar"


def test_a_filter_narrows_the_plan_and_never_widens_it() -> None:
    assert join_filters(PLANNED, "") == PLANNED
    assert join_filters(PLANNED, "tcp[(4 + 4)] = 1") == f"({PLANNED}) and (tcp[(4 + 4)] = 1)"
    for typed in ("port 80) or (port 90", "(port 80", "port 80)"):
        with pytest.raises(UsageError, match="parentheses"):
            join_filters(PLANNED, typed)


def test_a_bad_filter_is_refused_with_libpcaps_words() -> None:
    assert check_filter("", frozenset()) == ""
    assert check_filter("port 80 and inbound", frozenset({"eth0"})) == ""
    with pytest.raises(UsageError, match=r"^filter 'port foo bar': unknown port 'foo'; this machi"):
        check_filter(TYPED, frozenset())
    # A capture on all interfaces has no such header.
    assert check_filter("ether host 00:00:00:00:00:01", frozenset({"eth0"})) == ""
    with pytest.raises(UsageError, match="only on ethernet"):
        check_filter("ether multicast", frozenset({"any"}))


def test_without_libpcap_it_is_not_said_to_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "_LIBRARIES", ())
    assert "libpcap is not installed here" in check_filter(TYPED, frozenset())


def events(
    monkeypatch: pytest.MonkeyPatch, came: Sequence[Event], sent: Mapping[str, str]
) -> list[Event]:
    """What becomes of a stream's events."""

    def answers(_: CaptureStream) -> Iterator[Event]:
        return iter(came)

    monkeypatch.setattr(CaptureStream, "events", answers)
    requests = {
        node: pb.CaptureRequest(taps=[pb.CaptureTap(filter=text)]) for node, text in sent.items()
    }
    fleet: Any = None  # nobody is asked
    return list(FilteredStream(fleet, requests, descriptions={}, typed=TYPED).events())


def refusal(node: str, why: str = "unknown port 'foo'") -> AgentFailed:
    text = f"node {node}: host eth0: filter {sent(node)!r}: {why}"
    return AgentFailed(node=node, taps=(), error=UsageError(text))


def sent(node: str) -> str:
    return f"(host {node} and tcp) and ({TYPED})"


def started(node: str) -> Started:
    netns = NetnsRef(kind=NetnsKind.HOST, node=node)
    tap = Tap(node=node, netns=netns, interface="eth0", link_type=1)
    return Started(node=node, taps=(tap,), reply=pb.CaptureStarted(), received_ns=0)


SENT = {node: sent(node) for node in ("a", "b", "c")}


def test_what_all_nodes_refuse_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError) as caught:
        events(monkeypatch, [refusal(node) for node in SENT], SENT)
    assert str(caught.value) == "filter 'port foo bar': unknown port 'foo', on all 3 nodes"
    away = AgentFailed(node="c", taps=(), error=UnavailableError("node c: no agent"))
    with pytest.raises(UsageError, match=r"'foo', on a, b$"):
        events(monkeypatch, [refusal("a"), away, refusal("b")], SENT)
    with pytest.raises(
        UsageError, match=r"^node a: host eth0: filter 'port foo bar': unknown port"
    ):
        events(monkeypatch, [refusal("a")], {"a": sent("a")})


def test_what_one_node_refuses_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = started("b")
    first, second = events(monkeypatch, [refusal("a"), begun], SENT)
    assert second is begun
    assert isinstance(first, AgentFailed)
    error: GketraceError = first.error
    assert str(error) == "node a: host eth0: filter 'port foo bar': unknown port 'foo'"
    different = events(monkeypatch, [refusal("a"), refusal("b", "syntax error")], SENT)
    assert [type(event) for event in different] == [AgentFailed, AgentFailed]


def test_a_name_and_a_long_filter_are_compiled_by_a_process_that_can_be_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosts = " or ".join(f"host 10.0.{number}.1" for number in range(60))
    packet = CapturedPacket(
        tap=started("a").taps[0],
        time_ns=0,
        data=bytes(12) + b"\x08\x00\x45" + bytes(11) + bytes([10, 0, 7, 1, 10, 0, 0, 9]),
        original_length=34,
    )
    for text, taken in ((hosts, True), ("host localhost", False), ("host 10.0.7.1", True)):
        assert OfflineFilter(1, text).matches(packet) is taken, text
    with pytest.raises(UsageError, match=r"^filter 'host x{64}': unknown host"):
        OfflineFilter(1, f"host {'x' * 64}")  # no name server is asked for so long a label
    monkeypatch.setattr(offline, "_SECONDS", 0.01)
    with pytest.raises(UsageError) as caught:
        check_filter("host web.invalid", frozenset())
    assert caught.value.message == (
        "filter 'host web.invalid': web.invalid could not be looked up in 0.01 s"
    )
    with pytest.raises(UsageError, match=r"too large: libpcap has not compiled it in 0.01 s"):
        OfflineFilter(1, hosts)
