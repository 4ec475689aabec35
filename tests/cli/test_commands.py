"""The commands over a real API server and agents that walk real rules: text, JSON, exit codes."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest
import yaml

from gketrace_cli.cluster import Cluster
from gketrace_cli.main import run
from tests.cli.stage import Stage

GOLDEN = Path(__file__).parents[1] / "data/cli"
SCHEMAS = Path(__file__).parents[2] / "docs/schema"
HELLO = "hello-server-579859fb5b-szrwh"
Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(world: Stage, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs a command line on the stage: (exit code, standard output, standard error)."""

    def asked(*words: str, without: tuple[str, ...] = ()) -> tuple[int, str, str]:
        code = run(world.arguments(*words, without=without))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return asked


def check_golden(name: str, text: str) -> None:
    """Compares with tests/data/cli/NAME; GKETRACE_UPDATE_GOLDEN=1 writes it instead."""
    path = GOLDEN / name
    if os.environ.get("GKETRACE_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize(
    ("name", "words", "code"),
    [
        ("pod", ["pod", "hello-server-579859fb5b-szrwh"], 0),
        ("service", ["service", "hello-server"], 0),
        ("service-verbose", ["service", "hello-server", "-v"], 0),
        (
            "nodeport",
            ["service", "hello-server", "--via", "nodeport", "--from", "node/m69d", "--node=2jdh"],
            0,
        ),
        ("three-endpoints", ["service", "web-nodeport", "--via", "nodeport", "--node", "33fg"], 0),
        ("no-endpoints", ["service", "nobody", "--via", "clusterip"], 1),
        (
            "source-ranges",
            ["service", "web-lb-sources", "--via=loadbalancer", "--from=192.0.2.10", "--node=2jdh"],
            1,
        ),
        ("trace", ["trace", "pod/web-0", "svc/hello-server"], 0),
    ],
)
def test_text_as_it_is_printed(ask: Ask, name: str, words: list[str], code: int) -> None:
    got, out, err = ask(*words)
    assert (got, err) == (code, "")
    check_golden(f"{name}.txt", out)
    assert max(map(len, out.splitlines())) <= 80
    assert "\033" not in out


def test_the_command_that_shows_a_cited_rule_shows_it(ask: Ask) -> None:
    """The last lines of `service` say how its rules are cited, with one as an example."""
    _, out, _ = ask("service", "nobody", "--via", "clusterip")
    said = " ".join(out.split())
    found = re.search(r"CHAIN:N is rule N .*?; to see one: gketrace (rules .*?) -v", said)
    assert found is not None
    code, shown, _ = ask(*found[1].split())
    assert code == 0
    cited = re.search(r"by filter KUBE-SERVICES:(\d)", said)
    assert cited is not None
    chain = shown.partition("  KUBE-SERVICES\n")[2]
    assert f"\n    {cited[1]} -d 10.43.240.19/32 " in f"\n{chain}"


def test_the_tutorials_nodeport_cites_each_chain(ask: Ask) -> None:
    code, out, _ = ask(
        "service", "hello-server", "--via", "nodeport", "--from", "node/m69d", "--node", "2jdh"
    )
    assert code == 0
    wanted = [
        "KUBE-NODEPORTS",
        "KUBE-EXT-7D6H5YV7GTUSLGXR",
        "KUBE-MARK-MASQ",
        "KUBE-SVC-7D6H5YV7GTUSLGXR",
        "KUBE-SEP-GNGNYGTEG254KWMX",
        "10.40.0.6:8080",
        "MASQUERADE",
        "10.40.0.1:*",
        "veth-hello-server",
        "pod default/hello-server-579859fb5b-szrwh",
        "and back:",
    ]
    places = [out.find(word) for word in wanted]
    assert -1 not in places
    chains = re.findall(r"KUBE-[A-Z0-9-]+(?=:\d)", out)
    order = list(dict.fromkeys(c for c in chains if c in wanted))
    assert order == [wanted[0], wanted[1], wanted[2], wanted[3], wanted[4]]


