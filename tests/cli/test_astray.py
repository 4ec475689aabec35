"""Who takes a Service's packet, when it is no endpoint: that is not "works"."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from ipaddress import ip_address

import pytest

from gketrace.conntrack import ConntrackEntry
from gketrace.errors import ExitCode
from gketrace.findings.astray import astray
from gketrace.findings.world import Way, World
from gketrace.trace import (
    Citation,
    Disposition,
    Flow,
    Hop,
    Ingress,
    NetnsKind,
    NetnsRef,
    Path,
    Source,
    Step,
    StepAction,
    StepKind,
)
from gketrace_cli.astray import is_astray, is_misled
from gketrace_cli.checking.ways import ways_of
from gketrace_cli.checking.whole import Checked, missing_of
from gketrace_cli.frontdoors import Door, Question, Sender
from gketrace_cli.verdict import Answer, Standing, judge_service, judge_trace, path_standing
from tests.cli.test_brief import CLIENT, path, rewriting, rule, to

WEB = (ip_address("10.40.0.6"), 8080)
LED = path("n1", rule("PREROUTING:1"), *rewriting("PREROUTING:1", to("10.40.9.9")), end="other")


def asked(*ends: tuple[object, int], door: Door = Door.NODE_PORT) -> Question:
    return Question(
        door=door,
        sender=Sender(address=CLIENT.src),
        address=CLIENT.dst,
        port=31830,
        protocol=6,
        ends=frozenset(ends),  # type: ignore[arg-type]
    )


def standing(question: Question, way: Path) -> Standing:
    return path_standing(Answer(question=question, paths=(way,)), way)


def test_the_first_line_names_who_takes_it_and_the_rule() -> None:
    answer = Answer(question=asked(WEB), paths=(LED,))
    said = "is delivered to pod/shop/other 10.40.0.6:8080, which is no endpoint of the Service, "
    said += "by PREROUTING:1 on node n1."
    for verdict in (judge_service("Service shop/web", [answer], ()), judge_trace(answer, ())):
        assert verdict.code is ExitCode.BROKEN
        assert verdict.text.endswith(said)


@pytest.mark.parametrize("ends", [(WEB,), ((WEB[0], 0),)], ids=["port", "all ports"])
def test_an_endpoint_is_none_that_is_astray(ends: tuple[tuple[object, int], ...]) -> None:
    fine = path("n1", *rewriting("KUBE-SEP-A:2", to("10.40.0.6")), end="web-0")
    assert standing(asked(*ends), fine) is Standing.FINE


def test_a_sidecar_may_redirect_what_came_to_its_endpoint() -> None:
    inner = replace(to("10.40.0.6"), dport=15006)
    steps = [*rewriting("KUBE-SEP-A:2", to("10.40.0.6")), *rewriting("ISTIO_IN:1", inner)]
    assert standing(asked(WEB), path("n1", *steps, end="web-0")) is Standing.FINE


def test_a_program_of_the_node_is_no_endpoint_of_a_node_port() -> None:
    taken = path("n1", rule("KUBE-NODEPORTS:1"), end="n1")
    assert standing(asked(WEB), taken) is Standing.BROKEN
    # NodeLocal DNS has the ClusterIP itself.
    assert standing(asked(WEB, door=Door.CLUSTER_IP), taken) is Standing.FINE


def test_where_endpoints_are_not_known_nothing_is_said() -> None:
    assert standing(replace(asked(), ends=None), LED) is Standing.FINE


def test_a_rule_that_leads_where_nothing_listens() -> None:
    def refused(way: Path) -> Path:
        return replace(way, outcome=replace(way.outcome, disposition=Disposition.REFUSED))

    led = refused(LED)
    assert is_misled(asked(WEB), led)
    assert not is_astray(asked(WEB), led)
    assert not is_misled(asked(WEB), LED)
    # An endpoint without its listener, and what no rule translates, are other faults.
    endpoint = path("n1", *rewriting("KUBE-SEP-A:2", to("10.40.0.6")), end="web-0")
    assert not is_misled(asked(WEB), refused(endpoint))
    assert not is_misled(asked(WEB), refused(path("n1", rule("KUBE-NODEPORTS:1"), end="n1")))
    assert not is_misled(replace(asked(), ends=None), led)


@pytest.mark.parametrize(
    "end", [Disposition.LOOPED, Disposition.UNREACHABLE, Disposition.NO_NEIGHBOUR]
)
def test_the_rule_that_leads_to_what_is_gone_comes_before_where_it_ends(end: Disposition) -> None:
    """A route to a pod that is gone is not to be mended."""
    gone = replace(LED, outcome=replace(LED.outcome, disposition=end, detail="gone"), endpoint="")
    answer = Answer(question=asked(WEB), paths=(gone,))
    said = "led to 10.40.9.9:8080, which is no endpoint of the Service, by PREROUTING:1 on node n1"
    text = judge_trace(answer, ()).text
    assert said in text
    assert text.endswith("gone, on node far.")
    assert ways_of([answer], "shop/web")[0].astray


def test_another_pod_with_the_endpoint_s_address_is_not_the_endpoint() -> None:
    taker = NetnsRef(node="n2", kind=NetnsKind.POD, pod="shop/other")
    route = Step(
        kind=StepKind.ROUTE,
        action=StepAction.FORWARD,
        before=to("10.40.0.6"),
        after=to("10.40.0.6"),
        citation=Citation(source=Source.ROUTE, text="10.40.0.6 dev veth9"),
    )
    way = path("n1", *rewriting("KUBE-SEP-A:2", to("10.40.0.6")), route, end="other")
    way = replace(way, outcome=replace(way.outcome, netns=taker))
    took = "which is not pod shop/web-0, by the route '10.40.0.6 dev veth9' on node n1."
    service = replace(asked(WEB), takers=frozenset({(WEB[0], "shop/web-0")}))
    straight = replace(asked(), ends=None, address=WEB[0], pod="shop/web-0", door=Door.POD)
    for question in (service, straight):
        answer = Answer(question=question, paths=(way,))
        verdict = judge_trace(answer, ())
        assert verdict.code is ExitCode.BROKEN
        assert verdict.text.endswith(took)
        (found,) = astray(World(ways=ways_of([answer], "shop/web")))
        assert found.code == "GKT-311"
        assert found.text == "shop/other and shop/web-0 both have the address 10.40.0.6"
    mine = replace(way, outcome=replace(way.outcome, netns=replace(taker, pod="shop/web-0")))
    assert standing(service, mine) is standing(straight, mine) is Standing.FINE


def test_a_rule_that_leads_a_pod_s_packets_to_another_pod() -> None:
    taker = NetnsRef(node="n2", kind=NetnsKind.POD, pod="shop/other")
    way = replace(LED, outcome=replace(LED.outcome, netns=taker))
    question = replace(asked(), ends=None, address=WEB[0], pod="shop/web-0", door=Door.POD)
    answer = Answer(question=question, paths=(way,))
    said = "which is not pod shop/web-0, by PREROUTING:1 on node n1."
    assert judge_trace(answer, ()).text.endswith(said)
    (found,) = astray(World(ways=ways_of([answer])))
    assert (found.code, found.subjects) == ("GKT-119", ("pod shop/web-0", "node n1"))


def test_a_connection_that_has_outlived_its_endpoint_is_deleted_not_routed() -> None:
    cited = Citation(source=Source.CONNTRACK, text="tcp src=203.0.113.10 …")
    step = replace(rewriting("A:1", to("10.40.9.9"))[1], citation=cited)
    before = CLIENT.tuple5
    entry = ConntrackEntry(orig=before, reply=to("10.40.9.9").tuple5.inverted(), status=0)
    flow = Flow(netns=NetnsRef(node="n1"), entry=entry, assumed=False)

    def ending(end: Disposition) -> Answer:
        outcome = replace(LED.outcome, disposition=end, packet=to("10.40.9.9"), citation=cited)
        hop = replace(LED.hops[0], steps=(step,))
        way = replace(LED, hops=(hop,), outcome=outcome, flows=(flow,), endpoint="")
        return Answer(question=asked(WEB), paths=(way,))

    gone = ending(Disposition.LOOPED)
    assert "by an existing conntrack entry on node n1, and" in judge_trace(gone, ()).text
    (found,) = astray(World(ways=ways_of([gone], "shop/web")))
    assert (found.code, found.command) == (
        "GKT-202",
        "conntrack -D -p tcp --orig-dst 10.142.0.6 --reply-src 10.40.9.9  # on node n1",
    )
    # An endpoint that is on its way out may still answer: what drops the packet is the cause.
    assert not is_misled(asked(WEB), ending(Disposition.DROPPED).paths[0])


def test_what_leaves_the_cluster_is_broken_only_when_no_endpoint_is_there() -> None:
    left = replace(LED, outcome=replace(LED.outcome, disposition=Disposition.TRANSMITTED))
    assert standing(asked(WEB), left) is Standing.BROKEN
    outside = (ip_address("10.40.9.9"), 8080)
    assert standing(asked(WEB, outside), left) is Standing.UNKNOWN


@pytest.mark.parametrize(
    "text",
    [
        "-A KUBE-SVC-A -m recent --rcheck --seconds 10800 --reap --name KUBE-SEP-B --mask "
        "255.255.255.255 --rsource -j KUBE-SEP-B",
        "ip saddr @affinity-57VC4AL6-shop/web/tcp/http__10.40.0.6/8080 goto endpoint-57VC4AL6-x",
    ],
)
def test_session_affinity_is_said_to_have_chosen(text: str) -> None:
    chose = rule("KUBE-SVC-A:2")
    assert chose.citation is not None
    chose = replace(chose, citation=replace(chose.citation, text=text))
    way = path("n1", chose, *rewriting("KUBE-SEP-B:2", to("10.40.0.6")), end="web")
    said = judge_trace(Answer(question=asked(WEB), paths=(way,)), ()).text
    assert said.endswith("; session affinity keeps it there, by KUBE-SVC-A:2 on node n1.")


def test_the_share_of_what_leaves_the_cluster_is_said() -> None:
    outside = (ip_address("10.40.9.9"), 8080)
    left = replace(LED.outcome, disposition=Disposition.TRANSMITTED, detail="left towards x")
    fine = path("n1", *rewriting("A:2", to("10.40.0.6")), end="web", chance=Fraction(1, 2))
    paths = (replace(LED, outcome=left, chance=Fraction(1, 2)), fine)
    answer = Answer(question=asked(WEB, outside), paths=paths)
    assert judge_trace(answer, ()).text.endswith("could not tell: left towards x (50.0%).")


def test_what_was_asked_for_and_is_dropped_does_not_hide_what_works() -> None:
    fine = path("n1", *rewriting("A:2", to("10.40.0.6")), end="web")
    gone = replace(fine, outcome=replace(fine.outcome, disposition=Disposition.DROPPED))
    kept_out = replace(asked(WEB), configured_drop="policy Local", asked=True)
    answers = [
        Answer(question=kept_out, paths=(gone,)),
        Answer(question=asked(WEB), paths=(fine,)),
    ]
    verdict = judge_service("Service shop/web", answers, ())
    assert verdict.code is ExitCode.BROKEN
    assert verdict.text == (
        "Service shop/web does not answer at NodePort 10.142.0.6:31830/tcp from client "
        "203.0.113.10, as configured: policy Local; 1 of 2 ways leads to pod/shop/web "
        "10.40.0.6:8080."
    )


def test_a_sidecar_of_the_sender_is_not_the_service_and_not_its_fault() -> None:
    """Its own connection to the Service is another one."""
    pod = NetnsRef(node="n1", kind=NetnsKind.POD, pod="shop/client")
    step = rewriting("OUTPUT:1", replace(to("127.0.0.1"), dport=15001))
    hop = Hop(ingress=Ingress(netns=pod), steps=tuple(step))
    outcome = replace(LED.outcome, netns=pod, packet=step[-1].after)
    way = replace(LED, hops=(hop,), outcome=outcome, endpoint="pod/shop/client 127.0.0.1:15001")
    answer = Answer(question=asked(WEB), paths=(way,))
    assert not is_astray(asked(WEB), way)
    verdict = judge_trace(answer, ())
    assert verdict.code is ExitCode.PARTIAL
    assert "own pod at 127.0.0.1:15001, by OUTPUT:1 in pod shop/client;" in verdict.text
    # In the endpoint's pod it is.
    there = replace(way, hops=(*LED.hops, hop))
    assert standing(asked((ip_address("10.40.9.9"), 8080)), there) is Standing.FINE


def test_a_check_says_which_ways_it_could_not_tell() -> None:
    def checked(end: Disposition) -> Checked:
        way = replace(LED, outcome=replace(LED.outcome, disposition=end))
        one = Way(path=way, standing="unknown", service="shop/web")
        return Checked(findings=(), ignored=0, world=World(ways=(one,)), left_out=0)

    # An endpoint outside the cluster: no node sees it, whatever is asked.
    assert (left := checked(Disposition.TRANSMITTED)).code is ExitCode.OK
    assert [way.service for way in left.beyond] == ["shop/web"]
    assert (unknown := checked(Disposition.UNKNOWN)).code is ExitCode.PARTIAL
    assert "could not tell" in str(missing_of(unknown))


def test_shares_of_what_ends_alike_are_added() -> None:
    """Three of three that one rule drops are all connections, not a third of them."""
    drop = Citation(source=Source.RULE, text="drop", table="filter", chain="FORWARD", position=1)

    def dropped(text: str = "FORWARD:1") -> Path:
        way = path("n1", *rewriting("KUBE-SEP-A:2", to("10.40.0.6")), end="", chance=Fraction(1, 3))
        cited = replace(drop, position=int(text[-1]))
        gone = replace(way.outcome, disposition=Disposition.DROPPED, citation=cited)
        return replace(way, outcome=gone, endpoint="")

    def said(*paths: Path) -> str:
        return judge_trace(Answer(question=asked(WEB), paths=paths), ()).text

    fine = path("n1", *rewriting("A:2", to("10.40.0.6")), end="web", chance=Fraction(1, 3))
    assert said(dropped(), dropped(), dropped()).endswith(" on node far.")
    assert said(dropped(), fine, dropped()).endswith(" (66.7% of new connections).")
    more = said(dropped(), fine, dropped("FORWARD:2"))
    assert more.endswith(" (33.3% of new connections; 33.3% more fail in another way).")
