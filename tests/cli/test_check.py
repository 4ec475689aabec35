"""`gketrace check` and `explain`: over a real API server and agents that send what they read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest

from e2e.netlab.apiserver import api_request
from gketrace_cli.main import run
from tests.cli.stage import Stage, stage

SCHEMAS = Path(__file__).parents[2] / "docs/schema"
Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A stage of its own: all pods of the world are there, and what kube-proxy listens on."""
    with stage(tmp_path_factory.mktemp("check"), topology="ptp") as built:
        # The stage's nodes have IPv4 only.
        api_request(built.api.kubeconfig, "DELETE", "/api/v1/namespaces/default/services/web6")
        built.cluster.pod("33fg", "sick-0", "10.40.2.30", 8080)
        for each in built.cluster.nodes.values():
            # The order in which they were made: by it a node masquerades what it sends to itself.
            each.host.links = [
                replace(link, rank=place) for place, link in enumerate(each.host.links)
            ]
            for port in (10256, 32000, 32001, 9100):
                each.host.listen("0.0.0.0", port)
            for pod in each.pods.values():
                for port in (8080, 9090):
                    pod.listen("::", port)
                pod.listen("0.0.0.0", 5353, "udp")
                pod.sysctls["net.sctp.max_burst"] = "4"
                pod.listen("0.0.0.0", 3868, "sctp")
        yield built


