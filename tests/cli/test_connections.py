"""`gketrace connections`: entries of several agents, joined to one line each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import grpc
import jsonschema
import pytest

from gketrace_cli.main import run
from tests.cli.stage import Stage
from tests.cli.test_conntrack import DNS, GONE, NODE_PORT, SENT

SCHEMA = Path(__file__).parents[2] / "docs/schema/connections.json"
Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(world: Stage, capsys: pytest.CaptureFixture[str]) -> Ask:
    world.agents["2jdh"].entries = [NODE_PORT]
    world.agents["m69d"].entries = [SENT]
    world.agents["33fg"].entries = [DNS]

    def asked(*words: str) -> tuple[int, str, str]:
        code = run(world.arguments("connections", *words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return asked


def test_two_nodes_entries_are_one_connection(ask: Ask) -> None:
    code, out, err = ask("--service", "hello-server")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "1 connection on 3 nodes.",
        "Accounting and timestamps are off on all nodes: packets, bytes and ages are not",
        "  known.",
        "",
        "tcp 10.142.0.6:49132 -> 10.142.0.8:31830 -> 10.40.0.6:8080",
        "     node/m69d -> svc/default/hello-server ->",
        "       pod/default/hello-server-579859fb5b-szrwh",
        "     m69d    ESTABLISHED, answered",
        "     2jdh    ESTABLISHED, answered, translated to 10.40.0.6:8080 from",
        "             10.40.0.1:23374",
    ]


def test_one_sided_and_stale_ones_are_marked(ask: Ask, world: Stage) -> None:
    world.agents["m69d"].entries = []
    world.agents["33fg"].entries = [GONE]
    code, out, _ = ask("--service", "hello-server")
    assert code == 0
    assert "one-sided: m69d has no entry of it" in out
    code, out, _ = ask("--service", "dns")
    assert code == 1
    assert out.startswith("1 connection on 3 nodes, 1 stale.")
    assert "stale: its endpoint 10.40.1.99:5353 is in no EndpointSlice" in out


@pytest.mark.parametrize(
    ("words", "clients"),
    [
        ([], ["10.142.0.6:49132", "10.40.2.10:5555"]),
        (["--pod", "web-1"], ["10.40.2.10:5555"]),
        (["--pod", "web-2"], ["10.40.2.10:5555"]),
        (["--from", "10.142.0.0/16"], ["10.142.0.6:49132"]),
        (["--service", "dns", "--from", "10.142.0.0/16"], []),
    ],
)
def test_selection_and_document(ask: Ask, words: list[str], clients: list[str]) -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    _, out, _ = ask(*words, "-o", "json")
    document = json.loads(out)
    jsonschema.validate(document, schema)
    assert sorted(one["client"] for one in document["connections"]) == clients
    assert document["complete"]


def test_what_was_not_seen_is_said(ask: Ask, world: Stage) -> None:
    world.agents["m69d"].fails["ListConntrack"] = (grpc.StatusCode.UNAVAILABLE, "gone")
    code, out, _ = ask("--service", "hello-server")
    assert code == 3
    assert "not everything was seen" in out
    assert "Not seen: conntrack on m69d" in out
    assert "one-sided" not in out  # a table that was not read proves nothing
    assert ask("--from", "1.2.3")[0] == 2
