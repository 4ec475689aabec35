"""`--follow` without a cluster: what is typed, what a terminal is shown, what a summary counts."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from dataclasses import replace
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gketrace.connections import Place
from gketrace.errors import ExitCode, UsageError
from gketrace.follow.joiner import Joiner
from gketrace.follow.outcome import Outcome
from gketrace.objects import Endpoint, Pod
from gketrace.trace import Citation, Source
from gketrace_cli.addressbook import AddressBook
from gketrace_cli.agents import Fleet
from gketrace_cli.follow.intake import Intake
from gketrace_cli.follow.misled import Misled, find_misled, judge_misled, led_by
from gketrace_cli.follow.options import Followed, FollowOutput, plain_output
from gketrace_cli.follow.output import Output, Sampler
from gketrace_cli.follow.rulebook import RuleBook, Way
from gketrace_cli.follow.scope import Scope, changes, pod_scope
from gketrace_cli.follow.streams import Arrived, Streams
from gketrace_cli.follow.tally import Gap, Tally, percentiles
from gketrace_cli.follow.view import Chosen, View, make_view, parse_state
from gketrace_cli.main import run
from gketrace_cli.options import Options
from gketrace_cli.render.follow import connection_lines
from gketrace_cli.render.follow_documents import connection_document
from gketrace_cli.render.follow_summary import verdict
from gketrace_cli.render.layout import Page
from gketrace_proto.v1alpha1 import agent_pb2 as pb
from tests.agent.observe.bed import wait_until
from tests.core.test_follow import A, B, Script, node_port, owner, play

END = Endpoint(
    address="10.40.1.6",
    port=8080,
    protocol="TCP",
    ready=True,
    namespace="default",
    pod="web-0",
    service="web",
    source="EndpointSlice web-1",
    address_type="IPv4",
    port_name="",
    serving=True,
    terminating=False,
    node="a",
    zone="",
)


def service_of(*ends: Endpoint) -> Scope:
    service = cast(Any, SimpleNamespace(cluster_ips=("10.43.0.9",)))
    return Scope(title="", namespace="", filters=(), service=service, endpoints=ends)


def views(fate: str, *, died: int = 9) -> list[View]:
    script = Script()
    script.connect(5.0, node_port("203.0.113.9", 40000, A, B), fate, died=died)
    book = AddressBook(nodes=(), pods=(), services=())
    way = Way(paths=(), door=ip_address("10.142.0.1"))
    return [make_view(one, book, {"10.40.1.6": "b"}, way, "") for one in play(script)]


def test_a_closed_connection_is_one_line() -> None:
    text = connection_lines(Page(width=1000), views("closed")[-1], "default")
    assert text.count("\n") == 1
    assert "closed: 203.0.113.9:40000 → 10.142.0.1:30080 → 10.40.1.6:8080; " in text
    assert "seen as 10.142.0.1:40000; took 52 ms" in text


def test_a_connection_to_no_endpoint_of_the_service_is_astray() -> None:
    """Once the objects were read after its beginning: the endpoint may be new."""
    script = Script()
    script.connect(5.0, node_port("203.0.113.9", 40000, A, B), "closed")
    one = play(script)[-1]
    assert (one.judgement.failed, one.connection.unseen) == (False, ())
    found = find_misled(service_of(), one.connection, {})
    assert found == Misled(end="10.40.1.6:8080", removed=None, untranslated=False)
    early = judge_misled(one, found, since=1.0, read=4.0)
    assert (early.decided, early.followed.judgement.failed) == (False, False)
    judged = judge_misled(one, found, since=1.0, read=6.0).followed
    assert (judged.judgement.outcome, judged.judgement.failed) == (Outcome.ASTRAY, True)
    before = judge_misled(one, found, since=5.5, read=6.0)
    assert before.followed.judgement == one.judgement
    assert before.remark.endswith("whether it was one when this began is not known")

    book = AddressBook(nodes=(), pods=(), services=())
    view = make_view(judged, book, {}, None, "on a nat STALE:2 leads it there: -j DNAT")
    assert led_by(view) == ""
    text = " ".join(connection_lines(Page(width=200), view, "default").split())
    assert "ASTRAY: 203.0.113.9:40000 → " in text
    assert "it was led to 10.40.1.6:8080, which is no endpoint of the Service (read at " in text
    assert "on a nat STALE:2 leads it there: -j DNAT" in text
    tally = Tally()
    tally.add(view)
    assert tally.code(missing=False) is ExitCode.BROKEN
    assert "1 of 1 connection failed in 3 s (1 astray)" in verdict("Service x", tally, 3.0, ())


def test_what_was_an_endpoint_is_not_astray_at_once() -> None:
    """Nodes keep the rules of an endpoint for a while; and a connection stays where it is."""
    script = Script()
    script.connect(50.0, node_port("203.0.113.9", 40000, A, B), "closed")
    one = play(script)[-1]
    assert find_misled(service_of(END), one.connection, {}) is None
    for removed, failed, remark in (
        (51.0, False, ""),
        (49.0, False, "before this began"),
        (10.0, True, ""),
    ):
        found = find_misled(replace(service_of(), past=((END, removed),)), one.connection, {})
        assert found is not None
        judged = judge_misled(one, found, since=1.0, read=52.0)
        assert judged.followed.judgement.failed == failed
        assert judged.remark.endswith(remark)
        assert bool(remark) == bool(judged.remark)


def test_a_program_of_the_node_that_takes_a_node_port_is_no_endpoint() -> None:
    script = Script()
    script.connect(5.0, node_port("203.0.113.9", 40000, A, B)[:1], "closed")
    one = play(script)[-1]
    half = one.connection.halves[0]
    entry = replace(half.entry, reply=half.entry.orig.inverted())
    plain = replace(one, connection=replace(one.connection, halves=(replace(half, seen=entry),)))
    assert find_misled(service_of(), plain.connection, {"10.142.0.1": "b"}) is None
    found = find_misled(service_of(), plain.connection, {"10.142.0.1": "a"})
    assert found is not None
    assert found.untranslated
    judged = judge_misled(plain, found, since=1.0, read=6.0).followed.judgement
    assert judged.because.startswith("a program of the node took it: no rule translated it")
    assert judged.outcome is Outcome.ASTRAY


def test_tables_of_which_other_entries_are_read_say_nothing() -> None:
    """A Service's plan reads entries to its endpoints: of others no node is known to have none."""
    script = Script()
    script.connect(5.0, node_port("203.0.113.9", 40000, A, B), "unanswered", died=1)
    lost = play(script)[-1]
    assert lost.judgement.next_node == "b"
    assert find_misled(service_of(END), lost.connection, {}) is None
    found = find_misled(service_of(), lost.connection, {})
    assert found is not None
    judged = judge_misled(lost, found, since=1.0, read=6.0)
    assert judged.remark == "10.40.1.6:8080 is no endpoint of the Service"
    assert judged.followed.judgement.outcome is Outcome.UNANSWERED
    assert (judged.followed.judgement.next_node, judged.followed.connection.unseen) == ("", ())


