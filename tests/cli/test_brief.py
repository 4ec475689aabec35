"""A Service's ways in brief: what leads to a rewrite, and what is told of many ways."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from ipaddress import ip_address

from gketrace.packet import Packet
from gketrace.trace import (
    Citation,
    Disposition,
    Hop,
    Ingress,
    NetnsRef,
    Outcome,
    Path,
    Source,
    Step,
    StepAction,
    StepKind,
)
from gketrace_cli.frontdoors import Door, Question, Sender
from gketrace_cli.render.brief import draw_brief
from gketrace_cli.render.layout import Page
from gketrace_cli.rewrites import rewrites
from gketrace_cli.verdict import Answer

CLIENT = Packet(
    src=ip_address("203.0.113.10"),
    dst=ip_address("10.142.0.6"),
    protocol=6,
    sport=61234,
    dport=31830,
)


def rule(place: str, action: StepAction = StepAction.JUMP, table: str = "nat") -> Step:
    chain, _, position = place.rpartition(":")
    cited = Citation(
        source=Source.RULE, text=place, table=table, chain=chain, position=int(position)
    )
    return Step(kind=StepKind.RULE, action=action, before=CLIENT, after=CLIENT, citation=cited)


def rewriting(place: str, after: Packet) -> list[Step]:
    made = rule(place, StepAction.REWRITE)
    return [made, replace(made, kind=StepKind.NAT, after=after)]


def path(node: str, *steps: Step, end: str, chance: Fraction = Fraction(1)) -> Path:
    netns = NetnsRef(node=node)
    taker = NetnsRef(node="far")
    outcome = Outcome(disposition=Disposition.DELIVERED, packet=steps[-1].after, netns=taker)
    return Path(
        front_door="NodePort",
        source="client 203.0.113.10",
        target="10.142.0.6:31830/tcp",
        chance=chance,
        outcome=outcome,
        hops=(Hop(ingress=Ingress(netns=netns), steps=steps),),
        endpoint=f"pod/shop/{end} 10.40.0.6:8080",
    )


def to(address: str) -> Packet:
    return replace(CLIENT, dst=ip_address(address), dport=8080)


def test_what_was_jumped_to_and_returned_is_not_on_the_way() -> None:
    steps = [
        rule("FORWARD:1", table="filter"),
        rule("PREROUTING:1"),
        rule("KUBE-SERVICES:21"),
        rule("KUBE-NODEPORTS:8"),
        rule("KUBE-EXT-A:1"),
        rule("KUBE-MARK-MASQ:1", StepAction.MARK),
        rule("KUBE-EXT-A:2"),
        rule("KUBE-SVC-A:2"),
        *rewriting("KUBE-SEP-B:2", to("10.40.0.6")),
    ]
    (found,) = rewrites(path("n1", *steps, end="web-0"))
    assert found.of_destination
    assert not found.of_source
    assert found.named_by == "KUBE-NODEPORTS:8"
    assert found.rules == ("KUBE-EXT-A:2", "KUBE-SVC-A:2", "KUBE-SEP-B:2")


def test_a_rewrite_by_an_entry_cites_the_entry() -> None:
    cited = Citation(source=Source.CONNTRACK, text="tcp ESTABLISHED src=…")
    step = Step(
        kind=StepKind.NAT,
        action=StepAction.REWRITE,
        before=CLIENT,
        after=to("10.40.0.6"),
        citation=cited,
    )
    (found,) = rewrites(path("n1", rule("PREROUTING:1"), step, end="web-0"))
    assert (found.named_by, found.rules) == ("", ("an existing conntrack entry",))


def test_a_rule_of_postrouting_itself_is_cited() -> None:
    """As Docker's, or one by hand; it was an internal error."""
    sent = replace(to("10.40.0.6"), src=ip_address("10.142.0.7"))
    steps = [rule("KUBE-NODEPORTS:8"), *rewriting("KUBE-SEP-B:2", to("10.40.0.6"))]
    step = rule("POSTROUTING:1", StepAction.REWRITE)
    nat = replace(step, kind=StepKind.NAT, before=to("10.40.0.6"), after=sent)
    found = path("n1", *steps, step, nat, end="web-0")
    assert [one.by for one in rewrites(found)] == ["KUBE-SEP-B:2", "POSTROUTING:1"]
    page = Page(width=100)
    draw_brief(page, [replace(answer("n1", 1), paths=(found,))])
    assert "source becomes 10.142.0.7 by POSTROUTING:1" in "\n".join(page.lines)


def answer(node: str, ends: int) -> Answer:
    question = Question(
        door=Door.NODE_PORT,
        sender=Sender(address=CLIENT.src),
        address=CLIENT.dst,
        port=31830,
        protocol=6,
        entry=node,
        via=node,
    )
    paths = tuple(
        path(
            node,
            rule("KUBE-NODEPORTS:8"),
            rule(f"KUBE-SVC-A:{number + 1}"),
            *rewriting(f"KUBE-SEP-{number}:2", to(f"10.40.0.{number + 1}")),
            end=f"web-{number}",
            chance=Fraction(1, ends),
        )
        for number in range(ends)
    )
    return Answer(question=question, paths=paths)


def test_many_nodes_and_endpoints_are_counted_not_listed() -> None:
    page = Page(width=100)
    draw_brief(page, [answer(f"n{number}", 40) for number in range(10)])
    assert len(page.lines) == 11
    text = "\n".join(page.lines)
    assert "  at n0 10.142.0.6  KUBE-NODEPORTS:8; source is kept" in text
    assert "  and 7 more alike" in text
    first = "  2.5%  KUBE-SVC-A:1 → KUBE-SEP-0:2 DNAT to 10.40.0.1:8080, pod/shop/web-0 on far"
    assert first in page.lines
    assert "  and 35 more endpoints" in text