@pytest.fixture
def ask(
    whole: Stage, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Ask]:  # fmt: skip
    monkeypatch.chdir(tmp_path)

    def asked(*words: str) -> tuple[int, str, str]:
        code = run(whole.arguments(*words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield asked
    for agent in whole.agents.values():
        agent.fails.clear()


def _codes(out: str) -> list[tuple[str, str]]:
    return [(one["code"], one["subjects"][0]) for one in json.loads(out)["findings"]]


def _found(code: int, out: str, err: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(out)
    jsonschema.validate(document, json.loads((SCHEMAS / "check.json").read_text()))
    return document


def test_one_pod_of_a_node_with_a_link_for_each(ask: Ask) -> None:
    """The gateway's address is on each of them, and the routes to the other pods are not stale."""
    code, out, err = ask("pod", "hello-server-579859fb5b-szrwh")
    assert (code, err) == (0, "")
    assert "10.40.0.1 on eth0" in out
    assert "which is veth-hello-server-579859fb5b-szrwh there" in " ".join(out.split())
    assert "GKT-" not in out


def test_the_worlds_own_faults_and_no_other(ask: Ask) -> None:
    code, out, err = ask("check", "-o", "json")
    document = _found(code, out, err)
    assert document["missing"] == []
    assert code == 1
    errors = {(f["code"], f["subjects"][0]) for f in document["findings"]
              if f["severity"] == "error"}  # fmt: skip
    assert errors == {
        ("GKT-101", "service default/kubernetes"),
        ("GKT-101", "service default/nobody"),
        ("GKT-102", "service default/sick"),
    }
    assert document["counts"]["nodesSeen"] == 3
    assert document["counts"]["waysTraced"] > 40


def test_text_names_evidence_and_remedy(ask: Ask) -> None:
    code, out, err = ask("check", "--severity", "error")
    assert (code, err) == (1, "")
    assert out.startswith("3 nodes, ")
    assert "GKT-101 error: Service default/nobody has no endpoints" in out
    assert "kubectl get pods -n default -l app=nobody -o wide" in out
    assert "GKT-103" not in out
    # A command is not broken: it is there to be pasted.
    assert "kubectl get endpointslices -n default -l kubernetes.io/service-name=kubernetes" in out
    lines = [line for line in out.splitlines() if not line.startswith("   run  ")]
    assert max(map(len, lines)) <= 80


def test_codes_may_be_left_out(ask: Ask) -> None:
    code, out, _ = ask("check", "-o", "json", "--ignore", "GKT-101", "--ignore", "102")
    assert code == 0
    assert not {"GKT-101", "GKT-102"} & {code for code, _ in _codes(out)}
    assert json.loads(out)["counts"]["ignored"] == 3


def test_an_ignore_file_may_name_the_subject(ask: Ask) -> None:
    Path(".gketrace-ignore").write_text(
        "# the fixture's own\nGKT-101 service default/kube*\nGKT-102  # all of them\n"
    )
    code, out, _ = ask("check", "-o", "json")
    assert code == 1
    assert ("GKT-101", "service default/nobody") in _codes(out)
    assert ("GKT-101", "service default/kubernetes") not in _codes(out)
    assert ("GKT-102", "service default/sick") not in _codes(out)


def test_an_ignore_file_with_no_such_code_is_exit_2(ask: Ask) -> None:
    Path("mine").write_text("GKT-999\n")
    code, out, err = ask("check", "--ignore-file", "mine")
    assert (code, out) == (2, "")
    assert "GKT-999" in err
    assert ask("check", "--ignore-file", "absent")[0] == 2


def test_sarif(ask: Ask) -> None:
    code, out, _ = ask("check", "-o", "sarif")
    assert code == 1
    document = json.loads(out)
    assert document["version"] == "2.1.0"
    (one,) = document["runs"]
    rules = [rule["id"] for rule in one["tool"]["driver"]["rules"]]
    assert rules == sorted(set(rules))
    for result in one["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["locations"]


def test_a_node_that_is_not_seen_is_said_and_exit_3(ask: Ask, whole: Stage) -> None:
    whole.agents["m69d"].fails["Snapshot"] = (grpc.StatusCode.UNAVAILABLE, "no room")
    code, out, _ = ask("check", "-o", "json")
    document = _found(code, out, "")
    assert code == 3
    assert document["complete"] is False
    assert any(gap["node"] == "m69d" for gap in document["missing"])
    assert document["counts"]["nodesSeen"] == 2


def test_no_node_at_all_is_no_answer(ask: Ask, whole: Stage) -> None:
    for agent in whole.agents.values():
        agent.fails["Snapshot"] = (grpc.StatusCode.PERMISSION_DENIED, "not you")
    code, out, err = ask("check")
    assert (code, out) == (4, "")
    assert "not you" in err


def test_watch_prints_changes(
    whole: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three checks: as it is, with a port that nothing listens on, and as it was."""
    host = whole.cluster.nodes["m69d"].host
    assert isinstance(host.sockets, list)
    before = list(host.sockets)
    turns = [
        lambda: setattr(host, "sockets", [s for s in before if s.port != 10256]),
        lambda: setattr(host, "sockets", before),
    ]

    def sleep(_: float) -> None:
        if not turns:
            raise KeyboardInterrupt
        turns.pop(0)()

    monkeypatch.setattr("gketrace_cli.commands.check.time.sleep", sleep)
    code = run(whole.arguments("check", "--watch", "1", "-o", "json", "--severity", "warning"))
    out = capsys.readouterr().out
    assert code == 130
    first, new, gone = out.rstrip().rsplit("\n", 2)
    assert json.loads(first)["kind"] == "Check"
    assert [one["code"] for one in json.loads(new)["new"]] == ["GKT-114"]
    assert json.loads(new)["gone"] == []
    assert [one["code"] for one in json.loads(gone)["gone"]] == ["GKT-114"]


def test_explain_shows_the_page(ask: Ask) -> None:
    code, out, err = ask("explain", "301")
    assert (code, err) == (0, "")
    assert out.startswith("# GKT-301: Forwarding is off\n")
    code, out, _ = ask("explain")
    assert code == 0
    assert "GKT-325" in out
    code, out, _ = ask("explain", "GKT-101", "-o", "json")
    assert json.loads(out)["codes"][0]["page"].startswith("# GKT-101")


def test_explain_of_no_code_is_exit_2(ask: Ask) -> None:
    code, out, err = ask("explain", "GKT-000")
    assert (code, out) == (2, "")
    assert "there is no finding 'GKT-000'" in err