def test_a_narrow_terminal_breaks_lines_between_words() -> None:
    view = replace(views("closed")[-1], endpoint="pod/default/hello-server-579859fb5b-szrwh")
    for width in (40, 80, 120):
        lines = connection_lines(Page(width=width, colored=True), view, "default").splitlines()
        plain = [re.sub("\033.*?m", "", line) for line in lines]
        assert all(len(line) <= width for line in plain)
        assert all(line.startswith(" " * 4) for line in plain[1:])
        assert "\033[32m" in lines[0]
        assert lines[0].index("closed\033[0m:") > 0


def test_a_rule_is_quoted_once() -> None:
    view = views("closed")[-1]
    texts = ("-j KUBE-SVC-X", "-j DNAT --to-destination 10.40.1.6:8080")
    rules = tuple(
        Citation(source=Source.RULE, table="nat", chain="KUBE", position=n, text=text)
        for n, text in enumerate(texts, 1)
    )
    view = replace(view, rules=(rules, ()))
    changed = replace(view, rules=((rules[0], replace(rules[1], text="-j DROP")), ()))
    told: set[str] = set()
    page = Page(wide=True, width=200)
    said = [connection_lines(page, one, "default", told) for one in (view, view, changed)]
    assert [text.count("as above") for text in said] == [0, 1, 1]
    assert all(text in said[0] for text in texts)
    assert "nat KUBE:1, nat KUBE:2 (as above)\n" in said[1]
    assert "nat KUBE:1 (as above)\n" in said[2]
    assert "nat KUBE:2 -j DROP\n" in said[2]


