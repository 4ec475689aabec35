"""`gketrace conntrack`, `gketrace connections` and stale entries, held against the real kernel."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import jsonschema
import pytest

from e2e.answers import COMMAND, run_cli
from e2e.netlab import Lab

DNS = ("10.43.240.17", 53)
SLICES = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"


@pytest.fixture(scope="module")
def own_lab() -> Iterator[Lab]:
    """Not the session's: an endpoint goes away here."""
    with Lab(f"ct{os.getpid()}") as lab:
        yield lab


def lines_of(lab: Lab, node: str, *words: str) -> list[str]:
    done = lab.exec(f"node/{node}", ["conntrack", "-L", *words])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def steady(line: str) -> str:
    """Without the seconds that are left."""
    return re.sub(r"^(\S+\s+\d+) \d+ ", r"\1 ", line)


def document(lab: Lab, *words: str, code: int = 0) -> Any:
    ran = run_cli(lab, *words, "-o", "json")
    assert ran.code == code, ran.err
    return json.loads(ran.out)


def remove_rule(lab: Lab, node: str, endpoint: str) -> None:
    """Takes the endpoint out of its Services' chains, as kube-proxy does; entries stay."""
    saved = lab.exec(f"node/{node}", ["iptables-nft-save", "-t", "nat"]).stdout.splitlines()
    chains = {line.split()[1] for line in saved if line.endswith(f"--to-destination {endpoint}")}
    jumps = [line for line in saved if line.rpartition(" -j ")[2] in chains]
    assert jumps
    for line in jumps:
        argv = ["iptables-nft", "-t", "nat", *shlex.split(line.replace("-A ", "-D ", 1))]
        done = lab.exec(f"node/{node}", argv)
        assert done.returncode == 0, done.stderr


def test_lines_are_those_of_conntrack(own_lab: Lab) -> None:
    with own_lab.hold("node/m69d", "10.142.0.8", 31830) as held:
        assert held.result.source is not None
        port = str(held.result.source[1])
        words = ["-p", "tcp", "--sport", port]
        for node in ("2jdh", "m69d"):
            before = lines_of(own_lab, node, *words)
            ran = run_cli(own_lab, "conntrack", node, *words, "-o", "conntrack")
            after = lines_of(own_lab, node, *words)
            assert ran.code == 0, ran.err
            assert len(before) == 1
            said = ran.out.splitlines()
            assert [steady(line) for line in said] == [steady(line) for line in before]
            left = [int(line.split()[2]) for line in (after[0], said[0], before[0])]
            assert left == sorted(left)


def test_a_node_port_over_two_nodes_is_one_connection(own_lab: Lab) -> None:
    with own_lab.hold("node/m69d", "10.142.0.8", 31830) as held:
        source = held.result.source
        assert source is not None
        found = document(own_lab, "connections", "--service", "hello-server")
        mine = [c for c in found["connections"] if c["client"] == f"10.142.0.6:{source[1]}"]
        assert len(mine) == 1
        assert mine[0]["end"] == "10.40.0.6:8080"
        assert mine[0]["endName"] == "pod/default/hello-server-579859fb5b-szrwh"
        assert [e["node"][-4:] for e in mine[0]["entries"]] == ["m69d", "2jdh"]
        assert (mine[0]["standing"], mine[0]["remarks"]) == ("current", [])
        assert [e["state"] for e in mine[0]["entries"]] == ["ESTABLISHED"] * 2


def test_filters_and_untracked_pods(own_lab: Lab) -> None:
    result = own_lab.connect("pod/web-2", *DNS, "UDP")
    assert result.kind == "delivered"
    assert result.source is not None
    assert result.pod is not None
    found = document(own_lab, "conntrack", "--service", "dns", "--sport", str(result.source[1]))
    assert {e["netns"] for e in found["entries"]} == {"host"}
    assert {e["original"]["dst"] for e in found["entries"]} >= {DNS[0]}
    of_pod = document(own_lab, "conntrack", "--pod", result.pod.split("/")[1], "-p", "udp")
    assert any(e["original"]["sport"] == result.source[1] for e in of_pod["entries"])
    assert document(own_lab, "conntrack", "-p", "sctp")["entries"] == []
    pods = document(own_lab, "conntrack", "pod/web-2")
    assert [table["tracked"] for table in pods["tables"]] == [False]


def test_events_as_they_come(own_lab: Lab) -> None:
    words = ["conntrack", "2jdh", "-E", "-p", "tcp", "--dport", "31830", "-o", "jsonl"]
    environment = {**os.environ, "KUBECONFIG": str(own_lab.kubeconfig)}
    with subprocess.Popen(
        [*COMMAND, *words], stdout=PIPE, stderr=PIPE, text=True, env=environment
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert "following node" in running.stderr.readline()
        result = own_lab.connect("node/m69d", "10.142.0.8", 31830)
        assert result.source is not None
        event = json.loads(running.stdout.readline())
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=20)
    assert (event["kind"], event["event"], event["polled"]) == ("ConntrackEvent", "NEW", False)
    assert event["original"]["sport"] == result.source[1]
    assert running.returncode == 130
    schema = Path(__file__).parents[1] / "docs/schema/conntrack.json"
    jsonschema.validate(event, json.loads(schema.read_text()))


def test_an_entry_of_an_endpoint_that_is_gone_is_stale(own_lab: Lab) -> None:
    service = ["service", "dns", "--via", "clusterip", "--from", "pod/web-2", "--port", "dns"]
    for _ in range(40):  # the kernel draws lots
        result = own_lab.connect("pod/web-2", *DNS, "UDP")
        if result.pod == "default/web-1":
            break
    assert result.pod == "default/web-1"
    assert result.source is not None
    client = f"10.40.2.10:{result.source[1]}"
    fine = document(own_lab, *service)
    assert fine["liveConnections"]["stale"] == []
    assert fine["liveConnections"]["counts"]["current"] > 0

    listed = own_lab.api("GET", SLICES)["items"]
    name = "kubernetes.io/service-name"
    dns = next(one for one in listed if one["metadata"]["labels"].get(name) == "dns")
    rest = [one for one in dns["endpoints"] if one["addresses"] != ["10.40.1.10"]]
    own_lab.api("PUT", f"{SLICES}/{dns['metadata']['name']}", {**dns, "endpoints": rest})
    own_lab.stop_pod("web-1")
    remove_rule(own_lab, "33fg", "10.40.1.10:5353")

    told = document(own_lab, *service, code=1)
    stale = [
        s for s in told["liveConnections"]["stale"] if f"sport={result.source[1]} " in s["entry"]
    ]
    assert len(stale) == 1
    assert stale[0]["node"].endswith("33fg")
    assert "10.40.1.10:5353 is in no EndpointSlice" in stale[0]["why"]
    assert "stale" in told["verdict"]
    joined = document(own_lab, "connections", "--service", "dns", code=1)
    mine = next(c for c in joined["connections"] if c["client"] == client)
    assert mine["standing"] == "stale"
    assert mine["end"] == "10.40.1.10:5353"
    text = run_cli(own_lab, "connections", "--service", "dns").out
    assert "stale: its endpoint 10.40.1.10:5353" in " ".join(text.split())