@pytest.mark.parametrize(
    ("words", "schema"),
    [
        (["service", "hello-server"], "trace"),
        (["service", "web-lb-local"], "trace"),
        (["service", "nobody"], "trace"),
        (["trace", "pod/web-0", "8.8.8.8/icmp"], "trace"),
        (["pod", "web-0"], "podreport"),
    ],
)
def test_json_and_yaml_are_what_the_schema_says(ask: Ask, words: list[str], schema: str) -> None:
    rules = json.loads((SCHEMAS / f"{schema}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(rules)
    as_json = json.loads(ask(*words, "-o", "json")[1])
    jsonschema.validate(as_json, rules)
    assert as_json["apiVersion"] == "gketrace.dev/v1alpha1"
    assert yaml.load(ask(*words, "-o", "yaml")[1], yaml.CSafeLoader) == as_json


def test_a_trace_in_json(ask: Ask) -> None:
    code, out, _ = ask(
        *("service", "web-nodeport", "--via", "nodeport", "--node", "33fg", "-o", "json")
    )
    document: dict[str, Any] = json.loads(out)
    assert (code, document["kind"], document["complete"]) == (0, "ServiceTrace", True)
    paths = document["paths"]
    assert {p["endpoint"] for p in paths} == {
        "pod/default/web-0 10.40.0.10:8080",
        "pod/default/web-1 10.40.1.10:8080",
        "pod/default/web-2 10.40.2.10:8080",
    }
    assert sum(p["probability"] for p in paths) == pytest.approx(1)
    path = paths[0]
    assert (path["frontDoor"], path["from"]) == ("NodePort", "client 203.0.113.10")
    assert (path["outcome"], path["sourceSeen"]) == ("delivered", "10.142.0.7")
    steps = [s for hop in path["hops"] for s in hop["steps"]]
    (dnat,) = (s for s in steps if s["kind"] == "rule" and "-j DNAT" in s["rule"])
    assert (dnat["table"], dnat["chain"][:9], dnat["position"]) == ("nat", "KUBE-SEP-", 2)
    rewrite = next(s for s in steps if s["kind"] == "nat")
    assert (rewrite["before"]["dst"], rewrite["before"]["dport"]) == ("10.142.0.7", 30080)
    assert (rewrite["after"]["dst"], rewrite["after"]["dport"]) == ("10.40.0.10", 8080)
    assert path["return"]["outcome"] == "transmitted"


def test_a_trace_to_a_service_reads_its_endpoints_once(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the Service, not after it."""
    read = Cluster.endpoints
    asked: list[str] = []

    def count(cluster: Cluster, namespace: str = "", *, service: str = "") -> Any:
        asked.append(threading.current_thread().name)
        return read(cluster, namespace, service=service)

    monkeypatch.setattr(Cluster, "endpoints", count)
    assert ask("trace", "pod/web-0", "svc/hello-server")[0] == 0
    assert asked == ["endpoints"]


@pytest.mark.parametrize("words", [["pod", "hello-server"], ["-A", "pod", "hello-server"]])
def test_a_pod_by_its_workload_is_the_same_pod(ask: Ask, words: list[str]) -> None:
    assert ask(*words) == ask("pod", "hello-server-579859fb5b-szrwh")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pod", "hello"], 'pod "hello" not found in namespace "default"; did you mean hello-s'),
        (["pod", "web"], '"web" has 3 pods in namespace "default"; name one: web-0, web-1, web-2'),
        (["-A", "pod", "web"], '"web" has 3 pods in namespace "default"; name one: web-0, web-1'),
        (["pod", "web-0", "-n", "nope"], 'namespace "nope" not found; '),
        (["pod", "svc/web-0"], "'svc/web-0' is not a pod"),
        (["service", "hello"], 'service "hello" not found in namespace "default"; did you mean'),
        (["service", "hello-server", "--node", "zz"], "no node 'zz' in the cluster; there is"),
        (["service", "hello-server", "--port", "81"], "has no port '81'; it has 80/tcp"),
        (["service", "web", "--via", "nodeport"], "has no NodePort; its doors: ClusterIP"),
        (["service", "web", "--from", "svc/web"], "a service sends nothing"),
        (["service", "web", "--from", "example.org"], "cannot tell what 'example.org' is"),
        (["trace", "pod/web-0", "pod/web-1"], "'pod/web-1' lacks a port; for example pod/web-1:80"),
        (["trace", "pod/web-0", "svc/dns"], "lacks a port; service default/dns has 53/udp, 53/tcp"),
        (["trace", "pod/web-0", "10.40.0.6:80:80"], "cannot tell what"),
        (["trace", "203.0.113.10", "[fd00::1]:80"], "not of one address family"),
        (["pod", "web-0", "--agent", "2jdh"], "--agent 2jdh: not NODE=ADDR"),
        (["pod", "web-0", "--local"], "--local and --agent exclude each other"),
        (["capture", "zzz"], "capture needs a target, and 'zzz' is none"),
        (["check", "--bundle", ""], "--bundle lacks the name of a file"),
        (["check", "--agent-ca", ""], "--agent-ca names no file"),
        (["capture", " "], "capture needs a target; pod/NAME"),
        (["check", "--ignore-file", "/"], "cannot read the ignore file /: Is a directory"),
        (["service", "web", "--follow", "-v"], "-v tells a trace hop by hop"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(ask: Ask, words: list[str], message: str) -> None:
    code, out, err = ask(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_one_agent_down_is_said_and_exit_3(ask: Ask, world: Stage) -> None:
    world.agents["33fg"].fails["GetInfo"] = (grpc.StatusCode.UNAVAILABLE, "going down")
    code, out, err = ask("service", "hello-server")
    assert (code, err) == (3, "")
    assert "no agent answers on 33fg" in " ".join(out.split())
    assert "  at 2jdh 10.142.0.8  KUBE-NODEPORTS:12;" in out
    assert "KUBE-SEP-GNGNYGTEG254KWMX:2 DNAT to 10.40.0.6:8080" in " ".join(out.split())
    assert "at 33fg 10.142.0.7  UNKNOWN: " in out
    document = json.loads(ask("service", "hello-server", "-o", "json")[1])
    assert not document["complete"]
    assert {m["node"] for m in document["missing"]} == {"33fg"}


def test_no_agent_at_all_is_exit_5(ask: Ask, world: Stage) -> None:
    for agent in world.agents.values():
        agent.fails["GetInfo"] = (grpc.StatusCode.UNAVAILABLE, "going down")
    code, out, err = ask("service", "hello-server")
    assert (code, out) == (5, "")
    assert "does not answer" in err


def test_an_agent_that_does_not_answer_in_time(ask: Ask, world: Stage) -> None:
    world.agents["2jdh"].sleeps = 2.0
    code, _, err = ask("pod", "web-0", "--timeout", "0.3")
    assert code == 5
    assert "did not answer within 0.3 s" in err


def test_an_agent_that_forbids_is_exit_4(ask: Ask, world: Stage) -> None:
    for agent in world.agents.values():
        agent.fails["Walk"] = (grpc.StatusCode.PERMISSION_DENIED, "you may not")
    code, out, err = ask("service", "hello-server")
    assert (code, out) == (4, "")
    assert "you may not" in err


def test_an_agent_of_another_node_is_an_error(ask: Ask, world: Stage) -> None:
    world.agents["2jdh"].says = "other"
    code, _, err = ask("pod", "web-0")
    assert code == 2
    assert "is node other's, not 2jdh's" in err


def test_a_pod_that_goes_away_meanwhile_is_exit_3(ask: Ask, world: Stage) -> None:
    world.agents["2jdh"].fails["GetNetns"] = (grpc.StatusCode.ABORTED, "the pod went away")
    code, _, err = ask("pod", "web-0")
    assert code == 3
    assert "the pod went away" in err
    world.agents["2jdh"].fails["Walk"] = (grpc.StatusCode.ABORTED, "the pod went away")
    code, out, _ = ask("trace", "node/m69d", "pod/web-0:8080")
    assert code == 3
    assert "the pod went away" in " ".join(out.split())


def test_a_forbidden_user_is_exit_4(
    world: Stage, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    document = json.loads(world.api.kubeconfig.read_text())
    for context in document["contexts"]:
        context["context"]["user"] = "bob"
    (tmp_path / "bob").write_text(json.dumps(document))
    code = run(["pod", "web-0", "--kubeconfig", str(tmp_path / "bob")])
    captured = capsys.readouterr()
    assert (code, captured.out) == (4, "")
    assert "bob" in captured.err
    assert captured.err.count("\n") == 1


def test_an_api_server_that_is_down_is_exit_5(
    world: Stage, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    document = json.loads(world.api.kubeconfig.read_text())
    for cluster in document["clusters"]:
        cluster["cluster"]["server"] = "https://127.0.0.1:1"
    (tmp_path / "down").write_text(json.dumps(document))
    assert run(["service", "hello-server", "--kubeconfig", str(tmp_path / "down")]) == 5
    assert capsys.readouterr().err.startswith("error: ")


def test_a_rule_that_is_not_understood_ends_in_unknown(ask: Ask, world: Stage) -> None:
    host = world.cluster.nodes["2jdh"].host
    kept = list(host.rulesets)
    rule = "-A FORWARD -m u32 --u32 0x0=0x1 -j DROP"
    host.iptables(f"*filter\n:FORWARD ACCEPT [0:0]\n{rule}\nCOMMIT\n")
    try:
        code, out, _ = ask(
            *("service", "hello-server", "--via", "nodeport", "--node", "2jdh", "--from=192.0.2.1")
        )
    finally:
        host.rulesets[:] = kept
    assert code == 3
    assert rule in " ".join(out.split())


def test_dropped_as_configured_is_an_outcome(ask: Ask) -> None:
    code, out, _ = ask("service", "web-lb-local")
    assert code == 0
    assert "; as configured: externalTrafficPolicy is Local" in " ".join(out.split())
    assert ask("service", "web-lb-local", "--via", "nodeport", "--node", "33fg")[0] == 1


def test_options_may_stand_before_the_command(world: Stage, capsys: Any) -> None:
    before = run([*world.arguments(), "-n", "default", "pod", HELLO])
    assert before == 0
    assert HELLO in capsys.readouterr().out
    assert run([*world.arguments(), "-n", "nope", "pod", HELLO, "-n", "default"]) == 0


def test_a_pod_is_found_in_all_namespaces(ask: Ask) -> None:
    assert ask("pod", HELLO, "-A")[0] == 0
    code, _, err = ask("pod", "nobody-has-this-name", "-A")
    assert code == 2
    assert "not found in any namespace" in err


def test_colour_when_asked_for(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\033[" in ask("pod", "web-0", "--color", "always")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033[" not in ask("pod", "web-0")[1]


def test_wide_shows_each_rule_in_full(ask: Ask) -> None:
    out = ask("service", "hello-server", "-o", "wide", "--via", "clusterip")[1]
    assert "-j DNAT --to-destination 10.40.0.6:8080 [" in out
    assert "packets, " in out