def test_a_failure_says_where_it_was_seen_last() -> None:
    view = views("unanswered", died=1)[-1]
    text = " ".join(connection_lines(Page(), view, "default").split())
    assert "UNANSWERED" in text
    assert "last seen leaving a, and b has no entry of it" in text
    assert "seen as" not in text
    document = connection_document(view)
    assert document["died"] == {"lastSeen": "a", "notSeenOn": "b", "walk": None}
    assert document["sourceSeen"] is None


def test_a_terminal_gets_a_sample_and_the_count_of_the_rest() -> None:
    written: list[str] = []
    now = [0.0]
    sampler = Sampler(written.append, 10, lambda: now[0])
    for number in range(500):
        now[0] = number / 500
        sampler.offer(lambda: "line\n", failed=number % 100 == 0)
    assert written.count("line\n") == 15
    now[0] = 1.1
    sampler.tick()
    assert "485 more in 1.1 s are counted, not shown" in written[-1]


def test_output_that_has_no_room_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        output = Output()
        output.write("a line\n")
        assert output.broken.wait(10.0)
        assert output.error == "No space left on device"
        assert output.close(10.0)
        sys.stdout.close()
        with contextlib.suppress(OSError):
            full.close()


def test_many_senders_do_not_make_many_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not when what was walked is old: it is walked again, for any of them."""
    now = 100.0
    walked: list[int] = []

    def walk(book: RuleBook, batch: list[Any]) -> None:
        with book._lock:
            for key, question, _ in batch:
                book._ways[key] = now, Way(paths=(), door=question.address)
        walked.append(len(batch))

    monkeypatch.setattr(RuleBook, "_walk", walk)
    book = RuleBook(cast(Any, SimpleNamespace(nodes=())), lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr("gketrace_cli.follow.rulebook.time.monotonic", lambda: now)
        for minute in range(3):
            now = 100.0 + 60 * minute
            for sender in range(60):
                script = Script()
                client = f"203.0.{113 + minute}.{1 + sender}"
                script.connect(5.0, node_port(client, 40000, A, B))
                (one,) = [one for one in play(script, until=8.0) if one.phase.name == "CLOSED"]
                book.way(one.connection)
    book.close()
    wait_until(lambda: not any(t.name == "rulebook" for t in threading.enumerate()))
    # Those of the first minute, and the shared one once in each of the others.
    assert sum(walked) == 32 + 2


def test_the_summary_counts_and_judges() -> None:
    tally = Tally()
    tally.add(views("closed")[-1])
    assert tally.code(missing=False) is ExitCode.OK
    assert verdict("Service x", tally, 3.0, ()) == "Service x: 1 connection in 3 s, none failed."
    tally.add(views("refused")[-1])
    assert tally.code(missing=False) is ExitCode.BROKEN
    assert "1 of 2 connections failed in 3 s (1 refused)" in verdict("Service x", tally, 3.0, ())
    tally.gaps.append(Gap(where="a", why="gone", begin=1.0, end=None))
    assert tally.code(missing=False) is ExitCode.PARTIAL
    assert verdict("Service x", tally, 3.0, ()).endswith("not everything was seen.")


def test_a_summary_of_some_connections_does_not_speak_of_all() -> None:
    tally = Tally(only=Chosen(failed=True, states=frozenset({"refused"})).options)
    text = verdict("Service x", tally, 3.0, ())
    assert text.startswith("Service x: no failed connection was seen in 3 s; others than --state")
    tally.connections = tally.failed = 2
    tally.outcomes[Outcome.REFUSED] = 2
    assert verdict("Service x", tally, 3.0, ()) == (
        "Service x: 2 connections failed in 3 s (2 refused); "
        "others than --state and --failed ask for are not counted."
    )
    assert percentiles([3.0, 1.0, 2.0]) == {50: 2.0, 90: 3.0, 99: 3.0}


def test_options_that_go_with_follow_only() -> None:
    for typed in (
        Followed(follow=False, failed=True),
        Followed(follow=False, duration="5s"),
        Followed(follow=False, output=FollowOutput.JSONL),
    ):
        with pytest.raises(UsageError, match="--follow only"):
            plain_output(Options(), typed)
    for words in (
        ["service", "x", "--follow", "-o", "json"],
        ["service", "x", "--follow", "--duration", "soon"],
        ["service", "x", "--follow", "--via", "nodeport"],
        ["pod", "x", "--follow", "--events"],
    ):
        assert run(words) == ExitCode.USAGE


def test_a_node_that_is_behind_is_named_once_and_when_it_is_not() -> None:
    said: list[str] = []
    fleet = Fleet(timeout=1.0)
    intake = Intake(Joiner(owner=owner), Streams(fleet, lambda: fleet), said.append)

    def hear(place: Place, at: float, until: float) -> None:
        status = pb.FollowConntrackStatus(at=until, tracked=True, mode="events")
        intake.take(Arrived(place, 1, at, pb.FollowConntrackReply(status=status)))

    for place in (A, B, A, B):
        hear(place, 100.0, 100.0)
    hear(A, 111.0, 111.0)
    intake.listen(111.0, waiting=False)
    assert said == ["b is 11 s behind: nothing comes from there"]
    hear(B, 112.0, 105.0)
    hear(A, 112.0, 112.0)
    intake.listen(112.0, waiting=True)
    assert len(said) == 1
    hear(B, 112.5, 112.0)
    intake.listen(112.5, waiting=False)
    assert said[1:] == ["b is not behind any more"]
    hear(B, 120.0, 113.0)
    hear(A, 120.0, 120.0)
    intake.listen(120.0, waiting=False)
    intake.listen(127.0, waiting=True)
    assert said[2:] == [
        "b is 7 s behind: its agent is late with its events",
        "a is 7 s behind: this program needs more processor time than it gets",
    ]


def test_states() -> None:
    assert parse_state("established") == "ESTABLISHED"
    assert parse_state("Reset") == "reset"
    with pytest.raises(UsageError, match="no such state"):
        parse_state("sad")


def test_a_joiner_without_events_tells_nothing() -> None:
    joiner = Joiner(owner=owner)
    joiner.heard(Place(node="a"), 1.0)
    assert joiner.told(5.0) == []
    assert owner(ip_address("10.142.0.1")) == "a"


def test_states_choose_by_conntrack_and_by_outcome() -> None:
    for text, taken in (("reset", False), ("closed", True), ("TIME_WAIT", True), ("CLOSE", False)):
        chosen = Chosen(states=frozenset({parse_state(text)}))
        assert chosen.takes(views("closed")[-1].followed) == taken, text


def test_an_endpoint_added_and_a_pod_replaced_are_said() -> None:
    old = Pod(
        namespace="default",
        name="web-0",
        uid="1",
        node="a",
        pod_ips=("10.40.0.6",),
        phase="Running",
        ready=True,
        host_network=False,
        host_ip="10.142.0.1",
        containers=(),
        labels={},
        deletion_timestamp="",
        reason="",
    )
    new = replace(old, uid="2", node="b", pod_ips=("10.40.1.7",))
    before = pod_scope(old)
    after = pod_scope(new, before)
    assert changes(before, after) == [
        "pod default/web-0 was replaced: 10.40.0.6 on a is now 10.40.1.7 on b"
    ]
    assert after.addresses == {"10.40.0.6", "10.40.1.7"}  # what is open to the old one goes on
    assert after.concerns(views("closed")[-1].followed.connection.first) is False
    plain = replace(before, pod=None)
    text = "endpoint added: default/web-0 10.40.0.6:8080/tcp"
    assert changes(plain, replace(plain, endpoints=(replace(END, address="10.40.0.6"),))) == [text]
