"""``gketrace rules`` over real rules: trees, owners, one packet's rules, and what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gketrace.kubenames import ServicePort
from gketrace.snapshot import Unavailable
from gketrace_cli.main import run
from gketrace_cli.object_json import parse_endpointslice, parse_service
from gketrace_cli.render.layout import Page
from gketrace_cli.render.rules import draw_rules, rules_document
from gketrace_cli.ruletree import RuleText, make_tree, owners, select_chain
from tests.bench.ruleset_generate import iptables_text, make_services
from tests.cli.stage import WORLDS, Stage

HELLO = "KUBE-SVC-7D6H5YV7GTUSLGXR"
SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schema/ruletree.json").read_text())
Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(world: Stage, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs a command line on the stage: (exit code, standard output, standard error)."""

    def asked(*words: str) -> tuple[int, str, str]:
        code = run(world.arguments("rules", *words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return asked


def test_a_chain_its_callers_and_what_is_below(ask: Ask) -> None:
    code, out, err = ask("2jdh", "--chain", HELLO)
    assert (code, err) == (0, "")
    assert (
        out
        == """\
node 2jdh: 194 rules in iptables-nft
  [packets:bytes]: what each rule matched

iptables-nft IPv4 nat
  called by  KUBE-EXT-7D6H5YV7GTUSLGXR:2, KUBE-SERVICES:19
  KUBE-SVC-7D6H5YV7GTUSLGXR (default/hello-server)
    1 ! -s 10.40.0.0/14 -d 10.43.246.223/32 -p tcp -m tcp --dport 80 -j
        KUBE-MARK-MASQ [0:0]
      KUBE-MARK-MASQ
        1 -j MARK --set-xmark 0x4000/0x4000 [0:0]
    2 -j KUBE-SEP-GNGNYGTEG254KWMX [0:0]
      KUBE-SEP-GNGNYGTEG254KWMX (default/hello-server → 10.40.0.6:8080)
        1 -s 10.40.0.6/32 -j KUBE-MARK-MASQ [0:0]
          KUBE-MARK-MASQ (above)
        2 -p tcp -m tcp -j DNAT --to-destination 10.40.0.6:8080 [0:0]
"""
    )


def test_the_whole_tree_has_each_chain_once(ask: Ask) -> None:
    code, out, _ = ask("2jdh")
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.strip() for line in lines].count(f"{HELLO} (default/hello-server)") == 1
    assert "iptables-nft IPv4 filter" in lines
    assert "iptables-nft IPv6 nat" in lines
    assert "not reached from any hook: KUBE-PROXY-CANARY" in out
    assert "iptables-nft IPv4 mangle: no rules, policy ACCEPT" in lines


def test_a_tables_tree_as_the_schema_says(ask: Ask) -> None:
    code, out, _ = ask("node/2jdh", "--table", "nat", "-o", "json")
    document = json.loads(out)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(document, SCHEMA)
    assert (code, document["complete"]) == (0, True)
    assert {t["table"] for t in document["tables"]} == {"nat"}
    chains = {c["name"]: c for t in document["tables"] if t["family"] == 4 for c in t["chains"]}
    assert chains[HELLO]["belongsTo"]["service"] == "hello-server"
    assert chains[HELLO]["rules"][1]["jumps"][0]["chain"] == "KUBE-SEP-GNGNYGTEG254KWMX"
    assert chains["KUBE-SEP-GNGNYGTEG254KWMX"]["belongsTo"]["endpoint"] == "10.40.0.6:8080"
    assert chains["PREROUTING"]["priority"] == -100
    assert yaml.safe_load(ask("2jdh", "--table", "nat", "-o", "yaml")[1]) == document


def test_the_rules_that_one_packet_meets(ask: Ask) -> None:
    code, out, err = ask("2jdh", "--for", "10.43.246.223:80/tcp", "--from", "pod/web-0")
    assert (code, err) == (0, "")
    places = [
        out.find(word)
        for word in (
            "PREROUTING iptables-nft nat",
            "KUBE-SERVICES:19",
            f"{HELLO}:2 (default/hello-server)",
            "KUBE-SEP-GNGNYGTEG254KWMX:2 (default/hello-server → 10.40.0.6:8080)",
            "FORWARD iptables-nft filter",
            "delivered: 10.40.0.10:* → 10.40.0.6:8080 tcp",
        )
    ]
    assert places == sorted(places)
    assert -1 not in places
    assert "KUBE-MARK-MASQ" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_walk_forks_where_the_kernel_draws(ask: Ask) -> None:
    code, out, _ = ask("2jdh", "--for", "svc/web:http", "-o", "json")
    document = json.loads(out)
    jsonschema.validate(document, SCHEMA)
    assert code == 0
    assert (document["tables"], document["query"]["for"]) == ([], "svc/web:http")
    ends = {b["packet"]["dst"] for b in document["walk"] if b["outcome"]}
    assert ends == {"10.40.0.10", "10.40.1.10", "10.40.2.10"}
    owned = {str(r["belongsTo"]["endpoint"]) for b in document["walk"] for r in b["rules"]
             if r["belongsTo"] and r["belongsTo"]["role"] == "SEP"}  # fmt: skip
    assert owned == {f"{end}:8080" for end in ends}
    text = ask("2jdh", "--for", "10.43.240.10:80", "--from", "203.0.113.9")[1]
    assert "PREROUTING iptables-nft nat" in text
    assert text.count("-j DNAT --to-destination") == 3


def test_a_pod_without_rules(ask: Ask) -> None:
    code, out, err = ask("pod/web-0")
    assert (code, out, err) == (0, "pod default/web-0 on node 2jdh: no rules\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["2jdh", "--chain", "KUBE-SVCS"],
         'chain "KUBE-SVCS" not found; did you mean KUBE-SERVICES?'),
        (["2jdh", "--table", "natt"], 'table "natt" not found on 2jdh; did you mean nat?'),
        (["2jdx"], "no node '2jdx' in the cluster; did you mean 2jdh?"),
        (["pod/web-9"], 'pod "web-9" not found in namespace "default"'),
        (["2jdh", "--for", "10.43.246.223"], "lacks a port; for example 10.43.246.223:80"),
        (["2jdh", "--for", "svc/web"], "is not one port of one address; it has 80/tcp, 9090/tcp"),
        (["2jdh", "--for", "pod/web-0:80"], "is neither an address nor svc/NAME"),
        (["2jdh", "--for", "10.1.1.1:http"], "an address has no named ports"),
        (["2jdh", "--from", "pod/web-0"], "--from needs --for"),
        (["2jdh", "--for", "10.1.1.1:1", "--chain", "X"], "--for finds the rules itself"),
        (["2jdh", "--for", "10.1.1.1:1", "--from", "pod/web-1"], "not from 2jdh"),
        (["pod/web-0", "--for", "10.1.1.1:1", "--from", "192.0.2.1"],
         "reach the node, not the pod"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong(ask: Ask, words: list[str], message: str) -> None:
    code, out, err = ask(*words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_what_could_not_be_read_is_said(world: Stage, ask: Ask) -> None:
    rulesets = world.cluster.nodes["2jdh"].host.rulesets
    gap = Unavailable(reason="iptables-legacy-save exited with status 1")
    rulesets.append(gap)
    try:
        code, out, _ = ask("2jdh", "--table", "nat")
    finally:
        rulesets.remove(gap)
    assert code == 3
    assert "not seen: iptables-legacy on 2jdh: iptables-legacy-save exited" in " ".join(out.split())


def _world_tree(world: str, *dumps: tuple[str, str, int]) -> Any:
    folder = WORLDS / world
    services = [
        parse_service(i) for i in json.loads((folder / "services.json").read_text())["items"]
    ]
    slices = json.loads((folder / "endpointslices.json").read_text())["items"]
    whose = owners(services, [e for item in slices for e in parse_endpointslice(item)])
    texts = [
        RuleText(backend=backend, family=family, text=(folder / name).read_bytes(), source=name)
        for name, backend, family in dumps
    ]
    return make_tree(texts, whose, node="n"), whose


def test_nftables_chains_and_their_maps() -> None:
    tree, _ = _world_tree("kube-proxy-1.36-nftables", ("node-2jdh/nft.json", "nftables", 0))
    table = next(t for t in tree.tables if t.name == "ip kube-proxy")
    chain = table.chains["service-RXOQU453-default/hello-server/tcp/"]
    assert str(chain.owner) == "default/hello-server"
    vmap = next(r for r in table.chains["services"].rules if "@service-ips" in r.text)
    assert {j.chain: j.key for j in vmap.jumps}[chain.name] == "10.43.246.223 . tcp . 80"
    sticky = table.chains["endpoint-O2DH4KAM-default/web-affinity/tcp/http__10.40.0.10/8080"]
    assert str(sticky.owner) == "default/web-affinity:http → 10.40.0.10:8080"
    assert ("services", vmap.position) in table.callers[chain.name]
    page = Page(width=80)
    draw_rules(page, "node n", tree)
    assert page.text().count("service-RXOQU453-default/hello-server/tcp/ (default/hello-server)\n")


def test_both_backends_are_told_apart() -> None:
    name = "node-2jdh/iptables-save.txt"
    tree, _ = _world_tree(
        "kube-proxy-1.36-iptables-legacy", (name, "iptables-legacy", 4), (name, "iptables-nft", 4)
    )
    assert tree.backends == ("iptables-legacy", "iptables-nft")
    assert len(select_chain(tree, HELLO).tables) == 2


def test_long_chains_are_cut_in_text_only() -> None:
    services = make_services(100, 2)
    text = "".join(iptables_text(services)).encode()
    one = RuleText(backend="iptables-legacy", family=4, text=text, source="generated")
    tree = make_tree([one], {}, node="n")
    page = Page()
    draw_rules(page, "node n", tree)
    assert "… 37 more rules; --chain KUBE-SERVICES or -o wide shows them" in page.text()
    page = Page()
    draw_rules(page, "node n", select_chain(tree, "KUBE-SERVICES"), chain="KUBE-SERVICES")
    assert "more rules" not in page.text()


def test_an_owner_follows_the_name_not_the_comment() -> None:
    port = ServicePort(namespace="default", service="hello-server")
    _, whose = _world_tree("kube-proxy-1.36-iptables-nft")
    assert whose[HELLO].service == port
    assert whose[HELLO].role == "SVC"
    text = f'*nat\n:{HELLO} - [0:0]\n-A {HELLO} -m comment --comment "shop/web" -j ACCEPT\nCOMMIT\n'
    tree = make_tree(
        [RuleText(backend="iptables-nft", family=4, text=text.encode(), source="t")],
        whose,
        node="n",
    )
    assert tree.tables[0].chains[HELLO].owner == whose[HELLO]


@pytest.mark.parametrize("at", [1e300, float("nan"), float("inf"), -1e18])
def test_rules_of_no_time_that_there_is(at: float) -> None:
    text = RuleText(
        backend="iptables-nft", family=4, text=b"*nat\nCOMMIT\n", source="t", taken_at=at
    )
    document = rules_document(
        node="n",
        pod="",
        query={},
        tree=make_tree([text], {}, node="n"),
        walk=None,
        whose={},
        missing=(),
        notes=(),
    )
    assert [one["takenAt"] for one in document["tables"]] == [None]
